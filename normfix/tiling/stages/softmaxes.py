"""Softmax over all positions of an image, logarithms of sums of exponentials, and norms: from pools of the whole image.

    m = max x        s = n mean exp(x - m)        softmax = exp(x - m) / s        log-sum-exp = m + log s
    norm = (n mean |x|^p)^(1/p)

over n positions. The pools are put together from blocks (`bins`), so the softmax of a block is the whole image's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from normfix.tiling.stages.maps import ProgramMaps, maps_of
from normfix.tiling.stages.program import Program, Shapes
from normfix.tiling.stages.spaces import Space, called, extent, extents_of, prune_, shape_of, space_of, spread

__all__ = ["with_softmaxes"]

_aten = torch.ops.aten
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default)
_LOGARITHM = (_aten.log_softmax.int, _aten._log_softmax.default)
_SUM = (_aten.logsumexp.default,)
_NORM = (_aten.linalg_vector_norm.default,)
_MEANS = {1: _aten.adaptive_avg_pool1d, 2: _aten.adaptive_avg_pool2d, 3: _aten.adaptive_avg_pool3d}
_MAXIMA = {1: _aten.adaptive_max_pool1d, 2: _aten.adaptive_max_pool2d, 3: _aten.adaptive_max_pool3d}
_NARROW = (torch.float16, torch.bfloat16)


def with_softmaxes(program: Program, example: Sequence[int]) -> Program:
    """Return a program whose softmaxes over all positions are computed from pools of the whole image.

    Args:
        program: its graph is changed in place where there are any.
        example: a size (N, C, *space) that it takes.

    Returns:
        The program; itself where there are none.
    """
    targets = (*_SOFTMAX, *_LOGARITHM, *_SUM, *_NORM)
    nodes = [node for node in program.body.graph.nodes if node.target in targets]
    maps = maps_of(program, example) if nodes else None
    if maps is None:
        return program
    found = list(_over_space(nodes, maps, program.shapes(example)))
    for one in found:
        _pooled_(one)
    return program.recompiled() if found else program


class _Softmax(NamedTuple):
    """A softmax or norm of a value over its dimensions `dims`, which are space, or over one of tokens of `space`."""

    node: Node
    operand: Node
    dims: tuple[int, ...]
    space: Space | None


def _over_space(nodes: Sequence[Node], maps: ProgramMaps, shapes: Shapes) -> Iterator[_Softmax]:
    for node in nodes:
        operand: Any = node.args[0]
        place = 2 if node.target in _NORM else 1
        given: Any = node.args[place] if len(node.args) > place else None
        if given is None or not _is_summed(node):
            continue
        rank = len(shape_of(operand))
        dims = tuple(sorted(d % rank for d in ([given] if isinstance(given, int) else given)))
        map_ = maps.maps.get(operand)
        if map_ is not None and dims == tuple(sorted(map_.dims)):
            yield _Softmax(node, operand, dims, None)
        elif map_ is None and operand in maps.moving and len(dims) == 1:
            space = space_of(operand, dims[0], maps, shapes)
            if space is not None:
                yield _Softmax(node, operand, dims, space)


def _is_summed(node: Node) -> bool:
    """Tell whether a norm, if it is one, is the root of a sum of powers, in the dtype of its operand."""
    if node.target not in _NORM:
        return True
    power = node.args[1]
    return isinstance(power, int | float) and 0 < power < math.inf and not node.kwargs


def _pooled_(one: _Softmax) -> None:
    """Put what is computed from pools in place of a softmax."""
    node, graph = one.node, one.node.graph
    dtype = node.meta["val"].dtype
    wide = torch.float32 if dtype in _NARROW else dtype
    with graph.inserting_before(node):
        value, dims = one.operand, one.dims
        if one.space is not None:
            value = spread(value, dims[0], [extent(one.space.map, d) for d in one.space.dims])
            dims = tuple(range(dims[0], dims[0] + len(one.space.dims)))
        if value.meta["val"].dtype != wide:
            value = called(graph, _aten._to_copy.default, value, dtype=wide)
        leads = [d for d in range(len(shape_of(value))) if d not in dims]
        fronts = extents_of(value, leads)
        extents = [extent(value, d) for d in dims]
        # (n, ..., *space) -> (n, c, *space), as pools take it
        laid = called(graph, _aten.permute.default, value, [*leads, *dims])
        laid = called(graph, _aten.reshape.default, laid, [*fronts[:1], -1, *extents])
        smaller = node.target in (*_SUM, *_NORM)
        given = (
            _norm(node.args[1], laid, extents)
            if node.target in _NORM
            else _computed(node.target, laid, extents)
        )
        ends = [1] * len(dims) if smaller else extents
        given = called(graph, _aten.reshape.default, given, [*fronts, *ends])
        back = [*leads, *dims]
        given = called(graph, _aten.permute.default, given, [back.index(d) for d in range(len(back))])
        keeps = node.args[3:4] if node.target in _NORM else node.args[2:3]
        if smaller and not any(keeps):
            given = called(graph, _aten.squeeze.dims, given, list(dims))
        elif smaller and len(dims) > 1 and one.space is not None:
            given = called(graph, _aten.squeeze.dims, given, list(dims[1:]))
        elif one.space is not None:
            given = called(graph, _aten.flatten.using_ints, given, dims[0], dims[-1])
        if wide != dtype:
            given = called(graph, _aten._to_copy.default, given, dtype=dtype)
    node.replace_all_uses_with(given)
    prune_(node)


def _computed(target: Any, laid: Node, extents: Sequence[Node]) -> Node:
    """Return what a function gives over the space of a map (N, C, *space)."""
    graph, ones = laid.graph, [1] * len(extents)
    pool = called(graph, _MAXIMA[len(extents)].default, laid, ones)
    largest = called(graph, operator.getitem, pool, 0)
    above = called(graph, _aten.sub.Tensor, laid, largest)
    raised = called(graph, _aten.exp.default, above)
    total = _total(raised, extents)
    if target in _SOFTMAX:
        return called(graph, _aten.div.Tensor, raised, total)
    return called(
        graph,
        _aten.add.Tensor if target in _SUM else _aten.sub.Tensor,
        largest if target in _SUM else above,
        called(graph, _aten.log.default, total),
    )


def _norm(power: Any, laid: Node, extents: Sequence[Node]) -> Node:
    """Return the norm over the space of a map (N, C, *space)."""
    graph = laid.graph
    powers = called(graph, _aten.pow.Tensor_Scalar, called(graph, _aten.abs.default, laid), power)
    return called(graph, _aten.pow.Tensor_Scalar, _total(powers, extents), 1 / power)


def _total(laid: Node, extents: Sequence[Node]) -> Node:
    """Return the sum over the space of a map (N, C, *space), (N, C, 1, ...)."""
    graph = laid.graph
    mean = called(graph, _MEANS[len(extents)].default, laid, [1] * len(extents))
    count = reduce(lambda a, b: called(graph, operator.mul, a, b), extents)
    return called(graph, _aten.mul.Tensor, mean, count)
