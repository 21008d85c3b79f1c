"""What of a value is needed: an interval of positions per space factor, and what made it unbounded.

Positions are those of a tile that starts at 0. `fore` counts from the front of the value; `back` from its end
backwards, for what was flipped: there a tile at 0 is the last one, mirrored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

__all__ = ["Boundless", "Interval", "Need", "Reads", "Span", "hull", "united"]

Interval = tuple[int, int]
"""First and last position; empty where the first is larger."""

Reads = Callable[[Interval], Interval]
"""Which positions of an operand an interval of the result is computed from."""


@dataclass(frozen=True, slots=True)
class Boundless:
    """The node that needs a whole extent, and why in a few words."""

    node: Node
    why: str


@dataclass(frozen=True, slots=True)
class Span:
    """The needed positions of one space factor."""

    fore: Interval | None = None
    back: Interval | None = None
    boundless: Boundless | None = None

    def through(self, reads: Reads, extents: tuple[int, int]) -> Span:
        """Return the span of an operand.

        Args:
            reads: of the operator.
            extents: of the result and of the operand, at one size of the image.
        """
        return Span(
            None if self.fore is None else _filled(reads(self.fore)),
            None if self.back is None else _mirrored(self.back, reads, extents),
            self.boundless,
        )

    def flipped(self) -> Span:
        """Return the span of what a flip is computed from."""
        return Span(self.back, self.fore, self.boundless)


Need = dict[tuple[int, int], Span]
"""By dimension, and number of the factor in its frame."""


def united(a: Span | None, b: Span) -> Span:
    """Return the least span that holds both."""
    if a is None:
        return b
    return Span(hull(a.fore, b.fore), hull(a.back, b.back), a.boundless or b.boundless)


def hull(a: Interval | None, b: Interval | None) -> Interval | None:
    """Return the least interval that holds both."""
    if a is None or b is None:
        return a or b
    return min(a[0], b[0]), max(a[1], b[1])


def _filled(interval: Interval) -> Interval | None:
    return interval if interval[0] <= interval[1] else None


def _mirrored(back: Interval, reads: Reads, extents: tuple[int, int]) -> Interval | None:
    given, taken = extents
    found = _filled(reads((given - 1 - back[1], given - 1 - back[0])))
    return None if found is None else (taken - 1 - found[1], taken - 1 - found[0])
