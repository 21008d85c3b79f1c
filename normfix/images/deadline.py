"""Stop what a file asks for when it has taken more processor time than the file is worth.

A loop in plain Python makes no tensors that could be counted, so a watching thread looks at the processor time of
the thread that works, and raises in it once the time is up. What a library catches is raised again. Only whole
bytecodes are interrupted: the numbers in a config are bounded before (`arguments`), so that no single one is long
without taking memory, which the system refuses it (`headroom`).
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from normfix.errors import NormfixError
from normfix.images.headroom import Headroom, lacks_memory

__all__ = ["within"]

T = TypeVar("T")

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
        growth: bytes by which the process may grow meanwhile. Only held to on Linux and while no other thread
            computes, whose memory it might be.
        function: must leave nothing half done behind that matters when it is interrupted anywhere.
        where: named in the error.
        instead: what to do next, for the error.

    Raises:
        NormfixError: NF121 if it takes longer, or more.

    Example:
        >>> within(5, lambda: sum(range(1000)), "config.json")
        499500
    """
    clock = _clock_of(threading.get_ident())
    headroom = Headroom(growth, clock)
    watch = _Watch(seconds, clock, headroom)
    try:
        with headroom.taken():
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
        if growth is None or not lacks_memory(error):
            raise
        raise _out_of_proportion(where, instead) from error


def _out_of_proportion(where: str, instead: str) -> NormfixError:
    return NormfixError(
        "NF121",
        "what it asks for takes far more time or memory than a file of this size is worth (a depth or count in it "
        f"is too large). It is not opened; {instead}.",
        where=where,
    )


class _Late(BaseException):
    """The time is up; no Exception, so that libraries which try alternatives do not go on."""


class _Watch:
    def __init__(self, seconds: float, clock: Callable[[], float], headroom: Headroom) -> None:
        self._thread = threading.get_ident()
        self._clock = clock
        self._until = clock() + seconds
        self._headroom = headroom
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
                if not self._over.is_set() and (self._clock() > self._until or self._headroom.is_exceeded()):
                    _raise_in(self._thread, _Late)
                    pause = _AGAIN


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
