"""Small networks made to reach further than a scan says: none is silently wrong, by an arithmetic of its own."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import normfix

from . import adversaries
from .adversaries import ADVERSARIES, attack, tiled

SAMPLE = (
    "dilated 17",
    "max_pool2d 3 2 ceil True",
    "holes filled 2 5",
    "branch on width",
    "beside itself 0 300",
    "shifted windows 4",
    "columns of tokens, two back",
    "cropped to 200",
)
"""One case each of a reach, a stretched resize, a comparison, a size, a far tap, a lattice, a border and an end."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.zoo if n == "shifted windows 4" else ()) for n in SAMPLE]
)
def test_a_sample_is_not_silently_wrong(name):
    """Tiles at the claimed stride and halo equal the whole on an image that was not scanned, or nothing is claimed."""
    outcome = attack(name, images=2)
    assert outcome.kind != "silently wrong", outcome


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in ADVERSARIES if name not in SAMPLE])
def test_no_adversary_is_silently_wrong(name):
    """Of all families, on all images."""
    outcome = attack(name)
    assert outcome.kind != "silently wrong", outcome


def test_there_are_enough_and_they_differ():
    """More than a hundred and fifty, no two of which are called alike."""
    assert len(ADVERSARIES) >= 150


def test_a_halo_that_is_too_short_is_seen(monkeypatch):
    """Control: what claims a pixel less than it reaches is silently wrong."""
    scan = normfix.scan

    def short(net, example):
        found = scan(net, example)
        return replace(found, halo=((3, 3), (3, 3)))

    monkeypatch.setattr(adversaries.normfix, "scan", short)
    assert attack("dilated 5", images=1).kind == "silently wrong"


def test_tiles_at_the_right_halo_equal_the_whole():
    """Control of the arithmetic: a strided network with a scale of two, cut on its grid."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 1, 3, 2, 1), nn.Upsample(scale_factor=4), nn.Conv2d(1, 1, 3, padding=1)
    ).double()
    found = normfix.scan(net.float(), torch.randn(1, 1, 64, 96))
    image = torch.randn(1, 1, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(tiled(net.double(), image, found), net(image))
