"""calibrate: what travels with a network follows the images that its statistics are measured on."""

import numpy as np
import pytest
import torch

import normfix


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
