"""A program cut into stages, each with its reach: what is run, and what it will hold."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from normfix.records.spans import round_up
from normfix.tiling.stages.budget import Budget
from normfix.tiling.stages.cutting import Stage
from normfix.tiling.stages.maps import ProgramMaps
from normfix.tiling.stages.program import Program
from normfix.tiling.stages.reach import Reach

__all__ = ["Schedule", "block_extents", "forecast", "largest_block"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A program cut into stages, each with its reach, and where the stages compute."""

    program: Program
    maps: ProgramMaps
    stages: tuple[Stage, ...]
    reaches: tuple[Reach, ...]
    device: torch.device

    def done_after(self, stage: Stage) -> list[Node]:
        """Return the stored values that no stage after this one reads."""
        last = {node: later.number for later in self.stages for node in self._held(later)}
        held = dict.fromkeys((*self._held(stage), *stage.stores))
        return [n for n in held if last.get(n, -1) <= stage.number]

    def _held(self, stage: Stage) -> Iterator[Node]:
        """Yield the stored values that a stage reads: of a map that is resized, its source."""
        for node in (*stage.reads, *stage.whole):
            stretch = self.program.stretches.get(node)
            source = node if stretch is None else stretch.source
            if (
                node not in self.program.numbers
                and source is not self.program.image
                and source in self.maps.maps
            ):
                yield source


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


def largest_block(schedule: Schedule, tile: Sequence[int]) -> int:
    """Return what the heaviest block takes while it is computed, with what it reads and gives, about, in bytes."""
    pixels = (
        math.prod(n + sum(halo) for n, halo in zip(extents, reach.halo, strict=True))
        for extents, reach in zip(block_extents(schedule, tile), schedule.reaches, strict=True)
    )
    return int(max(stage.weight * n for stage, n in zip(schedule.stages, pixels, strict=True)))


def forecast(
    schedule: Schedule, sizes: Sequence[tuple[int, ...]], budget: Budget, keep: Collection[Node] = ()
) -> Budget:
    """Tell what images of these sizes (N, C, *space) will hold between stages, at most, in memory and on disk.

    Args:
        schedule: of the network.
        sizes: of the images.
        budget: with nothing taken; it is returned with what the run takes.
        keep: values that are held to the end.
    """
    known = {size: schedule.program.shapes(size) for size in set(sizes)}
    held: dict[tuple[int, Node], tuple[int, bool]] = {}
    for stage in schedule.stages:
        for number, size in enumerate(sizes):
            for node in stage.gives:
                amount = math.prod(known[size][node]) * node.meta["val"].element_size()
                if node in stage.stores:
                    held[number, node] = amount, budget.take(amount)
                if node in keep:
                    budget.take(amount)
        for node in schedule.done_after(stage):
            for number in range(len(sizes)):
                budget.give(*held.pop((number, node)))
    return budget
