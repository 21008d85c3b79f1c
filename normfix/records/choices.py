"""Closed choices that are texts: StrEnum, also for Python 3.10, which has none."""

from __future__ import annotations

import sys

__all__ = ["StrEnum"]

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):
        """A choice that is its own text, as in Python 3.11; `auto` is not used here."""

        __str__ = str.__str__
        __format__ = str.__format__
