"""Which values are maps over the image, along which of their dimensions, and at what scale.

A value's sizes are compared at image sizes that differ along one axis: the dimension that grows with the axis is
its own, and by how much it grows is the scale. Position i of a map belongs to image pixel i / scale; a block of
the image that starts on the grid of all scales starts each map at a whole position.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch.fx import Node

from normfix.images.sources import Span
from normfix.networks.calling import refusals
from normfix.networks.graph.extents import laid
from normfix.networks.graph.operators import taken_by
from normfix.tiling.reach.extents import Unsized, lattice_of
from normfix.tiling.stages.program import Program, Shapes, is_tensor_node

__all__ = ["Map", "ProgramMaps", "find_maps", "lattice", "maps_of"]


@dataclass(frozen=True, slots=True)
class Map:
    """A value over the image: per axis its dimension and its positions per image pixel.

    `lost` are the positions, per axis, by which it is shorter than the image times its scale, as behind a convolution
    without padding.
    """

    dims: tuple[int, ...]
    scale: tuple[Fraction, ...]
    lost: tuple[int, ...]

    def window(self, image: Sequence[Span], size: Sequence[int], shape: Sequence[int]) -> tuple[Span, ...]:
        """Return what a window of the image is in this map.

        Args:
            image: the window in pixels; it starts and ends on the grid or at the image's end.
            size: of the whole image.
            shape: of the whole map.
        """
        spans = []
        for (start, stop), n, d, s in zip(image, size, self.dims, self.scale, strict=True):
            # rounded down, without making fractions: this runs several times per block
            up, down = s.numerator, s.denominator
            last = shape[d] if stop >= n else min(shape[d], stop * up // down)
            spans.append((start * up // down, last))
        return tuple(spans)

    def taken(self, image: Sequence[Span], size: Sequence[int], shape: Sequence[int]) -> tuple[Span, ...]:
        """Return what a window of the image would have made of this map: as `window`, without what is lost at its end.

        What pads the map again, or adds it to another, is then given the extents that it has of the whole.
        """
        spans = self.window(image, size, shape)
        ends = [stop < n for (_, stop), n in zip(image, size, strict=True)]
        return tuple(
            (start, stop - less if inside else stop)
            for (start, stop), inside, less in zip(spans, ends, self.lost, strict=True)
        )

    def index(self, spans: Sequence[Span], rank: int) -> tuple[slice, ...]:
        """Return the index of a tensor of this rank that takes the spans along the map's dimensions."""
        index = [slice(None)] * rank
        for dim, (start, stop) in zip(self.dims, spans, strict=True):
            index[dim] = slice(start, stop)
        return tuple(index)


@dataclass(frozen=True, slots=True)
class ProgramMaps:
    """The maps of a program; `scales` are those of every value, also of what is no map.

    `laid` are values of the places of pixels, such as a mask.
    """

    maps: Mapping[Node, Map]
    moving: frozenset[Node]
    scales: Mapping[Node, tuple[tuple[Fraction, ...], ...]]
    laid: frozenset[Node]

    def grid(self, nodes: Sequence[Node], ndim: int) -> tuple[int, ...]:
        """Return per axis the number of pixels on which all these values start at whole positions."""
        return tuple(
            math.lcm(1, *(s.denominator for n in nodes for s in self.scales.get(n, ((),) * ndim)[axis]))
            for axis in range(ndim)
        )


def find_maps(program: Program, size: Sequence[int], step: Sequence[int]) -> ProgramMaps:
    """Compare a program's sizes at image sizes (N, C, *space) that differ by `step` per axis."""
    here = program.shapes(size)
    ndim = len(size) - 2
    longer = []
    for axis in range(ndim):
        grown = list(size)
        grown[axis + 2] += step[axis]
        longer.append(program.shapes(grown))
    growing = {n for n in here if any(here[n] != there[n] for there in longer)}
    moving = _computed_from(program, {program.image, *program.stretches}, growing)
    maps, scales = {}, {}
    for node in here:
        if node not in moving or not is_tensor_node(node):
            continue
        growth = [_growth(node, here, there, n) for there, n in zip(longer, step, strict=True)]
        scales[node] = tuple(tuple(found.values()) for found in growth)
        found = _map_of(growth, here[node], size)
        if found is not None:
            maps[node] = found
    placed = frozenset(laid(program.body.graph, program.image, program.stretches))
    return ProgramMaps(maps, frozenset(moving), scales, placed)


def maps_of(program: Program, example: Sequence[int]) -> ProgramMaps | None:
    """Return the program's maps, by a growth that it takes; None if it takes none."""
    coarsest = [math.lcm(64, n) for n in lattice(program) or (1,) * (len(example) - 2)]
    for steps in (coarsest, *([n] * len(coarsest) for n in (64, 32, 16, 8, 4, 2, 1))):
        try:
            return find_maps(program, example, steps)
        except refusals():
            continue
    return None


def lattice(program: Program) -> tuple[int, ...] | None:
    """Return per axis the pixels by which an image grows for all maps to grow whole; None if that is not found."""
    tensors = [n.meta["val"] for n in program.body.graph.nodes if is_tensor_node(n)]
    shape = program.image.meta["val"].shape
    try:
        return lattice_of(shape, tensors).lattice
    except Unsized:
        return None


def _growth(node: Node, here: Shapes, there: Shapes, step: int) -> dict[int, Fraction]:
    """Return per dimension that grows how much it grows per pixel."""
    pairs = enumerate(zip(here[node], there[node], strict=True))
    return {dim: Fraction(after - before, step) for dim, (before, after) in pairs if after != before}


def _lost(
    dims: Sequence[int], scale: Sequence[Fraction], shape: Sequence[int], size: Sequence[int]
) -> tuple[int, ...]:
    """Return by how many positions a map is shorter than its scale says; 0 where it starts at no whole ones."""
    lacks = [n * s - shape[d] for n, d, s in zip(size[2:], dims, scale, strict=True)]
    return tuple(int(n) if n > 0 and n.denominator == 1 else 0 for n in lacks)


def _map_of(
    growth: Sequence[Mapping[int, Fraction]], shape: Sequence[int], size: Sequence[int]
) -> Map | None:
    """Return the map, of this shape at a size of the image, whose axes each grow along one dimension of their own."""
    if any(len(found) != 1 for found in growth):
        return None
    dims = tuple(next(iter(found)) for found in growth)
    scale = tuple(next(iter(found.values())) for found in growth)
    if len(set(dims)) != len(dims) or any(s <= 0 for s in scale):
        return None
    return Map(dims, scale, _lost(dims, scale, shape, size))


def _computed_from(program: Program, sources: set[Node], growing: Collection[Node]) -> set[Node]:
    """Return the tensors that are computed from the sources' values (not from their sizes alone).

    Args:
        program: whose tensors.
        sources: what they are computed from.
        growing: nodes whose sizes follow the image's. What takes a dtype and a device from what it is given, and no
            more, is no value of it but a map as large, and so is what is made of such maps alone while it grows.
    """
    found, blank = set(sources), set[Node]()
    for node in program.body.graph.nodes:
        if node in found or (
            not is_tensor_node(node) and not isinstance(node.meta.get("val"), (tuple, list))
        ):
            continue
        parents = found.intersection(node.all_input_nodes)
        if not parents:
            continue
        if parents <= blank or (node.op == "call_function" and not taken_by(node)):
            if node not in growing:
                continue
            blank.add(node)
        found.add(node)
    return found
