"""check: what is compared where nobody stated how."""

import pytest
import torch
from torch import nn

import normfix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "size", "status"),
    [
        (nn.InstanceNorm3d, (20, 30, 28), "failed"),
        (nn.BatchNorm3d, (20, 30, 28), "passed"),
        (nn.BatchNorm3d, (4, 4, 4), "inconclusive"),
    ],
    ids=["live", "constant", "smaller than its halo"],
)
def test_a_small_volume_is_divided_by_the_tile_that_nobody_stated(norm, size, status):
    """A default of 256 would cover it and decide nothing; the settings say that the tile was chosen."""
    net = nn.Sequential(nn.Conv3d(1, 4, 7, padding=3), norm(4)).eval()
    verdict = normfix.check(net, torch.rand(1, 1, *size))
    assert verdict.status == status
    assert dict(verdict.settings)["tile"] == "chosen to divide the image"
