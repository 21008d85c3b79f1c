"""Pools to bins of the whole image, and maps resized by their place in it: blocks have them as the whole image does."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ResizesToSkip
from torch import nn

import normfix
from normfix.networks.calling import Caller
from normfix.tiling.stages.bins import Bins
from normfix.tiling.stages.blocks import Given
from normfix.tiling.stages.journal import decoded, encoded
from normfix.tiling.stages.overviews import with_overviews
from normfix.tiling.stages.program import captured_program
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.scheduling import largest_difference, schedule
from normfix.tiling.stages.stretches import Resizing, Stretched

CPU = torch.device("cpu")
CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MEAN = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class Pyramid(nn.Module):
    """Pyramid pooling (Zhao et al., arXiv 1612.01105) at half the extent, with a norm in each small branch."""

    def __init__(self, pool=nn.AdaptiveAvgPool2d, axes=2, sizes=(1, 2, 3, 6), *, norm=False, **resizing):
        super().__init__()
        conv = CONVOLUTION[axes]
        self.first, self.norm = conv(1, 4, 3, 2, 1), nn.InstanceNorm2d(4) if norm else nn.Identity()
        self.branches = nn.ModuleList(
            nn.Sequential(pool(k), conv(4, 2, 1), nn.GroupNorm(1, 2) if k > 1 else nn.Identity(), nn.ReLU())
            for k in sizes
        )
        self.last, self.resizing = conv(4 + 2 * len(sizes), 1, 3, padding=1), resizing or {"mode": "nearest"}

    def forward(self, x):
        y = self.norm(self.first(x))
        z = [F.interpolate(branch(y), size=y.shape[2:], **self.resizing) for branch in self.branches]
        return self.last(torch.cat([y, *z], 1))


class Gated(nn.Module):
    """Weighs channels by what a small network makes of nine bins: an overview that a map is multiplied by."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(36, 4), nn.Conv2d(4, 1, 3)

    def forward(self, x):
        y = self.first(x)
        gate = self.gate(F.adaptive_avg_pool2d(y, 3).flatten(1)).sigmoid()
        return self.last(y * gate[:, :, None, None])


class Placed(nn.Module):
    """Adds a learned grid that is stretched over the image, and doubles the extent with aligned corners."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 1, 3, padding=1)
        self.grid = nn.Parameter(torch.randn(1, 2, 5, 7))

    def forward(self, x):
        y = self.first(x)
        y = y + F.interpolate(self.grid, size=y.shape[2:], mode="bicubic", align_corners=False)
        return F.interpolate(self.last(y), scale_factor=2, mode="bilinear", align_corners=True)


class Indexed(nn.Module):
    """Uses the places of its bins' maxima."""

    def forward(self, x):
        value, place = F.adaptive_max_pool2d(x, 2, return_indices=True)
        return x + F.interpolate(value * place, size=x.shape[2:])


def program(net, *size):
    torch.manual_seed(0)
    image = torch.rand(1, 1, *size, dtype=torch.float64)
    return with_overviews(captured_program(net.double().eval(), Caller(), image, []), image.shape)


@pytest.fixture(scope="module")
def pyramid():
    torch.manual_seed(0)
    return Pyramid(mode="bilinear", align_corners=False).double().eval()


@settings(deadline=None, max_examples=60)
@given(
    extents=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    counts=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    cuts=st.lists(st.sets(st.integers(1, 16), max_size=3), min_size=3, max_size=3),
    kind=st.sampled_from(["mean", "maximum"]),
)
def test_any_partition_gives_the_bins_of_the_whole(extents, counts, cuts, kind):
    """As torch pools the whole, wherever blocks are cut, and through a journal."""
    axes = len(extents)
    x = torch.randn(2, 3, *extents, dtype=torch.float64)
    of = Bins(kind, tuple(counts[:axes]))
    pool = getattr(F, f"adaptive_{'avg' if kind == 'mean' else 'max'}_pool{axes}d")
    edges = [sorted({0, n, *(c for c in cut if c < n)}) for cut, n in zip(cuts, extents, strict=False)]
    parts = [
        decoded(encoded(of.partial(x[(..., *(slice(a, b) for a, b in spans))], spans, extents)))
        for spans in itertools.product(*(list(itertools.pairwise(e)) for e in edges))
    ]
    torch.testing.assert_close(of.merged(parts, extents, "pool"), pool(x, of.counts), rtol=0, atol=1e-14)


def test_a_block_that_is_missing_leaves_a_bin_short():
    """Positions are counted, so a lost block is no zero."""
    x, of = torch.rand(1, 1, 9), Bins("mean", (2,))
    parts = [of.partial(x[..., a:b], [(a, b)], (9,)) for a, b in ((0, 3), (3, 6), (6, 9))]
    for wrong in (parts[:2], [*parts, parts[1]]):
        with pytest.raises(NotInStages, match="NF325 pool"):
            of.merged(wrong, (9,), "pool")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("nearest", {}),
        ("nearest-exact", {}),
        ("bilinear", {"align_corners": True}),
        ("bilinear", {"align_corners": False, "antialias": True}),
        ("bicubic", {"align_corners": True}),
        ("bicubic", {"align_corners": False}),
        ("bicubic", {"align_corners": False, "antialias": True}),
    ],
)
def test_a_window_of_a_resized_map_is_what_torch_gives_there(mode, options, dtype):
    """Of small maps, of maps of one row, of large ones, larger and smaller than their source."""
    if options.get("antialias") and dtype == torch.bfloat16:
        pytest.skip("torch has no such kernel")
    name = {"nearest": "upsample_nearest2d", "nearest-exact": "_upsample_nearest_exact2d"}
    name = name.get(mode, f"upsample_{mode}2d")
    resizing = Resizing(
        f"_{name}_aa" if "antialias" in options else name, options.get("align_corners"), (None,) * 2
    )
    for given_, taken in (
        ((1, 3), (23, 31)),
        ((6, 6), (13, 29)),
        ((17, 90), (34, 181)),
        ((40, 31), (17, 23)),
    ):
        x = torch.randn(1, 2, *given_, dtype=torch.float64).to(dtype)
        whole = F.interpolate(x, size=taken, mode=mode, **options)
        read = Stretched(x, resizing, tuple(x.shape), tuple(whole.shape), CPU).read
        for i, j in itertools.product(range(0, taken[0], 9), range(0, taken[1], 40)):
            index = (
                slice(None),
                slice(None),
                slice(i, min(i + 9, taken[0])),
                slice(j, min(j + 40, taken[1])),
            )
            rounding = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
            torch.testing.assert_close(read(index), whole[index], rtol=0, atol=rounding)


