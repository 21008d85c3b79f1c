"""Unfinished work in a folder: the runs of one command, each with its manifest, its journal and its values.

A command that was stopped, by a kill, a full disk or Ctrl-C, leaves its folder; the same command finds it and goes on.
Runs are numbered in the order in which the command makes them, and each must be the one it was. What is not
measured by blocks is done again. The folder is deleted when the whole command is done. A command that makes several
things, such as predictions of a folder of images, has runs of their own for each: whatever is done of them first is
done anew beside what was made, and must not meet the run of another.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from normfix.errors import NormfixError
from normfix.images.drafts import TakenError
from normfix.images.locks import lock
from normfix.networks.devices import CPU
from normfix.tiling.stages.journal import Journal, Unwritten, Written, is_own_file
from normfix.tiling.stages.manifest import Parts, digest_of_parts, require_same, write_manifest
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.store import Store

__all__ = ["Job", "resumable", "run_of"]

FOLDER = "normfix-run"

_DONE = re.compile(rf"\.{FOLDER}-done-[0-9]+")
_RUN = re.compile("((?:[0-9a-f]{16}-)?)[0-9]+")
"""What is in the folder of a command: its runs, behind a digest of what they make where it makes several things."""
_LOCK = "lock"

_ATTEMPTS = 20
_LOG = logging.getLogger("normfix")


@dataclass(frozen=True, slots=True)
class Given:
    """What one run has: the folder of its values, its journal, and a digest of what is computed."""

    folder: Path
    journal: Written
    run: str


class Job:
    """The runs of one command, or for a part of it; `begun` tells whether one was found to be this one's, or made."""

    def __init__(self, folder: Path, part: str = "") -> None:
        self.folder = folder
        self.begun = False
        self._prefix = (
            f"{hashlib.sha256(part.encode(errors='surrogateescape')).hexdigest()[:16]}-" if part else ""
        )
        self._runs = 0

    @property
    def own(self) -> list[Path]:
        """Return the folders of its runs, also those that an earlier process made."""
        found = [path for path in self.folder.iterdir() if self._is_own(path.name)]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    @property
    def is_alone(self) -> bool:
        """Tell whether the folder holds no other runs."""
        return all(path.name == _LOCK or self._is_own(path.name) for path in self.folder.iterdir())

    def _is_own(self, name: str) -> bool:
        match = _RUN.fullmatch(name)
        return match is not None and match[1] == self._prefix

    @contextmanager
    def run(self, parts: Parts) -> Iterator[Given]:
        """Begin or continue the next run.

        Raises:
            NormfixError: NF328 if the folder holds another run in its place, NF329 if it is damaged, NF327 if it
                cannot be written.
        """
        place = self.folder / f"{self._prefix}{self._runs}"
        self._runs += 1
        if not require_same(place / "manifest.json", parts):
            shutil.rmtree(place, ignore_errors=True)
            try:
                (place / "values").mkdir(parents=True)
            except OSError as error:
                raise _failed(self.folder, error) from error
            write_manifest(place / "manifest.json", parts)
        run = digest_of_parts(parts)
        journal = Written(place / "journal.jsonl", run)
        self.begun = True
        try:
            yield Given(place / "values", journal, run)
        finally:
            journal.close()


_CURRENT: ContextVar[Job | None] = ContextVar("normfix_job", default=None)


@contextmanager
def resumable(store: Path | None, part: str = "") -> Iterator[None]:
    """Let the runs inside be continued by a later process that gets here with the same store, for the same part.

    Nested, the outermost counts: what it encloses is done when it is done. Without a store nothing is kept. `part` is
    what a command that makes several things, one after the other, calls the one that is made inside.

    Raises:
        NormfixError: NF326 if there is no such folder, NF327 if it cannot be written, NF332 if another process works
            in it.
    """
    if store is None or _CURRENT.get() is not None:
        yield
        return
    with _locked(store) as folder:
        job = Job(folder, part)
        others = any((path / "manifest.json").exists() for path in job.own)
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
                _clear(job)


@contextmanager
def run_of(
    store: Path | None,
    parts: Callable[[], Parts],
    budget: int | None,
    *,
    shared: bool,
    device: torch.device = CPU,
    aside: int = 0,
) -> Iterator[tuple[Store, Journal]]:
    """Give a store and a journal for one run: in the job's folder, or in memory where there is no folder.

    Args:
        store: folder of the job, if any.
        parts: what is computed; asked for only where it is written down.
        budget: bytes of memory.
        shared: whether other processes write into the store.
        device: where blocks are computed.
        aside: bytes of it that the blocks take.
    """
    if store is None:
        yield Store(budget, device=device, aside=aside), Unwritten()
        return
    with resumable(store):
        job = _CURRENT.get()
        assert job is not None
        with job.run(parts()) as given:
            kept = Store(budget, given.folder, device, aside=aside, shared=shared, run=given.run)
            yield kept, given.journal


