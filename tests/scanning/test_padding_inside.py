"""Networks that pad inside to whole strides, on both sides or before the image, are exact at the sizes that they take.

What is left over of an extent says where their grid begins: tiles are cut so that windows leave over as much.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normfix
from normfix.proof.verification import _disagreement
from normfix.tiling.geometry import geometry_of
from normfix.tiling.grid import Geometry, grid

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = [(97, 118), (90, 91), (96, 128), (101, 77), (64, 83), (71, 64), (97, 83), (66, 100)]


class Padded(nn.Module):
    """Two levels of strided convolutions with a norm, in an image that is padded to multiples and cut back."""

    def __init__(self, multiple, before, mode="constant", grown=1):
        super().__init__()
        self.multiple, self.before, self.mode, self.grown = multiple, before, mode, grown
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, 2, 1) for _ in range(2))
        self.up = nn.ModuleList(nn.ConvTranspose2d(4, 4, 2, 2) for _ in range(2))
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x):
        height, width = x.shape[-2:]
        rows, columns = -height % self.multiple, -width % self.multiple
        above, left = (rows // 2, columns // 2) if self.before == "half" else (rows, columns)
        y = self.first(F.pad(x, (left, columns - left, above, rows - above), mode=self.mode))
        for layer in self.down:
            y = self.norm(layer(y)).relu()
        for layer in self.up:
            y = layer(y).relu()
        y = self.last(y)
        if self.grown > 1:
            y = F.interpolate(y, scale_factor=self.grown, mode="nearest")
        n = self.grown
        return y[..., n * above : n * (above + height), n * left : n * (left + width)]


class Resized(nn.Module):
    """A map of half the size, resized to the image's: at odd sizes by another ratio at each."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        return self.last(F.interpolate(self.first(x).relu(), size=x.shape[-2:], mode="bilinear"))


def seeded(build):
    torch.manual_seed(0)
    return build().eval().double()


def image_of(size):
    return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def apart(one, whole):
    return float((one - whole).abs().max() / whole.std())


CASES = {
    "half on each side of 8": lambda: Padded(8, "half", "reflect"),
    "before the image": lambda: Padded(8, "all"),
    "half of 16, twice as large": lambda: Padded(16, "half", "replicate", grown=2),
}


@pytest.mark.zoo
@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_scan_check_and_predict_agree_at_every_size(build):
    """Frozen at an image's statistics, its tiles are what the network itself gives for it, extended by nobody."""
    net = seeded(build)
    done = normfix.convert(net, image_of(SIZES[0]), tile=16)
    assert done.proof.passed
    assert done.scan.padded_inside == (True, True)
    assert done.scan.exact_sizes == done.scan.stride == (net.multiple, net.multiple)
    for size in SIZES:
        image = image_of(size)
        with torch.no_grad():
            whole = (net if size == SIZES[0] else done.model)(image)
        assert apart(normfix.predict(done.model, image, tile=16), whole) < 1e-9
        verdict = normfix.check(done.model, image, tile=16)
        assert verdict.padding == (0, 0)
        assert verdict.status == "passed" or [f.code for f in verdict.findings] == ["NF407"]
    assert verdict.axes


@pytest.mark.slow
def test_nothing_is_said_of_an_extension(caplog):
    """The image is taken as it is; of a network that resizes to odd sizes it is extended, and that is said."""
    image = image_of((97, 118))
    normfix.predict(normfix.convert(seeded(CASES["before the image"]), image, tile=16).model, image, tile=16)
    assert "NF263" not in caplog.text
    net = seeded(Resized)
    assert normfix.scan(net, torch.rand(1, 1, 64, 64)).padded_inside == (False, False)
    normfix.predict(net, image, tile=16)
    assert "NF263" in caplog.text


@pytest.mark.slow
def test_statistics_per_image_are_those_of_the_image_as_it_is():
    """Unconverted, it gives what it gives for the whole image; in stages it is refused by name."""
    net, image = seeded(CASES["half on each side of 8"]), image_of((57, 83))
    with torch.no_grad():
        whole = net(image)
    assert apart(normfix.predict(net, image, tile=16, statistics="per-image"), whole) < 1e-9
    with pytest.raises(normfix.NormfixError, match="NF32"):
        normfix.predict(net, image, tile=16, statistics="per-image", engine="stages")


@pytest.mark.parametrize("build", [Resized, lambda: Padded(8, "half")], ids=["resized", "half on each side"])
def test_a_claim_of_it_that_is_wrong_is_refuted(build):
    """What a file says of it is held against the network: true of one that pads inside, of no other."""
    net = seeded(build)
    net.norm = nn.Identity()
    scan = normfix.scan(net, torch.rand(1, 1, 64, 64))
    claimed = replace(geometry_of(scan), padded_inside=(True, True))
    wrong = _disagreement(net, image_of((64, 64)), claimed, any_size=True)
    assert ("said to pad" in wrong) == (build is Resized)


def test_windows_leave_over_what_the_image_does():
    """All start on the grid, end a multiple and the rest further, and read a stride more than the halo asks for."""
    plain = Geometry(stride=(8,), halo=((8, 5),), scale=(1,), multiple=(8,), padded_inside=(False,))
    moved = replace(plain, padded_inside=(True,))
    assert plain.padding((99,)) == (5,)
    assert moved.padding((99,)) == (0,)
    reads = [tile.read[0] for tile in grid((99,), (16,), moved)]
    assert {(read.stop - read.start) % 8 for read in reads} == {3}
    assert {read.start % 8 for read in reads} == {0}
    assert reads[2] == slice(32 - 16, 48 + 16 + 3)
    assert not moved.covers(plain)
    assert moved.covers(replace(plain, multiple=(1,)))
    assert plain.covers(moved)