def test_stated_factors_are_those_that_count():
    """Torch maps coordinates by the factor that it was given, not by the extents that came of it."""
    x = torch.randn(1, 1, 10, dtype=torch.float64)
    whole = F.interpolate(x, scale_factor=2.37, mode="linear")
    stretched = Stretched(
        x, Resizing("upsample_linear1d", False, (2.37,)), (1, 1, 10), tuple(whole.shape), CPU
    )
    index = (slice(None), slice(None), slice(9, 23))
    torch.testing.assert_close(stretched.read(index), whole[index], rtol=0, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "size", "ragged"),
    [
        pytest.param(Pyramid(mode="bilinear", align_corners=True), (32, 48), (45, 70), id="aligned corners"),
        pytest.param(Pyramid(nn.AdaptiveMaxPool2d), (32, 48), (45, 70), id="maxima, nearest"),
        pytest.param(Pyramid(axes=1, pool=MEAN[1]), (64,), (91,), id="1D"),
        pytest.param(Pyramid(axes=3, pool=MEAN[3], sizes=(1, 2)), (16, 16, 16), (18, 16, 22), id="3D"),
        pytest.param(Gated(), (32, 48), (45, 70), id="a gate of nine bins"),
        pytest.param(Placed(), (32, 48), (45, 70), id="a learned grid and aligned corners"),
    ],
)
def test_blocks_are_the_whole(net, size, ragged):
    """To 1e-12 of the largest value in float64, at sizes that bins do not divide."""
    found = program(net, *size)
    assert found.pools or found.stretches
    planned = schedule(found, stride=(2,) * len(size), rests=[tuple(n % 2 for n in ragged)])
    assert largest_difference(planned, (1, 1, *ragged)) < 1e-12


@pytest.mark.slow
def test_a_network_that_resizes_to_its_skip_takes_any_size():
    """Where the factor is another at a size of the images, maps are resized by their place."""
    torch.manual_seed(0)
    found = captured_program(ResizesToSkip().double().eval(), Caller(), torch.rand(1, 1, 64, 64).double(), [])
    assert not schedule(found, stride=(8, 8)).program.stretches
    planned = schedule(found, stride=(8, 8), rests=[(4, 3)])
    assert planned.program.stretches
    assert largest_difference(planned, (1, 1, 68, 75)) < 1e-12


@pytest.mark.slow
def test_places_of_maxima_are_refused():
    """They number positions of the whole image, which no block knows."""
    with pytest.raises(NotInStages, match=r"NF32[34]"):
        schedule(program(Indexed(), 32, 32), stride=(2, 2))


def _bins_of_the_block(monkeypatch):
    def binned(self, value, block, size, bins):
        return bins.partial(value, [(0, n) for n in value.shape[2:]], value.shape[2:])

    monkeypatch.setattr(Given, "binned", binned)
    monkeypatch.setattr(torch, "equal", lambda a, b: True)


def _a_lost_block(monkeypatch):
    merged = Bins.merged
    monkeypatch.setattr(Bins, "merged", lambda self, parts, *given: merged(self, parts[:-1], *given))


def _coordinates_of_the_block(monkeypatch):
    read = Stretched.read

    def shifted(self, index):
        spans = [s.indices(n)[:2] for s, n in zip(index, self.taken, strict=True)]
        return read(self, tuple(slice(0, stop - start) for start, stop in spans))

    monkeypatch.setattr(Stretched, "read", shifted)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [_bins_of_the_block, _a_lost_block, _coordinates_of_the_block])
def test_planted_mistakes_are_caught(monkeypatch, pyramid, mistake):
    """The proof of the plan finds what pools and places would get wrong."""
    found = program(pyramid, 32, 48)
    mistake(monkeypatch)
    with pytest.raises(NotInStages, match="NF325"):
        schedule(found, stride=(2, 2))


@pytest.mark.slow
def test_an_unconverted_network_gives_its_whole_image_output():
    """Pyramid pooling after an instance norm, at a size that neither stride nor bins divide; its tiles differ."""
    torch.manual_seed(0)
    net = Pyramid(mode="bilinear", align_corners=False, norm=True).double().eval()
    image = torch.rand(1, 1, 47, 70, dtype=torch.float64) + torch.linspace(0, 2, 70, dtype=torch.float64)
    with torch.no_grad():
        expected = net(image)
        tiles = torch.cat([net(part) for part in image.split(24, 3)], 3)
    own = normfix.predict(net, image, tile=16, statistics="per-image")
    assert float((own - expected).abs().max() / expected.std()) < 1e-9
    assert float((tiles - expected).abs().max() / expected.std()) > 0.1
