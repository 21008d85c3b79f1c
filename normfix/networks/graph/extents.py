"""Maps that follow the image's extents and not its values, and whether they are the same throughout.

A map of ones is, numbers of positions are not: what they are far from the image's corner, no small image shows.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from normfix.networks.functions import BLANK, FILLED
from normfix.networks.graph.operators import name_of, taken_by, viewed_by

__all__ = ["is_sized", "laid", "space_of"]

_EVEN = FILLED | BLANK | {"rand", "randn"}
_DIAGONAL = ("tril", "triu")
"""Operators that keep what is on one side of the diagonal, along which no strip goes."""


def laid(graph: Graph, image: Node, known: Collection[Node] = ()) -> tuple[Node, ...]:
    """Return where a map is made that follows the image's extent and not its values, and varies over it.

    Keeping one side of the diagonal lays such a map over the image, whatever it is kept of, and places of maxima are
    one where anything but unpooling takes them. What is made of such a map is none once more.

    Args:
        graph: with the image among its nodes.
        image: whose extents count.
        known: other nodes whose values do not follow from extents alone.
    """
    depends, varies, found, space = {image, *known}, set[Node](), [], space_of(image)
    for node in graph.nodes:
        given = taken_by(node) if node.op == "call_function" else []
        if any(source in depends for source in given):
            depends.add(node)
            if is_sized(node, space) and (name_of(node).rstrip("_") in _DIAGONAL or _is_place(node)):
                found.append(node)
        elif given and is_sized(node, space) and any(source in varies for source in given):
            varies.add(node)
        elif node.op == "call_function" and is_sized(node, space) and not _is_even(node, space):
            varies.add(node)
            found.append(node)
    return tuple(found)


def _is_place(node: Node) -> bool:
    """Tell whether a node is the places of a pool's maxima, counted over the whole image, and is used as numbers."""
    if node.target is not operator.getitem or node.args[1] != 1:
        return False
    pool = node.args[0]
    return (
        isinstance(pool, Node)
        and "max_pool" in name_of(pool)
        and any("max_unpool" not in name_of(user) for user in node.users)
    )


def _is_even(node: Node, space: Collection[Any]) -> bool:
    """Tell whether a map of the image's extent has one value throughout, if the maps that it is made of have."""
    name, viewed = name_of(node), viewed_by(node)
    if name == "expand":
        source, shape = taken_by(node)[0].meta["val"].shape, node.meta["val"].shape
        pairs = zip(shape[len(shape) - len(source) :], source, strict=True)
        return all(isinstance(n, int) or not isinstance(m, int) or m == 1 for n, m in pairs)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise or name in _EVEN or (viewed is not None and is_sized(viewed, space))


def space_of(image: Node) -> frozenset[Any]:
    """Return the symbols of the image's free extents over space."""
    extents = image.meta["val"].shape[2:]
    return frozenset(s for n in extents if not isinstance(n, int) for s in n.node.expr.free_symbols)


def is_sized(node: Node, space: Collection[Any]) -> bool:
    """Tell whether a tensor follows the image's extent; a batch of vectors does not."""
    value = node.meta.get("val")
    extents: Sequence[Any] = value.shape if isinstance(value, Tensor) else ()
    free = (n.node.expr.free_symbols for n in extents if not isinstance(n, int))
    return any(symbol in space for symbols in free for symbol in symbols)
