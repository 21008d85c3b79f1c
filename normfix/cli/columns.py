"""Text in the columns and colours of the terminal that it is shown on."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap

__all__ = ["columns", "fitted"]

_COLOURS = {"passed": 32, "failed": 31, "refused": 31, "inconclusive": 33}
"""Of outcomes, by their numbers among those that terminals have: green, red and yellow."""

_OUTCOME = re.compile(rf"(?m)(^|: )({'|'.join(_COLOURS)})\b|^(Tile-invariant|Not tile-invariant)\b")

_FILE = 100
"""Columns where there is no terminal."""


def columns() -> int:
    """Return the columns of the terminal that results go to, or those of a file."""
    if not _on_terminal():
        return _FILE
    return max(20, shutil.get_terminal_size((_FILE, 24)).columns)


def fitted(text: str) -> str:
    """Return a text whose lines fit the terminal, further ones indented more, outcomes coloured unless NO_COLOR is set.

    For a file it is the text as it is.
    """
    if not _on_terminal():
        return text
    lines = "\n".join(part for line in text.splitlines() for part in _parts(line, columns()))
    return (
        lines
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        else _OUTCOME.sub(_painted, lines)
    )


def _painted(match: re.Match[str]) -> str:
    """Return an outcome in its colour.

    >>> _OUTCOME.sub(_painted, "tiles: failed")
    'tiles: \\x1b[1;31mfailed\\x1b[0m'
    """
    before, outcome, answer = match.groups(default="")
    colour = _COLOURS.get(outcome, 33 if answer.startswith("Not") else 32)
    return f"{before}\x1b[1;{colour}m{outcome or answer}\x1b[0m"


def _parts(line: str, width: int) -> list[str]:
    """Return a line in pieces; words longer than a line, such as paths, stay whole.

    >>> _parts("  one two three", 9)
    ['  one', '    two', '    three']
    """
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _on_terminal() -> bool:
    stdout = sys.__stdout__  # sys.stdout is put aside while a network's code runs
    return stdout is not None and stdout.isatty()
