"""How far an operator of a captured graph moves a map: paddings, where parts begin, how much is cut, as formulas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from normfix.networks.graph.operators import name_of

__all__ = ["shifts"]

_CUTS, _JOINS = frozenset({"slice", "narrow", "slice_scatter"}), frozenset({"cat"})
_PADDED = frozenset(
    {"pad", "constant_pad_nd", "conv1d", "conv2d", "conv3d", "convolution", "im2col", "roll"}
    | {f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)}
    | {f"{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)}
)
"""Operators whose lists of numbers say by how much they pad or move."""


def shifts(node: Node) -> Iterator[Any]:
    """Yield the formulas of how far an operator moves what it is given: padding, beginnings, how much is cut."""
    name = name_of(node)
    if name in _CUTS:
        given: tuple[Any, ...] = (*_arguments(node, scattered=name == "slice_scatter"), None, None, None)
        source, dim, start, end = given[:4]
        yield from _formulas((start,))
        extent = source.shape[dim or 0]
        if isinstance(end, torch.SymInt) and isinstance(extent, torch.SymInt):
            yield extent.node.expr - end.node.expr
    elif name in _JOINS:
        parts, dim, *_ = (*map(_value_of, node.args), 0)
        extents = [part.shape[dim] for part in parts[:-1]]
        begins = (sum(map(_expression, extents[: k + 1])) for k in range(len(extents)))
        yield from (begin for begin in begins if not isinstance(begin, int))
    elif name in _PADDED:
        yield from _formulas(
            tree_leaves([_value_of(a) for a in node.args[1:] if isinstance(a, list | tuple)])
        )


def _arguments(node: Node, *, scattered: bool) -> Iterator[Any]:
    """Yield what a slice, narrow, or scattered slice is of, its dimension, where it begins and where it ends."""
    source, *rest = map(_value_of, node.args)
    yield source
    yield from rest[1:] if scattered else rest


def _value_of(argument: Any) -> Any:
    """Return an argument with the values that its nodes stand for."""
    return map_aggregate(argument, lambda a: a.meta.get("val") if isinstance(a, Node) else a)


def _formulas(values: Iterable[Any]) -> Iterator[Any]:
    yield from (value.node.expr for value in values if isinstance(value, torch.SymInt))


def _expression(extent: Any) -> Any:
    return extent.node.expr if isinstance(extent, torch.SymInt) else extent
