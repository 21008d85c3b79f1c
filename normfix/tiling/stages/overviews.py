"""Overviews: values of a fixed size that are of the whole image, and what connects maps with them.

A pool to a fixed number of bins makes an overview of a map, which blocks put together (`bins`). What is computed of
overviews alone (the small branch of pyramid pooling: convolutions, norms) is an overview too, and is computed once per
image. Where an overview is resized to a map again, blocks read it at their place in the whole (`stretches`); so they do
where a map is resized with aligned corners, or by a factor that is another at every size.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normfix.networks.graph.operators import name_of
from normfix.tiling.reach.calls import Call, call_of
from normfix.tiling.reach.extents import Unsized, lattice_of
from normfix.tiling.reach.rules.resizing import is_stretched
from normfix.tiling.stages.bins import Bins
from normfix.tiling.stages.contractions import CONTRACT, Contraction
from normfix.tiling.stages.maps import ProgramMaps, maps_of
from normfix.tiling.stages.program import Cut, Pool, Program, Shapes, Stretch, extent_of
from normfix.tiling.stages.stretches import RESIZED, Resizing

__all__ = ["Overview", "overview_of", "overviews", "with_overviews", "with_ragged"]

_aten = torch.ops.aten
_MEANS = frozenset(
    {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}
    | {"_adaptive_avg_pool2d", "_adaptive_avg_pool3d"}
)
_MAXIMA = frozenset({"adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"})


@dataclass(frozen=True, slots=True)
class Overview:
    """What is computed once per image: `run(*pools, *sizes)` returns `gives`.

    `pools` are bins of the whole image, `sizes` nodes that stand for an extent of a map, `measures` name the sites
    whose operands are among `gives`.
    """

    run: GraphModule
    pools: tuple[Node, ...]
    sizes: tuple[Node, ...]
    gives: tuple[Node, ...]
    measures: tuple[tuple[str, Node], ...] = ()

    def told(self, shapes: Shapes) -> tuple[int, ...]:
        """Return the extents that it is told, of an image at which values have these shapes."""
        return tuple(shapes[of][dim] for of, dim in map(extent_of, self.sizes))


def with_overviews(program: Program, example: Sequence[int]) -> Program:
    """Return a program whose pools to a fixed number of bins, and maps resized by their place, are barriers.

    Args:
        program: its graph stays as it is.
        example: a size (N, C, *space) that it takes.

    Returns:
        The program with the new barriers; itself where there are none.
    """
    ndim = len(example) - 2
    pools, stretches = dict(_pools(program, ndim)), dict(_stretches(program, ndim))
    maps = maps_of(replace(program, stretches=stretches), example) if pools or stretches else None
    if maps is None:
        return program
    pools = {node: pool for node, pool in pools.items() if pool.operand in maps.maps}
    small = overviews(replace(program, pools=pools), maps)
    stretches = {
        node: one
        for node, one in stretches.items()
        if node in maps.maps and _is_readable(one.source, maps, small)
    }
    cuts = [Cut(node.name, pool.operand, frozenset({node})) for node, pool in pools.items()]
    cuts += [
        Cut(n.name, one.source, frozenset({n})) for n, one in stretches.items() if one.source in maps.maps
    ]
    return replace(program, cuts=(*program.cuts, *cuts), pools=pools, stretches=stretches)


def with_ragged(program: Program, maps: ProgramMaps, sizes: Sequence[Sequence[int]]) -> Program:
    """Return a program in which maps are resized by their place where at one of these sizes the factor is another.

    Args:
        program: its graph stays as it is.
        maps: of the program.
        sizes: of images (N, C, *space).

    Returns:
        The program with the new barriers; itself where there are none.
    """
    fresh: dict[Node, Stretch] = {}
    ndim = len(maps.maps[program.image].dims)
    for size in sizes:
        shapes = program.shapes(size)
        for node in program.body.graph.nodes:
            source = node.all_input_nodes[0] if name_of(node) in RESIZED else node
            if source is node or node in program.stretches or not {node, source} <= maps.maps.keys():
                continue
            stretch = _resized(node, source, program, ndim)
            if not any(stretch.resizing.factors) and _is_off(maps, shapes, source, node):
                fresh[node] = stretch
    if not fresh:
        return program
    cuts = [Cut(node.name, one.source, frozenset({node})) for node, one in fresh.items()]
    return replace(program, cuts=(*program.cuts, *cuts), stretches={**program.stretches, **fresh})


def _is_off(maps: ProgramMaps, shapes: Shapes, source: Node, node: Node) -> bool:
    """Tell whether a map is resized by another factor than that by which maps grow."""
    before, after = maps.maps[source], maps.maps[node]
    return any(
        shapes[node][d] * coarse != shapes[source][e] * fine
        for d, fine, e, coarse in zip(after.dims, after.scale, before.dims, before.scale, strict=True)
    )


def _is_readable(source: Node, maps: ProgramMaps, small: Collection[Node]) -> bool:
    """Tell whether it can be read at any place: a map, an overview, or what is the same for every image."""
    if source not in maps.moving:
        return any(n != 1 for n in source.meta["val"].shape[2:])
    return source in maps.maps or source in small


def overviews(program: Program, maps: ProgramMaps) -> frozenset[Node]:
    """Return the values that are computed of pools' bins alone, bins included."""
    found: set[Node] = set(program.pools)
    for node in program.body.graph.nodes:
        sources = [n for n in node.all_input_nodes if n in maps.moving]
        grows = any(maps.scales.get(node, ()))
        if node in maps.moving and sources and not grows and all(n in found for n in sources):
            found.add(node)
    return frozenset(found)


