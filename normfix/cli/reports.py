"""What reports are told of a command: its words, network and image by name, and the command that mends what is found.

Of several images each has a report of its own, named after it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from normfix.errors import printable

__all__ = ["converting", "known_of", "reports_of", "wants_pictures"]

_OTHERS = {"images", "tile", "halo", "threshold", "reports", "format_", "override_scale", "verbose"}
"""Options of check and diagnose that convert has not, or means otherwise."""

_PROGRAMS = (".pt2", ".ts")
"""Endings of what is no folder once it is converted."""

_OWN = {
    "last",
    "context",
    "scale_tiles",
    "train",
    "kind",
    "labels",
    "metric",
    "converted",
    "sites",
    "halo_curve",
}
"""Options of diagnose alone."""


def known_of(path: Path) -> tuple[tuple[str, str], ...]:
    """Return as settings of a record what it is of, the command it is from, and the one that freezes statistics."""
    context = click.get_current_context()
    model = str(context.params["model"])
    freezing = ["normfix", "convert", model, str(path), *_words(context, _OTHERS | _OWN | {"model"})]
    told = {
        "model": model,
        "file": str(path),
        "command": shlex.join(["normfix", str(context.info_name), *_words(context, {"format_"})]),
        "fix": f"{shlex.join(freezing)} --to frozen -o fixed{_ending(model)}",
    }
    # names of files may be no text, or steer the terminal that a report is read on
    return tuple((name, printable(text)) for name, text in told.items())


def _ending(model: str) -> str:
    """Return how the output is to end: a program is written as one."""
    suffix = Path(model).suffix
    return suffix if suffix in _PROGRAMS else ""


def converting(statistics: str, to: str = "frozen") -> str:
    """Return the command that converts with the statistics that were chosen, with the options of the command of now."""
    context = click.get_current_context()
    options = _words(context, _OTHERS | _OWN | {"model", "images", "window", "statistics", "distilled"})
    images = [str(image) for image in context.params["images"]]
    start = ["normfix", "convert", str(context.params["model"])]
    if to == "frozen":
        return shlex.join([*start, *images, *options, "--to", to, "--statistics", statistics, "-o", "fixed"])
    first = shlex.join([*start, images[0], *options, "--to", to, "-o", "renorm"])
    return f"{first} && {shlex.join(['normfix', 'calibrate', 'renorm', *images, '-o', 'fixed'])}"


def reports_of(reports: Sequence[str], paths: Sequence[Path]) -> list[tuple[str, ...]]:
    """Return the names of each image's reports: as given for one, with the image's name in them for several.

    >>> reports_of(["r.md"], [Path("a.tif")]), reports_of(["r.md"], [Path("a.tif"), Path("b/a.png"), Path("c.nii.gz")])
    ([('r.md',)], [('r-a.md',), ('r-a-2.md',), ('r-c.md',)])
    """
    if len(paths) == 1:
        return [tuple(reports)]
    names = list(_distinct(path.name.partition(".")[0] or "image" for path in paths))
    return [tuple(str(Path(r).with_stem(f"{Path(r).stem}-{name}")) for r in reports) for name in names]


def wants_pictures(reports: Iterable[str]) -> bool:
    """Tell whether any of them shows pictures."""
    return any(Path(report).suffix.lower() == ".html" for report in reports)


def _distinct(names: Iterable[str]) -> Iterator[str]:
    taken: set[str] = set()
    for name in names:
        numbered, number = name, 1
        while numbered in taken:
            number += 1
            numbered = f"{name}-{number}"
        taken.add(numbered)
        yield numbered


def _words(context: click.Context, without: set[str]) -> list[str]:
    """Return the words of a command line that mean what is not the default, arguments first."""
    arguments: list[str] = []
    options: list[str] = []
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        if name in without or value is None or value == parameter.get_default(context):
            continue
        if isinstance(parameter, click.Argument):
            arguments += [str(one) for one in value] if parameter.nargs == -1 else [str(value)]
        elif isinstance(parameter, click.Option) and value not in (False, ()):
            options += _option(parameter, value)
    return [*arguments, *options]


def _option(option: click.Option, value: Any) -> list[str]:
    flag = max(option.opts, key=len)
    if option.is_flag:
        return [flag]
    values = value if option.multiple else [value]
    return [word for one in values for word in (flag, _text(one))]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
