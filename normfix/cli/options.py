"""Options that several commands share, and what they open."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from normfix.cli.settings import SETTINGS
from normfix.cli.showing import Command, note
from normfix.errors import NormfixError
from normfix.networks.naming import require_findable
from normfix.records.encoding import once
from normfix.records.saved import Scaling
from normfix.records.scalings import parse_scaling
from normfix.storage.spec import require_no_revision, require_spec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from normfix.images.collections import ImageFiles
    from normfix.images.opening import Opener
    from normfix.images.sources import Image
    from normfix.images.views import Part
    from normfix.images.windows import ScaledImage
    from normfix.storage.opening.request import Loaded

__all__ = [
    "Arguments",
    "halo_option",
    "image_options",
    "model_options",
    "override_option",
]


class ArgumentsJson(click.ParamType):  # type: ignore[type-arg]
    """A JSON object of keyword arguments."""

    name = "json"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Mapping[str, Any]:
        """Parse, or fail with the reason."""
        if isinstance(value, Mapping):
            return value
        try:
            parsed = json.loads(value, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            self.fail(f"not JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail("give an object such as '{\"in_channels\": 1}'", param, ctx)
        return cast(Mapping[str, Any], parsed)


class Channels(click.ParamType):  # type: ignore[type-arg]
    """Numbers of channels, from 0."""

    name = "n[,n...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse, or fail with the reason."""
        numbers = value if isinstance(value, list | tuple) else str(value).split(",")
        if not numbers or not all(re.fullmatch(r"\d{1,9}", str(number)) for number in numbers):
            self.fail("give numbers of channels from 0, such as 0,2", param, ctx)
        return tuple(int(number) for number in numbers)


class Named(click.ParamType):  # type: ignore[type-arg]
    """A text of a form, which it is not looked up by: a slip would allow nothing, without a word."""

    def __init__(self, name: str, form: str, example: str) -> None:
        self.name, self._form, self._example = name, form, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return it, or fail with an example."""
        if re.fullmatch(self._form, str(value)) is None:
            self.fail(f"{str(value)!r} is none. Give {self._example}", param, ctx)
        return str(value)


_WORD = r"[^\W\d]\w*"
_MODULE = Named("MODULE", rf"{_WORD}(\.{_WORD})*", "a module, such as my_project.networks")
_CLASS = Named(
    "NAME",
    rf"{_WORD}([.:]{_WORD})*[.:]({_WORD}|\*)",
    "a class with its module, such as my_project.Net, or my_project.*",
)
_SHA256 = Named("SHA256", "[0-9a-fA-F]{64}", "the 64 digits that the error names")


class Device(click.ParamType):  # type: ignore[type-arg]
    """A name of a device that torch, or a package torch_NAME beside it, can know."""

    name = "name[:n]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return it, or fail with the reason."""
        kind = re.fullmatch(r"([a-z]+)(:[0-9]+)?", str(value))
        if kind is None or (kind[1] not in _DEVICES and find_spec(f"torch_{kind[1]}") is None):
            self.fail(f"{value!r} is no device. Give auto, cpu, cuda or cuda:1, or xpu", param, ctx)
        if kind[1] in ("auto", "cpu") and kind[2] not in (None, ":0"):
            self.fail(f"{value!r} is no device: there is one. Give {kind[1]}", param, ctx)
        return str(value)


_DEVICES = (
    "auto",
    "cpu",
    "cuda",
    "hip",
    "hpu",
    "meta",
    "mps",
    "mtia",
    "privateuseone",
    "vulkan",
    "xla",
    "xpu",
)


halo_option = click.option(
    "--halo",
    type=click.Choice(["graph", "measured"]),
    default="graph",
    show_default=True,
    help="graph: the bound that the network's graph gives, if any; measured: what the dye shows, which is then said.",
)


def model_options(command: Command) -> Command:
    """Add MODEL and how to open it, and keep what the network's code prints off stdout."""
    command = _quiet(command)
    for decorate in (
        click.option(
            "--device",
            type=Device(),
            default="auto",
            show_default=True,
            help="Where to compute, such as cuda:0 or cpu; auto is the GPU that is there, else the CPU.",
        ),
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
            type=_CLASS,
            metavar="NAME",
            help="Class, or PACKAGE.*, that a pickle may build; may be repeated.",
        ),
        click.option(
            "--allow-code",
            multiple=True,
            type=_SHA256,
            metavar="SHA256",
            help="Run the architecture file of a bioimage.io package that has this checksum.",
        ),
        click.option(
            "--trust",
            multiple=True,
            type=_MODULE,
            metavar="MODULE",
            help="Call factories of this module if a file names them; pyproject.toml may state it.",
        ),
        click.option("--weights", help="Which weights, where a file holds several, such as ema."),
        click.option("--revision", help="Branch, tag or commit of an hf-hub: repository."),
        click.option("--arch-args", type=ArgumentsJson(), help="Keyword arguments of the factory, as JSON."),
        click.option(
            "--arch",
            help="pkg.module:factory, path/to/file.py:Name or timm:NAME that builds the network for given weights.",
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
        click.option(
            "--channels",
            type=Channels(),
            help="Numbers of the channels to take, from 0, in the network's order. Example: 0,2.",
        ),
        click.option(
            "--slices",
            type=click.Choice(["Z", "T"]),
            help="Axis of a stack whose planes are images of their own, each scaled and predicted by itself; for "
            "networks that do not take that axis.",
        ),
        click.option("--series", help="Name or number of the image, where a file holds several."),
        click.option(
            "--axes", help="One letter per axis of the image: C channels; Z, Y, X space. Example: YXC."
        ),
    ):
        command = decorate(command)
    return command


