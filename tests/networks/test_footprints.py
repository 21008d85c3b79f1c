"""What a network calls at a size is seen without numbers, and compared with what it calls at others."""

import pytest
import torch
from branching import Branching
from torch import nn

from normfix.networks.calling import Caller
from normfix.networks.footprints import calls_more, footprint

SIZE, STRIPS = (1, 1, 40, 48), [(1, 1, 40, 16), (1, 1, 16, 48)]


def doubled(x):
    """Twice the image where both extents are large."""
    return 2 * x if x.shape[2] > 30 and x.shape[3] > 30 else x


def counted(x):
    """As many times the image as it has large extents; 2 times is what strips show."""
    return x * (1 + (x.shape[2] > 30) + (x.shape[3] > 30))


def cornered(x):
    """Twice what lies beyond the thirtieth row and column, which is nothing of a strip."""
    x = x.clone()
    x[..., 30:, 30:] *= 2
    return x


def pooled(x):
    """A pool of another window where both extents are large."""
    kernel = 5 if x.shape[2] > 30 and x.shape[3] > 30 else 3
    return nn.functional.avg_pool2d(x, kernel, 1, kernel // 2)


def in_chunks(x):
    """The same in two parts along each axis that is long: strips show both."""
    for dim in (2, 3):
        if x.shape[dim] > 30:
            x = torch.cat([part.tanh() for part in x.chunk(2, dim)], dim)
    return x


def padded(x):
    """Numbers of both extents that are of no window."""
    return nn.functional.pad(x, (0, -x.shape[3] % 9, 0, -x.shape[2] % 7))


@pytest.mark.parametrize(
    ("way", "more"),
    [(doubled, True), (counted, True), (cornered, True), (pooled, True), (in_chunks, False), (padded, False)],
)
def test_what_is_called_where_both_extents_are_large_alone_is_more(way, more):
    """Lines, operators, their numbers and what is nothing count; the size itself does not, nor how often."""
    assert calls_more(Branching(way).eval(), Caller(), SIZE, STRIPS) is more


def test_what_looks_at_values_has_no_footprint():
    """A branch on a value is not followed, and nothing is told of it."""
    net = Branching(lambda x: x if float(x.mean()) > 0 else -x).eval()
    assert footprint(net, Caller(), SIZE) is None
    assert calls_more(net, Caller(), SIZE, STRIPS) is None


def test_a_network_is_left_as_it_was():
    """What it keeps by the image's size is kept of no image without numbers."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.kept = nn.Conv2d(1, 1, 3, padding=1), None

        def forward(self, x):
            if self.kept is None:
                self.kept = torch.ones_like(x)
            return self.conv(x) * self.kept

    net = Keeps().eval()
    assert footprint(net, Caller(), SIZE)
    assert net.kept is None
