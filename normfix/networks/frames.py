"""Whose code a line is of, and how lines are named: by the last two parts of the file's path and the number."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from normfix.errors import PACKAGE

__all__ = ["OURS", "TORCH", "innermost", "line_name"]

TORCH = f"{Path(torch.__file__).parent}{os.sep}"
"""What the names of torch's own files begin with, and no other library's: torchvision lies beside it."""
OURS = f"{PACKAGE}{os.sep}"
"""What the names of normfix's own files begin with."""


def line_name(file: str, number: int | str | None) -> str:
    """Return how a line is named.

    >>> line_name("/home/me/project/nets/unet.py", 12)
    'nets/unet.py:12'
    """
    return f"{'/'.join(Path(file).parts[-2:])}:{number}"


def innermost(trace: str | None) -> str:
    """Name the innermost line outside torch and normfix of a stack trace as graphs keep it, else the innermost of all.

    Returns:
        "" where there is none.
    """
    lines = [line.strip() for line in (trace or "").splitlines()]
    frames = [line.split('"') for line in lines if line.startswith('File "')]
    places = [(parts[1], parts[2].split(",")[1].split()[1]) for parts in frames if "line" in parts[2]]
    outside = [place for place in places if not place[0].startswith((TORCH, OURS))]
    file, number = (outside or places or [("", "")])[-1]
    return line_name(file, number) if file else ""
