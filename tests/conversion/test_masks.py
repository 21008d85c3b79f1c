"""Masks: what is ignored is no part of any statistic, in whichever way that is measured."""

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from masks import mask_of
from streamed_networks import Anisotropic3d, DividesBySize, Shallow
from torch.testing import assert_close

import normfix
from normfix.errors import NormfixError

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def _image(*size, seed=1):
    return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3


@pytest.fixture(scope="module")
def converted():
    """A converted network of two scales in float64."""
    torch.manual_seed(0)
    return normfix.convert(Shallow().double(), _image(64, 48))


def _cells(mask, shape):
    """Return where a map of this shape counts: in cells of pixels none of which is ignored."""
    edges = [n // m for n, m in zip(mask.shape, shape, strict=True)]
    ignored = F.max_pool2d(torch.from_numpy(mask != 0)[None, None].double(), edges)
    return ignored[0, 0] == 0


def _reference(net, images, masks):
    """Freeze a network's instance norms one after another at the moments of what counts, in plain torch."""
    norms = [m for m in net.modules() if isinstance(m, torch.nn.InstanceNorm2d)]
    known = []
    for index in range(len(norms)):
        values = []
        for image, mask in zip(images, masks, strict=True):
            operands = []

            def norm(module, args, output, operands=operands):
                operands.append(args[0])
                k = len(operands) - 1
                if k >= len(known):
                    return output
                mean, var = known[k]
                return (args[0] - mean) / (var + module.eps).sqrt()

            handles = [m.register_forward_hook(norm) for m in norms]
            net(image)
            for handle in handles:
                handle.remove()
            x = operands[index][0]
            values.append(x[:, _cells(mask, x.shape[1:])])
        x = torch.cat(values, 1)
        known.append((x.mean(1)[:, None, None], x.var(1, correction=0)[:, None, None]))
    return known


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("tile", [None, 16])
def test_masked_statistics_are_those_of_the_positions_that_count(converted, tile):
    """Over two images of other sizes, in one block and in several, the moments are those of plain torch."""
    images = [_image(48, 64, seed=2), 3 * _image(36, 44, seed=3)]
    masks = [mask_of(48, 64), mask_of(36, 44)]
    expected = _reference(converted.original.eval(), images, masks)
    done = normfix.calibrate(converted.model, images, tile, mask=masks)
    assert done.summary.engine == "stages"
    assert done.summary.ignored == tuple(int((m != 0).sum()) for m in masks)
    norms = [m for m in done.model.modules() if hasattr(m, "running_mean")]
    assert len(norms) == len(expected) == 2
    for norm, (mean, var) in zip(norms, expected, strict=True):
        assert_close(norm.running_mean, mean.flatten(), **CLOSE)
        assert_close(norm.running_var, var.flatten(), **CLOSE)
    unmasked = normfix.calibrate(converted.model, images, tile)
    assert done.summary.sites[0].elements < unmasked.summary.sites[0].elements
    assert (norms[0].running_mean - next(iter(unmasked.model.buffers()))).abs().max() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_what_lies_under_a_mask_is_not_measured(converted):
    """Pixels far enough inside an ignored region may hold anything."""
    image, mask = _image(64, 64, seed=4), np.zeros((64, 64), bool)
    mask[:, 16:] = True
    other = image.clone()
    other[..., 62:] = 1e3
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.InstanceNorm2d(2)).double()
    model = normfix.convert(net, image).model
    one, two = (normfix.calibrate(model, x, mask=mask).model[1] for x in (image, other))
    assert torch.equal(one.running_mean, two.running_mean)
    whole = normfix.calibrate(model, other).model[1]
    assert (one.running_var - whole.running_var).abs().max() > 1


