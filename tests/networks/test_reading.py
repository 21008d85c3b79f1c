"""What a forward reads by name is part of what makes a network compute what it computes."""

import copy
import functools
import os
import sys
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from normfix.networks.behaviour import behaviour_of, structure_of

settings = ModuleType("settings_of_a_user")
settings.__file__ = "/home/user/settings.py"
settings.width = 1
sys.modules[settings.__name__] = settings
exec(compile("def widened(): return width", settings.__file__, "exec"), vars(settings))


class Widths:
    """Numbers that nothing makes an object of."""

    first = 1
    calls = 0


class Slotted:
    """An object that holds its number in a slot."""

    __slots__ = ("width",)

    def __init__(self):
        self.width = 1


SLOTTED, ARRAY, NESTED = Slotted(), np.array([1]), {"a": {"width": [1]}}
SEEN = Counter()


@functools.cache
def cached():
    return NESTED["a"]["width"][0]


def by_attribute():
    return by_attribute.width


by_attribute.width = 1

READS = {
    "variable of another module": (lambda: settings.width, (settings, "width", 15)),
    "function of another module": (lambda: settings.widened(), (settings, "width", 15)),
    "attribute of a class": (lambda: Widths.first, (Widths, "first", 15)),
    "slot of an object": (lambda: SLOTTED.width, (SLOTTED, "width", 15)),
    "value of an array": (lambda: ARRAY[0], ("array", 0, 15)),
    "number deep in a collection": (lambda: NESTED["a"]["width"][0], ("list", 0, 15)),
    "what a function keeps": (lambda: cached(), ("list", 0, 15)),
    "attribute of a function": (lambda: by_attribute(), (by_attribute, "width", 15)),
    "environment": (
        lambda: os.environ.get("NORMFIX_TEST_WIDTH", 1),
        (os.environ, "NORMFIX_TEST_WIDTH", "15"),
    ),
}


def reading(read):
    """A network whose forward reads a number."""
    kind = type(
        "Reads", (nn.Module,), {"read": staticmethod(read), "forward": lambda self, x: x * self.read()}
    )
    return kind()


@pytest.mark.parametrize(("read", "change"), READS.values(), ids=READS)
def test_what_a_forward_reads_by_name_is_noticed(read, change, monkeypatch):
    net = reading(read)
    before = behaviour_of(net), structure_of(net)
    assert (behaviour_of(net), structure_of(net)) == before
    held, name, value = change
    if isinstance(name, str) and held is not os.environ:
        monkeypatch.setattr(held, name, value)
    elif held is os.environ:
        monkeypatch.setenv(name, value)
    else:
        monkeypatch.setattr(sys.modules[__name__], "ARRAY", ARRAY.copy())
        monkeypatch.setattr(sys.modules[__name__], "NESTED", copy.deepcopy(NESTED))
        (ARRAY if held == "array" else NESTED["a"]["width"])[0] = value
    assert behaviour_of(net) != before[0]
    assert structure_of(net) != before[1]


def test_what_code_counts_is_no_change():
    """Counters of a class, and collections that a function fills, are no part of what is compared."""

    def counted():
        Widths.calls += 1
        SEEN.update([1])
        return Widths.first

    net = reading(counted)
    before = behaviour_of(net), structure_of(net)
    with torch.no_grad():
        net(torch.ones(1))
    assert (behaviour_of(net), structure_of(net)) == before
