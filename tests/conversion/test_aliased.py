"""A norm that a network knows under several names, or whose tensors it shares, is measured and saved like any other."""

from functools import cache
from weakref import WeakKeyDictionary

import pytest
import torch
from aliased_networks import (
    AliasedOwners,
    NestedParents,
    OneNormTwice,
    SharedAffine,
    Shuffled,
    SideBranch,
    TwoKeepers,
    TwoNames,
)
from torch import nn
from torch.testing import assert_close

import normfix
from normfix.errors import NormfixError
from normfix.tiling.stages import cache as kept
from normfix.tiling.stages import program as programs

KINDS = (TwoNames, NestedParents, SharedAffine, AliasedOwners, TwoKeepers, Shuffled, OneNormTwice)
NETWORKS = pytest.mark.parametrize("kind", KINDS)
EXACT = {"rtol": 0, "atol": 1e-11}


def image(*size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 1, *size, generator=generator, dtype=torch.float64)


FIRST, OTHER = image(48, 48, seed=1), image(48, 72, seed=2) ** 3 * 4 + 1


@cache
def network(kind):
    torch.manual_seed(0)
    net = kind().double().eval()
    for name, parameter in net.named_parameters():
        if parameter.dim() == 1 and name.rpartition(".")[0] not in ("head", "last"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return net.requires_grad_(False)


@cache
def converted(kind, to="frozen"):
    return normfix.convert(network(kind), FIRST, to)


@pytest.mark.slow
@NETWORKS
def test_stages_measure_what_the_original_has(kind):
    """Calibrated in blocks on another image, the converted network gives the original's own output of that image."""
    done = normfix.calibrate(converted(kind).model, OTHER, tile=16)
    assert done.summary.engine == "stages"
    assert_close(done.model(OTHER), network(kind)(OTHER), **EXACT)


@pytest.mark.slow
@NETWORKS
def test_per_image_statistics_are_the_originals(kind):
    """Predicted with its own statistics, an image gets the original's output."""
    own = normfix.predict(converted(kind).model, OTHER, tile=24, engine="stages", statistics="per-image")
    assert_close(own, network(kind)(OTHER), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [NestedParents, SharedAffine, AliasedOwners])
def test_group_statistics_become_those_of_channels_in_stages(kind):
    """In stages each norm's affine map is re-expressed by its own statistics, also where two norms shared one."""
    done = normfix.convert(
        network(kind), OTHER, "batchrenorm", tile=16, blocks=normfix.Blocks(budget=1 << 24)
    )
    assert done.proof.passed
    assert done.calibration.summary.engine == "stages"
    assert_close(done.model(OTHER), network(kind)(OTHER), **EXACT)


@pytest.mark.slow
def test_a_shared_affine_map_is_saved_for_each_norm(tmp_path):
    """What was one weight of two norms is two after re-expression, and stays so through a folder."""
    done = converted(SharedAffine, "batchrenorm")
    assert done.proof.passed
    normfix.save(done, tmp_path / "out")
    again = normfix.load(tmp_path / "out", model=network(SharedAffine))
    assert torch.equal(again(OTHER), done.model(OTHER))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TwoNames, AliasedOwners])
def test_masks_reach_a_norm_under_another_name(kind):
    """Pixels that a mask ignores are ignored in stages as in passes."""
    mask = torch.zeros(OTHER.shape[2:])
    mask[:12, :20] = 1
    passes = normfix.calibrate(converted(kind).model, OTHER, mask=mask)
    stages = normfix.calibrate(converted(kind).model, OTHER, tile=16, mask=mask)
    assert_close(stages.model(OTHER), passes.model(OTHER), **EXACT)
    assert float((passes.model(OTHER) - network(kind)(OTHER)).abs().max()) > 1e-3


@pytest.mark.slow
def test_a_norm_beside_the_output_that_counts_is_measured():
    """A site that another output alone depends on is no fault: its statistic is measured all the same."""
    done = normfix.convert(network(SideBranch), FIRST, output="main")
    again = normfix.calibrate(done.model, OTHER, tile=16)
    assert again.summary.engine == "stages"
    assert_close(again.model(OTHER)["main"], network(SideBranch)(OTHER)["main"], **EXACT)


