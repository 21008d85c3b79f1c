"""Locality: geometry per axis of a network without live statistics, or a reason why there is none."""

from fractions import Fraction

import pytest
import torch
from networks import (
    AlignedCorners,
    Anisotropic,
    Blocks,
    ConstantOutput,
    DilatedStack,
    HiddenLive,
    LiveInstance,
    NeedsRoom,
    PadsItself,
    PadsToMore,
    Patchify,
    PoolsByThree,
    PureShift,
    Resized,
    ResizesToSkip,
    ShiftedWindows,
    SuperResolution,
    SwallowsDye,
    UNet,
    functions,
    nearest,
    plain_unet,
    strided,
)
from torch import nn

import normfix
from normfix.tiling.geometry import _wide, cross_section, geometry_of, holds_stride, measure_locality
from normfix.tiling.grid import Geometry
from normfix.tiling.stitching import tiled

EXAMPLE = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def _measure(net, dilution, example=EXAMPLE):
    return measure_locality(*functions(net), example, dilution)


class _Numbered(nn.Module):
    """Reads a column by its number: alone, or beside a map that moves with the image."""

    def __init__(self, number, alone):
        super().__init__()
        self.number, self.alone = number, alone
        self.inner, self.outer = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x):
        y = self.inner(x)
        mark = torch.zeros(x.shape[-1], dtype=x.dtype).index_fill_(0, torch.tensor([self.number]), 1)
        return self.outer(y * mark if self.alone else y + y.relu() * mark)


@pytest.mark.parametrize(("number", "alone"), [(5, True), (9, False)])
def test_a_column_that_is_read_by_its_number_is_in_every_tile_or_there_are_none(number, alone):
    """A step of a lattice, in which nothing is compared, does not hide it where the halo leaves it in."""
    torch.manual_seed(0)
    net = _Numbered(number, alone).double().eval()
    image = EXAMPLE.double().repeat(1, 1, 2, 5)
    geometry = geometry_of(normfix.scan(net, EXAMPLE.double()))
    if geometry is not None:
        with torch.no_grad():
            difference = (tiled(net, image, 64, geometry) - net(image)).abs().max()
        assert difference < 1e-12


@pytest.mark.parametrize(
    ("make", "dilution", "stride", "halo", "scale", "multiple"),
    [
        (plain_unet, 8, 8, (23, 23), "1", 8),
        (lambda: UNet(strided, nearest), 8, 8, (31, 23), "1", 8),
        (PoolsByThree, 6, 6, (16, 16), "1", 6),
        (DilatedStack, 1, 1, (15, 15), "1", 1),
        (DilatedStack, 4, 1, (15, 15), "1", 1),
        (PureShift, 1, 1, (0, 4), "1", 1),
        (NeedsRoom, 1, 1, (20, 20), "1", 1),
        (PadsItself, 8, 8, (0, 0), "1", 1),
        (ResizesToSkip, 8, 8, (20, 20), "1", 8),
        (Patchify, 8, 8, (0, 0), "1/8", 1),
        (SuperResolution, 1, 1, (1, 1), "2", 1),
    ],
)
def test_geometry(make, dilution, stride, halo, scale, multiple):
    """Stride, halo, scale and exact sizes come out together, the halo never below zero."""
    found = _measure(make(), (dilution, dilution)).geometry
    assert (found.stride, found.halo, tuple(map(str, found.scale)), found.multiple) == (
        (stride,) * 2,
        (halo,) * 2,
        (scale,) * 2,
        (multiple,) * 2,
    )


@pytest.mark.parametrize(
    ("make", "stride", "halo", "multiple"),
    [
        (Blocks, 8, (9, 9), 1),
        (lambda: Blocks(4, "reflect", stem=2), 8, (9, 9), 1),
        (lambda: Blocks(12, "constant"), 12, (13, 13), 1),
        (lambda: Blocks(7), 7, (8, 8), 1),
        (lambda: Blocks(both_sides=True), 8, (9, 9), 8),
        (lambda: Blocks(7, "constant", both_sides=True), 7, (8, 8), 7),
        (lambda: ShiftedWindows(factor=2), 4, (7, 7), 1),
        (PadsToMore, 16, (9, 9), 1),
        (lambda: PadsToMore(24), 24, (9, 9), 1),
    ],
)
def test_the_lattice_a_network_pads_to_is_its_stride(make, stride, halo, multiple):
    """Blocks that no map's extent shows are found; where padding is at both ends, only their multiples are exact."""
    found = _measure(make(), (1, 1)).geometry
    assert (found.stride, found.halo, found.multiple) == ((stride,) * 2, (halo,) * 2, (multiple,) * 2)


