"""lower and fold: what is done is exact, what is not done is named with its reason."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normfix.conversion.lowering import LoweringRecord, fold, lower
from normfix.layers import (
    BatchRenorm2d,
    ChannelNorm,
    FrozenNorm1d,
    FrozenNorm2d,
    FrozenNorm3d,
    SyncBatchRenorm2d,
)

EXACT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _randomised(model):
    for layer in model.modules():
        if isinstance(layer, ChannelNorm | nn.BatchNorm2d) and layer.running_mean is not None:
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.2, 2)
            if layer.affine:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return model.double().eval()


class Block(nn.Module):
    """conv -> norm in code rather than in a Sequential, and a norm before a zero-padded convolution."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = FrozenNorm2d(6)
        self.norm2 = FrozenNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        return self.conv2(self.norm2(torch.relu_(self.norm1(self.conv1(x)))))


class Peeking(nn.Module):
    """Runs a sequence, and its first layer alone."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + self.inner[0](x)


class Skip(nn.Module):
    """The convolution's output is used beside the norm, too."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(3, 3, 1), FrozenNorm2d(3), use

    def forward(self, x):
        y = self.conv(x)
        return self.use(y, self.norm(y))


X = torch.randn(2, 3, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [FrozenNorm2d, BatchRenorm2d, SyncBatchRenorm2d])
@pytest.mark.parametrize("affine", [True, False])
def test_lower_gives_stock_batch_norm_with_the_same_bits(kind, affine):
    """Every layer becomes exactly nn.BatchNorm2d in eval; output and state dict keep their bits."""
    model = _randomised(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, affine=affine), nn.ReLU()))
    done = lower(model)
    assert type(done.model[1]) is nn.BatchNorm2d
    assert not done.model[1].training
    assert torch.equal(done.model(X), model(X))
    assert list(done.model.state_dict()) == list(model.state_dict())
    assert [(s.path, s.layer, s.done) for s in done.record.steps] == [("1", kind.__name__, True)]
    assert done.record.complete


def test_lower_leaves_the_given_model_alone():
    """The result shares no tensor with the model, whose layers stay what they were."""
    model = _randomised(nn.Sequential(FrozenNorm2d(3)))
    done = lower(model)
    nn.init.zeros_(done.model[0].weight)
    nn.init.zeros_(done.model[0].running_var)
    assert type(model[0]) is FrozenNorm2d
    assert model[0].weight.abs().min() > 0
    assert model[0].running_var.abs().min() > 0


def test_lower_replaces_every_alias_and_the_root():
    """A layer under two names is one stock layer under both; a layer alone is replaced, too."""
    layer = FrozenNorm2d(3)
    done = lower(_randomised(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})))
    assert done.model["a"] is done.model["b"][0]
    assert len(done.record.steps) == 1
    assert type(lower(layer).model) is nn.BatchNorm2d
    assert type(lower(FrozenNorm1d(3)).model) is nn.BatchNorm1d
    assert type(lower(FrozenNorm3d(3)).model) is nn.BatchNorm3d


def test_lowered_constants_do_not_drift_in_training():
    """A lowered FrozenNorm has momentum 0, so train() cannot move its statistics."""
    layer = lower(_randomised(FrozenNorm2d(3))).model.train()
    before = layer.running_mean.clone()
    layer(X)
    assert torch.equal(layer.running_mean, before)


class Fused(FrozenNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


def _hooked():
    layer = FrozenNorm2d(3)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Fused(3), "subclass"),
        (_hooked(), "hooks"),
        (BatchRenorm2d(3, track_running_stats=False), "no running statistics"),
    ],
    ids=["subclass", "hooks", "untracked"],
)
def test_what_cannot_be_lowered_or_folded_says_why(layer, reason):
    """A layer that would lose something is left as it is, with the reason, by lower and by fold."""
    model = _randomised(nn.Sequential(nn.Conv2d(3, 3, 1), layer))
    for done in (lower(model), fold(model), fold(model, X)):
        (step,) = done.record.steps
        assert not step.done
        assert reason in step.detail
        assert_close(done.model(X), model(X), rtol=0, atol=0)
        assert not done.record.complete


def test_the_record_is_json():
    """The record round-trips through JSON."""
    record = lower(nn.Sequential(FrozenNorm2d(3), Fused(3))).record
    assert LoweringRecord.from_json(record.to_json()) == record


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), FrozenNorm1d(6), (2, 4, 9)),
    "2d groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), FrozenNorm2d(6), (2, 4, 9, 9)),
    "2d no bias": (nn.Conv2d(4, 6, 3, padding="same", bias=False), FrozenNorm2d(6), (2, 4, 9, 9)),
    "3d no affine": (nn.Conv3d(4, 6, 3, stride=2), FrozenNorm3d(6, affine=False), (2, 4, 5, 6, 7)),
    "batchrenorm": (nn.Conv2d(4, 6, 3), BatchRenorm2d(6), (2, 4, 9, 9)),
    "stock": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 2, 2), FrozenNorm1d(6), (2, 4, 9)),
    "transposed groups": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), FrozenNorm2d(6), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_then_norm_is_folded_exactly(name, example):
    """A norm behind any convolution vanishes into it, padded or not; output equal to 1e-11 in float64."""
    conv, norm, shape = CONVOLUTIONS[name]
    model = _randomised(nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm)))
    x = torch.randn(shape, dtype=torch.double)
    done = fold(model, x if example else None)
    assert done.record.complete
    assert type(done.model[1]) is nn.Identity
    assert_close(done.model(x), model(x), **EXACT)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect", groups=4),
        nn.Conv2d(4, 6, 3, padding="valid"),
    ],
    ids=["unpadded", "pointwise", "reflect", "valid"],
)
def test_norm_then_conv_is_folded_where_no_zeros_are_padded(conv):
    """A norm before a convolution that pads no zeros vanishes into it, too."""
    model = _randomised(nn.Sequential(FrozenNorm2d(4), copy.deepcopy(conv)))
    x = torch.randn(2, 4, 9, 9, dtype=torch.double)
    done = fold(model, x)
    assert done.record.complete
    assert_close(done.model(x), model(x), **EXACT)