def overview_of(
    program: Program, gives: Sequence[Node], measures: Sequence[tuple[str, Node]] = ()
) -> Overview:
    """Return what computes overviews of a program from its pools."""
    inside: set[Node] = set()
    pools: dict[Node, None] = {}
    sizes: dict[Node, None] = {}
    pending = list(gives)
    while pending:
        node = pending.pop()
        if node in inside:
            continue
        if node in program.pools:
            pools[node] = None
        elif node.target is _aten.sym_size.int:
            sizes[node] = None
        else:
            inside.add(node)
            pending += node.all_input_nodes
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in (*sorted(pools), *sorted(sizes))}
    for node in program.body.graph.nodes:
        if node in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in gives))
    graph.lint()
    run = GraphModule(program.body, graph)
    return Overview(run, tuple(sorted(pools)), tuple(sorted(sizes)), tuple(gives), tuple(measures))


def _pools(program: Program, ndim: int) -> Iterator[tuple[Node, Pool]]:
    """Yield the bins of maps: of a pool that gives their places too, its values, where nobody uses the places."""
    for node in program.body.graph.nodes:
        if node.target is CONTRACT:
            yield node, Pool(node.args[0], _contraction(node, ndim))
        name = name_of(node)
        counts: Any = node.args[1] if len(node.args) > 1 else None
        if name not in _MEANS | _MAXIMA or not _are_constant(counts, ndim):
            continue
        operand: Any = node.args[0]
        extents = operand.meta["val"].shape
        if len(extents) != ndim + 2 or any(isinstance(n, int) for n in extents[2:]):
            continue
        if name in _MEANS:
            yield node, Pool(operand, Bins("mean", tuple(counts)))
            continue
        users = [user for user in node.users if user.users]
        values = [user for user in users if user.target is operator.getitem and user.args[1] == 0]
        if len(values) == len(users):
            yield from ((value, Pool(operand, Bins("maximum", tuple(counts)))) for value in values)


def _contraction(node: Node, ndim: int) -> Contraction:
    batch, rows = (int(n) for n in node.args[1:])  # type: ignore[arg-type]
    return Contraction(batch, rows, (1,) * ndim)


def _are_constant(counts: Any, ndim: int) -> bool:
    return (
        isinstance(counts, list | tuple) and len(counts) == ndim and all(isinstance(n, int) for n in counts)
    )


def _stretches(program: Program, ndim: int) -> Iterator[tuple[Node, Stretch]]:
    """Yield the maps that are resized by their place in the whole image: others are so by a factor of their own."""
    for node in program.body.graph.nodes:
        if name_of(node) not in RESIZED:
            continue
        source = node.all_input_nodes[0]
        extents = source.meta["val"].shape
        if len(extents) != ndim + 2 or any(isinstance(n, int) for n in node.meta["val"].shape[2:]):
            continue
        try:
            call = _call(node, source, program)
            is_placed = bool(call.get("align_corners", False)) or is_stretched(call)
        except Unsized:
            continue
        if is_placed or all(isinstance(n, int) for n in extents[2:]):
            yield node, _resized(node, source, program, ndim)


def _call(node: Node, source: Node, program: Program) -> Call:
    tensors = [n.meta["val"] for n in (node, source)]
    return call_of(node, lattice_of(program.image.meta["val"].shape, tensors))


def _resized(node: Node, source: Node, program: Program, ndim: int) -> Stretch:
    call = _call(node, source, program)
    factors = call.get("scale_factors") or [call.get(name) for name in _FACTORS[ndim]]
    given = [f if isinstance(f, int | float) else None for f in (*factors, *[None] * ndim)][:ndim]
    aligned = call.arguments.get("align_corners")
    corners = None if aligned is None else bool(aligned)
    return Stretch(source, Resizing(call.name, corners, tuple(given)))


_FACTORS = {1: ("scales",), 2: ("scales_h", "scales_w"), 3: ("scales_d", "scales_h", "scales_w")}
"""Names of stated factors, by the number of axes."""
