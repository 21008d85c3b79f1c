"""The reach of neighbourhood attention against brute force, and a network with it through the whole of normfix."""

from __future__ import annotations

import pytest
import torch
from neighbourhoods import NeighbourhoodBlock
from reaching import bound_for, true_reach
from torch import nn

import normfix


@pytest.mark.parametrize(
    ("kernel", "dilation", "causal"), [(5, 1, False), (4, 1, False), (3, 2, False), (3, 1, True)]
)
def test_a_window_is_pushed_inside_at_borders(kernel: int, dilation: int, causal: bool):
    """Of two in a row the bound is the truth in the middle and at both borders, but for a dilation's last pixel."""
    torch.manual_seed(0)
    blocks = nn.Sequential(
        *(NeighbourhoodBlock(2, kernel, dilation, causal=causal, norm=False) for _ in range(2))
    )
    bound = bound_for(blocks, (1, 2, 32, 32))
    assert bound.obstacles() == ()
    true = [true_reach(blocks, bound, 1, 32, channels=2, cross=12, tile=n) for n in (0, 16, 31)]
    before, after = (max(ends) + dilation - 1 for ends in zip(*true, strict=True))
    assert bound.halo((1, 1)) == ((before, after), (before, after))
    # near a border it reads further inside than anywhere else
    assert causal or max(before, after) > max(true[1])


def test_queries_that_share_a_window_have_no_bound():
    obstacle, *_ = bound_for(NeighbourhoodBlock(2, 5, stride=2, norm=False), (1, 2, 32, 32)).obstacles()
    assert obstacle.operator == "natten.na2d_forward.default"


def test_a_network_with_neighbourhood_attention_is_converted():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), NeighbourhoodBlock(4, 3, norm=True), nn.Conv2d(4, 1, 1)
    ).eval()
    image = torch.rand(1, 1, 48, 64) + torch.linspace(0, 2, 64)
    done = normfix.convert(net, image, tile=16)
    assert done.proof.passed
    assert done.scan.halo == ((3, 3), (3, 3))
    assert not {"NF223", "NF252"} & {finding.code for finding in done.scan.findings}
    whole = net.double()(image.double())
    tiles = normfix.predict(done.model.double(), image.double(), tile=16)
    assert (tiles - whole).abs().max() < 1e-5 * whole.std()
