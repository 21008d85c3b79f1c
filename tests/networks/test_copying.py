"""Copies of networks are those that copy.deepcopy makes."""

import copy

import torch
from torch import nn

from normfix.networks.behaviour import behaviour_of
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
