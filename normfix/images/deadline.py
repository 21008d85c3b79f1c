"""Stop what a file asks for when it has taken more processor time than the file is worth.

A loop in plain Python makes no tensors that could be counted, so a watching thread looks at the processor time of
the thread that works, and raises in it once the time is up. What a library catches is raised again. Only whole
bytecodes are interrupted: the numbers in a config are bounded before (`arguments`), so that no single one is long
without taking memory, as a list of all pairs of 16,000 places does; that the system refuses where it can.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from normfix.errors import NormfixError

__all__ = ["within"]

T = TypeVar("T")

_OWN_THREADS = 2
"""The one that works and the one that watches."""
_RESIDENT, _DATA = 1, 5
"""Fields of /proc/self/statm: what is in memory, and what may be written to and is nobody else's."""
_EVERY, _AGAIN = 0.05, 0.5
"""Seconds between two looks, and between two exceptions: long enough to leave the block after the first."""


def within(
    seconds: float,
    function: Callable[[], T],
    where: str,
    *,
    growth: int | None = None,
    instead: str = "name the network with --arch if it is right",
) -> T:
    """Call a function that may take so many seconds of processor time of this thread.

    Args:
        seconds: of processor time; of elapsed time where the system does not count a thread's.
        growth: bytes by which the process may grow meanwhile. Only held to on Linux and while no other thread of
            Python's runs, whose memory it might be.
        function: must leave nothing half done behind that matters when it is interrupted anywhere.
        where: named in the error.
        instead: what to do next, for the error.

    Raises:
        NormfixError: NF121 if it takes longer, or more.

    Example:
        >>> within(5, lambda: sum(range(1000)), "config.json")
        499500
    """
    watch = _Watch(seconds, growth)
    try:
        with _held_to(growth):
            watch.start()
            try:
                return function()
            finally:
                watch.stop()
    except _Late:
        # The exception may have come before stop had done its work.
        watch.stop()
        raise _out_of_proportion(where, instead) from None
    except (MemoryError, NormfixError) as error:
        if growth is None or not _lacks_memory(error):
            raise
        raise _out_of_proportion(where, instead) from error


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError)


def _out_of_proportion(where: str, instead: str) -> NormfixError:
    return NormfixError(
        "NF121",
        "what it asks for takes far more time or memory than a file of this size is worth (a depth or count in it "
        f"is too large). It is not opened; {instead}.",
        where=where,
    )


@contextmanager
def _held_to(growth: int | None) -> Iterator[None]:
    """Have the system refuse memory beyond a growth within the block, where it can and no other thread runs."""
    if growth is None or sys.platform != "linux" or threading.active_count() >= _OWN_THREADS:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    taken = _pages(_DATA)
    most = taken + growth
    if not taken or any(limit != resource.RLIM_INFINITY and limit < most for limit in (soft, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class _Late(BaseException):
    """The time is up; no Exception, so that libraries which try alternatives do not go on."""


class _Watch:
    def __init__(self, seconds: float, growth: int | None) -> None:
        self._thread = threading.get_ident()
        self._clock = _clock_of(self._thread)
        self._until = self._clock() + seconds
        self._most = None if growth is None else _pages(_RESIDENT) + growth
        self._lock = threading.Lock()
        self._over = threading.Event()

        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._watcher.start()

    def stop(self) -> None:
        with self._lock:
            self._over.set()
        if self._watcher.ident is not None:
            # Else the next call would take it for somebody else's thread.
            self._watcher.join()
        # What was raised but has not arrived yet must not arrive later.
        _raise_in(self._thread, None)

    def _watch(self) -> None:
        pause = _EVERY
        while not self._over.wait(pause):
            with self._lock:
                if (self._clock() > self._until or self._is_large()) and not self._over.is_set():
                    _raise_in(self._thread, _Late)
                    pause = _AGAIN

    def _is_large(self) -> bool:
        alone = threading.active_count() <= _OWN_THREADS
        return self._most is not None and alone and _pages(_RESIDENT) > self._most


def _pages(field: int) -> int:
    """Return the bytes that the process takes of a kind, 0 where they cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[field]) * mmap.PAGESIZE
    except OSError:
        return 0


def _clock_of(thread: int) -> Callable[[], float]:
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    number = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(number)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raise in another thread at its next bytecode; with None, take back what has not been raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if kind is None else ctypes.py_object(kind)
    )
