"""Options that several commands share, and what they open."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from normfix.errors import NormfixError
from normfix.json_record import Record
from normfix.records import Scaling

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from normfix.images import ImageFiles
    from normfix.loading import Loaded
    from normfix.streaming import Source, WindowedImage

__all__ = [
    "Arguments",
    "format_option",
    "image_options",
    "model_options",
    "no_steps",
    "note",
    "report_option",
    "require_report",
    "require_reports",
    "show",
    "steps",
    "write_report",
    "write_reports",
]

Command = TypeVar("Command", bound=Callable[..., Any])


class ArgumentsJson(click.ParamType[Mapping[str, Any]]):
    """A JSON object of keyword arguments."""

    name = "json"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Mapping[str, Any]:
        """Parse, or fail with the reason."""
        if isinstance(value, Mapping):
            return value
        try:
            parsed = json.loads(value)
        except ValueError as error:
            self.fail(f"not JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail("give an object such as '{\"in_channels\": 1}'", param, ctx)
        return cast(Mapping[str, Any], parsed)


def model_options(command: Command) -> Command:
    """Add MODEL and how to open it, and keep what the network's code prints off stdout."""
    command = _quiet(command)
    for decorate in (
        click.option("--device", help="Where to compute, such as cuda:0. Default: cpu."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "float64", "bfloat16"]),
            help="Compute in this precision.",
        ),
        click.option(
            "--output", help="Key or index of the output that counts, for networks that return several."
        ),
        click.option("--trust-pickle", is_flag=True, help="Run the pickle: it may execute any code."),
        click.option(
            "--allow-class",
            "allow_classes",
            multiple=True,
            metavar="NAME",
            help="Class, or PACKAGE.*, that a pickle may build; may be repeated.",
        ),
        click.option("--weights", help="Which weights, where a file holds several, such as ema."),
        click.option("--revision", help="Branch, tag or commit of an hf-hub: repository."),
        click.option("--arch-args", type=ArgumentsJson(), help="Keyword arguments of the factory, as JSON."),
        click.option(
            "--arch", help="pkg.module:factory or timm:NAME that builds the network for given weights."
        ),
        click.argument("model"),
    ):
        command = decorate(command)
    return command


def _quiet(command: Command) -> Command:
    @wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        click.get_current_context().obj = sys.stdout
        with redirect_stdout(sys.stderr):
            return command(*args, **options)

    return cast(Command, run)


def image_options(command: Command) -> Command:
    """Add how images are read and scaled."""
    for decorate in (
        click.option(
            "--preprocess", help="pkg.mod:function of the whole array (C, *space), instead of --scale."
        ),
        click.option(
            "--scale", help="none, unit, zscore, percentile:LOW,HIGH or MEAN,STD, over the whole image."
        ),
        click.option("--series", help="Name or number of the image, where a file holds several."),
        click.option(
            "--axes", help="One letter per axis of the image: C channels; Z, Y, X space. Example: YXC."
        ),
    ):
        command = decorate(command)
    return command


def format_option(command: Command) -> Command:
    """Add --format."""
    choice = click.Choice(["text", "json"])
    return click.option(
        "--format", "format_", type=choice, default="text", show_default=True, help="What stdout carries."
    )(command)