class PaddedByAxis(nn.Module):
    """Brings rows to a multiple of the stride at their end, columns at both ends or by a weak resize; cuts it off."""

    def __init__(self, stride=4, *, weak=None):
        super().__init__()
        self.stride, self.weak = stride, weak
        self.down = nn.Conv2d(1, 2, stride + 1, stride, padding=stride // 2)
        self.up = nn.ConvTranspose2d(2, 1, stride, stride)

    def forward(self, x):
        rows, columns = x.shape[2:]
        below, beside = -rows % self.stride, -columns % self.stride
        left = beside // 2
        both = nn.functional.pad(x, (left, beside - left, 0, below))
        centred = self.up(self.down(both))[..., :rows, left : left + columns]
        if self.weak is None:
            return centred
        plain = self.up(self.down(nn.functional.pad(x, (0, beside, 0, below))))[..., :rows, :columns]
        return plain + self.weak * centred


@pytest.mark.parametrize("weak", [None, 1e-4])
@pytest.mark.parametrize("stride", [4, 8])
def test_axes_of_one_halo_may_be_exact_at_different_sizes(stride, weak):
    """Columns that are padded at both ends are not called exact because rows, alike in all else, are."""
    found = _measure(PaddedByAxis(stride, weak=weak), (stride, stride)).geometry
    assert found.halo[0] == found.halo[1]
    assert (found.stride, found.multiple) == ((stride, stride), (1, stride))


@pytest.mark.slow
@pytest.mark.parametrize("block", [64, pytest.param(128, marks=pytest.mark.zoo)])
def test_a_lattice_of_few_halvings_is_found(block):
    """Where the maps are coarse already, blocks of two and of four of their pixels are told apart."""
    assert _measure(Blocks(block), (32, 32)).geometry.stride == (block, block)


@pytest.mark.parametrize(
    ("factor", "mode", "stride", "halo"),
    [
        (1.5, "bilinear", 2, 2),
        (1.5, "nearest", 2, 2),
        (0.75, "bilinear", 4, 3),
        (4 / 3, "bilinear", 3, 3),
        (1.3, "bilinear", 10, 3),
    ],
)
def test_a_fractional_scale_has_the_stride_of_its_denominator(factor, mode, stride, halo):
    """A scale of 3/2 is read as such, and tiles start where the output has a whole pixel."""
    found = _measure(Resized(factor, mode), (1, 1)).geometry
    assert found.scale == (Fraction(factor).limit_denominator(20),) * 2
    assert (found.stride, found.halo) == ((stride,) * 2, ((halo, halo),) * 2)


def test_a_scale_that_is_no_simple_fraction_is_a_reason():
    """A resize by 1.2345 has no place that tiles could share."""
    found = _measure(Resized(1.2345), (1, 1))
    assert found.geometry is None
    assert found.findings[0].code in ("NF254", "NF213")


def test_every_axis_has_its_own_geometry():
    """A 3D network of strides (1, 4, 4) has one number per axis everywhere."""
    found = _measure(Anisotropic(), (1, 4, 4), torch.randn(1, 1, 16, 32, 32)).geometry
    assert found.stride == (1, 4, 4)
    assert found.halo == ((4, 4), (11, 11), (11, 11))
    assert found.multiple == (1, 4, 4)


class InBlocks(nn.Module):
    """Every pixel takes from its block of 8 x 8 map pixels, at stride 2: sizes are multiples of 16 or refused."""

    def __init__(self, block=8):
        super().__init__()
        self.down, self.block = nn.Conv2d(1, 2, 2, 2), block

    def forward(self, x):
        x = self.down(x)
        n, c, h, w = x.shape
        y = x.view(n, c, h // self.block, self.block, w // self.block, self.block)
        if h % self.block or w % self.block:
            raise ValueError("sizes must be whole blocks")
        return (y + y.mean((3, 5), keepdim=True)).reshape(n, c, h, w)


def test_sizes_of_whole_blocks_are_found():
    """A network that takes only multiples of its attention's blocks is measured on that grid."""
    found = _measure(InBlocks(), (2, 2)).geometry
    assert found.stride == (16, 16)
    assert found.halo == ((0, 0), (0, 0))


def test_blocks_larger_than_any_that_is_tried_are_a_reason():
    """Control: where no grid that is tried is taken, there is no geometry."""
    (finding,) = _measure(InBlocks(48), (2, 2)).findings
    assert finding.code == "NF210"


@pytest.mark.parametrize(
    ("make", "code"),
    [(LiveInstance, "NF212"), (HiddenLive, "NF212"), (AlignedCorners, "NF213"), (SwallowsDye, "NF216")],
)
def test_a_reason_in_place_of_a_geometry(make, code):
    """What cannot be tiled has no geometry and one finding that says why."""
    found = _measure(make(), (2, 2))
    assert found.geometry is None
    assert [finding.code for finding in found.findings] == [code]


def test_a_constant_output_keeps_the_careful_answer():
    """A network that says nothing is given no finer stride than its feature maps."""
    dead = nn.Sequential(nn.MaxPool2d(4), ConstantOutput(), nn.Upsample(scale_factor=4))
    assert _measure(dead, (4, 4)).geometry.stride == (4, 4)


def test_a_network_of_one_size_runs_on_no_strip():
    """A network that accepts one size only is refused as NF210."""

    def picky(x):
        if x.shape[2:] != (64, 64):
            raise ValueError("64 x 64 only")
        return x

    assert [f.code for f in measure_locality(picky, picky, EXAMPLE, (1, 1)).findings] == ["NF210"]


def test_an_output_of_one_size_is_not_tiled():
    """An output that does not grow with the input is refused as NF211."""
    assert [f.code for f in _measure(nn.AdaptiveAvgPool2d(7), (1, 1)).findings] == ["NF211"]


class _Cropped(nn.Module):
    """Leaves nothing of an image of up to 20 pixels."""

    def forward(self, x):
        return x[:, :, 10 : x.shape[2] - 10, 10 : x.shape[3] - 10]


@pytest.mark.parametrize(
    ("make", "expected"), [(plain_unet, (16, 16)), (NeedsRoom, (32, 32)), (_Cropped, (32, 32))]
)
def test_the_cross_section_is_as_thin_as_the_network_allows(make, expected):
    """Strips start at 16 pixels and widen until the network runs and leaves something of them."""
    grid = (8, 8) if make is plain_unet else (1, 1)
    assert cross_section(functions(make())[0], EXAMPLE, grid) == expected


@pytest.mark.parametrize(("stride", "holds"), [(4, True), (8, True), (1, False), (2, False)])
def test_a_stride_that_was_measured_before_is_held_against_windows(stride, holds):
    """What pools by four is cut at multiples of four; at finer places windows differ from the whole."""
    geometry = Geometry(
        stride=(stride,) * 2, halo=((4, 4),) * 2, scale=(Fraction(1),) * 2, multiple=(stride,) * 2
    )

    def coarse(x):
        return torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x, 4), size=x.shape[2:])

    assert holds_stride(coarse, EXAMPLE.double(), geometry, (16, 16)) is holds


