"""Extents before and after along each axis of space, and their rounding to whole strides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

__all__ = ["in_strides", "per_axis", "round_up"]


Spans = tuple[tuple[int, int], ...]


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least n.

    >>> round_up(513, 16)
    528
    """
    return -(-n // multiple) * multiple


def per_axis(given: Any, ndim: int) -> tuple[int, ...] | None:
    """Return a whole number per axis, of one for all axes or of one for each; None for anything else.

    >>> per_axis(256, 2), per_axis([64, 32], 2), per_axis([64, 32], 3), per_axis(0.5, 1)
    ((256, 256), (64, 32), None, None)
    """
    values = (
        [given] * ndim if isinstance(given, Integral) else [*given] if isinstance(given, Iterable) else []
    )
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in values)
    return tuple(map(int, values)) if whole and len(values) == ndim else None


def in_strides(halo: Spans, stride: Sequence[int]) -> Spans:
    """Return a halo rounded up to whole strides: what a tile reads, so that reading starts in phase.

    What was measured may be up to a stride less one short for a tile that starts on the grid; rounded up it is not.

    >>> in_strides(((25, 26),), (4,))
    ((28, 28),)
    """
    pairs = zip(halo, stride, strict=True)
    return tuple((round_up(before, s), round_up(after, s)) for (before, after), s in pairs)
