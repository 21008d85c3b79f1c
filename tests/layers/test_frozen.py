"""FrozenNorm: constants, in every mode, with the bits of nn.BatchNorm in eval."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close

from normfix.layers import FrozenNorm1d, FrozenNorm2d, FrozenNorm3d, affine

FROZEN = {1: FrozenNorm1d, 2: FrozenNorm2d, 3: FrozenNorm3d}
STOCK = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _randomise(layer):
    layer.set_statistics_(torch.randn(layer.num_features), torch.rand(layer.num_features) + 0.2)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 7), (3, 4, 5, 6), (2, 4, 3, 4, 5)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_batch_norm_in_eval_to_the_bit(shape, affine, dtype):
    """In train and in eval the output has the same bits as nn.BatchNorm's in eval."""
    dims = max(1, len(shape) - 2)
    frozen = _randomise(FROZEN[dims](4, affine=affine, dtype=dtype))
    stock = STOCK[dims](4, affine=affine, dtype=dtype).eval()
    stock.load_state_dict(frozen.state_dict())
    x = torch.randn(shape).to(dtype)
    assert torch.equal(frozen.train()(x), stock(x))
    assert torch.equal(frozen.eval()(x), stock(x))


def test_training_changes_no_statistic():
    """A training step moves the affine and leaves the statistics."""
    layer = _randomise(FrozenNorm2d(3)).train()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, 3, 4, 4) * 9).square().sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert_close(layer.running_mean, before["running_mean"], rtol=0, atol=0)
    assert_close(layer.running_var, before["running_var"], rtol=0, atol=0)
    assert layer.num_batches_tracked == before["num_batches_tracked"]
    assert not torch.equal(layer.weight, before["weight"])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_state_dict_loads_strictly_both_ways(dims, affine):
    """BatchNorm's state dict loads strictly into FrozenNorm and back."""
    frozen, stock = FROZEN[dims](4, affine=affine), STOCK[dims](4, affine=affine)
    stock.load_state_dict(_randomise(frozen).state_dict(), strict=True)
    again = FROZEN[dims](4, affine=affine)
    again.load_state_dict(stock.state_dict(), strict=True)
    assert list(again.state_dict()) == list(stock.state_dict())
    assert_close(again.state_dict(), frozen.state_dict(), rtol=0, atol=0)


def test_a_state_dict_older_than_the_counter_loads():
    """A BatchNorm file without num_batches_tracked loads strictly, as it does into BatchNorm."""
    old = {name: v for name, v in nn.BatchNorm2d(3).state_dict().items() if name != "num_batches_tracked"}
    FrozenNorm2d(3).load_state_dict(old, strict=True)
    del old["weight"]
    with pytest.raises(RuntimeError, match="weight"):
        FrozenNorm2d(3).load_state_dict(old, strict=True)


def test_group_statistics_reproduce_group_norm():
    """Statistics of one image, given per group, make the layer that image's GroupNorm."""
    norm = nn.GroupNorm(2, 6)
    x = torch.randn(1, 6, 8, 8) * 3 + 1
    groups = x.reshape(2, -1)  # (1, g * c/g, h, w) -> (g, c/g * h * w)
    layer = FrozenNorm2d(6)
    layer.set_statistics_(groups.mean(1), groups.var(1, correction=0))
    assert_close(layer(x), norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [4, 0, 12])
def test_statistics_that_do_not_divide_the_channels_are_refused(count):
    """Statistics for 4, 0 or 12 groups do not fit 6 channels, and the layer keeps its own."""
    layer = FrozenNorm2d(6)
    with pytest.raises(ValueError, match="6 channels"):
        layer.set_statistics_(torch.zeros(count), torch.ones(count))
    assert_close(layer.running_var, torch.ones(6))


def test_affine_is_trainable_unless_asked_otherwise():
    """The affine has gradients by default, none with trainable=False, and does not exist without affine."""
    assert all(p.requires_grad for p in FrozenNorm2d(3).parameters())
    assert not any(p.requires_grad for p in FrozenNorm2d(3, trainable=False).parameters())
    assert not list(FrozenNorm2d(3, affine=False).parameters())


def test_normalize_uses_the_given_affine():
    """`normalize` uses the affine it is given, and None means none."""
    layer = _randomise(FrozenNorm2d(3))
    x, weight, bias = torch.randn(2, 3, 4, 4), torch.randn(3), torch.randn(3)
    bare = layer.normalize(x, None, None)
    assert_close(layer.normalize(x, weight, bias), bare * weight[:, None, None] + bias[:, None, None])
    assert_close(layer(x), layer.normalize(x, layer.weight, layer.bias), rtol=0, atol=0)


@pytest.mark.parametrize(("layer", "shape"), [(FrozenNorm1d(2), (2, 2, 2, 2)), (FrozenNorm2d(2), (2, 2, 2))])
def test_other_ranks_are_refused(layer, shape):
    """An input of another rank raises BatchNorm's error."""
    with pytest.raises(ValueError, match=r"expected .*D input \(got"):
        layer(torch.ones(shape))


def test_a_wrong_channel_count_is_named():
    """An input with another number of channels raises a ValueError with both numbers."""
    with pytest.raises(ValueError, match=r"3 channels.*5 channels"):
        FrozenNorm2d(3)(torch.ones(2, 5, 4, 4))


def test_a_tile_of_the_output_is_the_output_of_the_tile():
    """Tile invariance: cutting before or after gives the same numbers; InstanceNorm's differ."""
    x = torch.randn(1, 3, 16, 16).cumsum(-1)
    layer, live = _randomise(FrozenNorm2d(3)), nn.InstanceNorm2d(3)
    assert_close(layer(x)[..., :8], layer(x[..., :8]), rtol=1e-6, atol=1e-6)
    assert (live(x)[..., :8] - live(x[..., :8])).abs().max() > 0.1


# the first of a process imports rules that torch still scripts
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_tangents_pass_where_norms_are_fused(monkeypatch):
    """Forward-mode derivatives go through batch norm's own call on devices that have a faster one."""
    monkeypatch.setattr(affine, "_KINDS", ("cpu",))
    layer = FrozenNorm2d(2, trainable=False)
    layer.set_statistics_(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0]))
    x, tangent = torch.randn(2, 1, 2, 3, 3).unbind()
    with forward_ad.dual_level():
        given = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    assert given is not None
    assert_close(given, tangent / torch.tensor([4.0, 9.0]).add(layer.eps).sqrt().view(1, 2, 1, 1))