@dataclass(frozen=True, slots=True)
class Arguments:
    """The shared options of one run."""

    model: str
    arch: str | None
    arch_args: Mapping[str, Any] | None
    trust_pickle: bool
    allow_classes: tuple[str, ...]
    weights: str | None
    revision: str | None
    output: str | None
    device: str | None
    dtype: str | None
    axes: str | None = None
    scale: str | None = None
    preprocess: str | None = None
    series: str | None = None

    @classmethod
    def take(cls, options: dict[str, Any]) -> Arguments:
        """Take the shared options out of a command's keyword arguments."""
        return cls(**{name: options.pop(name) for name in cls.__slots__ if name in options})

    def open(self) -> Loaded:
        """Open the network and put it where it shall compute; notes go to stderr."""
        from normfix.loading import Request
        from normfix.pipeline import open_any

        request = Request(
            arch=self.arch,
            arch_args=self.arch_args,
            weights=self.weights,
            trust_pickle=self.trust_pickle,
            allow_classes=self.allow_classes,
            tell=note,
        )
        opened = open_any(self.model, request, revision=self.revision)
        for text in opened.notes:
            note(text)
        self._place_(opened.model)
        return opened

    def torch_dtype(self) -> torch.dtype | None:
        """Return the dtype to compute in, if one was chosen."""
        import torch

        return None if self.dtype is None else cast("torch.dtype", getattr(torch, self.dtype))

    def scaling(self, model: nn.Module | None = None) -> Scaling | None:
        """Return the stated scaling, else the one that travels with the model, else None."""
        from normfix.provenance import provenance_of
        from normfix.scaling import parse_scaling

        if self.scale is not None and self.preprocess is not None:
            raise click.UsageError("give --scale or --preprocess, not both")
        if self.preprocess is not None:
            return Scaling(kind="preprocess", function=self.preprocess)
        if self.scale is not None:
            return parse_scaling(self.scale)
        known = None if model is None else provenance_of(model)
        if known is not None and known.scaling.kind == "preprocess":
            name = known.scaling.function
            raise NormfixError(
                "NF113",
                "the images of this network are prepared by a function that its folder names, and a file does "
                f"not decide what runs here. If you trust it, repeat it: --preprocess {name}.",
                where=name,
            )
        if known is None or known.scaling.kind == "none":  # unscaled tensors say nothing of integer files
            return None
        return known.scaling

    def images(self, patterns: tuple[str, ...], model: nn.Module, level: int = 0) -> ImageFiles:
        """Return the images that files, folders and globs name."""
        from normfix.formats import Choice
        from normfix.images import ImageFiles, find_images
        from normfix.pipeline.looking import input_of

        channels, ndim = input_of(model)
        choice = Choice(self.series, level)
        return ImageFiles(find_images(patterns), ndim, channels, self.scaling(model), self.axes, choice)

    def image(self, path: str, model: nn.Module, level: int = 0) -> Tensor:
        """Return one image, (1, C, *space)."""
        found = list(self.images((path,), model, level))
        if len(found) != 1:
            raise click.UsageError(f"{path} names {len(found)} images; give one")
        return found[0]

    def windows(self, patterns: tuple[str, ...], model: nn.Module, level: int) -> list[WindowedImage]:
        """Return the images that files, folders and globs name, to be read by window until the command ends."""
        from normfix.images import find_images
        from normfix.pipeline import open_image

        paths = find_images(patterns)
        scaling = self.scaling(model)
        context = click.get_current_context()
        return [
            context.with_resource(
                open_image(p, model, axes=self.axes, level=level, series=self.series, scaling=scaling)
            )
            for p in paths
        ]

    def masks(self, patterns: tuple[str, ...], model: nn.Module) -> list[Source]:
        """Return the masks that files, folders and globs name; of the images' axes, channels apart."""
        from normfix.images import find_images
        from normfix.pipeline.looking import input_of
        from normfix.pipeline.masking import open_mask

        paths = find_images(patterns)
        axes = None if self.axes is None else self.axes.upper().replace("C", "").replace("S", "")
        context = click.get_current_context()
        return [context.with_resource(open_mask(path, input_of(model)[1], axes)) for path in paths]

    def _place_(self, model: nn.Module) -> None:
        try:
            model.to(device=self.device, dtype=self.torch_dtype())
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:160]
            raise NormfixError(
                "NF116", f"cannot compute there: {reason}.", where=f"--device {self.device}"
            ) from error


def note(text: str) -> None:
    """Say something beside the result, on stderr."""
    click.echo(text, err=True)


def show(record: Record, text: str, format_: str) -> None:
    """Put the result on stdout: the record as JSON, or its text."""
    stdout = click.get_current_context().obj  # None, which is stdout, where nothing was redirected
    click.echo(record.dumps() if format_ == "json" else text, file=stdout, nl=format_ != "json")


def report_option(command: Command) -> Command:
    """Add --report, which may be repeated."""
    return click.option(
        "--report",
        "reports",
        multiple=True,
        metavar="FILE",
        help="Write a report too: .html, .json, .md or .xml (JUnit). May be repeated.",
    )(command)


def require_reports(paths: Sequence[str]) -> None:
    """Refuse reports that cannot be written, before anything is computed for them."""
    from normfix.reporting.endings import require_ending

    for path in paths:
        require_ending(path)
        if not Path(path).parent.is_dir():
            raise NormfixError("NF114", "there is no such folder to write the report to.", where=path)


def write_reports(paths: Sequence[str], record: Any, maps: Any = None) -> None:
    """Write each report, whole or not at all."""
    from normfix.reporting.report import text_of

    for path in paths:
        _write(Path(path), text_of(Path(path).suffix.lower(), record, maps))


def _write(target: Path, text: str) -> None:
    draft = target.with_name(f".{target.name}-draft")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise NormfixError("NF114", f"cannot write it: {error.strerror}.", where=str(target)) from error
    finally:
        draft.unlink(missing_ok=True)


def require_report(path: str | None) -> None:
    """Refuse a report that cannot be written, before anything is computed for it."""
    if path is None:
        return
    if Path(path).suffix != ".json":
        raise click.UsageError(f"--report {path}: give a file ending in .json")
    if not Path(path).parent.is_dir():
        raise NormfixError("NF114", "there is no such folder to write the report to.", where=path)


def write_report(path: str | None, record: Record) -> None:
    """Write the record as JSON to a file, whole or not at all."""
    if path is not None:
        _write(Path(path), record.dumps())


def no_steps(stage: str, done: int, total: int) -> None:
    """Say nothing, as a progress callback."""


@contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """Give a progress callback (stage, done, total): a bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report
