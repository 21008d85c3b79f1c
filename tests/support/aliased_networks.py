"""Networks that know a norm under several names, or share what it holds, each named for how."""

import torch
import torch.nn.functional as F
from torch import nn


def _instance():
    return nn.InstanceNorm2d(4, affine=True)


def _group():
    return nn.GroupNorm(2, 4)


class TwoNames(nn.Module):
    """Registers every layer as an attribute and in a list, and calls the list."""

    def __init__(self):
        super().__init__()
        self.a, self.n1 = nn.Conv2d(1, 4, 3, padding=1), _instance()
        self.b, self.n2 = nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4)
        self.blocks = nn.ModuleList([self.a, self.n1, self.b, self.n2])
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        for layer in self.blocks:
            x = layer(x).relu()
        return self.head(x)


class NestedParents(nn.Module):
    """Registers whole blocks again inside nested containers, and calls those."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), _group(), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), _group(), nn.ReLU())
        self.tree = nn.ModuleDict({"inner": nn.ModuleList([nn.ModuleList([self.first]), self.second])})
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.head(self.tree["inner"][1](self.tree["inner"][0][0](x)))


class SharedAffine(nn.Module):
    """Has two norms with one weight and one bias between them."""

    def __init__(self):
        super().__init__()
        self.a, self.n1 = nn.Conv2d(1, 4, 3, padding=1), _group()
        self.b, self.n2 = nn.Conv2d(4, 4, 3, padding=1), _group()
        self.n2.weight, self.n2.bias = self.n1.weight, self.n1.bias
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.head(self.n2(self.b(self.n1(self.a(x)).relu())).relu())


class _Owner(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4, 3, padding=1)
        self.gain, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return F.group_norm(self.conv(x), 2, self.gain, self.shift).relu()


class AliasedOwners(nn.Module):
    """Normalises by a function inside owners that are registered twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two = _Owner(1), _Owner(4)
        self.again = nn.ModuleList([self.two, self.one])
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.head(self.again[0](self.again[1](x)))


class _Keeper(nn.Module):
    def __init__(self, inputs, norm, other=None):
        super().__init__()
        self.other = other
        self.conv, self.norm = nn.Conv2d(inputs, 4, 3, padding=1), norm

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class TwoKeepers(nn.Module):
    """Has a norm as an attribute of two owners, of which the second calls it."""

    def __init__(self):
        super().__init__()
        shared = _instance()
        self.late = _Keeper(4, _instance(), shared)
        self.early = _Keeper(1, shared)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.head(self.late(self.early(x)))


class Shuffled(nn.Module):
    """Lists its norms a second time in another order, beside a stride and a skip."""

    def __init__(self):
        super().__init__()
        norms = [_group() for _ in range(3)]
        self.backwards, self.norms = nn.ModuleList(norms[::-1]), nn.ModuleList(norms)
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, 4, 3, stride, padding=1) for inputs, stride in ((1, 1), (4, 2), (4, 1))
        )
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        skip = self.norms[0](self.convs[0](x)).relu()
        y = skip
        for conv, norm in zip(self.convs[1:], self.norms[1:], strict=True):
            y = norm(conv(y)).relu()
        return self.head(torch.cat([skip, F.interpolate(y, scale_factor=2.0)], 1))


class OneNormTwice(nn.Module):
    """Calls one norm at two places, and lists it again."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), _group()
        self.again = nn.ModuleList([self.norm])
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.head(self.again[0](self.b(self.norm(self.a(x)).relu())).relu())


class SideBranch(nn.Module):
    """Has an aliased norm that reaches one of two outputs only."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.side = nn.Conv2d(1, 4, 3, padding=1), _instance(), _instance()
        self.again = nn.ModuleList([self.side, self.norm])
        self.head, self.last = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        y = self.again[1](self.stem(x)).relu()
        return {"main": self.head(y), "side": self.last(self.again[0](y))}
