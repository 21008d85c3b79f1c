"""Stitching: the tiles of a local network, put together, are its output on the whole image."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import TOLERANCE, GrowsByTwo, Identity, Patchify, SuperResolution, ValidConvolutions, plain_unet
from torch.testing import assert_close

from normfix.errors import NormfixError
from normfix.tiling.grid import Geometry
from normfix.tiling.stitching import cropped, padded, tile_extents, tiled


def _geometry(stride=1, halo=(0, 0), scale=1, multiple=1, ndim=2):
    return Geometry(
        stride=(stride,) * ndim,
        halo=(halo,) * ndim,
        scale=(Fraction(scale),) * ndim,
        multiple=(multiple,) * ndim,
    )


LOCAL = {
    "identity": (Identity, _geometry()),
    "unet": (plain_unet, _geometry(8, (23, 23), 1, 8)),
    "scale 1/8": (Patchify, _geometry(8, (0, 0), Fraction(1, 8), 8)),
    "scale 2": (SuperResolution, _geometry(1, (1, 1), 2)),
    "shorter output": (ValidConvolutions, _geometry(1, (0, 4))),
    "longer output": (GrowsByTwo, _geometry(1, (1, 0), 2)),
}


@pytest.mark.parametrize("size", [(64, 64), (72, 104), (88, 33), (97, 34)], ids=str)
@pytest.mark.parametrize("name", LOCAL)
def test_stitched_tiles_equal_the_whole(name, size):
    """Every local network stitches to its own output, also where the last tile is one pixel wide."""
    make, geometry = LOCAL[name]
    net, image = make().double(), torch.randn(2, 1, *size, dtype=torch.float64)
    padding = geometry.padding(size)
    image = F.pad(image, (0, padding[1], 0, padding[0]))
    with torch.no_grad():
        assert_close(tiled(net, image, 32, geometry), net(image), **TOLERANCE[torch.float64])


def test_a_halo_that_is_too_small_shows_here():
    """Control: the same U-Net without halo does not stitch to its output."""
    net, image = plain_unet().double(), torch.randn(1, 1, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        difference = tiled(net, image, 32, _geometry(8, (0, 0), 1, 8)) - net(image)
    assert difference.abs().max() > 1e-3


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 9), st.integers(0, 9))
def test_the_identity_stitches_for_any_grid(height, width, tile, before, after):
    """Sizes, tiles and halos of any relation give the image back."""
    image = torch.arange(height * width).reshape(1, 1, height, width)
    assert torch.equal(tiled(Identity(), image, tile, _geometry(1, (before, after))), image)


def test_an_unexact_size_is_padded_and_cut_back():
    """At 45 pixels and multiple 8 the prediction is that of the image extended to 48, cut to 45."""
    net, image = plain_unet().double(), torch.randn(1, 1, 45, 64, dtype=torch.float64)
    extended = F.pad(image, (0, 0, 0, 3), mode="replicate")
    with torch.no_grad():
        expected = net(extended)[..., :45, :]
        assert_close(
            tiled(net, image, 16, _geometry(8, (23, 23), 1, 8)), expected, **TOLERANCE[torch.float64]
        )


def test_an_exact_size_is_not_copied():
    """The image itself comes back from padding where nothing is to be padded."""
    image = torch.randn(1, 1, 16, 24)
    assert padded(image, _geometry(8, multiple=8)) is image


@pytest.mark.parametrize(("scale", "expected"), [(1, 13), (2, 26), (Fraction(1, 8), 2)])
def test_what_belongs_to_the_image_is_rounded_up(scale, expected):
    """A crop keeps every output pixel that a pixel of the image belongs to."""
    assert cropped(torch.zeros(1, 1, 99), (13,), (Fraction(scale),)).shape[2] == expected


@pytest.mark.parametrize("tile", [0, -8, 12, (16, 12), (16,), (16, 16, 16)], ids=str)
def test_a_tile_off_the_grid_is_refused(tile):
    """Tiles that are not positive multiples of the stride on each axis raise NF402."""
    with pytest.raises(NormfixError, match="NF402"):
        tile_extents(tile, _geometry(8))


@pytest.mark.parametrize("scale", [9999, 2, Fraction(1, 2), Fraction(1, 9999)])
def test_a_scale_that_is_not_the_network_s_is_named(scale):
    """Whatever a file says of it, no image of another size is made, and no memory for one: NF115."""
    with pytest.raises(NormfixError, match="NF115"):
        tiled(plain_unet(), torch.rand(1, 1, 160, 96), 64, _geometry(8, (23, 23), scale, 8))
