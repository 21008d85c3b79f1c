"""Graphs that write into values made functional by other names, and those where that would be another function."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from normfix.tiling.stages.functional import make_functional_


class Residual(nn.Module):
    """Activations and a sum in place, and dropout between, as in most networks."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(2), nn.Dropout(0.5)

    def forward(self, x):
        before = self.first(x)
        y = F.relu_(self.drop(self.norm(before)))
        y = self.second(y)
        y += before
        return F.leaky_relu_(y), before * 1


class View(nn.Module):
    """What was written to is read by another name."""

    def forward(self, x):
        x = x * 1
        flat = x.flatten(2)
        return F.relu_(x).flatten(2) + flat


class DroppedView(nn.Module):
    """Dropout in eval gives its operand, which is read again."""

    def forward(self, x):
        x = x * 1
        y = F.relu_(F.dropout(x, 0.5, False))
        return x + y


class Given(nn.Module):
    """Writes into its input."""

    def forward(self, x):
        return F.relu_(x) + x


class Wider(nn.Module):
    """Adds float64 to float32 in place, which stays float32."""

    def forward(self, x):
        y = x.float() * 1
        y += x.double()
        return y


class Part(nn.Module):
    """Writes into a slice."""

    def forward(self, x):
        y = x * 1
        y[..., :2] = 0
        return y


def captured(net, x):
    program = torch.export.export(net.eval(), (x.clone(),), strict=False)
    body = program.module()
    return body, make_functional_(body.graph)


@pytest.fixture
def image():
    return torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [Residual, DroppedView])
def test_what_is_done_in_place_gets_another_name(kind, image):
    """The graph gives the same to the bit, and nothing in it writes into anything."""
    net = kind().eval()
    body, done = captured(net, image)
    body.recompile()
    assert done
    schemas = [n.target._schema for n in body.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert not any(schema.is_mutable or "dropout" in schema.name for schema in schemas)
    with torch.no_grad():
        pairs = zip(tree_leaves(body(image.clone())), tree_leaves(net(image.clone())), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", [View, Given, Wider, Part])
def test_nothing_is_claimed_where_other_names_are_another_function(kind, image):
    """A view that is read later, the input, a hidden cast and a slice are left to torch."""
    assert not captured(kind(), image)[1]
