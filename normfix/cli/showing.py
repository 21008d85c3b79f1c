"""How results leave a command: text or JSON on stdout, notes and progress on stderr, reports in files."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from normfix.cli.columns import fitted
from normfix.errors import NormfixError, shown
from normfix.images.drafts import cannot_write, drafting, require_unnamed, sweep
from normfix.records.encoding import Record
from normfix.records.progress import LOGGER, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

__all__ = [
    "Command",
    "bars",
    "format_option",
    "note",
    "report_option",
    "require_report",
    "require_reports",
    "show",
    "steps",
    "telling",
    "verbose_option",
    "write_choices",
    "write_report",
    "write_reports",
]

Command = TypeVar("Command", bound=Callable[..., Any])


def format_option(command: Command) -> Command:
    """Add --format."""
    choice = click.Choice(["text", "json"])
    return click.option(
        "--format", "format_", type=choice, default="text", show_default=True, help="What stdout carries."
    )(command)


def verbose_option(command: Command) -> Command:
    """Add --verbose."""
    return click.option(
        "-v", "--verbose", is_flag=True, help="Say all that was measured, not the answer alone."
    )(command)


def note(text: str) -> None:
    """Say something beside the result, on stderr; where nobody can be told there, the work goes on all the same."""
    with _above_bars(), suppress(OSError):
        click.echo(shown(text), err=True)


class _Notes(logging.Handler):
    """Says what is logged on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != LOGGER:  # bars tell that
            note(record.getMessage())


@contextmanager
def telling() -> Iterator[None]:
    """Say on stderr what normfix logs meanwhile, such as how long a stage will take."""
    logger, notes = logging.getLogger("normfix"), _Notes()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)
        logger.propagate = propagates


def show(record: Record, text: str, format_: str) -> None:
    """Put the result on stdout: the record as JSON, or its text. A reader who has seen enough ends no work."""
    stdout = click.get_current_context().obj or sys.stdout
    with _above_bars():
        said = record.dumps() if format_ == "json" else fitted(shown(text))
        try:
            click.echo(said, file=stdout, nl=format_ != "json")
        except BrokenPipeError:
            _unread(stdout)


def _unread(stdout: IO[str]) -> None:
    """Let what is written from now on go nowhere, since nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stdout.fileno())
    os.close(nowhere)


def report_option(command: Command) -> Command:
    """Add --report, which may be repeated."""
    return click.option(
        "--report",
        "reports",
        multiple=True,
        metavar="FILE",
        help="Write a report too, never over another: .html, .json, .md or .xml (JUnit). May be repeated.",
    )(command)


def require_reports(paths: Sequence[str]) -> None:
    """Refuse reports that cannot be written, before anything is computed for them."""
    from normfix.reporting.endings import require_ending

    for path in paths:
        require_ending(path)
        _require_folder(path)


def write_reports(paths: Sequence[str], record: Any, maps: Any = None) -> None:
    """Write each report, whole or not at all, and over nothing.

    Raises:
        NormfixError: NF114 if one cannot be written, or something else has its name.
    """
    from normfix.reporting.report import text_of

    for path in paths:
        _write(Path(path), text_of(Path(path).suffix.lower(), record, maps))


def write_choices(paths: Sequence[str], record: Any, places: Any) -> None:
    """Write each report of a choice; see `write_reports`."""
    from normfix.reporting.report import choice_text

    for path in paths:
        _write(Path(path), choice_text(Path(path).suffix.lower(), record, places))


def _write(target: Path, text: str) -> None:
    data = text.encode(errors="backslashreplace")
    if _holds(target, data):
        note(f"{target} is this report already.")
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(target, error) from error
    with drafting(target) as draft:
        try:
            draft.write_bytes(data)
        except OSError as error:
            raise cannot_write(target, error) from error


_OF_A_RUN = re.compile(rb'\d{4}-\d\d-\d\d|"seconds": [0-9.e+-]+')
"""What differs from one run of a command to the next: the day, and how long it takes."""


def _holds(target: Path, data: bytes) -> bool:
    """Tell whether a report is there already, whenever it was written and however long it took."""
    try:
        return target.is_file() and _OF_A_RUN.sub(b"", target.read_bytes()) == _OF_A_RUN.sub(b"", data)
    except OSError:
        return False


def require_report(path: str | None) -> None:
    """Refuse a report that cannot be written, before anything is computed for it."""
    if path is None:
        return
    if Path(path).suffix != ".json":
        raise click.UsageError(f"--report {path}: give a file ending in .json")
    _require_folder(path)


def _require_folder(path: str) -> None:
    folder = next(parent for parent in Path(path).parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise NormfixError("NF114", f"{folder} is no folder to write the report to.", where=path)
    if not Path(path).is_file():
        _require_writable(folder, Path(path))
    if not Path(path).parent.is_dir():
        return  # it is made once there is something to write
    sweep(Path(path).parent)
    if not Path(path).is_file():  # one that is there may be of the same command
        require_unnamed(Path(path))


def _require_writable(folder: Path, report: Path) -> None:
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(report, error) from error


def write_report(path: str | None, record: Record) -> None:
    """Write the record as JSON to a file, whole or not at all."""
    if path is not None:
        _write(Path(path), record.dumps())


@contextmanager
def steps() -> Iterator[Progress]:
    """Give a progress callback (stage, done, total): a bar on a terminal, nothing elsewhere.

    What has one step moves by itself until it is done, and its time is counted.
    """
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with bars(Bars(*columns, console=console, transient=True, disable=not console.is_terminal)) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=None)
            known = total if done or total > 1 else None  # a bar without a total moves
            progress.update(tasks[stage], completed=done, total=known)

        yield report


_LIVE: list[Any] = []
"""Bars that are drawn now; a terminal has one place for them."""


@contextmanager
def bars(progress: Bars) -> Iterator[Bars]:
    """Draw bars, below whatever is shown and noted meanwhile."""
    with progress:
        _LIVE.append(progress)
        try:
            yield progress
        finally:
            _LIVE.remove(progress)


@contextmanager
def _above_bars() -> Iterator[None]:
    """Take bars off the terminal while something is printed: they would be drawn over it, or erase it."""
    drawn = [(progress, [task.id for task in progress.tasks if task.visible]) for progress in _LIVE]
    for progress, tasks in reversed(drawn):
        _let_see(progress, tasks, visible=False)  # one that starts again erases as many lines as it had
        progress.stop()
    try:
        yield
    finally:
        for progress, tasks in drawn:
            progress.start()
            _let_see(progress, tasks, visible=True)


def _let_see(progress: Bars, tasks: Sequence[Any], *, visible: bool) -> None:
    for task in tasks:
        progress.update(task, visible=visible)
    progress.refresh()
