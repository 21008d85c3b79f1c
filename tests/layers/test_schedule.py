"""RenormSchedule: bounds by optimizer step, outside the model's state dict."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normfix.layers import BatchRenorm1d, BatchRenorm2d, RenormSchedule


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _bounds(layer):
    return layer.r_max.item(), layer.d_max.item()


def _run_to(schedule, step):
    while schedule.steps < step:
        schedule.step()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, (1.0, 0.0)),
        (40, (1.0, 0.0)),
        (120, (1 + 2 * 80 / 260, 2.5)),
        (200, (1 + 2 * 160 / 260, 5.0)),
        (300, (3.0, 5.0)),
        (5000, (3.0, 5.0)),
    ],
)
def test_bounds_follow_the_ramp_and_stop_at_its_end(step, expected):
    """Plain batch norm, then linear ramps, then constant for ever (one implementation's ran past)."""
    layer = BatchRenorm2d(3)
    _run_to(RenormSchedule(layer, 1000), step)
    assert _bounds(layer) == pytest.approx(expected)


@pytest.mark.parametrize("total", [1, 10, 100_000])
def test_the_ramp_scales_with_the_run(total):
    """Whatever the length of the run, its first step is batch norm and its last has open bounds."""
    layer = BatchRenorm2d(3, r_max=2, d_max=1)
    schedule = RenormSchedule(layer, total)
    assert _bounds(layer) == (1.0, 0.0)
    schedule.load_state_dict(schedule.state_dict() | {"steps": total})
    assert _bounds(layer) == (2.0, 1.0)


def test_during_warm_up_the_layer_is_batch_norm():
    """In the first share of the run training outputs equal nn.BatchNorm's."""
    ours, theirs = BatchRenorm1d(4, momentum=0.1), nn.BatchNorm1d(4)
    schedule = RenormSchedule(ours, 1000)
    for _ in range(5):
        x = torch.randn(16, 4) * 3 + 1
        assert_close(ours(x), theirs(x))
        schedule.step()


def test_follow_counts_optimizer_steps_under_accumulation():
    """With four forward and backward passes per optimizer step, one step is counted."""
    model = nn.Sequential(nn.Linear(4, 4), BatchRenorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = RenormSchedule(model, 100)
    handle = schedule.follow(optimizer)
    for _ in range(3):
        for _ in range(4):
            model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    assert schedule.steps == 3
    handle.remove()
    optimizer.step()
    assert schedule.steps == 3


def test_follow_does_not_count_steps_a_scaler_skips():
    """A step that GradScaler skips because of inf gradients is not counted."""
    model = BatchRenorm1d(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = RenormSchedule(model, 100)
    schedule.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        (scaler.scale(model(torch.randn(8, 4)).square().sum()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert schedule.steps == 1


def test_warm_layers_start_at_the_end():
    """A layer that has seen batches, as pretrained and converted ones have, is not ramped; a new one is."""
    model = nn.Sequential(BatchRenorm1d(4), BatchRenorm1d(4))
    model[0].set_statistics_(torch.zeros(4), torch.ones(4))
    schedule = RenormSchedule(model, 100)
    assert _bounds(model[0]) == (3.0, 5.0)
    assert _bounds(model[1]) == (1.0, 0.0)
    assert schedule.warm == ("0",)


@pytest.mark.parametrize(("warm", "expected"), [(True, (3.0, 5.0)), (False, (1.0, 0.0))])
def test_warm_can_be_said(warm, expected):
    """`warm` overrides what the layers' counters say."""
    layer = BatchRenorm1d(4)
    layer.num_batches_tracked.fill_(0 if warm else 7)
    RenormSchedule(layer, 100, warm=warm)
    assert _bounds(layer) == expected


def test_a_checkpoint_continues_the_ramp():
    """Model and schedule restored from a checkpoint have the bounds of the run that wrote it."""
    model = nn.Sequential(BatchRenorm1d(4), BatchRenorm1d(4))
    model[0].set_statistics_(torch.zeros(4), torch.ones(4))
    schedule = RenormSchedule(model, 100)
    for _ in range(13):
        model(torch.randn(8, 4))
        schedule.step()
    saved = copy.deepcopy((model.state_dict(), schedule.state_dict()))
    fresh = nn.Sequential(BatchRenorm1d(4), BatchRenorm1d(4))
    fresh.load_state_dict(saved[0])
    resumed = RenormSchedule(fresh, 7)
    assert _bounds(fresh[1]) == (3.0, 5.0)  # loaded counters look warm ...
    resumed.load_state_dict(saved[1])
    assert [_bounds(layer) for layer in fresh] == [_bounds(layer) for layer in model]  # ... the state knows
    assert 1 < fresh[1].r_max < 3


def test_a_schedule_of_another_model_is_refused():
    """A state that names a layer the model lacks raises and changes nothing."""
    model = nn.Sequential(BatchRenorm1d(4))
    schedule = RenormSchedule(model, 100)
    with pytest.raises(ValueError, match="other"):
        schedule.load_state_dict(schedule.state_dict() | {"warm": ["other"], "steps": 99})
    assert schedule.steps == 0


def test_a_model_without_layers_is_refused():
    """There is nothing to schedule in a model of stock batch norm."""
    with pytest.raises(ValueError, match="no BatchRenorm"):
        RenormSchedule(nn.BatchNorm2d(3), 100)


@pytest.mark.parametrize("shares", [{"batch_norm_until": 0.5}, {"r_until": 1.5}, {"total_steps": 0}])
def test_shares_out_of_order_are_refused(shares):
    """Ramps that end before they begin, or after the run, are refused."""
    with pytest.raises(ValueError, match="batch_norm_until"):
        RenormSchedule(BatchRenorm1d(4), **{"total_steps": 100, **shares})


def test_the_models_state_dict_has_batch_norms_keys():
    """The bounds add no key to the state dict, before, during or after a ramp."""
    layer = BatchRenorm2d(3)
    schedule = RenormSchedule(layer, 10)
    for step in (0, 2, 10):
        _run_to(schedule, step)
        assert list(layer.state_dict()) == list(nn.BatchNorm2d(3).state_dict())


def test_bounds_are_tensors_written_in_place():
    """The bounds stay the same 0-d buffers over the ramp, so compiled graphs and CUDA graphs see them."""
    layer = BatchRenorm2d(3)
    schedule = RenormSchedule(layer, 10)
    before = (layer.r_max, layer.d_max)
    _run_to(schedule, 10)
    assert layer.r_max is before[0]
    assert layer.d_max is before[1]
    assert before[0].shape == ()


def test_forward_never_reads_a_value_on_the_host():
    """A training forward and backward makes no tensor a Python number, which would wait for a device."""

    class NoReads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "read on the host"
            return func(*args, **(kwargs or {}))

    layer = BatchRenorm2d(3)
    RenormSchedule(layer, 10)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with NoReads():
        layer(x).sum().backward()
        with pytest.raises(AssertionError, match="read on the host"):
            layer.r_max.item()
