"""Blocks of real libraries with statistics that are no plain norms: each is converted and proved."""

import pytest
import torch
from real_blocks import BLOCKS
from torch import nn
from torch.testing import assert_close

import normfix
from normfix.layers import FrozenStatistic


class Gated(nn.Module):
    """Squeeze-excite by a pool module of its own, as torchvision writes it."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return x * self.pool(x).sigmoid()


@pytest.mark.parametrize("name", BLOCKS)
def test_converted_and_proved(name):
    """Exactly the statistics of space are frozen, none stays live, and every step of the proof passes."""
    build, functions = BLOCKS[name]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), build(), nn.Conv2d(8, 1, 3, padding=1))
    done = normfix.convert(model, torch.rand(1, 1, 96, 128))
    assert [d.site.function for d in done.plan.converted] == functions
    assert done.plan.left_live == ()
    assert done.proof.passed, done.proof.steps


def test_a_constant_has_the_networks_precision_although_its_owner_holds_no_tensor():
    """A pool module has no tensor to take a dtype from; a float32 constant would be 1e-8 off in float64."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Gated()).double()
    image = torch.randn(1, 1, 96, 64, dtype=torch.float64)
    done = normfix.convert(network, image)
    (constant,) = [m for m in done.model.modules() if isinstance(m, FrozenStatistic)]
    assert constant.value.dtype == torch.float64
    with torch.no_grad():
        assert_close(done.model(image), network(image), rtol=0, atol=1e-14)
