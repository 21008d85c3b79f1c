"""Which engine runs the stages: threads of this process, or the workers of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normfix.errors import NormfixError
from normfix.tiling.stages.dask import Dask
from normfix.tiling.stages.engines import Engine, Local

__all__ = ["engine_of"]


def engine_of(
    engine: str,
    scheduler: str | None,
    store: Path | None,
    workers: int,
    *,
    choices: Sequence[str] = ("local", "dask"),
) -> Engine:
    """Return an engine by its name.

    Args:
        engine: one of the choices; "dask" is a cluster, every other this process.
        scheduler: address of the cluster's scheduler.
        store: folder for values between stages.
        workers: threads of this process.
        choices: names that whoever asks knows.

    Raises:
        NormfixError: NF410 for another name, NF333 if dask is not installed, NF334 if a cluster is asked for without
            its address or without a store, or an address is given without asking for one.
    """
    if engine not in choices:
        raise NormfixError("NF410", f"give {' or '.join(choices)}.", where=f"engine={engine!r}")
    if engine != "dask":
        if scheduler is not None:
            raise NormfixError(
                "NF334", 'a scheduler belongs to engine "dask" (--engine dask).', where=scheduler
            )
        return Local(workers)
    if scheduler is None or store is None:
        missing = "the scheduler's address (--scheduler tcp://HOST:8786)" if scheduler is None else "a store"
        raise NormfixError(
            "NF334",
            f"a cluster needs {missing}. Its workers meet in a store that all of them see: --store FOLDER on shared "
            "storage.",
            where="engine dask",
        )
    return Dask(scheduler)
