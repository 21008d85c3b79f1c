"""Numbers computed from the image's extents that values are made of, and not shapes or places."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfix.networks.graph.extents import is_sized
from normfix.networks.graph.operators import name_of, taken_by

__all__ = ["factors", "is_of_the_size", "is_tensor", "made_of_the_size"]

_PLACING = ("upsample", "_upsample", "arange", "linspace", "grid_sampler")
"""Operators whose numbers say where something is and not what."""
_PARTS = frozenset({"select", "slice", "narrow"})
_VALUES = frozenset({"Tensor", "number", "float", "Optional[number]", "Optional[float]", "Optional[Tensor]"})
"""Types of an operator's arguments that values are made of; extents and places are SymInt."""


def factors(node: Node) -> Iterator[Any]:
    """Yield the formulas of a node's arguments that become values, or choose among channels; no extents, no places."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or name_of(node).startswith(_PLACING):
        return
    named = {a.name: a for a in schema.arguments}
    pairs = [
        *zip(schema.arguments, node.args, strict=False),
        *((named[k], v) for k, v in node.kwargs.items()),
    ]
    for argument, given in pairs:
        value = given.meta.get("val") if isinstance(given, Node) else None
        counts = str(argument.type) in _VALUES or _is_of_channels(node)
        if counts and isinstance(value, torch.SymInt | torch.SymFloat):
            yield value.node.expr


def is_of_the_size(node: Node, numbers: Collection[Node], space: Collection[Any]) -> bool:
    """Tell whether a tensor is computed from the image's extents, from maps of them or from numbers made of them.

    Args:
        node: that depends on no pixel.
        numbers: tensors that are known to be.
        space: the symbols of the image's extents.
    """
    formulas = (s for formula in factors(node) for s in formula.free_symbols)
    return any(s in space for s in formulas) or any(
        n in numbers or is_sized(n, space) for n in taken_by(node)
    )


def made_of_the_size(
    nodes: Iterable[Node], moving: Collection[Node], space: AbstractSet[Any]
) -> Iterator[Node]:
    """Yield the nodes that compute values of pixels with a number made of the image's size, or an answer about it.

    Args:
        nodes: of a graph, in order.
        moving: those that depend on pixels.
        space: the symbols of the image's extents.
    """
    numbers: set[Node] = set()
    for node in nodes:
        if not is_tensor(node):
            continue
        answers = (n.meta.get("val") for n in node.all_input_nodes)
        asked = any(isinstance(a, torch.SymBool) and a.node.expr.free_symbols & space for a in answers)
        if node not in moving:
            if not is_sized(node, space) and (asked or is_of_the_size(node, numbers, space)):
                numbers.add(node)
        elif (
            asked
            or any(formula.free_symbols & space for formula in factors(node))
            or any(n in numbers for n in taken_by(node))
        ):
            yield node


def is_tensor(node: Node) -> bool:
    """Tell whether a node gives a tensor, or several."""
    value = node.meta.get("val")
    return any(isinstance(leaf, Tensor) for leaf in (value if isinstance(value, list | tuple) else (value,)))


def _is_of_channels(node: Node) -> bool:
    """Tell whether a node takes a part along a dimension of one extent, whatever the image's."""
    if name_of(node) not in _PARTS or not is_tensor(source := node.all_input_nodes[0]):
        return False
    dim = node.args[1] if len(node.args) > 1 else 0
    return isinstance(dim, int) and isinstance(source.meta["val"].shape[dim], int)
