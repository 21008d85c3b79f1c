"""Windows compared with the strip that they are cut from."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from normfix.tiling.dependence import agrees, shortest
from normfix.tiling.grid import Geometry

GEOMETRY = Geometry(stride=(4, 4), halo=((3, 5), (2, 2)), scale=(Fraction(1),) * 2, multiple=(1, 1))


def _blurred(x):
    return F.avg_pool2d(x, 3, 1, 1)


def _negated_if_odd(x):
    return _blurred(x) * (-1) ** (x.shape[2] % 2)


def _halved_in_the_middle(x):
    weight = torch.ones(x.shape[2], 1, dtype=x.dtype)
    weight[x.shape[2] // 2] = 0.5
    return _blurred(x) * weight


@pytest.mark.parametrize(
    ("network", "rest", "alike"),
    [
        (_blurred, 0, True),
        (_blurred, 1, True),
        (_negated_if_odd, 0, True),
        (_negated_if_odd, 1, False),
        (_halved_in_the_middle, 0, False),
    ],
)
def test_two_windows_make_up_the_shortest_strip(network, rest, alike):
    """Every position of it is compared; control: one that is another in the strip, or all at an odd extent, is seen."""
    size = shortest(GEOMETRY, (16, 16), 0)
    example = torch.randn(1, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = []

    def f(x):
        seen.append(x.shape[2])
        return network(x)

    assert agrees(f, example, 0, GEOMETRY, (size[0] + rest, size[1])) is alike
    whole, *windows = seen
    assert all(extent < whole for extent in windows)
    if alike:
        before, after = 4, 8
        assert sum(windows) - before - after == whole
