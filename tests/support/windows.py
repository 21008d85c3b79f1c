"""What Windows does with files, on Linux: nothing that is open is renamed or deleted, and locks are of bytes."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from normfix.images import locks

POSIX_ONLY = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?")
_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]')


def fault_of_name(name: str) -> str:
    """Say why Windows gives no file this name; '' where it does."""
    if _RESERVED.fullmatch(name.rstrip(" .").partition(".")[0].rstrip()):
        return "reserved"
    if _FORBIDDEN.search(name):
        return "forbidden character"
    return "ends in a dot or a space" if name != name.rstrip(" .") else ""


def behave_like_windows(patch: pytest.MonkeyPatch, *modules: object) -> None:
    """Let files behave as on Windows, and these modules see its `os.name`; needs /proc."""
    for name in ("rename", "replace"):
        patch.setattr(os, name, _guarded(getattr(os, name), moves=name == "rename"))
    for name in ("unlink", "remove"):
        patch.setattr(os, name, _guarded(getattr(os, name)))
    for name in ("rename", "replace", "unlink"):  # Python 3.10 binds them once
        if hasattr(pathlib, "_normal_accessor"):
            patch.setattr(pathlib._normal_accessor, name, getattr(os, name))
    patch.setattr(os, "open", _opened(os.open))
    patch.setattr(os, "fsync", _synced(os.fsync))
    for module in modules:
        patch.setattr(module, "os", _Windows())


def lock_bytes(patch: pytest.MonkeyPatch) -> dict[tuple[int, int, int], int]:
    """Give normfix Windows' locks; returns those that were taken, by device, file and byte."""
    held: dict[tuple[int, int, int], int] = {}

    def locking(descriptor: int, mode: int, count: int) -> None:
        state = os.fstat(descriptor)
        place = state.st_dev, state.st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        holder = held.get(place)
        if holder not in (None, descriptor) and _is_open_on(holder, state):
            raise OSError(errno.EACCES, "Permission denied")
        held[place] = descriptor

    patch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    patch.setattr(locks, "sys", SimpleNamespace(platform="win32"))
    return held


class _Windows:
    """The module os under another name of the system."""

    name = "nt"

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


def _is_open_on(descriptor: int, state: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), state)
    except OSError:
        return False


def _guarded(act, *, moves=False):
    def guarded(path, *args, **kwargs):
        whole = _whole(path, kwargs.get("dir_fd"))
        if any(used == whole or whole in used.parents for used in _used()):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
        if moves and os.path.lexists(args[0]):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", args[0])
        return act(path, *args, **kwargs)

    return guarded


def _opened(act):
    def opened(path, flags, *args, **kwargs):
        # what deletes trees opens folders, which Windows' own version of it does not
        if Path(path).is_dir() and sys._getframe(1).f_globals.get("__name__") != "shutil":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return act(path, flags, *args, **kwargs)

    return opened


def _synced(act):
    def synced(descriptor):
        flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()[1].split()[1]
        if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return act(descriptor)

    return synced


def _whole(path, folder) -> Path:
    base = Path("/proc/self/fd", str(folder)).resolve() if folder is not None else Path.cwd()
    return Path(os.path.realpath(base / os.fspath(path)))


def _used() -> set[Path]:
    """Return the files that this process has open or mapped."""
    used = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            used.add(entry.readlink())
        except OSError:
            continue
    lines = Path("/proc/self/maps").read_text().splitlines()
    used |= {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    return {path for path in used if path.is_file()}
