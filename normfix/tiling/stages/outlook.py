"""What a run will take, before it starts, and how far it is.

Time is measured: every stage runs on a small part of a block, which is measured and kept as blocks are, and its blocks
are taken to cost the same per pixel they read. Later, what has passed corrects it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from normfix.networks.calling import refusals
from normfix.networks.devices import synchronize
from normfix.records.spans import round_up
from normfix.tiling.stages.budget import Budget
from normfix.tiling.stages.cutting import Stage
from normfix.tiling.stages.program import extent_of
from normfix.tiling.stages.running import Run

__all__ = ["Clock", "Outlook", "Step", "Watch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a run will take.

    `whole` of the `blocks` are computed already, by an earlier process; `seconds` are for the others, None if they
    could not be measured. `memory` and `disk` are the bytes between stages, at most; `block` is what the largest block
    takes while it is computed, about.
    """

    stages: int
    blocks: int
    whole: int
    seconds: float | None
    memory: int
    disk: int
    block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far a run is: `done` of the `blocks` of a stage; `left` seconds, if known."""

    stage: int
    stages: int
    done: int
    blocks: int
    left: float | None


class Watch(Protocol):
    """Is told about a run; `timed` if it wants to know how long, for which every stage is tried."""

    @property
    def timed(self) -> bool:
        """Tell whether seconds are wanted."""

    def begin(self, outlook: Outlook) -> None:
        """Take what the run will take, before its first block."""

    def block(self, step: Step) -> None:
        """Take how far it is, after each block."""


class Clock:
    """Tells a watch what a run will take and how far it is."""

    def __init__(self, watch: Watch, run: Run, held: Budget, at_a_time: int) -> None:
        self._watch, self._stages = watch, len(run.schedule.stages)
        counts, costs, largest = [], [], 0.0
        self._waiting: list[int] = []
        for stage in run.schedule.stages:
            blocks, done = run.blocks(stage), run.journal.blocks(stage.number)
            waiting = [block for number, block in enumerate(blocks) if number not in done]
            rate = _seconds_per_pixel(stage, run) if watch.timed and waiting else 0.0
            counts.append(len(blocks))
            self._waiting.append(len(waiting))
            costs.append(None if rate is None else rate * sum(b.pixels for b in waiting) / at_a_time)
            largest = max(largest, stage.weight * max(b.pixels for b in blocks))
        known = [cost for cost in costs if cost is not None]
        self._timed = watch.timed and len(known) == len(costs)
        self._costs = known if self._timed else [float(n) for n in self._waiting]
        watch.begin(
            Outlook(
                stages=self._stages,
                blocks=sum(counts),
                whole=sum(counts) - sum(self._waiting),
                seconds=sum(known) if self._timed else None,
                memory=held.most,
                disk=held.most_on_disk,
                block=int(largest),
            )
        )
        self._start = time.monotonic()

    def tick(self, stage: int, done: int, blocks: int) -> None:
        """Tell that so many blocks of a stage are done."""
        remaining = self._costs[stage] * (blocks - done) / max(1, self._waiting[stage])
        after = remaining + sum(self._costs[stage + 1 :])
        passed = sum(self._costs) - after
        elapsed = time.monotonic() - self._start
        left: float | None = elapsed * after / passed if passed > 0 else None
        if passed < _EARLY * (passed + after):  # the first blocks wait for files, caches and workers
            left = after if self._timed else None
        self._watch.block(Step(stage=stage, stages=self._stages, done=done, blocks=blocks, left=left))


_PIXELS = 1 << 16
"""What a stage is tried on."""

_EARLY = 0.05
"""The part of the work that is done before what has passed says more than the trial."""

_TRIAL = "trial"
"""Name in the store of what is tried."""


def _seconds_per_pixel(stage: Stage, run: Run) -> float | None:
    """Time a stage on a window that is small but has its shape; None if it does not run on such a window."""
    if stage.whole or stage.biases:  # its keys are those of the whole image, whatever the window
        return None
    maps, grid = run.schedule.maps.maps, run.schedule.reaches[stage.number].grid
    window = _window(run.extents[stage.number], grid, run.images[0].shape[2:])

    def shape(node: Node) -> list[int]:
        extents = list(run.shapes[0][node])
        for dim, n, scale in zip(maps[node].dims, window, maps[node].scale, strict=True):
            extents[dim] = int(n * scale)
        return extents

    given = [(node, shape(node)) for node in stage.reads]
    given += [(node, list(run.shapes[0][node])) for node in stage.overviews]
    likes = [node.meta["val"] for node, _ in given]
    values = [
        torch.full(extents, 0.5, device=like.device).to(like.dtype)
        for (_, extents), like in zip(given, likes, strict=True)
    ]
    told = [shape(of)[dim] for of, dim in map(extent_of, stage.sizes)]
    try:
        with torch.no_grad():
            _seconds(lambda: stage.run(*values, *told))  # the first call is slower
            results, seconds = _seconds(lambda: stage.run(*values, *told))
    except refusals():
        return None
    for node, result in zip(stage.gives, results, strict=True):
        seconds += _seconds_after(node, result, stage, run)
    return seconds / math.prod(window)


def _seconds_after(node: Node, result: Tensor, stage: Stage, run: Run) -> float:
    """Time what is done with a block's value: it is measured, written to the store and read again."""
    seconds = 0.0
    for site, measured in stage.measures:
        if measured is node and site in run.statistics:
            seconds += _seconds(partial(run.statistics[site].measure, result))[1]
    if node in stage.stores or node in run.keep:
        everything = tuple(slice(0, n) for n in result.shape)
        kept = run.store.create(_TRIAL, result.shape, result.dtype, result.shape)
        seconds += _seconds(lambda: kept.write(everything, result))[1]
        seconds += _seconds(lambda: kept.read(everything).clone())[1]
        run.store.free(_TRIAL)
    return seconds


def _seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            synchronize(leaf.device)
    return result, time.perf_counter() - start


def _window(extents: Sequence[int], grid: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Return a window on the grid, no larger than a block and about _PIXELS large."""
    edge = max(16, round(_PIXELS ** (1 / len(grid))))
    return tuple(
        min(round_up(n, g), round_up(edge, g), max(g, s // g * g))
        for n, g, s in zip(extents, grid, size, strict=True)
    )
