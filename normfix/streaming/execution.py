"""Run the stages of a program over blocks: read with the stage's halo, compute, keep the interior, measure it.

Stage by stage, within it image by image and block by block. At the end of a stage, what the blocks measured is
put together in the order of images and blocks, whoever computed them in which order, and the statistics are set
before the next stage starts. So the numbers depend on the blocks alone: not on workers, order or budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfix.errors import NormfixError
from normfix.streaming.maps import Maps
from normfix.streaming.program import Program, Shapes
from normfix.streaming.reach import Reach
from normfix.streaming.sources import Source
from normfix.streaming.stages import Stage
from normfix.streaming.stores import Budget, Kept, Store
from normfix.tiles import Geometry, Tile, grid, round_up

__all__ = ["Schedule", "Statistic", "block_extents", "execute", "forecast"]

Progress = Callable[[int, int, int, int], None]
"""Called with (stage, stages, blocks done, blocks in the stage)."""

Sink = Callable[[int, Node, tuple[int, ...], torch.dtype, tuple[int, ...]], Kept | None]
"""Called with (image, value, its shape, its dtype, the blocks it comes in); gives the place it goes to, or None."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """What becomes of a site's operand.

    `dims` are the operand's dimensions it runs over, None if blocks of it cannot be put together. `measure`
    reduces the operand of one block; `settle` receives what was measured, per image in the order of the blocks,
    and sets the statistic.
    """

    site: str
    dims: tuple[int, ...] | None
    measure: Callable[[Tensor], Any]
    settle: Callable[[list[list[Any]]], None]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A program cut into stages, each with its reach."""

    program: Program
    maps: Maps
    stages: tuple[Stage, ...]
    reaches: tuple[Reach, ...]

    def done_after(self, stage: Stage) -> list[Node]:
        """Return the stored values that no stage after this one reads."""
        last = {node: later.number for later in self.stages for node in later.reads}
        held = dict.fromkeys((*stage.reads, *stage.stores))
        return [n for n in held if n is not self.program.image and last.get(n, -1) <= stage.number]