def override_option(command: Command) -> Command:
    """Add --override-scale, without which images are scaled as those were that the statistics were measured on."""
    return click.option(
        "--override-scale", is_flag=True, help="Take --scale although the network was converted with another."
    )(command)


@dataclass(frozen=True, slots=True)
class Arguments:
    """The shared options of one run."""

    model: str
    arch: str | None
    arch_args: Mapping[str, Any] | None
    trust_pickle: bool
    allow_classes: tuple[str, ...]
    allow_code: tuple[str, ...]
    trust: tuple[str, ...]
    weights: str | None
    revision: str | None
    output: str | None
    device: str | None
    dtype: str | None
    axes: str | None = None
    scale: str | None = None
    preprocess: str | None = None
    series: str | None = None
    channels: tuple[int, ...] | None = None
    slices: str | None = None
    level: int = 0
    override_scale: bool = True

    @classmethod
    def take(cls, options: dict[str, Any], images: Iterable[str] = ()) -> Arguments:
        """Take the shared options out of a command's keyword arguments, and look at them before torch is imported.

        Names of images that the command takes are looked up as well.
        """
        from normfix.images.names import find_images

        arguments = cls(**{name: options.pop(name) for name in cls.__slots__ if name in options})
        if arguments.scale is not None and arguments.preprocess is not None:
            raise click.UsageError("give --scale or --preprocess, not both")
        context = click.get_current_context()
        insists = context.get_parameter_source("override_scale") is ParameterSource.COMMANDLINE
        if insists and arguments.scale is None and arguments.preprocess is None:
            raise click.UsageError("--override-scale belongs to --scale or --preprocess")
        for name, require in (("scale", parse_scaling), ("axes", _require_axes)):
            value = getattr(arguments, name)
            if value is not None:
                _require_stated(name, value, require)
        for spec in filter(None, (arguments.model, arguments.arch)):
            require_spec(spec)
        require_no_revision(arguments.model, arguments.revision)
        if arguments.preprocess is not None:
            require_findable(arguments.preprocess)
        find_images([*images])
        return arguments

    def open(self) -> Loaded:
        """Open the network and put it where it shall compute; notes go to stderr."""
        from normfix.storage.loading import open_any
        from normfix.storage.opening.request import Request

        request = Request(
            arch=self.arch,
            arch_args=self.arch_args,
            weights=self.weights,
            trust_pickle=self.trust_pickle,
            allow_classes=self.allow_classes,
            allow_code=tuple(map(str.lower, self.allow_code)),
            trust=self._trusted(),
            tell=note,
        )
        opened = open_any(self.model, request, revision=self.revision)
        for text in opened.notes:
            note(text)
        self._place_(opened.model)
        return opened

    def open_converted(self, folder: str) -> nn.Module:
        """Open the conversion of this network, which its folder may name as this command does."""
        from normfix.networks.naming import is_named

        arch = self.model if self.arch is None and is_named(self.model) else self.arch
        return replace(self, model=folder, arch=arch, revision=None, weights=None).open().model

    def _trusted(self) -> tuple[str, ...]:
        """Return the modules that the caller or the project trusts; a folder does not say it of itself."""
        context = click.get_current_context()
        if not self.trust or context.get_parameter_source("trust") is not ParameterSource.DEFAULT_MAP:
            return self.trust
        stating, model = context.meta[SETTINGS].path, Path(self.model)
        if stating is not None and model.exists() and stating.resolve().is_relative_to(model.resolve()):
            note(f"{stating} lies in the network's own folder, so what it trusts does not count here.")
            return ()
        return self.trust

    def torch_dtype(self) -> torch.dtype | None:
        """Return the dtype to compute in, if one was chosen."""
        import torch

        return None if self.dtype is None else cast("torch.dtype", getattr(torch, self.dtype))

    def scaling(self, model: nn.Module | None = None) -> Scaling | None:
        """Return the stated scaling, else the one that travels with the model, else None."""
        from normfix.images.opening import scaling_of
        from normfix.networks.provenance import provenance_of

        known = None if model is None else provenance_of(model)
        stated = None
        if self.preprocess is not None:
            stated = Scaling(kind="preprocess", function=self.preprocess)
        elif self.scale is not None:
            stated = parse_scaling(self.scale)
        if stated is not None:
            if known is not None and not self.override_scale:
                _require_same(stated, known.scaling)
            return stated
        return None if model is None else scaling_of(model)

    def images(self, patterns: tuple[str, ...], model: nn.Module) -> ImageFiles:
        """Return the images that files, folders and globs name."""
        from normfix.images.given import files_of

        files = files_of(
            patterns,
            model,
            axes=self.axes,
            level=self.level,
            series=self.series,
            scaling=self.scaling(model),
            part=self.part(),
            tell=note,
        )
        _tell_repeated(files.paths)
        return files

    def opener(self, model: nn.Module) -> Opener:
        """Return what opens one image after another, to be read by window."""
        from normfix.images.opening import Opener

        return Opener(
            model,
            axes=self.axes,
            level=self.level,
            series=self.series,
            scaling=self.scaling(model),
            part=self.part(),
        )

    def part(self) -> Part:
        """Return what of each file is meant."""
        from normfix.images.views import Part

        return Part(self.channels or (), self.slices or "")

    def windows(self, patterns: tuple[str, ...], model: nn.Module) -> list[ScaledImage]:
        """Return the images that files, folders and globs name, to be read by window until the command ends."""
        from normfix.images.names import find_images

        paths = find_images(patterns)
        _tell_repeated(paths)
        opener, context = self.opener(model), click.get_current_context()
        opened: list[ScaledImage] = []
        for path in paths:
            opened.append(first := context.with_resource(opener.open(path)))
            opened += [context.with_resource(opener.open(path, plane)) for plane in range(1, first.planes)]
        _tell(opened)
        return opened

    def masks(self, patterns: tuple[str, ...], model: nn.Module) -> list[Image]:
        """Return the masks that files, folders and globs name; of the images' axes, channels apart."""
        from normfix.conversion.masks import open_mask
        from normfix.images.names import find_images
        from normfix.networks.intake import Intake

        paths = find_images(patterns)
        axes = None if self.axes is None else self.axes.upper().replace("C", "").replace("S", "")
        context, ndim = click.get_current_context(), Intake(model).ndim
        opened = [context.with_resource(open_mask(path, ndim, axes)) for path in paths]
        _tell(opened)
        return list(opened)

    def _place_(self, model: nn.Module) -> None:
        from normfix.networks.calling import require_network
        from normfix.networks.devices import AUTO, chosen, described, place_

        require_network(model)
        device = chosen(self.device)
        if self.device == AUTO and device is not None and device.type != "cpu":
            note(f"computing on {described(device)}; --device cpu computes on the CPU")
        place_(model, self.device, self.torch_dtype())


