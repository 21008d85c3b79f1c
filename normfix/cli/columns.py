"""Text in the columns of the terminal that it is shown on."""

from __future__ import annotations

import shutil
import sys
import textwrap

__all__ = ["columns", "fitted"]

_FILE = 100
"""Columns where there is no terminal."""


def columns() -> int:
    """Return the columns of the terminal that results go to, or those of a file."""
    if not _on_terminal():
        return _FILE
    return max(20, shutil.get_terminal_size((_FILE, 24)).columns)


def fitted(text: str) -> str:
    """Return a text whose lines fit the terminal, further ones indented more; for a file, the text as it is."""
    if not _on_terminal():
        return text
    return "\n".join(part for line in text.splitlines() for part in _parts(line, columns()))


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