@pytest.mark.parametrize(("shift", "halo"), [(5, (1, 13)), (-4, (11, 1))])
def test_a_halo_that_is_measured_holds_the_end_of_a_shifted_map(shift, halo):
    """A map that is shifted and then convolved depends on no pixel of one side, and must not end there."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))

        def forward(self, x):
            first, second, third = self.layers
            for layer in (first, second):
                x = nn.functional.pad(layer(x), (-shift, shift, 0, 0))
            return third(x)

    geometry = _measure(Shifted(), (1, 1)).geometry
    assert geometry.halo == ((3, 3), halo)


@pytest.mark.parametrize(("stride", "crop"), [(1, 4), (2, 3)])
def test_a_network_that_crops_its_end_is_tiled(stride, crop):
    """A tile reads as far ahead as is cropped, though its pixels depend on no more than a convolution takes."""
    torch.manual_seed(0)
    conv = nn.Conv1d(1, 1, 3, stride=stride, padding=1).double().requires_grad_(False)
    net = lambda x: conv(x)[..., :-crop]  # noqa: E731
    example = EXAMPLE.double()[:, :, 0]
    geometry = measure_locality(lambda x: net(x.double()).float(), net, example.float(), (stride,)).geometry
    assert geometry is not None
    assert (geometry.stride, geometry.multiple) == ((stride,), (1,))
    for image in (example, example[..., :-1]):
        torch.testing.assert_close(tiled(net, image, 8, geometry), net(image))


def test_a_line_has_no_width():
    """Of one axis there is nothing across that could be widened."""
    assert (_wide((8,), 0), _wide((4, 4), 0)[0]) == ((8,), 4)
