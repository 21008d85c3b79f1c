"""Tile against tile: which windows meet, and what comparing them is forecast to take."""

import time

import numpy as np
import pytest
import torch
from torch import nn

import normfix
from normfix.diagnosis import examination
from normfix.diagnosis.overlaps import meeting, overlaps
from normfix.diagnosis.windows import Window

SIZE = (37, 23)


def scattered(seed: int, number: int) -> list[Window]:
    """Windows anywhere, also reaching out of the image, as those with a mirrored border do."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        starts = [int(rng.integers(-4, n)) for n in SIZE]
        spans = tuple((a, a + int(rng.integers(1, 9))) for a in starts)
        found.append(Window(read=spans, tile=spans))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_windows_meet_where_they_have_a_pixel_in_common(seed):
    """For each window of the second tiling those of the first are found, in order, that share a pixel of the image."""
    first, second = scattered(seed, 40), scattered(seed + 10, 30)
    pixels = [
        {
            (y, x)
            for y in range(*w.read[0])
            for x in range(*w.read[1])
            if 0 <= y < SIZE[0] and 0 <= x < SIZE[1]
        }
        for w in (*first, *second)
    ]
    expected = [[i for i, mine in enumerate(pixels[:40]) if mine & theirs] for theirs in pixels[40:]]
    assert any(expected)
    assert list(meeting(first, second, SIZE)) == expected


def test_the_forecast_counts_every_pair_of_windows(monkeypatch):
    """Many small tiles with their context meet many others: comparing these is most of the time, and is foreseen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), nn.Conv2d(2, 1, 1))
    image, each = torch.rand(1, 1, 24, 24), 0.05

    def slow(*args):
        time.sleep(each)
        return overlaps(*args)

    plain = normfix.diagnose(net, image, tile=8).record.cost.seconds
    monkeypatch.setattr(examination, "overlaps", slow)
    record = normfix.diagnose(net, image, tile=8).record
    assert len(record.tile_mismatch.pairs) >= 16
    assert record.cost.seconds - plain > 0.9 * each * len(record.tile_mismatch.pairs)
