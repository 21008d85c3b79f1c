"""Copies of networks are those that copy.deepcopy makes."""

import copy

import pytest
import torch
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.networks.behaviour import behaviour_of
from normfix.networks.calling import once_each, require_network
from normfix.networks.copying import copy_of


class Forgets(nn.Module):
    """Leaves what it has seen out of its copies."""

    def __init__(self):
        super().__init__()
        self.seen = 3

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "seen"}


class Holds(nn.Module):
    """Holds its network, beside its parts, and a tensor twice."""

    def __init__(self, network):
        super().__init__()
        self.above, self.table = [network], torch.ones(2)
        self.again = {"table": self.table}


def test_a_copy_is_pythons_own():
    """What classes say of their state, cycles, shared tensors, hooks and ties come out as Python copies them."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), Forgets(), nn.ReLU())
    network.append(Holds(network))
    network.append(network[0])
    network[2].register_forward_hook(_hook)
    network[0].eval()
    ours, theirs = copy_of(network), copy.deepcopy(network)
    for copied in (ours, theirs):
        assert not hasattr(copied[1], "seen")
        assert copied[3].above[0] is copied
        assert copied[3].again["table"] is copied[3].table
        assert copied[3].table is not network[3].table
        assert copied[4] is copied[0]
        assert copied[0].weight is not network[0].weight
        assert [*copied[2]._forward_hooks.values()] == [_hook]
        assert copied[2]._forward_hooks is not network[2]._forward_hooks
        assert copied[0]._forward_hooks is not network[0]._forward_hooks
    assert behaviour_of(ours) == behaviour_of(theirs)
    assert [m.training for m in ours.modules()] == [m.training for m in network.modules()]


def _hook(module, given, result):
    return result


class Expanded(nn.Module):
    """A network with a buffer whose elements are few places in memory, as `expand` leaves it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3)
        self.register_buffer("scale", torch.full((1, 1, 1, 1), 0.3).expand(1, 3, 1, 1), persistent=False)
        self.register_buffer("places", torch.arange(4).expand(2, 4), persistent=False)

    def forward(self, x):
        return self.norm(self.conv(x) * self.scale)


def test_a_network_with_an_expanded_buffer_is_converted_and_predicted():
    """torch does not write to such a buffer, which ended every verb in a bare RuntimeError."""
    net, image = Expanded().eval(), torch.rand(1, 1, 24, 20, generator=torch.Generator().manual_seed(0))
    assert normfix.convert(net, image).proof.passed
    predicted = normfix.predict(net, image, tile=8, statistics="per-image")
    torch.testing.assert_close(predicted, net(image).detach(), rtol=1e-4, atol=1e-5)
    assert net.scale.stride() == (1, 0, 1, 1)
    assert net.places.stride() == (0, 1)


def test_what_an_expanded_buffer_cannot_hold_is_not_passed_over():
    """Values that differ where the buffer repeats one are no repetition."""
    place = torch.zeros(1, 2).expand(3, 2)
    one, value = once_each(place, torch.arange(2.0).expand(3, 2).clone())
    one.copy_(value)
    assert place.tolist() == [[0.0, 1.0]] * 3
    assert once_each(place, torch.arange(6.0).reshape(3, 2))[0].shape == (3, 2)


@pytest.mark.parametrize("deep", [False, True])
def test_a_module_that_holds_itself_is_named(deep):
    """It ended in a recursion error, and on the command line in an error of the device."""
    net = nn.Sequential(nn.Sequential(nn.ReLU()))
    shared = nn.ReLU()
    net.append(shared).append(shared)  # twice is no ring
    require_network(net)
    inner = net[0] if deep else net
    inner.add_module("up", net)
    with pytest.raises(NormfixError, match=rf"NF118.*its part {'0.up' if deep else 'up'} holds itself"):
        normfix.scan(net)
