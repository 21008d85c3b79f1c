"""Tiles against the whole at an image's size, where no graph tells how a network treats sizes."""

from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from normfix.tiling import lengths
from normfix.tiling.grid import Geometry

GEOMETRY = Geometry(stride=(2, 2), halo=((2, 2), (2, 2)), scale=(Fraction(1), Fraction(1)), multiple=(2, 2))
EXAMPLE = torch.rand(1, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def compared(where, size=(64, 40), tile=(16, 16)):
    """Return the extents at which tiles differ for a pool that doubles all where it is asked to."""
    return lengths.differing(
        lambda x: F.avg_pool2d(x, 3, 1, 1) * (2 if where(*x.shape[2:]) else 1), EXAMPLE, size, tile, GEOMETRY
    )


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (lambda h, w: w == 40, (64, 40)),
        (lambda h, w: (h, w) == (64, 40), (64, 40)),
        (lambda h, w: w == 20, (64, 40)),
        (lambda h, w: w == 22, None),
        (lambda h, w: False, None),
    ],
    ids=["its width", "its size", "a window's width", "no width of it", "none"],
)
def test_a_small_image_is_compared_whole(where, found):
    """Any branch on its size or its windows' shows; controls: one on another, and none."""
    assert compared(where) == found


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (lambda h, w: w == 40, (16, 40)),
        (lambda h, w: h == 64, (64, 16)),
        (lambda h, w: h == 20, (64, 16)),
        (lambda h, w: h == w == 20, (20, 20)),
        (lambda h, w: (h, w) == (64, 40), None),
        (lambda h, w: False, None),
    ],
    ids=["its width", "its height", "a window's height", "a window's size", "its size", "none"],
)
def test_of_a_large_image_strips_and_a_window_are(monkeypatch, where, found):
    """What goes by both extents of the whole is left, and `is_compared_whole` says so."""
    monkeypatch.setattr(lengths, "LARGEST", 2000)
    assert compared(where) == found
    assert not lengths.is_compared_whole((64, 40), GEOMETRY)
    assert lengths.is_compared_whole((40, 49), GEOMETRY)
    assert not lengths.is_compared_whole((40, 51), GEOMETRY)


def test_a_window_of_another_scale_is_compared(monkeypatch):
    """Half of the positions in the output: a window's end is cut by what is felt of it there."""
    monkeypatch.setattr(lengths, "LARGEST", 2000)
    halved = Geometry(stride=(2, 2), halo=((2, 2), (2, 2)), scale=(Fraction(1, 2),) * 2, multiple=(2, 2))

    def pooled(factor, x):
        x = F.avg_pool2d(F.avg_pool2d(x, 3, 1, 1), 2)
        return x * (factor if x.shape[2:] == (10, 10) else 1)

    for factor, found in ((1, None), (3, (20, 20))):
        assert lengths.differing(partial(pooled, factor), EXAMPLE, (64, 40), (16, 16), halved) == found


def test_a_window_that_is_too_large_is_left(monkeypatch):
    """It may not fit where the image does not."""
    monkeypatch.setattr(lengths, "LARGEST", 400)
    assert compared(lambda h, w: h == w == 20) is None