def _is_left(job: Job, error: BaseException) -> bool:
    """Tell whether something of this command is left to continue, and say so in the error."""
    if isinstance(error, TakenError) and error.kept is not None:
        return False  # its result lies under another name
    whole = sum(_blocks_in(path / "journal.jsonl") for path in job.own)
    if not job.begun or not whole or isinstance(error, NotInStages):
        return False
    note = (
        f"{whole} blocks are kept in {job.folder}. The same command goes on from there; delete the folder to give "
        "them up."
    )
    # add_note of Python 3.11, as 3.10 can do it
    error.__notes__ = [*getattr(error, "__notes__", ()), note]
    return True


def _blocks_in(journal: Path) -> int:
    """Return how many blocks a journal holds; none where something else stands in its place."""
    return journal.read_bytes().count(b'"block":') if is_own_file(journal) else 0


@contextmanager
def _locked(store: Path) -> Iterator[Path]:
    """Take the folder for this process; the lock ends with the process, however that ends."""
    if not store.is_dir():
        raise NormfixError("NF326", "there is no such folder to keep values in.", where=str(store))
    folder = (store / FOLDER).resolve()
    with _held(folder):
        _sweep(store)
        yield folder
    if os.name != "posix":
        _give_up(folder)


def _held(folder: Path) -> IO[str]:
    """Return the lock file of the folder, which is made, locked."""
    for _ in range(_ATTEMPTS):
        with ExitStack() as stack:
            try:
                folder.mkdir(exist_ok=True)
                _require_ours(folder)
                file = stack.enter_context((folder / _LOCK).open("a"))
                if not lock(file):
                    break
                if os.path.samestat(os.fstat(file.fileno()), (folder / _LOCK).stat()):
                    stack.pop_all()
                    return file
            except FileNotFoundError:  # another process finished in between
                continue
            except OSError as error:
                raise _failed(folder, error) from error
    raise NormfixError(
        "NF332",
        "another process works there. Wait for it, or name another folder: --store FOLDER (store= in Python).",
        where=str(folder),
    )


def _require_ours(folder: Path) -> None:
    """Refuse a folder in which anything else lies: it would be deleted with the runs when they are done.

    Raises:
        NormfixError: NF327.
    """
    for entry in folder.iterdir():
        kind = entry.is_file if entry.name == _LOCK else entry.is_dir
        if not _is_ours(entry.name) or entry.is_symlink() or not kind():
            raise NormfixError(
                "NF327",
                f"it holds {entry.name[:80]}, which normfix did not put there, and what is in it is deleted when a run "
                "is done. Take that out, or name another folder: --store FOLDER (store= in Python).",
                where=str(folder),
            )


def _failed(folder: Path, error: OSError) -> NormfixError:
    return NormfixError(
        "NF327",
        f"values cannot be kept there: {error.strerror or error}. Name a folder that can be written: --store FOLDER "
        "(store= in Python).",
        where=str(folder),
    )


def _is_ours(name: str) -> bool:
    return name == _LOCK or _RUN.fullmatch(name) is not None


def _clear(job: Job) -> None:
    """Delete the runs, and their folder where it holds no others."""
    if job.is_alone:
        _remove(job.folder)
        return
    done = _done(job.folder)
    try:
        done.mkdir(exist_ok=True)
        for run in reversed(job.own):  # a run without an earlier one is none
            run.replace(done / run.name)
    except OSError as error:
        _LOG.warning("%s could not be emptied: %s.", job.folder, error.strerror or error)
    shutil.rmtree(done, ignore_errors=True)
    _LOG.warning("%s holds unfinished runs of something else. Repeat the command, or delete it.", job.folder)


def _done(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-done-{os.getpid()}")


def _remove(folder: Path) -> None:
    """Delete the folder; it loses its name first, so that half of it is never taken for a run."""
    done = _done(folder)
    try:
        folder.replace(done)
    except OSError as error:
        if os.name != "posix":
            _empty(folder)
        else:  # the result is written, so this is no reason to fail
            _LOG.warning("%s could not be deleted: %s.", folder, error.strerror or error)
    else:
        shutil.rmtree(done, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Delete what is in a folder that keeps its name: on Windows it cannot lose it while its lock is open."""
    for manifest in folder.glob("*/manifest.json"):
        manifest.unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _give_up(folder: Path) -> None:
    """Delete a folder in which nothing but its lock is left; where another has that open, Windows refuses."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()


def _sweep(store: Path) -> None:
    """Delete the finished runs whose processes were killed while they did so."""
    for path in store.iterdir():
        if _DONE.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            if all(_is_ours(entry.name) for entry in path.iterdir()):
                shutil.rmtree(path, ignore_errors=True)
            else:
                _LOG.warning("%s is left alone: it holds what normfix did not put there.", path)
