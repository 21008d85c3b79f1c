"""How work tells how far it is."""

from __future__ import annotations

import logging
from typing import Protocol

__all__ = ["LOGGER", "Progress", "logged", "silent"]

LOGGER = "normfix.progress"
"""Name of the logger that hears how far work is."""

_LOG = logging.getLogger(LOGGER)


class Progress(Protocol):
    """Is called with a stage of the work, how much of it is done, and how much there is."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Take how far a stage is."""


def logged(stage: str, done: int, total: int, /) -> None:
    """Log it at level INFO, which is shown nowhere unless somebody asks for it."""
    _LOG.info("%s: %d of %d done", stage, done, total)


def silent(stage: str, done: int, total: int, /) -> None:
    """Tell nobody."""
