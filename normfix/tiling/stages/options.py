"""Blocks: how an image is run in parts, what that may use, and who is told; checked in one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from normfix.errors import NormfixError
from normfix.images.sources import Image
from normfix.records.spans import per_axis
from normfix.tiling.stages.cluster import require_cluster
from normfix.tiling.stages.dask import Dask
from normfix.tiling.stages.engines import Engine, Local
from normfix.tiling.stages.journal import Journal
from normfix.tiling.stages.manifest import describe
from normfix.tiling.stages.outlook import Watch
from normfix.tiling.stages.resuming import run_of
from normfix.tiling.stages.running import Statistic
from normfix.tiling.stages.schedule import Schedule, largest_block
from normfix.tiling.stages.store import Store

__all__ = ["Blocks"]


_EXTENTS = {1: 1 << 18, 2: 512, 3: 96}
"""Pixels per axis of a block that nobody stated, per number of axes."""

_SCRATCH = 3
"""As many times what is alive in a block on a device its kernels take: their workspaces, float64 copies to measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How a network is run stage by stage over blocks of an image.

    Attributes:
        tile: extents of blocks in pixels, one number or one per axis; default: 512 in 2D, 96 in 3D.
        budget: bytes of memory for values between stages; None is no limit.
        store: folder where values between stages are kept on disk and a run that was stopped is continued from.
        workers: blocks computed at a time.
        engine: "dask" computes blocks on a cluster; needs `scheduler` and a `store` that all of it sees.
        scheduler: address of a dask scheduler.
        watch: is told what a run will take, and of each block.
        batch: tiles that share a call of the network, where an image is predicted in tiles; by default one on a CPU and
            as many as pay on a GPU, if the network treats the images of a batch apart. In one dtype results differ by
            rounding.

    Raises:
        NormfixError: NF410 for another engine or number of workers or tiles, NF402 for a tile that is no number of
            pixels, NF334 if a cluster is asked for without its address or without a store, or an address is given
            without asking for one.

    Example:
        >>> import normfix
        >>> normfix.Blocks(tile=512, budget=1 << 30).engine
        'local'
    """

    tile: int | Sequence[int] | None = None
    budget: int | None = None
    store: Path | None = None
    workers: int = 1
    engine: Literal["local", "dask"] = "local"
    scheduler: str | None = None
    watch: Watch | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.store is not None:  # a text is a path everywhere
            object.__setattr__(self, "store", Path(self.store))
        require_cluster(self.engine, self.scheduler, self.store)
        if self.workers < 1:
            raise NormfixError("NF410", "give 1 or more.", where=f"workers={self.workers!r}")
        if self.batch is not None and self.batch < 1:
            raise NormfixError("NF410", "give 1 or more.", where=f"batch={self.batch!r}")
        if self.tile is not None:
            self.extents(len(self.tile) if isinstance(self.tile, Sequence) else 1)

    @property
    def asked(self) -> bool:
        """Tell whether anything was stated that stages alone have."""
        stated = (self.tile, self.budget, self.store)
        return self.engine == "dask" or any(option is not None for option in stated)

    @property
    def crew(self) -> Engine:
        """Return who computes the blocks."""
        return Local(self.workers) if self.scheduler is None else Dask(self.scheduler)

    def sized(self, tile: int | Sequence[int] | None) -> Blocks:
        """Return them with the extents that a verb was given beside them, if any.

        Raises:
            NormfixError: NF414 if they have other extents already.
        """
        if tile is None:
            return self
        if self.tile not in (None, tile):
            raise NormfixError(
                "NF414", f"blocks have a size already, {self.tile!r}. State one.", where=f"tile={tile!r}"
            )
        return replace(self, tile=tile)

    def extents(self, ndim: int) -> tuple[int, ...]:
        """Return the block extents per axis.

        Raises:
            NormfixError: NF402 for what is no number of pixels per axis.
        """
        tile = _EXTENTS[ndim] if self.tile is None else self.tile
        extents = per_axis(tile, ndim)
        if extents is None or min(extents) < 1:
            raise NormfixError(
                "NF402", f"give a positive number of pixels, or {ndim} of them, not {tile!r}.", where="tile"
            )
        return extents

    @contextmanager
    def run(
        self, planned: Schedule, images: Sequence[Image], statistics: Sequence[Statistic]
    ) -> Iterator[tuple[Store, Journal]]:
        """Give a store and a journal for one run, that of an earlier process if it was the same."""
        tile = self.extents(len(images[0].shape) - 2)
        sites = [statistic.site for statistic in statistics]
        parts = partial(describe, planned, images, tile, sites)
        at_a_time = self.workers if self.engine == "local" else 1
        aside = _SCRATCH * largest_block(planned, tile) * at_a_time
        with run_of(
            self.store, parts, self.budget, shared=self.crew.shared, device=planned.device, aside=aside
        ) as given:
            yield given