@pytest.mark.parametrize("padding", [1, "same"])
def test_norm_then_zero_padded_conv_is_refused(padding):
    """Zero padding is not shifted by the norm, so folding would change the border, and is refused."""
    model = _randomised(nn.Sequential(FrozenNorm2d(3), nn.Conv2d(3, 3, 3, padding=padding)))
    done = fold(model, X)
    assert "pads zeros" in done.record.steps[0].detail
    assert_close(done.model(X), model(X), rtol=0, atol=0)
    inner = copy.deepcopy(model)
    inner[1].padding, inner[1]._reversed_padding_repeated_twice = (0, 0), [0] * 4
    border_free = fold(inner).model
    border_free[1].padding = model[1].padding
    border_free[1]._reversed_padding_repeated_twice = model[1]._reversed_padding_repeated_twice
    assert (border_free(X) - model(X)).abs().max() > 1e-3  # what folding it anyway would have done


def test_norm_then_transposed_conv_is_refused():
    """Outputs of a transposed convolution see part of the kernel each, so no one bias is right."""
    model = _randomised(nn.Sequential(FrozenNorm2d(3), nn.ConvTranspose2d(3, 3, 3, 2)))
    assert "transposed" in fold(model, X).record.steps[0].detail


def test_data_flow_is_observed_on_an_example():
    """Outside a Sequential the example shows conv -> norm; without it the record asks for one."""
    model = _randomised(Block())
    blind, seen = fold(model), fold(model, X)
    assert ["example" in s.detail for s in blind.record.steps] == [True, True]
    assert [s.done for s in seen.record.steps] == [True, False]
    assert "pads zeros" in seen.record.steps[1].detail
    assert_close(seen.model(X), model(X), **EXACT)


def test_without_an_example_no_sequence_inside_another_class_is_folded():
    """That class may run a part of it alone; sequences in sequences run whole, unless one has a forward set."""
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), FrozenNorm2d(3))
    model = _randomised(Peeking(inner))
    assert not fold(model).record.steps[0].done
    assert_close(fold(model).model(X), model(X), rtol=0, atol=0)
    nested = nn.Sequential(nn.ReLU(), inner)
    assert fold(nested).record.complete
    inner.forward = lambda x: inner[1](inner[0](x)) + inner[0](x)
    assert not fold(nested).record.complete


@pytest.mark.parametrize(
    "use",
    [
        lambda y, z: y + z,
        lambda y, z: (y, z),
        lambda y, z: {"a": [y], "b": z},
        lambda y, z: torch.cat((y, z)),
        lambda y, z: z * y.mean().item(),
        lambda y, z: z + y.view(-1)[0],
    ],
    ids=["sum", "tuple", "dict", "cat", "item", "view"],
)
def test_a_convolution_used_twice_is_not_folded_into(use):
    """Where the convolution's own output is also used, nothing is folded."""
    model = _randomised(Skip(use))
    done = fold(model, X)
    assert not done.record.complete
    assert_close(done.model(X), model(X), rtol=0, atol=0)


def test_shared_layers_are_not_folded():
    """A convolution or norm with two places in the model is left alone."""
    conv, norm = nn.Conv2d(3, 3, 1), FrozenNorm2d(3)
    for model in (nn.Sequential(conv, norm, conv), nn.Sequential(conv, norm, nn.Conv2d(3, 3, 1), norm)):
        done = fold(_randomised(model))
        assert not done.record.steps[0].done
        assert not fold(model, X).record.steps[0].done


def test_live_batch_norm_is_not_folded():
    """BatchNorm in training mode normalises by the batch, so it is refused with advice."""
    model = _randomised(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).train()
    assert "eval()" in fold(model, X).record.steps[0].detail
    assert "eval()" in fold(model).record.steps[0].detail


def test_parametrised_convolutions_are_not_folded_into():
    """Writing into a weight-normed convolution would be undone by its parametrisation."""
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    assert not fold(_randomised(nn.Sequential(conv, FrozenNorm2d(3))), X).record.complete


class Elusive(nn.Module):
    """Keeps the convolution's output where no observer of calls can see it used."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), FrozenNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        with torch._C.DisableTorchFunction():
            return y + z


def test_a_fold_that_changes_the_output_is_taken_back():
    """The comparison on the example catches what observation missed: nothing is folded, and it says so."""
    model = _randomised(Elusive())
    done = fold(model, X)
    assert "differed" in done.record.steps[0].detail
    assert_close(done.model(X), model(X), rtol=0, atol=0)


def test_fold_leaves_the_given_model_alone():
    """Neither weights nor modes nor hooks of the model change."""
    model = _randomised(Block()).train()
    before = copy.deepcopy(model.state_dict())
    fold(model, X)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert not model.conv1._forward_hooks