@pytest.mark.zoo
@torch.no_grad()
def test_masks_of_volumes_and_files(tmp_path):
    """In 3D with other strides per axis, masks from files give in blocks what they give in one."""
    torch.manual_seed(0)
    image = _image(6, 24, 36)
    model = normfix.convert(Anisotropic3d().double(), image).model
    tifffile.imwrite(tmp_path / "mask.tif", mask_of(6, 24, 36), imagej=True, metadata={"axes": "ZYX"})
    whole, stages = (
        normfix.calibrate(model, image, tile, mask=tmp_path / "mask.tif") for tile in (None, (4, 8, 12))
    )
    assert stages.summary.engine == "stages"
    for name, value in stages.model.named_buffers():
        assert_close(value, whole.model.get_buffer(name), **CLOSE)


class Gated(torch.nn.Module):
    """Multiplies by a mean or by a norm over space."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(1, 2, 3, padding=1), norm

    def forward(self, x):
        x = self.conv(x)
        if self.norm:
            return x * torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x * x.mean((2, 3), keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("tile", [None, 16])
def test_a_hand_written_mean_is_masked_and_a_norm_refused(tile):
    """A mean runs over what counts; a norm over space grows with the number of pixels and is refused by name."""
    torch.manual_seed(0)
    image, mask = _image(32, 48), mask_of(32, 48)
    net = Gated(norm=False).double()
    done = normfix.calibrate(normfix.convert(net, image).model, image, tile, mask=mask)
    x = net.conv(image)[0][:, torch.from_numpy(mask == 0)]
    (values,) = [b for n, b in done.model.named_buffers() if b.numel() == 2]
    assert_close(values.flatten(), x.mean(1), **CLOSE)
    model = normfix.convert(Gated(norm=True).double(), image).model
    with pytest.raises(NormfixError, match=r"NF139 .*norm.*depends on how many pixels"):
        normfix.calibrate(model, image, tile, mask=mask)


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (np.ones((64, 48)), "NF138"),
        (np.zeros((48, 64)), "NF137"),
        (np.zeros((2, 64, 48)), "NF137"),
        ([np.zeros((64, 48))] * 2, "NF137"),
        (np.indices((64, 48)).sum(0) % 4 == 0, "NF138"),
        ([None], "NF137"),
        (True, "NF137"),
        (np.full((64, 48), "x"), "NF137"),
    ],
    ids=["all", "turned", "channels", "two", "scattered", "none", "number", "words"],
)
def test_masks_that_do_not_fit_are_refused(converted, mask, code):
    """A mask of everything, of other extents or number, or of a pixel in every cell is an error with a code."""
    before = {name: value.clone() for name, value in converted.model.named_buffers()}
    for tile in (None, 32):
        with pytest.raises(NormfixError) as caught:
            normfix.calibrate_(converted.model, _image(64, 48), tile, mask=mask)
        assert caught.value.code == code
    assert all(torch.equal(converted.model.get_buffer(name), value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["sparse", "listing"])
def test_a_mask_is_one_in_whatever_holds_its_numbers(converted, kind):
    """A sparse tensor, and an array of another library, ignore what the same numbers of numpy's ignore."""

    class Listing:
        """As Zarr, h5py and dask have them: shape, dtype, and numpy's way to read it."""

        shape, dtype = (64, 48), np.dtype("uint8")

        def __array__(self, dtype=None, copy=None):
            return ignored

        def __iter__(self):
            return iter(ignored)

    ignored = np.zeros((64, 48), np.uint8)
    ignored[:20] = 1
    mask = torch.from_numpy(ignored).to_sparse() if kind == "sparse" else Listing()
    done, expected = (normfix.calibrate(converted.model, _image(64, 48), mask=m) for m in (mask, ignored))
    assert done.summary.ignored == expected.summary.ignored == (20 * 48,)


@pytest.mark.slow
def test_a_network_that_cannot_run_in_stages_takes_no_mask():
    """Pixels are ignored in stages alone; the reason why there are none is said."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(DividesBySize(), torch.nn.InstanceNorm2d(1)).double()
    image = _image(32, 48)
    model = normfix.convert(net, image).model
    before = model[1].running_mean.clone()
    with pytest.raises(NormfixError, match=r"NF139 .*in stages alone.*NF324"):
        normfix.calibrate_(model, 2 * image, 16, mask=mask_of(32, 48))
    assert torch.equal(model[1].running_mean, before)
