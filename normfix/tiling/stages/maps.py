"""Which values are maps over the image, along which of their dimensions, and at what scale.

A value's sizes are compared at image sizes that differ along one axis: the dimension that grows with the axis is
its own, and by how much it grows is the scale. Position i of a map belongs to image pixel i / scale; a block of
the image that starts on the grid of all scales starts each map at a whole position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch.fx import Node

from normfix.images.sources import Span
from normfix.tiling.stages.program import Program, Shapes, is_tensor_node

__all__ = ["Map", "ProgramMaps", "find_maps", "map_of"]


@dataclass(frozen=True, slots=True)
class Map:
    """A value over the image: per axis its dimension and its positions per image pixel."""

    dims: tuple[int, ...]
    scale: tuple[Fraction, ...]

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

    def index(self, spans: Sequence[Span], rank: int) -> tuple[slice, ...]:
        """Return the index of a tensor of this rank that takes the spans along the map's dimensions."""
        index = [slice(None)] * rank
        for dim, (start, stop) in zip(self.dims, spans, strict=True):
            index[dim] = slice(start, stop)
        return tuple(index)


@dataclass(frozen=True, slots=True)
class ProgramMaps:
    """The maps of a program; `scales` are those of every value, also of what is no map."""

    maps: Mapping[Node, Map]
    moving: frozenset[Node]
    scales: Mapping[Node, tuple[tuple[Fraction, ...], ...]]

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
    moving = _computed_from(program, {program.image})
    maps, scales = {}, {}
    for node in here:
        if node not in moving or not is_tensor_node(node):
            continue
        growth = [_growth(node, here, there, n) for there, n in zip(longer, step, strict=True)]
        scales[node] = tuple(tuple(found.values()) for found in growth)
        found = map_of(growth)
        if found is not None:
            maps[node] = found
    return ProgramMaps(maps, frozenset(moving), scales)


def _growth(node: Node, here: Shapes, there: Shapes, step: int) -> dict[int, Fraction]:
    """Return per dimension that grows how much it grows per pixel."""
    pairs = enumerate(zip(here[node], there[node], strict=True))
    return {dim: Fraction(after - before, step) for dim, (before, after) in pairs if after != before}


def map_of(growth: Sequence[Mapping[int, Fraction]]) -> Map | None:
    """Return the map whose axes each grow along one dimension of their own; see `_growth`."""
    if any(len(found) != 1 for found in growth):
        return None
    dims = tuple(next(iter(found)) for found in growth)
    scale = tuple(next(iter(found.values())) for found in growth)
    if len(set(dims)) != len(dims) or any(s <= 0 for s in scale):
        return None
    return Map(dims, scale)


def _computed_from(program: Program, sources: set[Node]) -> set[Node]:
    """Return the tensors that are computed from the sources' values (not from their sizes alone)."""
    found = set(sources)
    for node in program.body.graph.nodes:
        if node in found or (
            not is_tensor_node(node) and not isinstance(node.meta.get("val"), (tuple, list))
        ):
            continue
        if any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return found
