"""Calls with which operators of torch would read beyond their tensors are refused, and those of networks are not."""

import pytest
import torch
from torch import nn
from torch.fx import Graph

from normfix.networks.graph.soundness import SoundInterpreter
from normfix.storage.opening.operations import is_allowed, misplaced
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
    "an axis from the end": lambda: ATEN._fft_r2c(MAP, [-2], 0, True),
    "another half": lambda: ATEN._fft_c2r(MAP.cfloat(), [3], 0, 90),
    "few norms": lambda: ATEN._weight_norm_interface(MAP, ONE, 0),
    "norms of another axis": lambda: ATEN._weight_norm_interface(MAP, torch.ones(2, 1, 1, 1), 3),
    "few values": lambda: ATEN._scaled_dot_product_flash_attention_for_cpu(MAP, MAP, MAP[:, :, :1]),
    "fewer heads": lambda: ATEN._scaled_dot_product_flash_attention_for_cpu(MAP, MAP[:, :3], MAP[:, :3]),
    "no queries": lambda: ATEN._scaled_dot_product_flash_attention_for_cpu(MAP[:, :, :0], MAP, MAP),
    "a short bias": lambda: ATEN._scaled_dot_product_flash_attention_for_cpu(
        MAP, MAP, MAP, attn_mask=torch.zeros(3, 2)
    ),
    "a fourth scaling": lambda: ATEN._fft_r2c(MAP, [3], 3, True),
    "distances within a volume": lambda: ATEN._pdist_forward(torch.zeros(4, 8, 0)),
    "distances within values that are none": lambda: ATEN._pdist_forward(torch.zeros(4, 2, 4, 0), 1.0),
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


def test_attention_and_weights_of_norm_one_are_called():
    """Negative control: attention with a bias and with fewer keys' heads, and weights normalised along either end."""
    with torch.no_grad(), Workload(0, "p.pt2"):
        attend = nn.functional.scaled_dot_product_attention
        for bias in (None, torch.zeros(3, 3), torch.zeros(2, 1, 3, 3) > 0, torch.zeros(4, 1, 3)):
            assert attend(MAP, MAP, MAP, attn_mask=bias).shape == MAP.shape
        assert attend(MAP, MAP[:, :2], MAP[:, :2], enable_gqa=True).shape == MAP.shape
        for axis, shape in ((0, (2, 1, 1, 1)), (3, (1, 1, 1, 3))):
            weight = torch._weight_norm(MAP + 1, torch.ones(shape), axis)
            norms = weight.square().sum([a for a in range(4) if a != axis])
            torch.testing.assert_close(norms, torch.ones(shape[axis]))


def test_spectra_distances_and_recurrence_are_called():
    """Negative control: a transform along two axes and back, distances between rows, and a layer of LSTM."""
    with torch.no_grad(), Workload(0, "p.pt2"):
        assert nn.functional.pdist(torch.eye(4)).shape == (6,)
        torch.testing.assert_close(torch.fft.irfft2(torch.fft.rfft2(MAP + 1), s=(3, 3)), MAP + 1)
        made = ATEN.mkldnn_rnn_layer(
            *(torch.zeros(3, 2, 5), *LSTM, LSTM[-1], False, [], 2, 4, 1, True, False, False, False)
        )
        assert not made[0].any()


def _interpreted(function, *inputs):
    graph = Graph()
    given = [graph.placeholder(f"x{number}") for number in range(len(inputs))]
    graph.output(graph.call_function(*function(*given)))
    return SoundInterpreter(nn.Module(), graph=graph).run(*inputs)


def _lstm(source, *states):
    return ATEN.lstm.input, (source, [*states], [], False, 1, 0.0, False, False, False)


def test_what_fits_one_size_is_refused_at_another():
    """A graph is looked at whenever it runs: attention to as many keys as pixels, and one value fewer."""

    def attention(source, values):
        return ATEN._scaled_dot_product_flash_attention_for_cpu.default, (source, source, values)

    assert _interpreted(attention, MAP, MAP)[0].shape == MAP.shape
    with pytest.raises(ValueError, match="is called with what it does not take"):
        _interpreted(attention, MAP, MAP[:, :, :2])


def _heads(query, key, value):
    return ATEN._scaled_dot_product_attention_math.default, (query, key, value), {"enable_gqa": True}


@pytest.mark.parametrize(
    "call", [_heads, lambda *x: (ATEN.scaled_dot_product_attention.default, *_heads(*x)[1:])]
)
@pytest.mark.parametrize(("keys", "values"), [(0, 0), (2, 0), (0, 2)])
def test_heads_are_not_shared_among_none(call, keys, values):
    """torch divides by their number before it looks, which ends the process; among two they are."""
    with pytest.raises(ValueError, match="is called with what it does not take"):
        _interpreted(call, MAP, MAP[:, :keys], MAP[:, :values])
    found = _interpreted(call, MAP, MAP[:, :2], MAP[:, :2])
    assert (found[0] if isinstance(found, tuple) else found).shape == MAP.shape


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (0, 0)])
def test_a_deformable_convolution_has_groups(numbers):
    """It divides by their numbers; with one of each it is a convolution."""
    deform_conv2d = pytest.importorskip("torchvision.ops").deform_conv2d

    weight, offset = torch.ones(2, 4, 1, 1), torch.zeros(2, 2, 3, 3)

    def call(source, offset, weight, bias):
        given = (source, weight, offset, torch.ones(2, 1, 3, 3), bias, 1, 1, 0, 0, 1, 1, *numbers, False)
        return torch.ops.torchvision.deform_conv2d.default, given

    with pytest.raises(ValueError, match="is called with what it does not take"):
        _interpreted(call, MAP + 1, offset, weight, torch.zeros(2))
    assert deform_conv2d(MAP + 1, offset, weight).eq(4).all()


@pytest.mark.parametrize("memory", [(1, 2, 4), (3, 2, 4)], ids=["fewer", "more"])
def test_a_recurrence_has_as_many_memories_as_states(memory):
    """torch takes the memory of each layer that has a state, whether it is there or not."""
    with pytest.raises(ValueError, match="is called with what it does not take"):
        _interpreted(_lstm, torch.zeros(3, 2, 5), torch.zeros(2, 2, 4), torch.zeros(memory))


def test_a_recurrence_is_interpreted():
    """Negative control: the call of a module of two layers."""
    network = nn.LSTM(5, 4, num_layers=2).eval()

    def called(source, hidden, memory, *weights):
        return ATEN.lstm.input, (source, [hidden, memory], [*weights], True, 2, 0.0, False, False, False)

    source, states = torch.rand(3, 2, 5), torch.zeros(2, 2, 4)
    with torch.no_grad():
        found = _interpreted(called, source, states, states, *network.parameters())
        torch.testing.assert_close(found[0], network(source)[0])


@pytest.mark.parametrize(
    "target",
    [
        "to.prim_dtype",
        "to.prim_other",
        "copy_.int",
        "__interpolate.default",
        "gru.data",
        "rnn_tanh.data",
        "lstm.data",
    ],
)
def test_overloads_of_scripts_and_of_packed_sequences_are_no_operations_of_programs(target):
    """One of TorchScript's takes any number for a dtype, and no lengths are looked at: both end the process."""
    assert not is_allowed(f"torch.ops.aten.{target}")


def test_overloads_of_tensors_are_operations_of_programs():
    """Negative control: the same operations as torch.export writes them."""
    assert all(
        is_allowed(f"torch.ops.aten.{target}") for target in ("to.dtype", "copy_.default", "item.default")
    )


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
