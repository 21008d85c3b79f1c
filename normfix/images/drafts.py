"""An output in the making: beside the name that it takes when it is whole, and takes from nobody.

A draft lies in a folder of its own beside its target, with a file that its process holds locked while it lives. Who
next writes there deletes the drafts whose locks are free: whoever made them was killed. Naming is one step that fails
where the name is taken, by a hard link for a file and by the kernel's refusal to replace a filled folder; so of two
runs with one output name one ends with an error, which says where its result lies.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from normfix.errors import NormfixError
from normfix.images.locks import lock

__all__ = [
    "Naming",
    "TakenError",
    "UnwritableError",
    "cannot_write",
    "drafting",
    "naming",
    "require_possible",
    "require_unnamed",
    "reserve",
    "sweep",
]

_PREFIX = ".normfix-draft-"
_NAME = re.compile(re.escape(_PREFIX) + "[0-9a-f]{16}")
_LOCK, _INSIDE = "lock", "draft"
_ATTEMPTS = 20
_PATIENCE = 5.0
"""Seconds that another process may take to name an output in the same folder."""
_UUID = re.compile(rb"urn:uuid:[0-9a-f-]{36}")
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
"""What renaming says where something has the name."""
_OTHER = "it exists and is not what this command makes"
_NO_SUCH_CALL = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system says that takes no room in advance."""

_LOG = logging.getLogger("normfix")


class UnwritableError(NormfixError):
    """An output that the system does not let be written: no room, no permission, a name that is too long."""


class TakenError(NormfixError):
    """The name of an output was taken when it was whole; `kept` is where it lies, if anywhere."""

    def __init__(self, target: Path, kept: Path | None, why: str) -> None:
        self.kept = kept
        where = "" if kept is None else f" What this run made is {kept}."
        super().__init__(
            "NF114",
            f"{why}, and normfix overwrites nothing.{where} Name another output, or remove this one.",
            where=str(target),
        )


@dataclass(slots=True)
class Naming:
    """Where a command writes: the target, or where that exists a place to compare with it; `again` if it was equal."""

    target: Path
    path: Path
    again: bool = False


@contextmanager
def drafting(target: Path) -> Iterator[Path]:
    """Give a path for a file or folder that becomes `target` if the block succeeds; else nothing is left.

    Raises:
        NormfixError: NF114 if the folder cannot be written, TakenError if something has the name by then.
    """
    sweep(target.parent)
    require_possible(target)
    existed = os.path.lexists(target)
    with _holder(target) as inside:
        draft = inside / target.name
        yield draft
        _appear(
            draft, target, _OTHER if existed else "another run or program gave it this name in the meantime"
        )


@contextmanager
def naming(target: Path) -> Iterator[Naming]:
    """Say where to write what a command makes, also where that command was done before: it is compared then.

    Raises:
        NormfixError: NF114 if the folder cannot be written, TakenError if the target holds something else.
    """
    sweep(target.parent)
    require_possible(target)
    if not os.path.lexists(target):
        if target.parent.is_dir():
            with _holder(
                target
            ):  # so that a folder that cannot be written is known before anything is computed
                pass
        yield Naming(target, target)
        return
    with _holder(target) as inside:
        place = Naming(target, inside / target.name)
        yield place
        if not os.path.lexists(place.path):
            return
        place.again = _same(place.path, target)
        if not place.again:
            _appear(place.path, target, _OTHER)


def require_unnamed(target: Path) -> None:
    """Refuse a name that something has.

    Raises:
        NormfixError: NF114.
    """
    if os.path.lexists(target):
        raise NormfixError(
            "NF114",
            "it exists, and normfix overwrites nothing. Name another output or remove this one.",
            where=str(target),
        )


def require_possible(target: Path) -> None:
    """Refuse a name that the system cannot give.

    Raises:
        NormfixError: NF114.
    """
    try:
        target.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_write(target, error) from error


def cannot_write(target: Path, error: OSError) -> UnwritableError:
    """Return the error for an output that the system does not let be written."""
    reason = " ".join((error.strerror or str(error)).split())[:160]
    todo = "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Name a place that can be written"
    return UnwritableError("NF114", f"cannot write it: {reason}. {todo}.", where=str(target))


def reserve(path: Path) -> None:
    """Take a mapped file's room now: on a disk that fills up later, writing to it would end the process."""
    if path.is_file() and hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in _NO_SUCH_CALL:
                    raise


def sweep(folder: Path) -> None:
    """Delete the drafts in a folder whose processes are gone, and say which cannot be told."""
    try:
        names = [entry.name for entry in os.scandir(folder) if _NAME.fullmatch(entry.name)]
    except OSError:  # no folder, nothing in it
        return
    for name in names:
        with suppress(OSError):  # another process sweeps too, or it is not ours to delete
            if reason := _swept(folder / name):
                _LOG.warning("%s is left alone: %s. Delete it if no run needs it.", folder / name, reason)


def _swept(holder: Path) -> str:
    """Delete a draft if its process is gone; return why it cannot be told, '' if it can."""
    if holder.is_symlink() or not holder.is_dir():
        return "it is no folder"
    names = {path.name for path in holder.iterdir()}
    if not names:
        holder.rmdir()
        return ""
    if not names <= {_LOCK, _INSIDE} or _LOCK not in names:
        return "it holds what normfix did not put there"
    with (holder / _LOCK).open("r+", encoding="utf-8", errors="replace") as file:
        said = file.read(4096)
        if said and not _is_here(said, holder):
            return "it is a draft of another machine, whose runs are not seen from here"
        try:
            free = lock(file)
        except OSError:
            return "its lock cannot be tried there"
        if not free:
            return ""
        if not said and _INSIDE in names:
            return "it does not say whose it is"
        shutil.rmtree(holder / _INSIDE, ignore_errors=True)
    # after the lock file is closed: Windows deletes nothing that is open
    _remove(holder)
    return ""


