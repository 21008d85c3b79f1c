"""Folders whose files say what builds the network."""

from __future__ import annotations

from pathlib import Path

from normfix.records.saved import Source
from normfix.storage.opening import open_path
from normfix.storage.opening.request import Request

__all__ = ["builder"]


def builder(original: Path, request: Request) -> Source | None:
    """Return what they say; see Library."""
    return open_path(original, request).source
