"""Values whose dimensions are positions of the image in a row, and what puts calls on them into a graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from normfix.tiling.stages.maps import ProgramMaps
from normfix.tiling.stages.program import Shapes, is_tensor_node

__all__ = ["Space", "called", "extent", "extents_of", "filled", "prune_", "shape_of", "space_of", "spread"]

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Space:
    """The map whose positions are the tokens of a value, and its dimensions over space in the order of the tokens."""

    map: Node
    dims: tuple[int, ...]


def space_of(node: Node, dim: int, maps: ProgramMaps, shapes: Shapes) -> Space | None:
    """Return what tokens are the positions of: the nearest map with as many, at every size.

    Tokens of all images of a batch, as `view(1, c, -1)` makes of them, are positions of none.
    """
    pending, seen = [node], {node}
    for candidate in pending:
        found = maps.maps.get(candidate)
        if found is not None and is_tensor_node(candidate):
            extents = [shapes[candidate][d] for d in found.dims]
            pairs = zip(found.scale, extents, strict=True)
            grows = tuple((scale * math.prod(extents) / extent,) for scale, extent in pairs)
            as_many = shapes[node][dim] == math.prod(extents) and maps.scales[node] == grows
            if as_many and _symbols(node, [dim]) <= _symbols(candidate, found.dims):
                return Space(candidate, tuple(sorted(found.dims)))
        fresh = [n for n in candidate.all_input_nodes if n in maps.moving and n not in seen]
        seen.update(fresh)
        pending += fresh
    return None


def spread(tokens: Node, dim: int, extents: Sequence[Node]) -> Node:
    """Return a value with the extents of space in place of a dimension of tokens."""
    shape = extents_of(tokens, range(len(shape_of(tokens))))
    dim %= len(shape)
    return called(tokens.graph, _aten.reshape.default, tokens, [*shape[:dim], *extents, *shape[dim + 1 :]])


def prune_(node: Node) -> None:
    """Erase a node that nothing uses, and what it alone used."""
    if not node.users:
        before = node.all_input_nodes
        node.graph.erase_node(node)
        for parent in before:
            prune_(parent)


def shape_of(node: Node) -> Sequence[Any]:
    """Return a value's extents, those that follow the image's as symbols; none of a number."""
    return tuple(getattr(node.meta["val"], "shape", ()))


def extent(value: Node, dim: int) -> Node:
    """Return what stands for an extent of a value."""
    return called(value.graph, _aten.sym_size.int, value, dim)


def extents_of(value: Node, dims: Iterable[int]) -> list[int | Node]:
    """Return extents of a value, and what stands for those that follow the image's."""
    shape = shape_of(value)
    return [shape[d] if isinstance(shape[d], int) else extent(value, d) for d in dims]


def called(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Return a new call, with what it stands for."""
    node = graph.call_function(target, args, kwargs)
    values = map_aggregate(args, lambda a: a.meta["val"] if isinstance(a, Node) else a)
    tensor = next((v for v in tree_leaves(values) if isinstance(v, FakeTensor)), None)
    with nullcontext() if tensor is None else tensor.fake_mode:
        node.meta["val"] = target(*values, **kwargs)
    return node


def filled(sizes: Sequence[Any], value: float, like: Node, dtype: torch.dtype) -> Node:
    """Return a new call that gives one number throughout, where another value is."""
    device = like.meta["val"].device
    node = like.graph.call_function(
        _aten.full.default, (list(sizes), value), {"dtype": dtype, "device": device}
    )
    extents = [n.meta["val"] if isinstance(n, Node) else n for n in sizes]
    with like.meta["val"].fake_mode:
        node.meta["val"] = torch.full(extents, value, dtype=dtype, device=device)
    return node


def _symbols(value: Node, dims: Iterable[int]) -> set[Any]:
    """Return the extents of the image, and the number of images, that some extents of a value are made of."""
    sizes = [shape_of(value)[dim] for dim in dims]
    return {symbol for n in sizes if not isinstance(n, int) for symbol in n.node.expr.free_symbols}
