"""Locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import os
import sys
from typing import IO

__all__ = ["lock"]

_FAR = 1 << 30
"""Which byte is locked on Windows, where others cannot read what is locked: one that no file here has."""


def lock(file: IO[str] | int) -> bool:
    """Lock an open file against other processes, without waiting; tell whether it is held now.

    It is held until the file is closed.

    Raises:
        OSError: on a file system that knows no locks.
    """
    descriptor = file if isinstance(file, int) else file.fileno()
    try:
        if sys.platform == "win32":
            _lock_byte(descriptor)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def _lock_byte(descriptor: int) -> None:
    """Lock the same byte whatever was read or written before: on Windows a lock begins at the file's position."""
    import msvcrt

    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _FAR, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)
