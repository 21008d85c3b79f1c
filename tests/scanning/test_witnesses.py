"""The two witnesses of a reach: the graph's bound is the halo, and the dye must lie within it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reaching import Function
from torch import Tensor, nn

import normfix
from normfix.tiling.geometry import BoundExceededError
from normfix.tiling.reach.links import WHOLE
from normfix.tiling.reach.rules import RULES
from normfix.tiling.reach.rules.rule import kept


class Framed(nn.Module):
    """A function between two convolutions with a norm."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.head = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.InstanceNorm2d(4),
            nn.Conv2d(4, 1, 3, padding=1),
        )
        self.function = Function(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.stem(self.function(x)))))


def _noise(*size: int) -> Tensor:
    return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(3)) + 0.1


def _filled(x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.where(x != 0, x, F.max_pool2d(x, 5, 1, 2))
    return x


def _moved(x: Tensor, down: int, right: int) -> Tensor:
    return x + F.pad(x, (right, 0, down, 0))[..., : x.shape[2], : x.shape[3]]


HOLES = _noise(64, 160).clone()
HOLES[:, :, 20:50, 60:100] = 0
UNSEEN = {
    # name: (what the dye does not see, an image that shows it, the halo along the last axis)
    "far": (lambda x: _moved(x, 0, 700), _noise(16, 1600), (702, 2)),
    "diagonal": (lambda x: _moved(x, 40, 60), _noise(160, 192), (62, 2)),
    "holes": (_filled, HOLES, (8, 8)),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_strip_shows_is_in_the_halo(name: str):
    """Taps further away than any strip, off the axes or behind a comparison: tiles of another image are right."""
    function, image, halo = UNSEEN[name]
    done = normfix.convert(Framed(function).eval(), _noise(64, 96))
    assert done.proof.passed
    assert done.scan.halo[1] == halo
    assert done.scan.reach.used == "graph"
    with torch.no_grad():
        whole = done.model(image)
        tiles = normfix.predict(done.model, image, tile=16)
    torch.testing.assert_close(tiles, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_bound_far_above_the_dye_is_said():
    """A comparison whose other side was not taken widens the bound alone, which is a finding."""
    found = normfix.scan(Framed(_filled).eval(), _noise(64, 96))
    assert [f.where for f in found.findings if f.code == "NF253"] == ["axis 0", "axis 1"]
    assert found.reach.measured == ((2, 2), (2, 2))
    assert found.reach.bound == found.halo == ((8, 8), (8, 8))


def test_a_rule_that_is_wrong_is_found_by_the_dye(monkeypatch: pytest.MonkeyPatch):
    """A rule by which a convolution reads its own place only: the dye shows more, and the scan fails loudly."""
    monkeypatch.setitem(RULES, "conv2d", lambda call: [kept(call, call.tensor("input"), {1: WHOLE})])
    with pytest.raises(BoundExceededError, match="one of normfix's rules is wrong") as caught:
        normfix.scan(nn.Conv2d(1, 1, 5, padding=2).eval(), _noise(64, 96))
    assert caught.value.code == "NF251"


def test_a_measured_halo_is_a_choice_that_is_marked():
    """halo="measured" takes what the dye shows; scan, proof and verdict say so."""
    function, _, bound = UNSEEN["far"]
    done = normfix.convert(Framed(function).eval(), _noise(64, 96), halo="measured")
    assert done.scan.halo == ((2, 2), (2, 2))
    assert done.scan.reach.bound[1] == bound
    assert (done.scan.reach.used, done.scan.reach.chosen) == ("measured", True)
    assert done.proof.verdict.reach == "measured up to 512 pixels, as was asked for"


def test_a_network_without_a_graph_says_how_far_it_was_measured():
    """Values that leave tensors cannot be captured: the halo is measured, and the words say up to where."""

    def told(x: Tensor) -> Tensor:
        return x if float(x.detach().new_ones(1).sum() + 0 * x.detach().reshape(-1)[0]) >= 0 else -x

    reach = normfix.scan(
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), Function(told)).eval(), _noise(64, 96)
    ).reach
    assert reach is None or reach.used == "measured"
    assert reach is None or reach.words.startswith("measured up to 512 pixels")


@pytest.mark.slow
def test_an_operator_without_a_bound_is_named_in_the_words():
    """A gather whose places depend on values has no bound: the halo is measured, and the words name it."""

    def nearby(x: Tensor) -> Tensor:
        places = torch.arange(x.shape[3])[None, None, None] + (x > 0.5).long()
        return x.gather(3, places.clamp_max(x.shape[3] - 1))

    found = normfix.scan(
        nn.Sequential(Function(nearby), nn.Conv2d(1, 1, 3, padding=1)).eval(), _noise(64, 96)
    )
    assert found.reach is not None
    assert [o.operator for o in found.reach.obstacles] == ["aten.gather.default"]
    assert "aten.gather.default" in found.reach.words


def test_a_network_that_draws_has_no_bound():
    """What is drawn for a tile is not what is drawn for the whole there, however far the graph reaches."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Function(lambda x: x + 0.01 * torch.randn_like(x)))
    found = normfix.scan(net.eval(), _noise(64, 96))
    assert not found.tile_invariant
    assert (found.reach.used, found.reach.bound) == ("measured", None)


class Stretched(nn.Module):
    """Brought back to the image's extent from a pool that has, with `ceil_mode`, a cell more than half of it."""

    def __init__(self, *, ceil_mode):
        super().__init__()
        self.conv, self.ceil_mode = nn.Conv2d(1, 2, 3, padding=1), ceil_mode

    def forward(self, x):
        small = F.max_pool2d(self.conv(x), 3, 2, 1, ceil_mode=self.ceil_mode)
        return F.interpolate(small, size=x.shape[2:])


def test_a_resize_that_follows_the_size_is_named():
    """What it weighs depends on the place in the whole extent, whatever windows of a strip happen to show."""
    scan = normfix.scan(Stretched(ceil_mode=True).eval(), torch.rand(1, 1, 96, 128))
    assert not scan.tile_invariant
    assert any(f.code == "NF244" and "another at every size" in f.message for f in scan.findings)


def test_a_resize_by_a_constant_factor_is_local():
    """Control: half of the extent, brought back."""
    assert normfix.scan(Stretched(ceil_mode=False).eval(), torch.rand(1, 1, 96, 128)).tile_invariant


class Chosen(nn.Module):
    """The number of the largest channel, which no dye passes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 5, padding=2)

    def forward(self, x):
        return self.conv(x).argmax(1, keepdim=True)


@pytest.mark.slow
def test_a_bound_stands_where_the_dye_is_swallowed():
    """The graph needs no values: the halo is its bound, and nothing is said to be measured."""
    scan = normfix.scan(Chosen().eval(), torch.rand(1, 1, 64, 64))
    assert scan.halo == ((2, 2), (2, 2))
    assert scan.reach.measured is None
    assert "NF216" not in {finding.code for finding in scan.findings}


class Conditional(nn.Module):
    """Branches by an operator of control flow."""

    def forward(self, x):
        return torch.cond(x.mean() > 0, lambda v: v + 1, lambda v: v * 2, (x,))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_control_flow_of_torch_is_named():
    """Torch compiles such an operator whole, which fails while it is watched: not another shape is asked for."""
    with pytest.raises(normfix.NormfixError) as caught:
        normfix.scan(Conditional(), torch.rand(1, 1, 64, 64))
    assert caught.value.code == "NF575"
