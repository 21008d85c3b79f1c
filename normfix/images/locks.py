"""Locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import sys
from typing import IO

__all__ = ["lock"]


def lock(file: IO[str] | int) -> bool:
    """Lock an open file against other processes, without waiting; tell whether it is held now.

    It is held until the file is closed.

    Raises:
        OSError: on a file system that knows no locks.
    """
    descriptor = file if isinstance(file, int) else file.fileno()
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True
