"""The demo network: small, strictly loadable, full of live norms, and defined on the demo image."""

from __future__ import annotations

import sys
from importlib import resources

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import nn

from normfix.demo.data import nuclei_image
from normfix.demo.network import WEIGHTS, NucleiUNet, nuclei_unet


@pytest.fixture(scope="module")
def crop() -> torch.Tensor:
    """Scale the demo image as the network was trained and cut a piece of 256 x 320 out of it."""
    image = nuclei_image().astype(np.float32)
    low, high = np.percentile(image, (1, 99.8))
    return torch.from_numpy(((image - low) / (high - low)).astype(np.float32))[None, None, 256:512, 448:768]


def weights() -> bytes:
    """Read the bundled file."""
    return resources.files("normfix.demo").joinpath(WEIGHTS).read_bytes()


def test_weights_are_small():
    """The bundled weights take at most 2,000,000 bytes."""
    assert len(weights()) <= 2_000_000


def test_weights_are_the_whole_state():
    """The bundled file holds exactly the network's state, name by name and shape by shape, in float32."""
    stored, state = load(weights()), NucleiUNet().state_dict()
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_pretrained_loads_the_bundled_weights():
    """nuclei_unet() carries the bundled values, not fresh ones."""
    torch.testing.assert_close(dict(nuclei_unet().state_dict()), load(weights()), rtol=0, atol=0)


def test_has_fourteen_live_instance_norms():
    """Every norm is an affine InstanceNorm2d without running statistics, and there are 14 of them."""
    norms = [module for module in nuclei_unet().modules() if isinstance(module, nn.InstanceNorm2d)]
    assert len(norms) == 14
    assert all(norm.affine and not norm.track_running_stats for norm in norms)


@torch.no_grad()
def test_output_is_a_probability(crop):
    """On the real image the output has the input's shape and lies between 0 and 1."""
    probability = nuclei_unet()(crop)
    assert probability.shape == crop.shape
    assert ((probability >= 0) & (probability <= 1)).all()


@torch.no_grad()
def test_finds_the_bright_pixels_of_the_real_image(crop):
    """Trained weights tell nuclei from background on an image they never saw; fresh ones do not."""
    bright = crop > crop.quantile(0.9)
    dark = crop < crop.quantile(0.5)

    def contrast(model: nn.Module) -> float:
        probability = model(crop)
        return (probability[bright].mean() - probability[dark].mean()).item()

    assert contrast(nuclei_unet()) > 0.8
    assert contrast(nuclei_unet(pretrained=False)) < 0.5


@torch.no_grad()
def test_prediction_depends_on_the_extent(crop):
    """The same pixels with the same context get another probability when the image around is cut away."""
    model, halo = nuclei_unet(), 64
    inner = (..., slice(halo, -halo), slice(halo, -halo))
    smaller = crop[..., :, 64:256]
    difference = model(crop)[..., :, 64:256][inner] - model(smaller)[inner]
    assert difference.abs().max() > 0.01


def test_image_is_grey_and_eight_bit():
    """The demo image is one channel of 1024 x 1344 pixels in uint8, and not flat."""
    image = nuclei_image()
    assert (image.shape, image.dtype) == ((1024, 1344), np.uint8)
    assert image.min() < image.max()


def test_missing_mahotas_names_the_extra(monkeypatch):
    """Without mahotas the error says what to install."""
    monkeypatch.setitem(sys.modules, "mahotas.demos", None)
    with pytest.raises(ImportError, match=r"normfix\[demo\]"):
        nuclei_image()