def _require_stated(name: str, value: Any, require: Callable[[Any], object]) -> None:
    """Look at the value of an option, and name the file that it is from where nobody typed it."""
    context = click.get_current_context()
    try:
        require(value)
    except NormfixError as error:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT_MAP:
            raise
        where = f"{context.meta[SETTINGS].path}: [tool.normfix] {name} = {value!r}"
        raise NormfixError(error.code, error.message, where=where) from error


_LETTERS = frozenset("CSZYXT")


def _require_axes(axes: str) -> None:
    """Refuse letters that cannot name axes, whatever the image.

    Raises:
        NormfixError: NF106.
    """
    letters = axes.upper()
    if not letters.isalpha() or len(set(letters)) < len(letters):
        raise NormfixError(
            "NF106", "give each axis one letter of its own, such as YXC or CZYX.", where=f"--axes {axes}"
        )
    unknown = next((letter for letter in letters if letter not in _LETTERS), None)
    if unknown is not None:
        raise NormfixError(
            "NF106",
            f"{unknown} names no axis: C and S are channels, Z, Y and X space, T is time. Give one letter for each.",
            where=f"--axes {axes}",
        )


def _require_same(stated: Scaling, known: Scaling) -> None:
    """Refuse a scaling that contradicts the one which the network's statistics belong to.

    Raises:
        NormfixError: NF107.
    """
    if known.kind == "none" or known == stated:
        return
    raise NormfixError(
        "NF107",
        f"the network was converted with images scaled by {_words(known)}, and its statistics belong to these. Leave "
        "--scale out, measure it anew with normfix calibrate, or insist with --override-scale.",
        where=f"--scale {_words(stated)}",
    )


def _words(scaling: Scaling) -> str:
    values = ",".join(f"{value:g}" for value in scaling.values)
    return scaling.function or f"{scaling.kind}{':' if values else ''}{values}"


def _tell_repeated(paths: Sequence[Path]) -> None:
    """Say which images are named several times."""
    from normfix.images.names import repeated

    for path, times in repeated(paths).items():
        note(f"{path} is given {times} times, and counts as often.")


def _tell(images: Sequence[ScaledImage]) -> None:
    """Say what a user should know of files, such as chunks that are missing."""
    for image in images:
        for text in image.notes:
            note(text)
