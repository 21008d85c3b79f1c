"""Unfinished work in a folder: the runs of one command, each with its manifest, its journal and its values.

A command that was stopped, by a kill, a full disk or Ctrl-C, leaves its folder; the same command finds it and goes on.
Runs are numbered in the order in which the command makes them, and each must be the one it was. What is not
measured by blocks is done again. The folder is deleted when the whole command is done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO

from normfix.errors import NormfixError
from normfix.streaming.journal import Journal, Unwritten, Written
from normfix.streaming.manifest import Parts, require_same, write_manifest
from normfix.streaming.stores import Store

__all__ = ["Job", "resumable", "run_of"]

FOLDER = "normfix-run"

_FUTILE = ("NF321", "NF323", "NF324", "NF325")
"""What would fail again, so nothing is left to continue."""


class Job:
    """The runs of one command; `begun` tells whether one of them was found to be this command's, or made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun = False
        self._runs = 0

    @contextmanager
    def run(self, parts: Parts) -> Iterator[tuple[Path, Written]]:
        """Begin or continue the next run; give the folder of its values and its journal.

        Raises:
            NormfixError: NF328 if the folder holds another run in its place, NF329 if it is damaged.
        """
        place = self.folder / str(self._runs)
        self._runs += 1
        if not require_same(place / "manifest.json", parts):
            shutil.rmtree(place, ignore_errors=True)
            (place / "values").mkdir(parents=True)
            write_manifest(place / "manifest.json", parts)
        journal = Written(place / "journal.jsonl")
        self.begun = True
        try:
            yield place / "values", journal
        finally:
            journal.close()


_CURRENT: ContextVar[Job | None] = ContextVar("normfix_job", default=None)


@contextmanager
def resumable(store: Path | None) -> Iterator[None]:
    """Let the runs inside be continued by a later process that gets here with the same store.

    Nested, the outermost counts: what it encloses is done when it is done. Without a store nothing is kept.

    Raises:
        NormfixError: NF326 if there is no such folder, NF332 if another process works in it.
    """
    if store is None or _CURRENT.get() is not None:
        yield
        return
    with _locked(store) as folder:
        job, others = Job(folder), any(folder.glob("*/manifest.json"))
        token = _CURRENT.set(job)
        keep = False
        try:
            yield
        except BaseException as error:
            keep = _is_left(job, error)
            raise
        finally:
            _CURRENT.reset(token)
            if not keep and (job.begun or not others):
                _remove(folder)


@contextmanager
def run_of(
    store: Path | None, parts: Callable[[], Parts], budget: int | None, *, shared: bool
) -> Iterator[tuple[Store, Journal]]:
    """Give a store and a journal for one run: in the job's folder, or in memory where there is no folder.

    Args:
        store: folder of the job, if any.
        parts: what is computed; asked for only where it is written down.
        budget: bytes of memory.
        shared: whether other processes write into the store.
    """
    if store is None:
        yield Store(budget), Unwritten()
        return
    with resumable(store):
        job = _CURRENT.get()
        assert job is not None
        with job.run(parts()) as (folder, journal):
            yield Store(budget, folder, shared=shared), journal


def _is_left(job: Job, error: BaseException) -> bool:
    """Tell whether something of this command is left to continue, and say so in the error."""
    whole = sum(f.read_bytes().count(b'"block":') for f in job.folder.glob("*/journal.jsonl"))
    if not job.begun or not whole or (isinstance(error, NormfixError) and error.code in _FUTILE):
        return False
    error.add_note(
        f"{whole} blocks are kept in {job.folder}. The same command goes on from there; delete the folder to give "
        "them up."
    )
    return True


@contextmanager
def _locked(store: Path) -> Iterator[Path]:
    """Take the folder for this process; the lock ends with the process, however that ends."""
    if not store.is_dir():
        raise NormfixError("NF326", "there is no such folder to keep values in.", where=str(store))
    folder = (store / FOLDER).resolve()
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("a") as file:
        if not _lock(file):
            raise NormfixError(
                "NF332",
                "another process works there. Wait for it, or name another folder: --store FOLDER (store= in Python).",
                where=str(folder),
            )
        yield folder


def _lock(file: IO[str]) -> bool:
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Delete the folder; it loses its name first, so that half of it is never taken for a run."""
    done = folder.with_name(f".{folder.name}-done-{os.getpid()}")
    folder.replace(done)
    shutil.rmtree(done, ignore_errors=True)
