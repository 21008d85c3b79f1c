"""Where a command writes, and what it says of it; a command that was done before finds its own output there."""

from __future__ import annotations

import mmap
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from normfix.cli.showing import note
from normfix.errors import NormfixError
from normfix.images.drafts import Naming, naming, require_unnamed, sweep

__all__ = ["is_given", "is_image", "is_saved", "output", "tell"]

_FILES = ("normfix.json", "state_dict.pt", "config.json")
"""One of them is in every folder that normfix saves, or lets a library save."""


@contextmanager
def output(out: str, is_like: Callable[[Path], bool]) -> Iterator[Naming]:
    """Say where to write; what exists is compared with what the command makes, if it is like that at all.

    Raises:
        NormfixError: NF114 if it exists and is something else, or cannot be written.
    """
    target = Path(out)
    sweep(target.parent)
    if os.path.lexists(target):
        if not is_like(target):
            require_unnamed(target)
        note(f"{out} exists; what this command makes is compared with it, and nothing is overwritten.")
    with naming(target) as place:
        yield place


def tell(place: Naming, how: str = "") -> None:
    """Say that the output was written, or that it was there."""
    if place.again:
        note(f"Done before: {place.target} holds exactly what this command writes. Nothing was written.{how}")
    else:
        note(f"Wrote {place.target}.{how}")


def is_saved(path: Path) -> bool:
    """Tell whether something may be a folder, program or form for another runtime that was saved."""
    if path.is_symlink():
        return False
    if path.is_dir():
        return any((path / name).is_file() for name in _FILES)
    if not path.is_file():  # a pipe would be waited for
        return False
    if path.suffix == ".onnx":
        return _speaks_of_normfix(path)
    return path.suffix in (".pt2", ".ts") and zipfile.is_zipfile(path)


def _speaks_of_normfix(path: Path) -> bool:
    """Tell whether a file holds the name of normfix's record, which stands at the end of an ONNX that it wrote."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.rfind(b"normfix.json") >= 0
    except (OSError, ValueError):  # it cannot be read, or nothing is in it
        return False


def is_given(path: Path) -> bool:
    """Tell whether something may be a folder that was given back: one with normfix's card in it."""
    for name in ("README.md", "README-normfix.md"):
        with suppress(OSError), (path / name).open(encoding="utf-8", errors="replace") as file:
            if file.readline().rstrip().endswith("with constant statistics"):
                return not path.is_symlink()
    return False


def is_image(path: Path) -> bool:
    """Tell whether something is an image."""
    from normfix.images.formats import open_file

    try:
        open_file(path).close()
    except NormfixError:
        return False
    return not path.is_symlink()
