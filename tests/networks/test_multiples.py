"""Graphs of extents that are multiples of a number, where formulas of all extents are too long."""

import itertools
import operator

import pytest
import sympy
import torch
from networks import InWindows
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Mod

import normfix
from normfix.networks.graph import sizes
from normfix.networks.graph.capture import capture
from normfix.networks.graph.multiples import capture_multiples, multiples_near, unfolded
from normfix.networks.graph.sizes import shortening
from normfix.tiling.stages.refusals import NotInStages

S, T = sympy.symbols("s t", integer=True, positive=True)


def run(model, x):
    return model(x)


def up_to(extent, window):
    """Return an extent with its padding to whole windows, as programs compute it."""
    return extent + Mod(window - Mod(extent, window), window)


def windows(extent):
    return FloorDiv(up_to(FloorDiv(extent + 3, 4), 7), 7)


@pytest.mark.parametrize(
    ("formula", "least"),
    [
        (windows(S), 28),
        (windows(FloorDiv(S + Mod(S, 2), 2)), 56),
        (windows(S) * FloorDiv(up_to(T, 6), 4), 84),  # 28 and 12
        (S + 3, 1),
    ],
)
def test_the_least_multiples_that_windows_divide(formula, least):
    """Counted out: over these the formula's differences are constant along an axis, and over no smaller one's."""
    size = sympy.lambdify((S, T), formula, [{"FloorDiv": operator.floordiv, "Mod": operator.mod}])

    def is_straight(step):
        lines = zip(
            *((size(step * n, least), size(least, step * n)) for n in range(1, least + 3)), strict=True
        )
        return all(len({b - a for a, b in itertools.pairwise(line)}) == 1 for line in lines)

    assert shortening(formula) == least
    assert is_straight(least)
    assert not any(is_straight(step) for step in range(1, least))


def test_there_is_none_for_a_remainder_that_stays():
    """Every multiple of seven less three pads to windows of seven."""
    assert shortening(Mod(7 * S - 3, 7) * Mod(S, 1021 * 1019)) is None


def mixed(windows):
    return windows + windows.flip(-1).tanh()


def padded_to(levels):
    """Return a network that mixes within windows of 3."""
    torch.manual_seed(0)
    return InWindows(levels, window=3, mix=mixed).double().eval()


@pytest.fixture(scope="module")
def padded():
    return padded_to(2)


@pytest.mark.slow
def test_a_graph_of_multiples_is_the_network(padded):
    """At every multiple, also of batches; what is none it does not take."""
    image = torch.randn(1, 1, 40, 64).double()
    found = capture_multiples(padded, run, image, 12)
    assert found.multiple == 12
    body = unfolded(found.program.module(), found.multiple)
    for shape in [(1, 1, 24, 36), (1, 1, 60, 24), (3, 1, 36, 48)]:
        x = torch.randn(shape).double()
        with torch.no_grad():
            assert torch.equal(body(x), padded(x))
    for extents in [(24, 40), (25, 24)]:
        with pytest.raises((AssertionError, RuntimeError)):
            body(torch.randn(1, 1, *extents).double())


def test_extents_are_taken_as_they_are_where_any_do():
    """Also one pixel."""
    assert multiples_near((1, 40), 1) == (1, 40)
    assert multiples_near((1, 40), 12) == (24, 36)


@pytest.mark.slow
def test_multiples_grow_with_what_formulas_divide_by(monkeypatch):
    """Until these are short, or two multiples are many times what was given."""
    net, image = padded_to(1), torch.randn(1, 1, 24, 24).double()
    monkeypatch.setattr(sizes, "_LONGEST", 20)
    assert capture_multiples(net, run, image, 4).multiple == 12
    assert capture_multiples(net, run, image[..., :8, :8], 12) is None


class Tied(nn.Module):
    """Takes images whose extents have one ratio."""

    def forward(self, x):
        return x + x.transpose(2, 3)[:, :, : x.shape[2], : x.shape[3]].reshape_as(x)


class Sized(nn.Module):
    """Takes images of one size."""

    def __init__(self):
        super().__init__()
        self.map = nn.Parameter(torch.zeros(1, 1, 48, 48))

    def forward(self, x):
        return x + self.map


@pytest.mark.slow
@pytest.mark.parametrize("network", [Tied(), Sized()])
def test_what_ties_extents_has_none(network):
    """A graph that holds where both axes are alike, or at one size, is no graph of multiples."""
    assert capture_multiples(network.eval(), run, torch.randn(1, 1, 48, 48), 24) is None


@pytest.mark.slow
def test_a_network_without_a_graph_of_all_sizes_runs_in_stages(monkeypatch):
    """On multiples of its windows; of another image it is said."""
    monkeypatch.setattr(sizes, "_LONGEST", 20)
    head = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 3, padding=1))
    net = nn.Sequential(padded_to(1), head).double().eval()
    captured = capture(net, run, torch.randn(1, 1, 48, 72).double())
    assert (captured.free, shortening(captured.formula)) == ((0,), 6)
    for space in [(96, 168), (192, 102)]:
        image = torch.randn(1, 1, *space).double() * 3 + 1
        image[..., 24:48] += 8
        with torch.no_grad():
            whole = net(image)
        got = normfix.predict(net, image, tile=48, statistics="per-image", engine="stages")
        assert (got - whole).abs().max() < 1e-9 * whole.std()
    image = torch.randn(1, 1, 96, 170).double()
    with pytest.raises(NotInStages, match=r"NF321.*multiples of 6 pixels, 12 and more.*96x170"):
        normfix.predict(net, image, tile=48, statistics="per-image", engine="stages")
