"""The bound of a captured program: how far its output reaches, on which lattice, and what stands against a bound."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from normfix.networks import operators
from normfix.networks.graph.capture import WRAPPED, decomposed, image_of
from normfix.networks.graph.isolation import silence
from normfix.networks.graph.parts import owner_of
from normfix.records.derivations import Obstacle, PathStep
from normfix.records.spans import Spans
from normfix.tiling.reach.calls import call_of, tensor_of
from normfix.tiling.reach.cyclic import open_shifts
from normfix.tiling.reach.derivation import Derived, Reached, Trail, between, depends, derive
from normfix.tiling.reach.extents import Unsized, lattice_of
from normfix.tiling.reach.needs import Interval
from normfix.tiling.reach.places import placed_calls
from normfix.tiling.reach.rules.pointwise import keeps_place

__all__ = ["Bound", "bound_between", "bound_of"]

_PHASES = 64
"""Tiles within a lattice that are followed one by one; with more of them a whole lattice is added instead."""


@dataclass(frozen=True, slots=True)
class Bound:
    """How far maps reach into the maps that they are computed from, in pixels of the image that all lie over.

    `scale` and `offset` are those of the first result: it has scale n + offset positions. `masked` are cyclic shifts
    that let nothing of the opposite border in if their masks hide it, `masks` the calls that apply these.
    """

    derived: Derived
    sources: tuple[Node, ...]
    results: tuple[Node, ...]
    scale: tuple[Fraction, ...]
    offset: tuple[int, ...]
    masked: tuple[Node, ...] = ()
    masks: tuple[Node, ...] = ()

    @property
    def lattice(self) -> tuple[int, ...]:
        """Return pixels per axis."""
        return self.derived.sizes.lattice

    @property
    def wraps(self) -> tuple[Obstacle, ...]:
        """Return what reads the opposite border."""
        opened = (node for node in self.derived.wraps if node not in self.masked)
        return tuple(_obstacle(node, "it reads the opposite border") for node in opened)

    @property
    def shifts(self) -> tuple[Obstacle, ...]:
        """Return the cyclic shifts whose masks hide the opposite border, which no graph tells."""
        return tuple(_obstacle(node, "a mask hides the opposite border") for node in self.masked)

    @property
    def stretches(self) -> tuple[Obstacle, ...]:
        """Return what resizes by a factor that is another at every size of the image."""
        why = "it resizes by a factor that is another at every size of the image"
        return tuple(_obstacle(node, why) for node in self.derived.stretches)

    def obstacles(self) -> tuple[Obstacle, ...]:
        """Return what makes the reach unbounded; nothing where it is bounded."""
        found, _ = self._reached([0] * len(self.lattice))
        every = (reached for of_source in found.values() for reached in of_source)
        causes = {r.boundless.node: r.boundless.why for r in every if r.boundless is not None}
        return tuple(_obstacle(node, why) for node, why in causes.items())

    @property
    def is_whole(self) -> bool:
        """Tell whether it holds for all that is read: nothing is unbounded, and nothing comes from the other border."""
        return not self.derived.wraps and not self.obstacles()

    @property
    def is_whole_if_masked(self) -> bool:
        """Tell whether it does if masks hide what cyclic shifts bring around the border."""
        return not self.wraps and not self.obstacles()

    @property
    def knows_places(self) -> bool:
        """Tell whether something is computed with a place or with the image's size, masks of shifts aside."""
        if self.derived.stretches:
            return True
        # also those that write into a constant, which nothing is computed from
        nodes = self.results[0].graph.nodes
        found = placed_calls(nodes, self.derived.layouts, self.derived.sizes, self.masks)
        return next(found, None) is not None

    def halo(self, stride: Sequence[int]) -> Spans:
        """Return what a tile reads (before, after) if tiles start at multiples of a stride.

        Args:
            stride: per axis; one that does not divide the lattice is taken for their greatest common divisor.
        """
        units = [math.gcd(s, n) for s, n in zip(stride, self.lattice, strict=True)]
        counts = [n // unit for n, unit in zip(self.lattice, units, strict=True)]
        if math.prod(counts) > _PHASES and max(counts) > _PHASES:
            whole = self._spans([0] * len(counts))
            return tuple((b + n, a + n) for (b, a), n in zip(whole, self.lattice, strict=True))
        phases = range(max(counts))
        # axes are bounded one by one, so all of them move at a time
        starts = (
            [phase % count * unit for count, unit in zip(counts, units, strict=True)] for phase in phases
        )
        spans = [self._spans(start) for start in starts]
        return tuple((max(b for b, _ in axis), max(a for _, a in axis)) for axis in zip(*spans, strict=True))

    def stated(self, stride: Sequence[int]) -> dict[str, Any]:
        """Return what records state of it, by their fields, for tiles that start at multiples of a stride."""
        obstacles = self.obstacles()
        return {
            "bound": None if obstacles else self.halo(stride),
            "lattice": self.lattice,
            "scale": tuple(map(str, self.scale)),
            "offset": self.offset,
            "obstacles": obstacles,
            "wraps": self.wraps,
            "shifts": self.shifts,
            "paths": () if obstacles else self.paths(),
        }

    def along(self, axis: int, stride: int) -> tuple[int, int]:
        """Return the halo along one axis for tiles on a stride there."""
        strides = list(self.lattice)
        strides[axis] = stride
        return self.halo(strides)[axis]

    def paths(self) -> tuple[tuple[tuple[PathStep, ...], tuple[PathStep, ...]], ...]:
        """Return, per axis, the widest ways before and after a tile, from the first source to a result."""
        trail = Trail(layouts=self.derived.layouts)
        self.derived.reached(self.results, self.sources, [0] * len(self.lattice), trail)
        return tuple(
            (tuple(self._path(trail, axis, before=True)), tuple(self._path(trail, axis, before=False)))
            for axis in range(len(self.lattice))
        )

    def _path(self, trail: Trail, axis: int, *, before: bool) -> Iterator[PathStep]:
        """Yield what widens the interval, operator by operator; what adds nothing is left out."""
        steps = trail.steps(self.sources[0], axis, before=before)
        for step, reader in itertools.pairwise(steps):
            ends = [self._pixels(s.node, s.interval, axis, before=before) for s in (step, reader)]
            if None not in ends and (adds := ends[0] - ends[1]) != 0:  # type: ignore[operator]
                name = str(reader.node.target)
                yield PathStep(operator=name, where=_where(reader.node), adds=float(adds))

    def _pixels(self, node: Node, interval: tuple[int, int], axis: int, *, before: bool) -> Fraction | None:
        """Return how many pixels of the image an interval reaches beyond a tile."""
        pace = self.derived.pace(node, axis)
        if pace is None:
            return None
        if before:
            return -interval[0] / pace
        return (interval[1] + 1) / pace - self.lattice[axis]

    def _reached(self, starts: Sequence[int]) -> tuple[dict[Node, list[Reached]], list[Interval | None]]:
        return self.derived.reached(self.results, self.sources, starts)

    def _spans(self, starts: Sequence[int]) -> list[tuple[int, int]]:
        """Return (before, after) in pixels per axis of a tile of one lattice step."""
        by_source, extent = self._reached(starts)
        # by what the result itself is shorter than the image, its tiles are too
        lost = [max(0, int(-offset / scale)) for offset, scale in zip(self.offset, self.scale, strict=True)]
        spans = [
            (0, 0)
            if held is None
            else (max(0, start - held[0]), max(0, held[1] + 1 - short - start - pixels))
            for held, start, pixels, short in zip(extent, starts, self.lattice, lost, strict=True)
        ]
        for source, found in by_source.items():
            for axis, (reached, start, pixels) in enumerate(zip(found, starts, self.lattice, strict=True)):
                pace = self.derived.pace(source, axis)
                if reached.fore is None or pace is None:
                    continue
                first, last = reached.fore
                # outwards to whole pixels
                before, after = start - first / pace // 1, -(-(last + 1) / pace // 1) - (start + pixels)
                spans[axis] = max(spans[axis][0], int(before)), max(spans[axis][1], int(after))
        return spans


def bound_of(program: ExportedProgram, output: int = 0) -> Bound:
    """Derive the reach of a program.

    Args:
        program: as exported, with free spatial extents.
        output: number of the output among the tensors that it returns.

    Raises:
        Unsized: sizes are fixed, or the output is no map over the image.
    """
    program = _functional(program)
    returned = [n for n in tree_leaves(program.graph.output_node().args[0]) if isinstance(n, Node)]
    image = image_of(program)
    return bound_between(image, [image], [[n for n in returned if tensor_of(n) is not None][output]])


def bound_between(image: Node, sources: Sequence[Node], results: Sequence[Node]) -> Bound:
    """Derive how far some values of a graph reach into others.

    Args:
        image: gives the symbols of all sizes.
        sources: where the search ends; maps over the image.
        results: maps over the image.

    Raises:
        Unsized: sizes are fixed, or a result is no map over the image.
    """
    nodes = between(sources, results)
    tensors = [v for n in nodes for v in tree_leaves(n.meta.get("val")) if isinstance(v, Tensor)]
    derived = derive(nodes, set(sources), lattice_of(image.meta["val"].shape, tensors))
    mine = tuple(r for r in results if r in derived.layouts)
    layouts = [derived.scale(result) for result in mine]
    offset = derived.offset(mine[0]) if mine else None
    if not layouts or None in layouts or offset is None or layouts[0] is None:
        raise Unsized("the output is no map over the image")
    bound = Bound(derived, tuple(sources), mine, layouts[0], offset)
    if not derived.wraps:
        return bound
    opened, masks = open_shifts(derived.order, derived.readings, derived.layouts, mine, derived.sizes)
    masked = tuple(n for n in derived.wraps if n not in opened and call_of(n, derived.sizes).name == "roll")
    return replace(bound, masked=masked, masks=tuple(masks))


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Return a program in which nothing that depends on the image is written to what others read.

    What is written elsewhere, as a mask of windows is from zeros and numbers, stays: no value of it counts, and torch
    takes as long to rewrite a program as it took to capture it.
    """
    places = {node: place for place, node in enumerate(program.graph.nodes)}
    moved = {image_of(program)}
    for node in places:
        if node.op == "placeholder" or not depends(node, moved):
            continue
        if _changes_others(node, places):
            break
        moved.add(node)
    else:
        return program
    with silence(), torch.no_grad():
        return decomposed(program)


def _changes_others(node: Node, places: Mapping[Node, int]) -> bool:
    """Tell whether a node changes what others read, otherwise than pixel by pixel on its own."""
    target = node.target
    if not isinstance(target, OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)
    local = keeps_place(target)
    if not target._schema.is_mutable or (local and len(node.all_input_nodes) == 1):
        return False
    written = node.args[0] if node.args else None
    if not local or not isinstance(written, Node) or _is_view(written):
        return True
    return any(places[user] > places[node] or _is_view(user) for user in written.users)


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return _is_view(node.args[0])  # of parts, as chunk and split give them
    return node.op == "placeholder" or (
        isinstance(node.target, OpOverload) and operators.is_view(node.target)
    )


def _obstacle(node: Node, why: str) -> Obstacle:
    return Obstacle(operator=str(node.target), where=_where(node), why=why)


def _where(node: Node) -> str:
    path = owner_of(node)
    return path.removeprefix(WRAPPED).removeprefix(".") or "(root)"