def test_a_changed_neighbour_of_an_alias_is_seen():
    """Control: a weight outside the converted sites that moved fails the proof, under whatever name."""
    done = converted(NestedParents)
    assert done.proof.step("untouched").status == "passed"
    with torch.no_grad():
        done.model.first[0].weight[0, 0, 0, 0] += 1e-9
    step = normfix.proof.steps.untouched(network(NestedParents), done.model, done.plan)
    with torch.no_grad():
        done.model.first[0].weight.copy_(network(NestedParents).first[0].weight)
    assert step.status == "failed"
    assert "first.0.weight" in step.note
    assert "tree.inner.0.0.0.weight" in step.note


@pytest.mark.slow
@pytest.mark.parametrize("blind", ["nothing", "something else"])
def test_a_site_without_a_reader_is_an_error(blind, monkeypatch):
    """Control: where what reads a statistic is not found, nothing is measured, and the old statistics are back."""
    model = normfix.calibrate(converted(TwoNames).model, FIRST).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = {"nothing": frozenset(), "something else": frozenset({"network.head.weight"})}[blind]
    monkeypatch.setattr(programs._Names, "of", lambda self, site: names)
    monkeypatch.setattr(
        kept, "_CAPTURES", WeakKeyDictionary()
    )  # what other tests captured had its readers found
    for measure in (normfix.calibrate_, _predicted):
        with pytest.raises(NormfixError, match=r"NF340 \w+.*statistic of this site"):
            measure(model, OTHER, tile=16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _predicted(model, image, tile):
    return normfix.predict(model, image, tile=tile, engine="stages", statistics="per-image")


def test_names_match_by_memory_and_not_by_spelling():
    """Found are all names of a norm's tensors and no weight that another module holds too."""
    net = SharedAffine()
    net.alias = nn.ModuleList([net.n1])
    net.n1.register_buffer("seen", torch.zeros(3))
    net.register_buffer("view", net.n1.seen[:2])
    assert programs._Names(net).of("n1") == {"network.n1.seen", "network.alias.0.seen", "network.view"}
    net.n2 = nn.GroupNorm(2, 4)
    assert "network.alias.0.weight" in programs._Names(net).of("n1")


class Reads(nn.Module):
    """Reads the affine map of its norm before the norm is called: to make another of it, or on the way to its map."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), _affine(), nn.Conv2d(4, 1, 1)
        self.way = way

    def forward(self, x):
        if self.way == "made":
            made = {name: value * 2 for name, value in self.norm.named_parameters()}
            return self.head(torch.func.functional_call(self.norm, made, (self.conv(x),)))
        return self.head(self.norm(self.conv(x) * self.norm.weight[:, None, None]))


def _affine():
    norm = nn.InstanceNorm2d(4, affine=True)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


@pytest.mark.slow
@pytest.mark.parametrize(("way", "engine"), [("made", "stages"), ("on the way", "auto")])
def test_state_that_is_read_before_its_norm_is_called(way, engine):
    """What reads it waits for the statistic; an operand that is computed from it is measured in passes."""
    net = Reads(way).double().eval()
    own = normfix.predict(net, OTHER, tile=16, engine=engine, statistics="per-image")
    assert_close(own, net(OTHER), **EXACT)


class Tokens(nn.Module):
    """Normalises positions as rows of a matrix, those of all images of a batch or of its only one."""

    def __init__(self, rows):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Conv2d(4, 1, 1)
        self.norm.track_running_stats, self.norm.running_mean, self.norm.running_var = False, None, None
        self.rows = rows

    def forward(self, x):
        y = self.conv(x)
        if self.rows:
            z = self.norm(y.permute(0, 2, 3, 1).reshape(-1, 4)).view(y.shape[0], *y.shape[2:], 4)
            return self.head(z.permute(0, 3, 1, 2))
        return self.head(self.norm(y.reshape(1, 4, -1)).view_as(y))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [True, pytest.param(False, marks=pytest.mark.zoo)])
def test_positions_of_a_whole_batch_in_one_dimension(rows):
    """They are positions of no single map, so that they are measured in passes; no size is made up."""
    net = Tokens(rows).double().eval()
    own = normfix.predict(net, OTHER, tile=16, statistics="per-image")
    assert_close(own, net(OTHER), **EXACT)


def test_a_batch_norm_called_twice_is_refused_by_name():
    """Running statistics of one module cannot be those of two operands, whichever way they are measured."""

    class Twice(OneNormTwice):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.again = nn.ModuleList([self.norm])

    net = Twice().eval()
    for tile in (None, 16):
        with pytest.raises(NormfixError, match="NF301 norm/"):
            normfix.calibrate(net, FIRST.float(), tile=tile)
