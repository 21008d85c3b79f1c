"""Options of runs in stages over blocks, and what is said about such a run on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from normfix.cli.showing import Command, bars, note
from normfix.reporting.sentences import duration_text
from normfix.tiling.stages.cluster import require_cluster

if TYPE_CHECKING:
    from rich.progress import Progress

    from normfix.tiling.stages.options import Blocks
    from normfix.tiling.stages.outlook import Outlook, Step

__all__ = ["blocks_of", "engine_option", "require_workers_used", "stage_options", "watching", "working"]


_EVERY = 30.0
"""Seconds between lines where stderr is no terminal."""


def stage_options(command: Command) -> Command:
    """Add how stages run over blocks; `blocks_of` takes them."""
    for decorate in (
        click.option("--scheduler", metavar="ADDRESS", help="Of a dask cluster, such as tcp://HOST:8786."),
        click.option(
            "--workers",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Blocks computed at a time.",
        ),
        click.option(
            "--store",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Folder to keep values between stages in; the same command goes on from it if it was stopped.",
        ),
        click.option(
            "--budget",
            type=click.IntRange(0),
            help="MiB of memory for values between stages. Default: no limit.",
        ),
        click.option("--level", type=click.IntRange(0), default=0, help="Of a pyramid; 0 is the finest."),
    ):
        command = decorate(command)
    return command


def engine_option(command: Command) -> Command:
    """Add --engine for commands whose stages run here or on a cluster."""
    return click.option(
        "--engine",
        type=click.Choice(["local", "dask"]),
        default="local",
        show_default=True,
        help="dask: compute blocks on the cluster at --scheduler; needs a --store that all of it sees.",
    )(command)


def blocks_of(options: dict[str, Any], engine: Literal["local", "dask"]) -> Blocks:
    """Take the options of stages out of a command's keyword arguments."""
    require_cluster(engine, options["scheduler"], options["store"])

    from normfix.tiling.stages.options import Blocks

    budget = options.pop("budget")
    return Blocks(
        budget=None if budget is None else budget << 20,
        engine=engine,
        **{name: options.pop(name) for name in ("store", "workers", "scheduler")},
    )


def require_workers_used(local: bool) -> None:
    """Refuse workers that were asked for where no blocks are computed here; what the project states is let be.

    Args:
        local: whether the options ask for stages that run here.
    """
    source = click.get_current_context().get_parameter_source("workers")
    if source is ParameterSource.COMMANDLINE and not local:
        raise click.UsageError(
            "--workers belongs to stages that run here (--budget, --store), and has no use without"
        )


@contextmanager
def watching() -> Iterator[Bar | Lines]:
    """Give a watch: a bar on a terminal, a line now and then elsewhere, both on stderr."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with bars(Progress(*columns, console=Console(stderr=True), transient=True)) as progress:
        yield Bar(progress)


@contextmanager
def working(path: Path) -> Iterator[Bar | Lines]:
    """Give a watch for an image, whose bar moves also where no blocks are counted."""
    with watching() as watch:
        if isinstance(watch, Bar):
            watch.wait(path.name)
        yield watch


class Lines:
    """Says what a run will take, then how far it is every half minute."""

    timed = True

    def __init__(self, every: float = _EVERY) -> None:
        self._every, self._last = every, time.monotonic()

    def begin(self, outlook: Outlook) -> None:
        """Say what it will take."""
        note(outlook_text(outlook))
        self._last = time.monotonic()

    def block(self, step: Step) -> None:
        """Say how far it is, if that was not said lately."""
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            note(
                f"stage {step.stage + 1} of {step.stages}, block {step.done} of {step.blocks}{left_text(step)}"
            )


class Bar:
    """Says what a run will take and shows how far it is: stage, blocks, time left."""

    timed = True

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def wait(self, what: str) -> None:
        """Move for what nobody counts, until blocks are."""
        self._task = self._progress.add_task(what, total=None, left="")

    def begin(self, outlook: Outlook) -> None:
        """Say what it will take."""
        note(outlook_text(outlook))
        if self._task is None:
            self.wait("")

    def block(self, step: Step) -> None:
        """Move the bar."""
        self._progress.update(
            self._task,
            description=f"stage {step.stage + 1} of {step.stages}",
            completed=step.done,
            total=step.blocks,
            left=left_text(step).removeprefix(", "),
        )


def outlook_text(outlook: Outlook) -> str:
    """Return what a run will take, in a line."""
    done = f"; {outlook.whole} are whole already" if outlook.whole else ""
    duration = "time not known" if outlook.seconds is None else f"about {duration_text(outlook.seconds)}"
    return (
        f"{outlook.stages} stages, {outlook.blocks} blocks{done}: {duration}; between stages at most "
        f"{size_text(outlook.memory)} in memory and {size_text(outlook.disk)} on disk, and about "
        f"{size_text(outlook.block)} for each block at a time."
    )


def left_text(step: Step) -> str:
    """Return the time left as an appendix, if it is known."""
    return "" if step.left is None else f", {duration_text(step.left)} left"


def size_text(size: int) -> str:
    """Return bytes in the unit that suits them.

    >>> size_text(900), size_text(34_359_738_368)
    ('900 bytes', '34.4 GB')
    """
    if size < 1000:
        return f"{size} bytes"
    value, unit = float(size), 0
    while value >= 1000:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f} {('', 'kB', 'MB', 'GB', 'TB', 'PB')[unit]}"
