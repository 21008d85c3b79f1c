"""What stages may use: blocks, memory, a folder, an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from normfix.errors import NormfixError
from normfix.images.sources import Image
from normfix.tiling.stages.engines import Engine, Local
from normfix.tiling.stages.journal import Journal
from normfix.tiling.stages.manifest import describe
from normfix.tiling.stages.outlook import Watch
from normfix.tiling.stages.resuming import run_of
from normfix.tiling.stages.running import Statistic
from normfix.tiling.stages.schedule import Schedule, largest_block
from normfix.tiling.stages.store import Store

__all__ = ["BLOCK_EXTENTS", "Resources"]


BLOCK_EXTENTS = {1: 1 << 18, 2: 512, 3: 96}


_SCRATCH = 3
"""As many times what is alive in a block on a device its kernels take: their workspaces, float64 copies to measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What stages may use: block extents in pixels per axis, bytes of memory, a folder, an engine; who is told."""

    tile: int | Sequence[int]
    budget: int | None = None
    store: Path | None = None
    engine: Engine = field(default_factory=Local)
    watch: Watch | None = None

    @contextmanager
    def run(
        self, planned: Schedule, images: Sequence[Image], statistics: Sequence[Statistic]
    ) -> Iterator[tuple[Store, Journal]]:
        """Give a store and a journal for one run, that of an earlier process if it was the same."""
        tile = self.extents(len(images[0].shape) - 2)
        sites = [statistic.site for statistic in statistics]
        parts = partial(describe, planned, images, tile, sites)
        at_a_time = self.engine.workers if isinstance(self.engine, Local) else 1
        aside = _SCRATCH * largest_block(planned, tile) * at_a_time
        with run_of(
            self.store, parts, self.budget, shared=self.engine.shared, device=planned.device, aside=aside
        ) as given:
            yield given

    def extents(self, ndim: int) -> tuple[int, ...]:
        """Return the block extents per axis.

        Raises:
            NormfixError: NF402 for what is no number of pixels per axis.
        """
        given = (self.tile,) * ndim if isinstance(self.tile, int) else tuple(self.tile)
        if len(given) != ndim or not all(isinstance(n, int) and n > 0 for n in given):
            raise NormfixError(
                "NF402", f"give 1 or {ndim} positive numbers of pixels, not {self.tile!r}.", where="tile"
            )
        return given
