"""Extents before and after along each axis of space, and their rounding to whole strides."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["in_strides", "round_up"]


Spans = tuple[tuple[int, int], ...]


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least n.

    >>> round_up(513, 16)
    528
    """
    return -(-n // multiple) * multiple


def in_strides(halo: Spans, stride: Sequence[int]) -> Spans:
    """Return a halo rounded up to whole strides: what a tile reads, so that reading starts in phase.

    What was measured may be up to a stride less one short for a tile that starts on the grid; rounded up it is not.

    >>> in_strides(((25, 26),), (4,))
    ((28, 28),)
    """
    pairs = zip(halo, stride, strict=True)
    return tuple((round_up(before, s), round_up(after, s)) for (before, after), s in pairs)
