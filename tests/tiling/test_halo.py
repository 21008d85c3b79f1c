"""Dye: halos to the pixel on both sides, and interference that sees a halo one stride short."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from networks import (
    DilatedStack,
    HiddenStride,
    LiveInstance,
    Patchify,
    PureShift,
    SuperResolution,
    SwallowsDye,
    UNet,
    WideDilation,
    bilinear,
    functions,
    max_pool,
    nearest,
    plain_unet,
    shuffled,
    strided,
    strided_even,
    transposed,
)
from torch import nn

from normfix.proof.comparison import ISOLATED
from normfix.records.spans import round_up
from normfix.tiling.halo import DyeLost, halo, interference

# name: (network, stride, scale, (before, after))
HALOS = {
    "pool, nearest": (plain_unet, 8, 1, (23, 23)),
    "pool, bilinear": (partial(UNet, max_pool, bilinear), 8, 1, (30, 30)),
    "stride 2, nearest": (partial(UNet, strided, nearest), 8, 1, (31, 23)),
    "k2 s2, transposed k2": (partial(UNet, strided_even, partial(transposed, kernel=2)), 8, 1, (23, 23)),
    "pool, transposed k3": (partial(UNet, max_pool, transposed), 8, 1, (23, 30)),
    "stride 2, transposed k4": (partial(UNet, strided, partial(transposed, kernel=4)), 8, 1, (38, 30)),
    "pool, pixel shuffle": (partial(UNet, max_pool, shuffled), 8, 1, (37, 37)),
    "pool, nearest, dilation 4": (partial(UNet, max_pool, nearest, depth=2, dilation=4), 4, 1, (40, 40)),
    "1x1 stride 2, nearest": (partial(UNet, partial(strided, kernel=1), nearest), 8, 1, (23, 15)),
    "dilated stack": (DilatedStack, 1, 1, (15, 15)),
    "hidden stride": (HiddenStride, 2, 1, (3, 3)),
    "patches": (Patchify, 8, Fraction(1, 8), (0, 0)),
    "upscaling": (SuperResolution, 1, 2, (1, 1)),
    "pure shift": (PureShift, 1, 1, (-4, 4)),
    "dilation 400": (WideDilation, 1, 1, (400, 400)),
}
SOLID = [name for name, (_, _, _, (before, after)) in HALOS.items() if min(before, after) > 0]
EXAMPLE = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
CROSS = (32, 32)


def _isolation(name, shorter=(0, 0), axis=1, example=EXAMPLE):
    """Run interference with the halo rounded to the stride, `shorter` strides cut off on either side."""
    make, stride, scale, reach = HALOS[name]
    before, after = (round_up(n, stride) - stride * cut for n, cut in zip(reach, shorter, strict=True))
    _, double = functions(make())
    return interference(double, example.double(), axis, stride, Fraction(scale), (before, after), CROSS)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", HALOS)
def test_the_halo_is_exact(name, axis):
    """Before and after are the receptive field at windows in phase, to the pixel."""
    make, stride, scale, expected = HALOS[name]
    single, _ = functions(make())
    assert halo(single, EXAMPLE, axis, stride, Fraction(scale), CROSS) == expected


@pytest.mark.parametrize(
    "name", ["pool, nearest", "stride 2, nearest", "pool, transposed k3", "hidden stride"]
)
def test_the_halo_equals_brute_force(name):
    """One dyed pixel at a time, both halo sides are the furthest reach across a tile's edges."""
    make, stride, _, expected = HALOS[name]
    length, edge = 160, 80  # the edge lies on the stride grid
    assert edge % stride == 0
    x = torch.randn(length, 1, length, 16)
    x[torch.arange(length), :, torch.arange(length)] = torch.nan  # image i has its line i dyed
    dirty = functions(make())[0](x).isnan().amax((1, 3))  # (dyed line, line of the output)
    before = max(i + 1 for i in range(edge, length) if dirty[:edge, i].any()) - edge
    after = edge - min(i for i in range(edge) if dirty[edge:, i].any())
    assert (before, after) == expected


def test_a_coarser_grid_changes_nothing():
    """A multiple of the stride as grid gives the same halo."""
    single, _ = functions(plain_unet())
    assert halo(single, EXAMPLE, 0, 24, Fraction(1), (48, 48)) == (23, 23)


def test_a_live_statistic_has_no_halo():
    """Dye in an InstanceNorm reaches everywhere."""
    single, _ = functions(LiveInstance())
    assert halo(single, EXAMPLE, 0, 1, Fraction(1), CROSS) is None


