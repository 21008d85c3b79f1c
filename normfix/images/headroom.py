"""Have the system refuse memory beyond a growth, so that one long call of plain Python ends instead of filling it.

A list of all pairs of places is one call that no other thread can interrupt. Linux can refuse it the memory, and Python
then raises MemoryError within the call. The limit is the process's: it is held for one thread at a time, only where
no other thread computes, whose memory it would refuse as well, and it is given up as soon as one begins.
"""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

if sys.platform == "linux":
    import resource

__all__ = ["Headroom", "lacks_memory", "written_bytes"]

_RESIDENT, _DATA = 1, 5
"""Fields of /proc/self/statm: pages in memory, and pages that may be written to and are nobody else's."""
_LOOK, _IDLE = 0.004, 0.2
"""Seconds for which other threads are looked at first, and the share of a core that they may take: what waits takes
none, and the watching thread less than a hundredth."""
_held = Lock()


class Headroom:
    """By how much the process may grow while one thread works; on Linux only.

    Args:
        growth: bytes; None for any.
        clock: the processor time of the thread that works.
    """

    def __init__(self, growth: int | None, clock: Callable[[], float]) -> None:
        self._growth = growth
        self._clock = clock
        self._most = 0
        self._limit: int | None = None
        self._looked = 0.0, 0.0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the process to it within the block, unless other threads compute."""
        if self._growth is None or not _resident() or not _held.acquire(blocking=False):
            yield
            return
        try:
            self._looked = self._clocks()
            time.sleep(_LOOK)
            if not self._others_compute():
                self._most = _resident() + self._growth
                self._hold(self._growth)
            yield
        finally:
            self._give_up()
            _held.release()

    def is_exceeded(self) -> bool:
        """Tell whether the process has grown by more; give it up if other threads computed since the last look."""
        if self._most and self._others_compute():
            self._give_up()
        return 0 < self._most < _resident()

    def _others_compute(self) -> bool:
        before, self._looked = self._looked, self._clocks()
        elapsed, taken = (now - then for now, then in zip(self._looked, before, strict=True))
        return taken > _IDLE * elapsed

    def _clocks(self) -> tuple[float, float]:
        """Return the elapsed time, and the processor time that all other threads have taken."""
        return time.monotonic(), time.process_time() - self._clock()

    def _hold(self, growth: int) -> None:
        if sys.platform == "linux":
            soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
            limit = written_bytes() + growth
            # A limit of the user's own that is lower stays.
            if all(other == resource.RLIM_INFINITY or other > limit for other in (soft, hard)):
                resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
                self._limit, self._before = limit, soft

    def _give_up(self) -> None:
        self._most = 0
        if sys.platform == "linux" and self._limit is not None:
            soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
            if soft == self._limit:
                resource.setrlimit(resource.RLIMIT_DATA, (self._before, hard))
            self._limit = None


def lacks_memory(error: BaseException | None) -> bool:
    """Tell whether an error is one of memory, or was raised from one."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__
    return error is not None


def written_bytes() -> int:
    """Return the bytes that the process may write to and that are nobody else's, 0 where they cannot be told."""
    return _bytes(_DATA)


def _resident() -> int:
    """Return the bytes that the process takes, 0 where they cannot be told."""
    return _bytes(_RESIDENT)


def _bytes(field: int) -> int:
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[field]) * mmap.PAGESIZE
    except (OSError, IndexError):
        return 0
