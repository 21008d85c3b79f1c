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
from normfix.tiling import stitching
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


@pytest.mark.parametrize("batch", [2, 5, 1000])
def test_tiles_that_share_a_call_give_what_they_give_alone(batch):
    """Windows of one shape go through the network together, ragged ones at the borders as well, a batch of two each."""
    net, image = plain_unet().double(), torch.randn(2, 1, 88, 64, dtype=torch.float64)
    calls = []

    def f(x):
        calls.append(x.shape)
        return net(x)

    geometry = _geometry(8, (23, 23), 1, 8)
    with torch.no_grad():
        together, alone = tiled(f, image, 16, geometry, batch), tiled(net, image, 16, geometry)
    assert_close(together, alone, **TOLERANCE[torch.float64])
    assert max(shape[0] for shape in calls) == 2 * min(batch, 8)


class Mixing(torch.nn.Module):
    """Adds to each image the one before it in the batch: the first of a batch is as it is alone."""

    def forward(self, x):
        return x + torch.cat([torch.zeros_like(x[:1]), x[:-1]])


class Alone(torch.nn.Module):
    """Takes one image."""

    def forward(self, x):
        return x.view(1, 1, *x.shape[2:])


@pytest.mark.parametrize("network", [Mixing(), Alone()], ids=["mixes", "takes one"])
def test_networks_that_do_not_treat_a_batch_apart(network, monkeypatch):
    """A batch that is asked for is refused; where nobody asked, each tile has its own call."""
    image = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    with pytest.raises(NormfixError, match="NF410 batch=4"):
        tiled(network, image, 16, _geometry(), batch=4)
    monkeypatch.setattr(stitching, "_paying", lambda device, shape: 4)
    assert torch.equal(tiled(network, image, 16, _geometry(), batch=None), image)


@pytest.mark.parametrize(
    "beside",
    [lambda x: x.roll(1, 0), lambda x: -x.flip(0), lambda x: x.amax(0, keepdim=True), lambda x: -x[-1:]],
)
def test_no_gate_hides_the_others_of_a_batch(beside):
    """What the first tiles keep shut a later one opens; control: a gate on each image's own values."""
    image = torch.rand(1, 1, 96, 96)
    image[..., 48:, :] *= 1e5

    def mixed(x):
        return x + torch.relu(beside(x) - 1000)

    def own(x):
        return x + torch.relu(x - 1000)

    with pytest.raises(NormfixError, match="NF410 batch=4"):
        tiled(mixed, image, 16, _geometry(), batch=4)
    assert torch.equal(tiled(own, image, 16, _geometry(), batch=4), own(image))


def test_a_batch_that_does_not_fit_is_halved():
    """Where memory runs out on windows together, fewer go together."""
    sizes = []

    def f(x):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return x

    image = torch.rand(1, 1, 64, 64)
    assert torch.equal(tiled(f, image, 16, _geometry(), batch=8), image)
    assert set(sizes) == {8, 6, 4, 3, 2, 1}


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


@pytest.mark.parametrize("extent", [61, 63])
@pytest.mark.parametrize("ceil", [False, True], ids=["rounds down", "rounds up"])
def test_a_network_that_rounds_its_output_to_the_stride_is_stitched(extent, ceil):
    """A map that is pooled and enlarged has a stride more or less than the image: no sign of a wrong scale."""
    net = lambda x: F.interpolate(F.avg_pool1d(x, 4, ceil_mode=ceil), scale_factor=4.0)  # noqa: E731
    image = torch.rand(1, 1, extent, generator=torch.Generator().manual_seed(0))
    assert_close(
        tiled(net, image, 16, Geometry(stride=(4,), halo=((0, 0),), scale=(Fraction(1),), multiple=(1,))),
        net(image),
    )


@pytest.mark.parametrize("scale", [9999, 2, Fraction(1, 2), Fraction(1, 9999)])
def test_a_scale_that_is_not_the_network_s_is_named(scale):
    """Whatever a file says of it, no image of another size is made, and no memory for one: NF115."""
    with pytest.raises(NormfixError, match="NF115"):
        tiled(plain_unet(), torch.rand(1, 1, 160, 96), 64, _geometry(8, (23, 23), scale, 8))
