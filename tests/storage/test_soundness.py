"""Calls with which operators of torch would read beyond their tensors are refused, and those of networks are not."""

import pytest
import torch
from torch import nn

from normfix.storage.opening.operations import misplaced
from normfix.storage.opening.workload import Workload

ATEN = torch.ops.aten
MAP, ONE, FOUR = torch.zeros(2, 4, 3, 3), torch.ones(1), torch.ones(4)
LSTM = (torch.zeros(16, 5), torch.zeros(16, 4), torch.zeros(16), torch.zeros(16), torch.zeros(1, 2, 4))
REFUSED = {
    "few factors": lambda: ATEN.native_batch_norm(MAP, ONE, None, FOUR, FOUR, False, 0.1, 1e-5),
    "few statistics": lambda: ATEN._native_batch_norm_legit_no_training(
        MAP, FOUR, FOUR, ONE, FOUR, 0.1, 1e-5
    ),
    "no statistics": lambda: ATEN.native_batch_norm(MAP, None, None, None, None, False, 0.1, 1e-5),
    "no update of none": lambda: ATEN._batch_norm_no_update(MAP, None, None, None, None, 0.1, 1e-5),
    "more images": lambda: ATEN.native_group_norm(MAP, None, None, 200, 4, 9, 2, 1e-5),
    "more pixels": lambda: ATEN.native_group_norm(MAP, None, None, 2, 4, 900, 2, 1e-5),
    "no groups": lambda: ATEN.native_group_norm(MAP, None, None, 2, 4, 9, 0, 1e-5),
    "few factors of groups": lambda: ATEN.native_group_norm(MAP, ONE, None, 2, 4, 9, 2, 1e-5),
    "an axis too far": lambda: ATEN._fft_r2c(MAP, [4], 0, True),
    "an axis twice": lambda: ATEN._fft_r2c(MAP, [3, -1], 0, True),
    "a fourth scaling": lambda: ATEN._fft_r2c(MAP, [3], 3, True),
    "few weights of a recurrence": lambda: ATEN.mkldnn_rnn_layer(
        *(torch.zeros(3, 2, 5), torch.zeros(3, 5), *LSTM[1:], LSTM[-1], False, []),
        *(2, 4, 1, True, False, False, False),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_beyond_its_tensors_is_refused(name):
    """It is not made: torch would read what is not there, or end the process."""
    with Workload(0, "p.pt2"), pytest.raises(ValueError, match="is called with what it does not take"):
        REFUSED[name]()


@pytest.mark.parametrize(
    "network",
    [
        nn.BatchNorm2d(4).eval(),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, affine=False),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.GroupNorm(4, 4, affine=False),
    ],
    ids=str,
)
def test_norms_are_called(network):
    """Negative control: the norms of networks, in training mode too."""
    with torch.no_grad(), Workload(0, "p.pt2"):
        torch.testing.assert_close(network(MAP), MAP)


def test_spectra_and_recurrence_are_called():
    """Negative control: a transform along two axes and back, and a layer of LSTM."""
    with torch.no_grad(), Workload(0, "p.pt2"):
        torch.testing.assert_close(torch.fft.irfft2(torch.fft.rfft2(MAP + 1), s=(3, 3)), MAP + 1)
        made = ATEN.mkldnn_rnn_layer(
            *(torch.zeros(3, 2, 5), *LSTM, LSTM[-1], False, [], 2, 4, 1, True, False, False, False)
        )
        assert not made[0].any()


def _argument(name: str, argument: dict, kind: int | None) -> dict:
    return {"name": name, "arg": argument, "kind": kind}


SOURCE = _argument("self", {"as_tensor": {"name": "x"}}, 1)


@pytest.mark.parametrize(
    ("target", "more"),
    [
        ("_to_copy.default", [_argument("dtype", {"as_int": 7}, 2)]),
        ("_to_copy.default", [_argument("layout", {"as_scalar_type": 7}, 2)]),
        ("clone.default", [_argument("memory_format", {"as_memory_format": 1}, 2)] * 2),
        ("to.dtype", [_argument("non_blocking", {"as_int": 99}, 1)]),
        ("to.dtype", [_argument("dtype", {"as_bool": True}, None)]),
    ],
)
def test_what_stands_where_a_dtype_stands_is_one(target, more):
    """Numbers, other enumerations, two of one name, and what would move into the place are named."""
    assert misplaced(f"torch.ops.aten.{target}", [SOURCE, *more])


@pytest.mark.parametrize(
    ("target", "more"),
    [
        ("_to_copy.default", [_argument("dtype", {"as_scalar_type": 7}, 2)]),
        ("_to_copy.default", [_argument("memory_format", {"as_none": True}, 2)]),
        ("to.dtype", [_argument("dtype", {"as_scalar_type": 7}, 1), _argument("copy", {"as_bool": True}, 2)]),
        ("to.dtype", [_argument("dtype", {"as_scalar_type": 7}, None)]),
        ("add.Tensor", [_argument("other", {"as_int": 1}, 1), _argument("alpha", {"as_int": 2}, 2)]),
    ],
)
def test_what_an_exporter_writes_is_in_its_place(target, more):
    """Negative control: by place and by name, of today's programs and of those without kinds."""
    assert not misplaced(f"torch.ops.aten.{target}", [SOURCE, *more])
