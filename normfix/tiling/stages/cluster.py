"""What a cluster takes to be asked for, told without torch."""

from __future__ import annotations

from pathlib import Path

from normfix.errors import NormfixError

__all__ = ["require_cluster"]


def require_cluster(engine: str, scheduler: str | None, store: Path | None) -> None:
    """Refuse a cluster without its address or without a store, and an address without a cluster.

    Raises:
        NormfixError: NF410 for another engine, NF334.
    """
    if engine not in ("local", "dask"):
        raise NormfixError("NF410", "give local or dask.", where=f"engine={engine!r}")
    if engine == "local" and scheduler is not None:
        raise NormfixError("NF334", 'a scheduler belongs to engine "dask" (--engine dask).', where=scheduler)
    if engine == "dask" and (scheduler is None or store is None):
        missing = "a store" if scheduler else "the scheduler's address (--scheduler tcp://HOST:8786)"
        raise NormfixError(
            "NF334",
            f"a cluster needs {missing}. Its workers meet in a store that all of them see: --store FOLDER on "
            "shared storage.",
            where="engine dask",
        )
