"""How work tells how far it is."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Is called with a stage of the work, how much of it is done, and how much there is."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Take how far a stage is."""


def silent(stage: str, done: int, total: int, /) -> None:
    """Tell nobody."""
