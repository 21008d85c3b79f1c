"""How often a command runs and copies the network it is given: what was measured is not measured again."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import normfix
from normfix.networks.behaviour import behaviour_of
from normfix.networks.copying import double_of

RUNS, COPIES = Counter(), Counter()
"""By class; what a class itself holds would be a part of what its networks compute."""


class Counting(nn.Module):
    """Four layers that count how often any copy of them runs or is copied."""

    def __init__(self, norm=nn.InstanceNorm2d):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)
        )

    def forward(self, x):
        RUNS[Counting] += 1
        return self.layers(x)

    def __deepcopy__(self, memo):
        COPIES[Counting] += 1
        copied = Counting.__new__(Counting)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


@pytest.fixture
def network():
    torch.manual_seed(0)
    RUNS.clear()
    COPIES.clear()
    return Counting()


@pytest.fixture
def image():
    return torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))


def test_convert_runs_and_copies_little(network, image):
    """To scan, calibrate and prove four layers on a small image: 9 of the runs are tiles, 9 strips of the geometry.

    The copies are the original, the result, one in which all is frozen, that in float64, that for the graph, which
    tells its reach and the sizes that it holds for, and the one that tells what the result gives, to be known again.
    """
    assert normfix.convert(network, image).proof.passed
    assert RUNS.total() <= 41
    assert COPIES.total() <= 6


def test_scan_runs_little(network, image):
    """What the census gave is not computed again for the graph; with a graph one strip is dyed per axis.

    Five of the runs are the whole example and four tiles of it.
    """
    assert normfix.scan(network, image).reach.used == "graph"
    assert RUNS.total() <= 24


@pytest.mark.parametrize(("norm", "captures"), [(nn.Identity, 1), (nn.InstanceNorm2d, 2)])
def test_what_has_nothing_to_freeze_is_captured_once(image, monkeypatch, norm, captures):
    """The graph that the census is held against is that of the reach, unless statistics are frozen first."""
    made = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: made.append(0) or export(*a, **k))
    assert normfix.scan(Counting(norm), image).reach.used == "graph"
    assert len(made) == captures


@pytest.mark.parametrize("to", ["frozen", "batchrenorm"])
def test_a_float64_copy_is_the_network_it_is_of(network, image, to):
    """A network that takes the state of another over computes in float64 what the other does; no other is taken."""
    model = normfix.convert(network, image, to).model.eval()
    spare = normfix.convert(network, image * 2 + 1, to).model.eval().double()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(image.double())
        assert not torch.equal(spare(image.double()), expected)
        assert double_of(model, spare) is spare
        assert torch.equal(spare(image.double()), expected)
    spare.layers[3].dilation = (2, 2)
    other = double_of(model, spare)
    assert other is not spare
    assert torch.equal(other(image.double()), expected)


@pytest.mark.slow
def test_a_network_is_scanned_once_for_one_image(image):
    """To check and then to predict a network that was not converted scans it once; what changed is scanned again."""
    torch.manual_seed(0)
    network = Counting(nn.BatchNorm2d).eval()

    def runs(given):
        RUNS.clear()
        normfix.check(network, given, tile=32)
        return RUNS.total()

    first, again = runs(image), runs(image)
    assert again < first - 10
    with torch.no_grad():
        network.layers[0].weight.mul_(2)
    assert runs(image) > again
    network.layers[0].padding_mode = "reflect"
    assert runs(image) > again
    assert runs(image + 1) > again
    assert runs(image + 1) == again


class Sized(nn.Module):
    """Counts its runs by the shorter extent, and takes no image that is narrower than `least`."""

    def __init__(self, least):
        super().__init__()
        self.layers, self.least = Counting().layers, least

    def forward(self, x):
        if x.shape[-1] < self.least:
            raise ValueError("too narrow")
        if type(x.shape[-1]) is int and type(x) is torch.Tensor:  # while it is captured it is a symbol
            RUNS[min(x.shape[2:])] += 1
        return self.layers(x)


@pytest.mark.parametrize(("least", "widest"), [(0, 128), (160, 256)])
def test_another_image_is_tried_on_a_small_part(least, widest):
    """The first is scanned on 256 pixels; the next on 128 where it takes that. The result is the network's own."""
    RUNS.clear()
    net = Sized(least).eval()
    first, then = torch.rand(2, 1, 1, 320, 288)
    normfix.predict(net, first, 96, statistics="per-image")
    assert max(n for n in RUNS if isinstance(n, int)) >= 256
    RUNS.clear()
    found = normfix.predict(net, then * 3 + 1, 96, statistics="per-image")
    assert max(n for n in RUNS if isinstance(n, int)) == widest
    with torch.no_grad():
        torch.testing.assert_close(found, net(then * 3 + 1))


class Holder:
    """An object beside the modules."""

    def __init__(self, factor):
        self.factor = factor


def _attribute(net):
    net.layers[0].padding = (2, 2)


def _held(net):
    net.holder.factor = 3


def _tensor(net):
    net.mask[0, 0] = 2


def _hook(net):
    net.layers[1].register_forward_hook(lambda module, given, result: result.abs())


def _tied(net):
    net.layers[3].weight = net.layers[4].weight


@pytest.mark.parametrize("change", [_attribute, _held, _tensor, _hook, _tied])
def test_copies_behave_alike_until_one_is_changed(network, change):
    """What a network computes is compared by what it holds and not by which objects hold it, one level down as well."""
    network.layers.append(nn.Conv2d(2, 4, 3, padding=1))
    network.layers[3] = nn.Conv2d(4, 2, 3, padding=1)
    network.layers[4] = nn.Conv2d(4, 2, 3, padding=1)
    network.holder, network.mask = Holder(2), torch.ones(3, 3)
    copied = copy.deepcopy(network)
    assert behaviour_of(copied) == behaviour_of(network)
    change(copied)
    assert behaviour_of(copied) != behaviour_of(network)


def test_what_python_does_not_show_is_like_no_other(network):
    """Control: an object whose state cannot be looked into makes a copy another network."""
    network.source = torch.Generator()
    assert behaviour_of(network) == behaviour_of(network)
    copied = copy.deepcopy(network.layers)
    assert behaviour_of(copied) == behaviour_of(network.layers)
    other = Counting()
    other.load_state_dict(network.state_dict())
    other.source = torch.Generator()
    assert behaviour_of(other) != behaviour_of(network)
