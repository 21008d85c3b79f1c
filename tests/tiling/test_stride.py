"""Symmetry: the stride is the smallest shift that float64 confirms, and sizes are exact if windows agree."""

from fractions import Fraction

import pytest
import torch
from networks import (
    AlignedCorners,
    ConstantOutput,
    DeadOutput,
    DilatedStack,
    HiddenStride,
    PadsBothSides,
    PadsItself,
    Patchify,
    PoolsByThree,
    ResizesToSkip,
    SuperResolution,
    functions,
    plain_unet,
)

from normfix.tiling.stride import exact_multiple, is_equivariant, output_scale, smallest_stride

EXAMPLE = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ONE = Fraction(1)


def _stride(net, hint, scale=ONE, reach=(48, 48), cross=(48, 48)):
    return smallest_stride(functions(net)[1], EXAMPLE, 0, hint, scale, reach, cross)


@pytest.mark.parametrize(
    ("make", "hint", "scale", "stride"),
    [
        (plain_unet, 8, 1, 8),
        (plain_unet, 4, 1, 8),
        (plain_unet, 16, 1, 8),
        (DilatedStack, 1, 1, 1),
        (DilatedStack, 6, 1, 1),
        (HiddenStride, 2, 1, 2),
        (PoolsByThree, 6, 1, 6),
        (PoolsByThree, 12, 1, 6),
        (Patchify, 8, Fraction(1, 8), 8),
        (SuperResolution, 1, 2, 1),
    ],
)
def test_known_strides(make, hint, scale, stride):
    """The true stride is found from hints that are its multiple, its divisor or itself."""
    assert _stride(make(), hint, Fraction(scale)) == stride


def test_a_stride_that_dye_cannot_see():
    """The network with a hidden stride of 2 does not commute with a shift by 1."""
    double = functions(HiddenStride())[1]
    assert is_equivariant(double, EXAMPLE, 0, 1, ONE, (8, 8), (16, 16)) is False


def test_aligned_corners_have_no_stride():
    """No shift of the input shifts the output of a resize with align_corners=True."""
    assert _stride(AlignedCorners(), 2) is None


def test_a_shift_to_half_an_output_pixel_is_no_symmetry():
    """A network of scale 1/8 cannot commute with a shift by 4."""
    double = functions(Patchify())[1]
    assert is_equivariant(double, EXAMPLE, 0, 4, Fraction(1, 8), (8, 8), (16, 16)) is False


@pytest.mark.parametrize("make", [ConstantOutput, DeadOutput])
def test_a_constant_output_is_no_evidence(make):
    """Equivariance of an output that does not vary over space is neither true nor false."""
    double = functions(make())[1]
    assert is_equivariant(double, EXAMPLE, 0, 8, ONE, (24, 24), (16, 16), grid=8) is None


def test_the_hint_stands_where_nothing_varies():
    """A U-Net of stride 8 that answers 0 everywhere is not taken for a network of stride 1."""
    assert _stride(DeadOutput(), 8) == 8


@pytest.mark.parametrize(
    ("make", "grid", "scale"), [(plain_unet, 8, 1), (Patchify, 8, Fraction(1, 8)), (SuperResolution, 1, 2)]
)
def test_the_scale_of_the_output(make, grid, scale):
    """Output pixels per input pixel are read as an exact fraction."""
    assert output_scale(functions(make())[0], EXAMPLE.float(), 1, grid, (16, 16)) == scale


@pytest.mark.parametrize(
    ("make", "multiple"),
    [
        (PadsItself, 1),
        (DilatedStack, 1),
        (ResizesToSkip, 8),
        (PadsBothSides, 8),
        (plain_unet, 8),
        (Patchify, 1),
    ],
)
def test_exact_sizes(make, multiple):
    """Sizes the stride does not divide are exact only where windows at both ends agree with the whole."""
    stride = 1 if make is DilatedStack else 8
    scale = Fraction(1, 8) if make is Patchify else ONE
    reach = (16, 16) if make in (PadsItself, PadsBothSides, Patchify) else (32, 32)
    assert exact_multiple(functions(make())[1], EXAMPLE, 0, stride, scale, reach, (16, 16)) == multiple


def test_no_size_is_called_exact_without_evidence():
    """Where the output does not vary, sizes stay on the stride grid."""
    assert exact_multiple(functions(ConstantOutput())[1], EXAMPLE, 0, 8, ONE, (8, 8), (16, 16)) == 8
