"""Who computes the blocks of a stage. Crews hand back what was measured as blocks become whole, in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from normfix.tiling.stages.blocks import Work
from normfix.tiling.stages.journal import Measured

__all__ = ["Crew", "Engine", "Local"]


class Crew(Protocol):
    """Computes blocks."""

    @property
    def at_a_time(self) -> int:
        """Return how many blocks are computed at a time."""

    def run(self, work: Work, numbers: Sequence[int]) -> Iterator[tuple[int, Measured]]:
        """Compute these blocks of a stage and yield (number, what was measured), in any order."""


class Engine(Protocol):
    """Gathers a crew for a run."""

    @property
    def shared(self) -> bool:
        """Tell whether other processes write, so that values between stages must be on disk."""

    def opened(self) -> AbstractContextManager[Crew]:
        """Give the crew, and let it go in the end."""


@dataclass(frozen=True, slots=True)
class Local:
    """Threads of this process."""

    workers: int = 1

    @property
    def shared(self) -> bool:
        """Return False; see Engine."""
        return False

    def opened(self) -> AbstractContextManager[Crew]:
        """Give threads, or this one; see Engine."""
        return nullcontext(_Alone() if self.workers == 1 else _Threads(self.workers))


class _Alone:
    at_a_time = 1

    def run(self, work: Work, numbers: Sequence[int]) -> Iterator[tuple[int, Measured]]:
        yield from ((number, work(number)) for number in numbers)


@dataclass(frozen=True, slots=True)
class _Threads:
    at_a_time: int

    def run(self, work: Work, numbers: Sequence[int]) -> Iterator[tuple[int, Measured]]:
        """Begin no block before it has a thread, so that stopping waits for those alone that run."""
        waiting = iter(numbers)
        with ThreadPoolExecutor(self.at_a_time) as pool:
            running: dict[Future[Measured], int] = {}
            while True:
                while len(running) < self.at_a_time and (number := next(waiting, None)) is not None:
                    running[pool.submit(work, number)] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
