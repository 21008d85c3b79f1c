"""Copies of networks are those that copy.deepcopy makes."""

import copy

import pytest
import torch
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.networks.behaviour import behaviour_of
from normfix.networks.calling import once_each, require_network
from normfix.networks.copying import copy_of, twin_of


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


class Telling(nn.Module):
    """A network whose class says itself how it is deep-copied."""

    def __init__(self, way=None):
        super().__init__()
        self.way = way
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True)

    def forward(self, x):
        return self.norm(self.conv(x))

    def __deepcopy__(self, memo):
        return COPIES[self.way](self, memo)


def _shallow(network, memo):
    made = Telling.__new__(Telling)
    vars(made).update(vars(network))
    return made


def _sharing(network, memo):
    made = Telling(network.way)
    made.conv.weight, made.conv.bias = network.conv.weight, network.conv.bias
    made.norm.load_state_dict(network.norm.state_dict())
    return made


def _whole(network, memo):
    made = Telling(network.way)
    made.load_state_dict(network.state_dict())
    return made


COPIES = {
    "itself": lambda network, memo: network,
    "shallow": _shallow,
    "sharing": _sharing,
    "anew": lambda network, memo: Telling(network.way),
    "other": lambda network, memo: nn.Identity(),
    "whole": _whole,
}


@pytest.mark.parametrize("way", ["itself", "shallow", "sharing", "anew", "other"])
def test_a_copy_that_is_none_is_refused_and_the_network_stays(way):
    """Copies that shared modules or weights were converted in the caller's network, others passed for it."""
    net = nn.Sequential(nn.Identity(), Telling(way)).eval() if way == "sharing" else Telling(way).eval()
    before = {name: (id(value), value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    kinds = [type(module) for module in net.modules()]
    for work in (normfix.scan, normfix.convert):
        with pytest.raises(NormfixError, match=r"NF208.*a deep copy of the network is not one"):
            work(net, torch.rand(1, 1, 24, 20))
    assert [type(module) for module in net.modules()] == kinds
    for name, value in net.state_dict(keep_vars=True).items():
        assert id(value) == before[name][0]
        assert torch.equal(value, before[name][1])


def test_a_class_may_say_how_it_is_copied():
    """What it makes is the network, values that are no numbers included."""
    net = Telling("whole").eval()
    with torch.no_grad():
        net.conv.bias[0] = float("nan")
    assert copy_of(net).conv.weight is not net.conv.weight
    assert twin_of(net) is not net


class ReturnsNothing(nn.Module):
    """A network whose own `train` returns nothing, as is often forgotten, and keeps its norm in eval mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3)

    def train(self, mode=True):
        super().train(mode)
        self.norm.training = False

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize("to", ["frozen", "batchrenorm"])
def test_a_network_whose_train_returns_nothing_is_converted(to):
    """It ended in a bare AttributeError of None."""
    net, image = ReturnsNothing(), torch.rand(1, 1, 24, 20, generator=torch.Generator().manual_seed(0))
    net.eval()
    done = normfix.convert(net, image, to=to)
    assert done.proof.passed
    torch.testing.assert_close(normfix.predict(done.model, image, tile=8), net(image), rtol=1e-4, atol=1e-5)
    assert normfix.diagnose(net, image, tile=8).culprits
    own = normfix.predict(net, image, tile=8, statistics="per-image")
    torch.testing.assert_close(own, net(image), rtol=1e-4, atol=1e-5)
