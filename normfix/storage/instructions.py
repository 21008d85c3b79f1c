"""How a saved network is opened again, in Python and on the command line, in words that can be copied."""

from __future__ import annotations

import shlex
from pathlib import Path

from normfix.records.saved import Source
from normfix.storage.opening.gate import is_allowed, present

__all__ = ["arguments_of", "commands", "options_of"]


def commands(saved: Path, source: Source) -> str:
    """Return the lines that use what was saved, each as it can be typed.

    Args:
        saved: the folder or .pt2 file, as the caller named it.
        source: of the network in it.
    """
    if source.kind == "object" and saved.is_dir() and not any(saved.glob("*.pt2")):
        return (
            f"Load it with normfix.load({str(saved)!r}, model=NETWORK), where NETWORK is a fresh {source.spec}: it is "
            "no network that the command line can build."
        )
    # a program holds what it computes, and opens without its factory
    options, arguments = ([], []) if saved.suffix == ".pt2" else (options_of(source), arguments_of(source))
    words = " ".join(["normfix predict", shlex.quote(str(saved)), *options])
    return (
        f"Load it with normfix.load({', '.join([repr(str(saved)), *arguments])}), or run\n"
        f"  {words} IMAGE -o prediction.tif"
    )


def arguments_of(source: Source) -> list[str]:
    """Return what `normfix.load` needs beside the folder.

    >>> arguments_of(Source(kind="factory", spec="my_model:UNet"))
    ["arch='my_model:UNet'"]
    """
    return [f"arch={source.spec!r}"] if _is_repeated(source) else []


def options_of(source: Source) -> list[str]:
    """Return what commands need beside the folder.

    >>> options_of(Source(kind="factory", spec="my model.py:UNet"))
    ['--arch', "'my model.py:UNet'"]
    """
    return ["--arch", shlex.quote(source.spec)] if _is_repeated(source) else []


def _is_repeated(source: Source) -> bool:
    """Tell whether the caller has to name the factory again."""
    return source.kind == "factory" and not is_allowed(present(source.spec))