def block_extents(schedule: Schedule, tile: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the blocks of each stage in pixels, multiples of its grid.

    The heaviest stage works on blocks of `tile`; one that holds a fourth (2D) of its bytes per pixel on blocks
    twice as long, and so on, so that small maps are not cut into crumbs.
    """
    most = max(stage.weight for stage in schedule.stages)
    extents = []
    for stage, reach in zip(schedule.stages, schedule.reaches, strict=True):
        factor = 1
        while stage.weight * (2 * factor) ** len(tile) <= most:
            factor *= 2
        extents.append(tuple(round_up(n * factor, g) for n, g in zip(tile, reach.grid, strict=True)))
    return extents


def forecast(schedule: Schedule, sizes: Sequence[tuple[int, ...]], limit: int | None) -> Budget:
    """Tell what images of these sizes (N, C, *space) will hold between stages, at most, in memory and on disk."""
    known = {size: schedule.program.shapes(size) for size in set(sizes)}
    budget, held = Budget(limit), dict[tuple[int, Node], tuple[int, bool]]()
    for stage in schedule.stages:
        for number, size in enumerate(sizes):
            for node in stage.stores:
                amount = math.prod(known[size][node]) * node.meta["val"].element_size()
                held[number, node] = amount, budget.take(amount)
        for node in schedule.done_after(stage):
            for number in range(len(sizes)):
                budget.give(*held.pop((number, node)))
    return budget


def execute(
    schedule: Schedule,
    images: Sequence[Source],
    *,
    tile: Sequence[int],
    store: Store,
    statistics: Sequence[Statistic] = (),
    settled: Callable[[], None] = lambda: None,
    sink: Sink = lambda image, node, shape, dtype, blocks: None,
    workers: int = 1,
    progress: Progress = lambda stage, stages, done, total: None,
) -> None:
    """Run all stages over all images.

    Args:
        schedule: of the network.
        images: each read by window, once or a few times per stage that needs it.
        tile: extents of the heaviest stage's blocks, in pixels per axis.
        store: keeps values between stages; empty again at the end.
        statistics: of the sites that the schedule measures.
        settled: called after each barrier, to take new statistics over into the program.
        sink: where computed values go besides the store.
        workers: blocks computed at a time.
        progress: called after each block.

    Raises:
        NormfixError: NF321 for an image size the program does not take, NF323 for a statistic that blocks do not
            add up to, NF325 if a block does not come out as
            the stage promised, NF326 and NF327 of the store.
    """
    for stage in schedule.stages:
        _require_whole(stage, schedule.maps, statistics)
    run = _Run(schedule, images, tuple(tile), store, {s.site: s for s in statistics}, sink)
    store.require(forecast(schedule, [image.shape for image in images], store.budget.limit).most_on_disk)
    with ExitStack() as stack:
        stack.callback(store.clear)
        pool = stack.enter_context(ThreadPoolExecutor(workers)) if workers > 1 else None
        for stage in schedule.stages:
            run.stage(stage, pool, progress)
            settled()


@dataclass(slots=True)
class _Run:
    schedule: Schedule
    images: Sequence[Source]
    tile: tuple[int, ...]
    store: Store
    statistics: dict[str, Statistic]
    sink: Sink
    shapes: list[Shapes] = field(init=False)
    extents: list[tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        known: dict[tuple[int, ...], Shapes] = {}
        for image in self.images:
            if image.shape not in known:
                known[image.shape] = self.schedule.program.shapes(image.shape)
        self.shapes = [known[image.shape] for image in self.images]
        self.extents = block_extents(self.schedule, self.tile)

    def stage(self, stage: Stage, pool: ThreadPoolExecutor | None, progress: Progress) -> None:
        """Run one stage, settle its statistics and free what no later stage reads."""
        sinks = [self._make_room(stage, number) for number in range(len(self.images))]
        jobs = [(number, tile) for number in range(len(self.images)) for tile in self._blocks(stage, number)]
        total = len(self.schedule.stages)
        parts: list[list[dict[str, Any]]] = [[] for _ in self.images]

        def work(job: tuple[int, Tile]) -> dict[str, Any]:
            return self._block(stage, job[0], job[1], sinks[job[0]])

        results = pool.map(work, jobs) if pool is not None else map(work, jobs)
        for done, ((number, _), measured) in enumerate(zip(jobs, results, strict=True), start=1):
            parts[number].append(measured)
            progress(stage.number, total, done, len(jobs))
        for site in (name for name, _ in stage.measures if name in self.statistics):
            self.statistics[site].settle([[block[site] for block in image] for image in parts])
        for node in self.schedule.done_after(stage):
            for number in range(len(self.images)):
                self.store.free(_name(number, node))

    def _make_room(self, stage: Stage, number: int) -> list[tuple[Node, Kept]]:
        """Return where the values of an image go that a stage computes."""
        places: list[tuple[Node, Kept]] = []
        block = self.extents[stage.number]
        for node in stage.gives:
            shape, dtype = self.shapes[number][node], node.meta["val"].dtype
            found, blocks = self.schedule.maps.maps[node], list(shape)
            for dim, n, scale in zip(found.dims, block, found.scale, strict=True):
                blocks[dim] = int(n * scale)
            if node in stage.stores:
                places.append((node, self.store.create(_name(number, node), shape, dtype, blocks)))
            wanted = self.sink(number, node, shape, dtype, tuple(blocks))
            if wanted is not None:
                places.append((node, wanted))
        return places

    def _blocks(self, stage: Stage, number: int) -> list[Tile]:
        reach = self.schedule.reaches[stage.number]
        ones = (1,) * len(reach.grid)
        geometry = Geometry(
            stride=reach.grid, halo=reach.halo, scale=tuple(map(Fraction, ones)), multiple=ones
        )
        return list(grid(self.images[number].shape[2:], self.extents[stage.number], geometry))

    def _block(
        self, stage: Stage, number: int, tile: Tile, places: list[tuple[Node, Kept]]
    ) -> dict[str, Any]:
        """Compute one block, write its interior and return what was measured of it."""
        size = self.images[number].shape[2:]
        window = [(s.start, s.stop) for s in tile.read]
        interior = [(s.start, n if s.stop is None else s.stop) for s, n in zip(tile.write, size, strict=True)]
        values = [self._value(number, node, window) for node in stage.reads]
        sizes = [self._extent(number, node, window) for node in stage.sizes]
        with torch.no_grad():
            results = dict(zip(stage.gives, stage.run(*values, *sizes), strict=True))
        del values
        kept, index = {}, {}
        for node, result in results.items():
            kept[node], index[node] = self._interior(stage, number, node, result, window, interior)
        for node, place in places:
            place.write(index[node], kept[node])
        return {
            site: self.statistics[site].measure(kept[node])
            for site, node in stage.measures
            if site in self.statistics
        }

    def _value(self, number: int, node: Node, window: list[tuple[int, int]]) -> Tensor:
        if node is self.schedule.program.image:
            return self.images[number].read(window)
        shape, found = self.shapes[number][node], self.schedule.maps.maps[node]
        spans = found.window(window, self.images[number].shape[2:], shape)
        return self.store[_name(number, node)].read(found.index(spans, len(shape))).contiguous()

    def _extent(self, number: int, node: Node, window: list[tuple[int, int]]) -> int:
        """Return an extent that a stage is told, as it is in the window."""
        of, dim = node.args[0], node.args[1]
        assert isinstance(of, Node)
        assert isinstance(dim, int)
        shape, found = self.shapes[number][of], self.schedule.maps.maps[of]
        if dim not in found.dims:
            return shape[dim]
        start, stop = found.window(window, self.images[number].shape[2:], shape)[found.dims.index(dim)]
        return stop - start

    def _interior(
        self,
        stage: Stage,
        number: int,
        node: Node,
        result: Tensor,
        window: list[tuple[int, int]],
        interior: list[tuple[int, int]],
    ) -> tuple[Tensor, tuple[slice, ...]]:
        """Return the part of a block's value that it is responsible for, and where it goes."""
        size, shape = self.images[number].shape[2:], self.shapes[number][node]
        found = self.schedule.maps.maps[node]
        outer, inner = found.window(window, size, shape), found.window(interior, size, shape)
        crop = tuple(
            (start - first, stop - first) for (start, stop), (first, _) in zip(inner, outer, strict=True)
        )
        for dim, (_, stop), (_, end), (first, last) in zip(found.dims, crop, window, outer, strict=True):
            axis = found.dims.index(dim)
            if result.shape[dim] < stop or (end == size[axis] and result.shape[dim] != last - first):
                raise NormfixError(
                    "NF325",
                    f"a block of {[b - a for a, b in window]} pixels gave {tuple(result.shape)} where the whole image "
                    f"has {shape}; the network treats this size otherwise than its parts.",
                    where=f"stage {stage.number}, {node.name}",
                )
        return result[found.index(crop, result.dim())], found.index(inner, len(shape))


def _require_whole(stage: Stage, maps: Maps, statistics: Sequence[Statistic]) -> None:
    """Refuse statistics that a block alone does not contribute to: of rows, say, or without a law."""
    dims = {statistic.site: statistic.dims for statistic in statistics}
    for site, node in stage.measures:
        over = dims.get(site, maps.maps[node].dims)
        if over is None or not set(maps.maps[node].dims) <= set(over):
            raise NormfixError(
                "NF323", "its statistic cannot be put together from blocks of the image.", where=site
            )


def _name(number: int, node: Node) -> str:
    return f"{number}-{node.name}"
