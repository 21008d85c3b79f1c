"""The pytest fixture: it passes local networks, and fails what is live or compares nothing."""

import pytest
import torch
from torch import nn


@pytest.fixture
def local():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))


def test_passes_local_network(tile_invariant, local):
    """A network without live statistics passes."""
    assert tile_invariant(local, torch.rand(1, 1, 96, 96), tile=32).passed


def test_fails_live_network(tile_invariant, local):
    """A live InstanceNorm fails with its site named."""
    local[1] = nn.InstanceNorm2d(4)
    with pytest.raises(AssertionError, match=r"failed.*1/0/instance_norm/0"):
        tile_invariant(local, torch.rand(1, 1, 96, 96), tile=32)


def test_fails_inconclusive_check(tile_invariant, local):
    """Windows that cover the image prove nothing, which is not a pass."""
    with pytest.raises(AssertionError, match=r"inconclusive.*NF407"):
        tile_invariant(local, torch.rand(1, 1, 96, 96), tile=128)
