"""The workers of a dask cluster as a crew: a stage is a map over block numbers.

What a stage needs goes to each worker once, as a worker plugin, also to one that joins late or is started again; a task
is a number. Workers read images and values from shared storage, write values there and return what they measured.
If a worker dies, its blocks are computed again by others: the same bytes in the same places.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

import torch

from normfix.errors import NormfixError
from normfix.networks.numerics import exact_arithmetic
from normfix.tiling.stages.blocks import Work
from normfix.tiling.stages.journal import Measured

__all__ = ["Dask"]


@dataclass(frozen=True, slots=True)
class Dask:
    """A dask cluster, by its scheduler's address.

    Raises:
        NormfixError: NF333 if dask.distributed is not installed, NF334 if the scheduler does not answer, NF335 if
            workers cannot compute blocks, NF336 if blocks keep killing their workers.
    """

    scheduler: str
    patience: float = 30.0

    @property
    def shared(self) -> bool:
        """Return True; see Engine."""
        return True

    @contextmanager
    def opened(self) -> Iterator[_Workers]:
        """Connect to the scheduler and wait for a worker; see Engine."""
        distributed = _distributed()
        try:
            client = distributed.Client(self.scheduler, timeout=self.patience, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise NormfixError(
                "NF334",
                f"the scheduler does not answer: {' '.join(str(error).split())[:160]}. Start it (dask scheduler) and "
                "give the address that it prints.",
                where=self.scheduler,
            ) from error
        with client:
            try:
                client.wait_for_workers(1, timeout=self.patience)
            except TimeoutError as error:
                raise NormfixError(
                    "NF334",
                    f"no worker joined in {self.patience:.0f} seconds. Start some: dask worker {self.scheduler}.",
                    where=self.scheduler,
                ) from error
            except OSError as error:
                raise _gone(self.scheduler) from error
            yield _Workers(client)


class _Workers:
    """The workers of a cluster, behind a client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @property
    def at_a_time(self) -> int:
        """Return the threads of all workers; see Crew."""
        return max(1, sum(map(int, self._asked(self._client.ncores).values())))

    def run(self, work: Work, numbers: Sequence[int]) -> Iterator[tuple[int, Measured]]:
        """Submit block numbers, a few per thread ahead, and yield results as they come; see Crew."""
        if not numbers:
            return
        distributed = _distributed()
        name = f"normfix-{uuid.uuid4().hex}"
        self._hand_out(_toolbox(name, work, torch.get_num_threads()), name)
        running: dict[Any, int] = {}
        waiting = iter(numbers)

        def submit() -> Any:
            number = next(waiting)
            if self._client.status != _RUNNING:
                raise _gone(f"block {number}")
            future = self._client.submit(_compute, name, number, key=f"{name}-{number}", pure=False)
            running[future] = number
            return future

        try:
            ahead = min(len(numbers), _AHEAD * self.at_a_time)
            arriving = distributed.as_completed([submit() for _ in range(ahead)], loop=self._client.loop)
            for future in arriving:
                yield running.pop(future), self._result(future)
                with suppress(StopIteration):
                    arriving.add(submit())
        finally:
            with suppress(
                OSError, NormfixError
            ):  # a worker, or a scheduler, that is gone has nothing to let go of
                self._asked(partial(self._client.cancel, list(running), force=True))
                self._asked(partial(self._client.unregister_worker_plugin, name))

    def _asked(self, call: Callable[[], Any]) -> Any:
        """Return what the scheduler answers; one that is gone is not waited for.

        Raises:
            NormfixError: NF334.
        """
        answers: list[Any] = []
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                answers.append(call())
            except BaseException as error:  # noqa: BLE001 - raised below, by the thread that asked
                errors.append(error)

        asking = Thread(target=ask, daemon=True)
        asking.start()
        while asking.is_alive() and self._client.status == _RUNNING:
            asking.join(_LOOK)
        if self._client.status != _RUNNING:
            raise _gone("engine dask")
        if errors:
            raise errors[0]
        return answers[0]

    def _hand_out(self, toolbox: Any, name: str) -> None:
        """Send a stage's work to all workers; one that dies meanwhile is no reason to give up."""
        for attempt in range(_ATTEMPTS):
            try:
                self._asked(partial(self._client.register_plugin, toolbox, name=name))
            except OSError as error:
                if attempt + 1 == _ATTEMPTS:
                    raise _gone("engine dask") from error
                time.sleep(1)
            except NormfixError:
                raise
            except Exception as error:
                raise _unable(error) from error
            else:
                return

    def _result(self, future: Any) -> Measured:
        """Return what a worker measured, or raise what it raised."""
        distributed = _distributed()
        block = f"block {future.key.rpartition('-')[2]}"
        try:
            found: Measured = future.result()
        except distributed.KilledWorker as error:
            raise NormfixError(
                "NF336",
                "it ended several workers one after another. Give smaller blocks (--tile), or workers more memory.",
                where=block,
            ) from error
        except CancelledError as error:
            raise _gone(block) from error
        except OSError as error:
            if future.status == "error":  # the worker's own
                raise
            raise _gone(block) from error
        return found


_AHEAD = 4
"""Tasks per thread that are submitted ahead, so that no worker waits and the scheduler holds few."""

_ATTEMPTS = 5

_LOOK = 0.2
"""Seconds between looks at whether the scheduler is still there."""

_RUNNING = "running"


def _compute(name: str, number: int) -> Measured:
    """Compute a block on a worker, with the tools that were handed out under this name."""
    toolbox = _distributed().get_worker().plugins.get(name)
    if toolbox is None:  # the run was stopped, and nobody waits for this block
        return {}
    if torch.get_num_threads() != toolbox.threads:
        torch.set_num_threads(
            toolbox.threads
        )  # for this thread of the worker; the order of sums depends on it
    found: Measured = toolbox.work(number)
    return found


def _toolbox(name: str, work: Work, threads: int) -> Any:
    """Return a worker plugin that holds a stage's work and computes as exactly as the local engine."""
    distributed = _distributed()

    class Toolbox(distributed.WorkerPlugin):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.work, self.threads = work, threads

        def setup(self, worker: Any) -> None:
            self.exact = ExitStack()
            self.exact.enter_context(exact_arithmetic())

        def teardown(self, worker: Any) -> None:
            self.exact.close()

    return Toolbox()


def _gone(where: str) -> NormfixError:
    return NormfixError(
        "NF334", "the scheduler went away. Start it again and repeat the command.", where=where
    )


def _unable(error: Exception) -> NormfixError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return NormfixError(
        "NF335",
        f"the workers cannot take the work: {reason}. They need this normfix, and images and store on storage that "
        "they see.",
        where="engine dask",
    )


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise NormfixError(
            "NF333",
            'a cluster is reached through dask.distributed: pip install "normfix[dask]".',
            where="engine dask",
        ) from error
    return distributed