def _is_here(said: str, holder: Path) -> bool:
    """Tell whether a lock file is that of this draft, made on this machine."""
    try:
        record = json.loads(said)
        return bool(record == _record(holder, record["process"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _record(holder: Path, process: int) -> dict[str, object]:
    return {"draft": holder.name, "machine": platform.node(), "process": process}


@contextmanager
def _holder(target: Path) -> Iterator[Path]:
    """Give a folder beside the target that is gone afterwards, and marked as this process's while it is there."""
    try:
        holder, file = _made(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        with file:
            try:
                (holder / _INSIDE).mkdir()
            except OSError as error:
                raise cannot_write(target, error) from error
            yield holder / _INSIDE
    finally:
        _remove(holder)


def _made(parent: Path) -> tuple[Path, IO[str]]:
    """Make a folder and its lock file, and hold the lock; anew where a sweeping process was quicker."""
    for attempt in range(_ATTEMPTS):
        holder = parent / f"{_PREFIX}{secrets.token_hex(8)}"
        holder.mkdir()
        try:
            file = (holder / _LOCK).open("x", encoding="utf-8")
        except FileNotFoundError:
            if attempt + 1 == _ATTEMPTS:
                raise
            continue
        except OSError:
            holder.rmdir()
            raise
        with suppress(OSError):  # no locks there: nobody sweeps it then
            if not lock(file):
                file.close()
                continue
        if (holder / _LOCK).exists():
            try:
                json.dump(_record(holder, os.getpid()), file)
                file.flush()
            except OSError:
                with suppress(OSError):  # it tries to write once more
                    file.close()
                _remove(holder)
                raise
            return holder, file
        file.close()
    raise OSError(errno.EAGAIN, "no draft could be held there")


def _remove(holder: Path) -> None:
    """Delete a draft; its lock file goes last, so that half of it is known for what it is and swept."""
    shutil.rmtree(holder / _INSIDE, ignore_errors=True)
    if os.path.lexists(holder / _INSIDE):
        return
    with suppress(OSError):
        (holder / _LOCK).unlink()
    with suppress(OSError):
        holder.rmdir()


def _appear(draft: Path, target: Path, why: str) -> None:
    """Give a draft its name, or one like it where that is taken, which is an error."""
    try:
        if not _placed(draft, target):
            raise TakenError(target, _spared(draft, target), why)
    except OSError as error:
        raise cannot_write(target, error) from error


def _spared(draft: Path, target: Path) -> Path | None:
    """Give a draft a name like the target's; None if there is nothing in it, or no such name."""
    if draft.is_dir() and not any(draft.iterdir()):
        return None
    ending = ".nii.gz" if target.name.lower().endswith(".nii.gz") else target.suffix
    stem = target.name[: len(target.name) - len(ending)]
    with suppress(OSError):
        for number in range(2, 100):
            name = target.with_name(f"{stem}-{number}{target.name[len(stem) :]}")
            if _placed(draft, name):
                return name
    return None


def _placed(draft: Path, target: Path) -> bool:
    """Give a draft a name that nothing has, in one step; tell whether it got it."""
    if draft.is_file():
        try:
            os.link(draft, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            pass
        else:
            with suppress(OSError):
                draft.unlink()
            return True
    with _held(target.parent) as alone:
        if os.path.lexists(target):
            return False
        if draft.is_file() and not alone:
            return _claimed(draft, target)
        try:
            draft.rename(target)
        except OSError as error:
            if error.errno in _TAKEN and os.path.lexists(target):
                return False
            raise
    return True


def _claimed(draft: Path, target: Path) -> bool:
    """Name a file where there are neither links nor locks: take the name with an empty file, then replace that."""
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    try:
        draft.replace(target)
    except OSError:
        target.unlink(missing_ok=True)
        raise
    return True


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Keep other processes of normfix from naming anything in a folder; tell whether that is possible there."""
    if os.name != "posix":  # renaming never replaces anything there
        yield True
        return
    with ExitStack() as stack:
        alone = False
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            until = time.monotonic() + _PATIENCE
            while not (alone := lock(descriptor)) and time.monotonic() < until:
                time.sleep(0.05)
        yield alone


def _same(one: Path, other: Path) -> bool:
    """Tell whether two files, or all files of two folders, are the same bytes under the same names."""
    if one.is_dir() != other.is_dir() or other.is_symlink():
        return False
    if one.is_file():
        return _same_bytes(one, other)
    mine, theirs = _files(one), _files(other)
    return mine == theirs and all(_same_bytes(one / name, other / name) for name in mine)


def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())


def _same_bytes(one: Path, other: Path) -> bool:
    """Tell whether two files are the same bytes, but for the random name that OME-TIFF gives every file."""
    if one.stat().st_size != other.stat().st_size:
        return False
    named = one.suffix.lower() in (".tif", ".tiff")
    with one.open("rb") as a, other.open("rb") as b:
        while mine := a.read(1 << 20):
            theirs = b.read(1 << 20)
            if named:  # it stands in the first description
                mine, theirs, named = _UUID.sub(b"", mine), _UUID.sub(b"", theirs), False
            if mine != theirs:
                return False
    return True
