"""Numbers computed from the image's extents that values are made of, and not shapes or places."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfix.networks.graph.extents import is_sized
from normfix.networks.graph.operators import name_of, taken_by

__all__ = ["factors", "is_tensor", "made_of_the_size", "numbers_of"]

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


def numbers_of(
    nodes: Iterable[Node], moving: Collection[Node], space: AbstractSet[Any], laid: Collection[Node]
) -> tuple[Node, ...]:
    """Return the tensors that are numbers made of the image's extents: they depend on no pixel, and are no maps.

    A part of a map is one where the map varies, as the last of its positions is.

    Args:
        nodes: of a graph, in order.
        moving: those that depend on pixels.
        space: the symbols of the image's extents.
        laid: maps of the image's extents that vary; see `normfix.networks.graph.extents.laid`.
    """
    numbers, varied = dict[Node, None](), set[Node]()
    for node in nodes:
        if node in moving or not is_tensor(node):
            continue
        given = taken_by(node)
        if node in laid or any(n in varied for n in given):
            varied.add(node)
        if is_sized(node, space):
            continue
        counted = any(is_sized(n, space) for n in given) and (node in varied or name_of(node) not in _PARTS)
        if counted or any(n in numbers for n in given) or _takes_size(node, space):
            numbers[node] = None
    return tuple(numbers)


def made_of_the_size(
    nodes: Sequence[Node], moving: Collection[Node], space: AbstractSet[Any], laid: Collection[Node]
) -> Iterator[Node]:
    """Yield the nodes that compute values of pixels with a number made of the image's size, or an answer about it.

    Arguments as for `numbers_of`.
    """
    numbers = frozenset(numbers_of(nodes, moving, space, laid))
    for node in nodes:
        if node not in moving or not is_tensor(node):
            continue
        if _takes_size(node, space) or any(n in numbers for n in taken_by(node)):
            yield node


def _takes_size(node: Node, space: AbstractSet[Any]) -> bool:
    """Tell whether a number of the image's size, or an answer about it, is among what a node's values are made of."""
    given = (n.meta.get("val") for n in node.all_input_nodes)
    answers = (value.node.expr for value in given if isinstance(value, torch.SymBool))
    return any(formula.free_symbols & space for formula in (*factors(node), *answers))


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
