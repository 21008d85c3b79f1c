"""Stop what a file asks for when it has taken more processor time than the file is worth.

A loop in plain Python makes no tensors that could be counted, so a watching thread looks at the processor time of
the thread that works, and raises in it once the time is up. What a library catches is raised again. Only whole
bytecodes are interrupted: the numbers in a config are bounded before (`arguments`), so that no single one is long.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from normfix.errors import NormfixError

__all__ = ["within"]

T = TypeVar("T")

_OWN_THREADS = 2
"""The one that works and the one that watches."""
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
        growth: bytes by which the process may grow meanwhile. Only looked at on Linux and while no other thread of
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
        watch.start()
        try:
            return function()
        finally:
            watch.stop()
    except _Late:
        # The exception may have come before stop had done its work.
        watch.stop()
        raise NormfixError(
            "NF121",
            "what it asks for takes far more time or memory than a file of this size is worth (a depth or count in it "
            f"is too large). It is not opened; {instead}.",
            where=where,
        ) from None


class _Late(BaseException):
    """The time is up; no Exception, so that libraries which try alternatives do not go on."""


class _Watch:
    def __init__(self, seconds: float, growth: int | None) -> None:
        self._thread = threading.get_ident()
        self._clock = _clock_of(self._thread)
        self._until = self._clock() + seconds
        self._most = None if growth is None else _resident() + growth
        self._lock = threading.Lock()
        self._over = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        with self._lock:
            self._over.set()
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
        return self._most is not None and alone and _resident() > self._most


def _resident() -> int:
    """Return the bytes that the process takes, 0 where they cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * mmap.PAGESIZE
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
