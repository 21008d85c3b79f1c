"""Run the stages of a program over blocks: read with the stage's halo, compute, keep the interior, measure it.

Stage by stage, within it image by image and block by block. At the end of a stage, what the blocks measured is
put together in the order of images and blocks, whoever computed them in which order, and the statistics are set
before the next stage starts. So the numbers depend on the blocks alone: not on engine, workers, order, budget or on
how often the run was stopped and continued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.fx import Node

from normfix.errors import NormfixError
from normfix.images.sources import Image
from normfix.tiling.stages.cutting import Stage
from normfix.tiling.stages.engines import Engine, Local
from normfix.tiling.stages.journal import Journal, Unwritten
from normfix.tiling.stages.outlook import Clock, Watch
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.running import Run, Sink, Statistic
from normfix.tiling.stages.schedule import Schedule, forecast
from normfix.tiling.stages.store import Store

__all__ = ["MOST_BLOCKS", "execute"]

MOST_BLOCKS = 1 << 20
"""Of one stage, over all images: what each measured is held until the stage ends, about a gigabyte of it then."""


def execute(
    schedule: Schedule,
    images: Sequence[Image],
    *,
    tile: Sequence[int],
    store: Store,
    statistics: Sequence[Statistic] = (),
    settled: Callable[[], None] = lambda: None,
    sink: Sink = lambda image, node, shape, dtype, blocks: None,
    keep: Sequence[Node] = (),
    engine: Engine | None = None,
    journal: Journal | None = None,
    watch: Watch | None = None,
) -> None:
    """Run all stages over all images.

    Args:
        schedule: of the network.
        images: each read by window, once or a few times per stage that needs it.
        tile: extents of the heaviest stage's blocks, in pixels per axis.
        store: keeps values between stages; empty again at the end but for what `keep` names.
        statistics: of the sites that the schedule measures.
        settled: called after each barrier, to take new statistics over into the program.
        sink: where computed values go besides the store.
        keep: values that the store holds at the end, under `kept_name`.
        engine: computes the blocks; default: this process, one at a time.
        journal: knows which blocks are whole already, and is told of new ones.
        watch: is told what to expect, and of each block.

    Raises:
        NormfixError: NF321 for an image size the program does not take, NF323 for a statistic that blocks do not
            add up to, NF325 if a block does not come out as the stage promised, NF326, NF327 and NF330 of the
            store, NF329 if the journal is of other statistics, NF338 for more blocks than are kept account of, and
            codes of the images and the engine.
    """
    for stage in schedule.stages:
        _require_whole(stage, schedule, statistics)
    run = Run(
        schedule,
        images,
        tuple(tile),
        store,
        {s.site: s for s in statistics},
        settled,
        sink,
        frozenset(keep),
        journal or Unwritten(),
    )
    _require_few(run)
    held = forecast(schedule, [image.shape for image in images], store.fresh_budget(), keep)
    store.require(held.most_on_disk)
    with (engine or Local()).opened() as crew:
        tick = Clock(watch, run, held, crew.at_a_time).tick if watch is not None else _unwatched
        for stage in schedule.stages:
            run.stage(stage, crew, tick)


def _require_few(run: Run) -> None:
    """Refuse images of more blocks than are kept account of, before any is made."""
    most = max(run.count(stage) for stage in run.schedule.stages)
    if most > MOST_BLOCKS:
        tile = "x".join(map(str, run.tile))
        raise NormfixError(
            "NF338",
            f"in blocks of {tile} pixels a stage has {most:,} of them, and up to {MOST_BLOCKS:,} are kept account of. "
            "State larger ones (--tile).",
            where="x".join(map(str, max((image.shape for image in run.images), key=math.prod))),
        )


def _unwatched(stage: int, done: int, blocks: int) -> None:
    """Tell nobody."""


def _require_whole(stage: Stage, schedule: Schedule, statistics: Sequence[Statistic]) -> None:
    """Refuse statistics that a block alone does not contribute to: of rows, say, or without a law."""
    dims = {statistic.site: statistic.dims for statistic in statistics}
    for site, node in stage.measures:
        flat = schedule.program.flat.get(site)
        moving = set(schedule.maps.maps[node].dims) if flat is None else {flat[0]}
        over = dims.get(site, tuple(moving))
        if over is None or not moving <= set(over):
            raise NotInStages(
                "NF323", "its statistic cannot be put together from blocks of the image.", where=site
            )
