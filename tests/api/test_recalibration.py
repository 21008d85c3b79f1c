"""calibrate: what travels with a network follows the images that its statistics are measured on."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import normfix
from normfix.errors import NormfixError


@pytest.fixture(scope="module")
def network():
    """A small network with a live norm."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4), torch.nn.Conv2d(4, 1, 1)
    )


@pytest.fixture(scope="module")
def converted(network, tmp_path_factory):
    """It, converted on integers that are scaled by their range, and the file of the image."""
    path = tmp_path_factory.mktemp("images") / "cells.npy"
    np.save(path, np.random.default_rng(0).integers(0, 200, (64, 48), dtype="uint8"))
    return normfix.convert(network, normfix.read_images(path, network, scaling="unit")).model, path


def test_the_scaling_of_the_images_travels_with_the_new_statistics(converted):
    """Measured anew on images scaled otherwise, the network predicts the same file scaled that way."""
    model, path = converted
    images = normfix.read_images(path, model, scaling="zscore")
    measured = normfix.calibrate(model, images).model
    (image,) = images
    torch.testing.assert_close(normfix.predict(measured, path), normfix.predict(measured, image))
    assert normfix.read_images(path, measured).scaling.kind == "zscore"
    assert normfix.read_images(path, model).scaling.kind == "unit"


def test_in_place_too(converted):
    """calibrate_ says it of the network itself; tensors, of which nothing is known, change nothing."""
    model, path = converted
    measured = normfix.calibrate(model, normfix.read_images(path, model, scaling="percentile:1,99")).model
    normfix.calibrate_(measured, torch.rand(1, 1, 64, 48))
    assert normfix.read_images(path, measured).scaling.kind == "percentile"
    normfix.calibrate_(measured, normfix.read_images(path, measured, scaling="unit"))
    assert normfix.read_images(path, measured).scaling.kind == "unit"


class Excited(nn.Module):
    """A trained batch norm, and a gate by the mean over space."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.gate = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.Module, fx.GraphModule])
def test_constants_of_a_traced_network_are_measured_anew(kind):
    """torch.fx's own copy forgets what was attached; all sites follow the new image, not the batch norms alone."""
    torch.manual_seed(0)
    net = (Excited() if kind is nn.Module else fx.symbolic_trace(Excited())).eval().double()
    images = [torch.rand(1, 1, size, 64, dtype=torch.float64) for size in (64, 80)]
    done = normfix.convert(net, images[0])
    anew = normfix.calibrate(done.model, images[1])
    expected = normfix.calibrate(normfix.convert(net, images[1]).model, images[1]).model
    assert len(anew.summary.sites) == 2
    torch.testing.assert_close(anew.model(images[1]), expected(images[1]), rtol=0, atol=1e-12)
    again = normfix.calibrate(anew.model, images[1]).model
    torch.testing.assert_close(again(images[1]), expected(images[1]), rtol=0, atol=1e-12)


def test_constants_of_which_nothing_is_known_are_not_left_as_they_are():
    """A converted part of a network, whose mean over space could not be measured with the batch norms, is refused."""
    torch.manual_seed(0)
    part = normfix.convert(Excited(), torch.rand(1, 1, 64, 64)).model
    with pytest.raises(NormfixError, match="NF302"):
        normfix.calibrate(nn.Sequential(part), torch.rand(1, 1, 64, 64))


def test_a_copy_of_a_traced_network_keeps_its_constants():
    """torch.fx makes copies of a class of its own; what is handed to a constant stays so, and predicts in tiles."""
    torch.manual_seed(0)
    model = normfix.convert(fx.symbolic_trace(Excited()).eval(), torch.rand(1, 1, 64, 64)).model
    image = torch.rand(1, 1, 96, 64) * 2
    copied = copy.deepcopy(copy.deepcopy(model))
    torch.testing.assert_close(copied(image), model(image), rtol=0, atol=0)
    torch.testing.assert_close(normfix.predict(model, image, tile=32), model(image))
    with pytest.raises(NormfixError, match="NF302"):
        normfix.calibrate(copied, image)