def test_what_may_well_be_global_is_given_up_on_shorter_strips():
    """Where nothing shows that it is, reaches of thousands of pixels are measured."""
    lengths = []

    def seen(network):
        single, _ = functions(network)
        return lambda x: lengths.append(x.shape[2]) or single(x)

    assert halo(seen(LiveInstance()), EXAMPLE, 0, 1, Fraction(1), CROSS, farthest=512) is None
    assert max(lengths) == 256 + 2 * 512
    wide = nn.Conv2d(1, 1, 3, padding=400, dilation=400)
    assert halo(seen(wide), EXAMPLE[:, :1], 0, 1, Fraction(1), CROSS, farthest=512) == (400, 400)
    lengths.clear()
    assert halo(seen(LiveInstance()), EXAMPLE, 0, 1, Fraction(1), CROSS) is None
    assert max(lengths) > 8000


def test_dye_that_is_swallowed_is_not_a_halo_of_zero():
    """A network that answers with labels raises instead of looking as if it had no reach."""
    single, _ = functions(SwallowsDye())
    with pytest.raises(DyeLost):
        halo(single, EXAMPLE, 0, 1, Fraction(1), CROSS)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", [name for name in HALOS if name != "pure shift"])
def test_the_measured_halo_isolates(name, axis):
    """With the halo rounded to the stride, amplifying everything outside changes nothing."""
    assert _isolation(name, axis=axis) < ISOLATED


@pytest.mark.parametrize("shorter", [(1, 0), (0, 1)], ids=["before", "after"])
@pytest.mark.parametrize("name", SOLID)
def test_one_stride_less_on_either_side_leaks(name, shorter):
    """Control: each side of the halo is needed, to the stride."""
    assert _isolation(name, shorter) > ISOLATED


def test_a_black_background_does_not_hide_a_leak():
    """Interference finds a short halo on an image of zeros too, where there is nothing to amplify."""
    assert _isolation("pool, nearest", (1, 1), example=torch.zeros(1, 1, 64, 64)) > ISOLATED


def test_interference_finds_a_live_statistic():
    """No halo isolates a tile from an InstanceNorm."""
    _, double = functions(LiveInstance())
    assert interference(double, EXAMPLE.double(), 0, 1, Fraction(1), (64, 64), CROSS) > ISOLATED


def test_interference_has_both_signs():
    """A gate that opens for one sign only is found, whichever it is."""
    for sign in (1, -1):
        change = interference(
            lambda x, sign=sign: torch.where(sign * x[..., -1:, -1:] > 1e6, 2 * x, x),
            EXAMPLE.double(),
            0,
            1,
            Fraction(1),
            (8, 8),
            CROSS,
        )
        assert change > ISOLATED


def test_interference_is_finite_even_if_the_network_is_not():
    """NaN under amplification counts as a large change, and as a number that JSON can hold."""

    def overflowing(x):
        return x.exp().cumsum(2) - x.exp().cumsum(2)

    change = interference(overflowing, EXAMPLE.double(), 0, 1, Fraction(1), (8, 8), CROSS)
    assert ISOLATED < change < float("inf")


def test_a_saturating_input_blinds_interference():
    """Known limit: a network that squashes its input is amplified no further than ordinary data."""

    class Squashes(nn.Module):
        def __init__(self):
            super().__init__()
            self.far = nn.Conv2d(1, 1, 3, padding=24, dilation=24)

        def forward(self, x):
            return x + 1e-14 * self.far(x.tanh())

    _, double = functions(Squashes())
    assert interference(double, EXAMPLE.double(), 0, 1, Fraction(1), (0, 0), CROSS) < ISOLATED


def test_a_reach_that_alternates_with_the_lattice_is_the_widest_of_it():
    """On half of its lattice a network of blocks reaches now 96, now 128 pixels: found in a few strips, the larger."""
    runs = []

    def blocks(x):
        runs.append(x.shape)
        wide = nn.functional.conv2d(x, torch.ones(1, 1, 1, 141), padding=(0, 70))
        return nn.functional.avg_pool2d(wide, (1, 64)).repeat_interleave(64, 3)

    assert halo(blocks, torch.randn(1, 1, 4, 64), 1, 32, Fraction(1), (4, 4)) == (128, 128)
    assert len(runs) <= 5


def test_a_kernel_that_follows_the_extent_has_no_halo():
    """What reaches further by more and more on longer strips is given up before the strips are the longest."""
    runs = []

    def following(x):
        runs.append(x.shape[3])
        step = x.shape[3] // 12
        return x + nn.functional.pad(x, (step, 0))[..., : x.shape[3]]

    assert halo(following, torch.randn(1, 1, 4, 64), 1, 1, Fraction(1), (4, 4)) is None
    assert max(runs) < 4096


def test_a_tap_that_short_strips_miss_is_not_taken_for_one():
    """Control: three reaches, each seen on a longer strip only, are measured to the last."""

    def far(x):
        return x + sum(nn.functional.pad(x, (n, 0))[..., : x.shape[3]] for n in (5, 300, 520))

    assert halo(far, torch.randn(1, 1, 4, 64), 1, 1, Fraction(1), (4, 4), least=600) == (520, 0)
