"""How a result's positions are computed from an operand's, dimension by dimension.

Along(d)          from the same position along dimension d of the result
Window(d, reads)  from an interval around it
Reflected(d, ..)  from the position it is shifted to, or from its mirror image inside the nearer border
Inward(d, ..)     from an interval around it, pushed inside where it would go beyond a border
Mirror(d)         from the opposite position
WHOLE             from everything
NOTHING           from nothing: one value stands for all, or none is read
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch.fx import Node

from normfix.tiling.reach.calls import Call
from normfix.tiling.reach.frames import Factor, Frame, Layout, Opaque, Space, is_plain
from normfix.tiling.reach.needs import Boundless, Interval, Need, Reads, Span

__all__ = [
    "NOTHING",
    "WHOLE",
    "Along",
    "ByDimension",
    "Inward",
    "Link",
    "Mirror",
    "Nothing",
    "Reading",
    "Reflected",
    "Unread",
    "Whole",
    "Window",
    "moved",
    "whole",
]


class Reading(Protocol):
    """What a call reads of one operand."""

    @property
    def operand(self) -> Node:
        """Return the operand."""

    def frames(self, layout: Layout, call: Call) -> Mapping[int, Frame]:
        """Return frames of the result's dimensions that follow from the operand's."""

    def carried(self, need: Need, result: Layout, layout: Layout, call: Call) -> Need | None:
        """Return what is needed of the operand for what is needed of the result, None where no value of it is."""


@dataclass(frozen=True, slots=True)
class Along:
    """The same position."""

    dim: int


@dataclass(frozen=True, slots=True)
class Window:
    """An interval around it; where it does not move with the image it counts as everything."""

    dim: int
    reads: Reads


@dataclass(frozen=True, slots=True)
class Reflected:
    """The position less `before`; beyond a border its mirror image, up to `before` or `after` inside."""

    dim: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Inward:
    """`before` to `after` positions around it; near a border up to `span` inside, counted from the border."""

    dim: int
    before: int
    after: int
    span: int


@dataclass(frozen=True, slots=True)
class Mirror:
    """The opposite position."""

    dim: int


@dataclass(frozen=True, slots=True)
class Whole:
    """Everything, and why."""

    why: str = "it reads the whole extent"


@dataclass(frozen=True, slots=True)
class Nothing:
    """Nothing that has a place."""


Link = Along | Window | Reflected | Inward | Mirror | Whole | Nothing
WHOLE, NOTHING = Whole(), Nothing()


@dataclass(frozen=True, slots=True)
class ByDimension:
    """A reading that is one link per dimension of the operand."""

    operand: Node
    links: tuple[Link, ...]

    def frames(self, layout: Layout, call: Call) -> Mapping[int, Frame]:
        """Return the operand's frames where the result has the same positions."""
        shape, extents = call.shape, call.extents(self.operand)
        return {
            link.dim: frame
            for link, frame, extent in zip(self.links, layout, extents, strict=True)
            if isinstance(link, Along | Mirror) and shape[link.dim] == extent
        }

    def carried(self, need: Need, result: Layout, layout: Layout, call: Call) -> Need:
        """Carry each dimension for itself."""
        found: Need = {}
        for dim, (link, frame) in enumerate(zip(self.links, layout, strict=True)):
            for number, span in _carried(link, frame, need, result, call).items():
                found[dim, number] = span
        return found


@dataclass(frozen=True, slots=True)
class Unread:
    """The reading of an operand that gives its shape alone, or nothing at all."""

    operand: Node

    def frames(self, layout: Layout, call: Call) -> Mapping[int, Frame]:
        """Return nothing."""
        return {}

    def carried(self, need: Need, result: Layout, layout: Layout, call: Call) -> Need | None:
        """Return that no value is needed."""
        return None


def whole(frame: Frame, boundless: Boundless) -> dict[int, Span]:
    """Return that everything of a dimension is needed."""
    return {n: Span(boundless=boundless) for n, f in enumerate(frame) if isinstance(f, Space | Opaque)}


def _carried(link: Link, frame: Frame, need: Need, result: Layout, call: Call) -> dict[int, Span]:
    if is_plain(frame) or isinstance(link, Nothing):
        return {}
    if isinstance(link, Whole):
        return whole(frame, Boundless(call.origin, link.why))
    given = result[link.dim]
    spans = {number: span for (dim, number), span in need.items() if dim == link.dim}
    if given == frame and isinstance(link, Along):
        return spans
    if given == frame and isinstance(link, Mirror) and len(frame) == 1:
        return {number: span.flipped() for number, span in spans.items()}
    if isinstance(link, Along | Window | Reflected | Inward) and len(given) == len(frame) == 1:
        span = moved(_reads(link), given[0], frame[0], spans.get(0))
        if span is not None:
            return {0: _at_borders(span, link, frame[0], call)}
    return whole(frame, Boundless(call.origin, "what it reads does not move with the image"))


def _reads(link: Along | Window | Reflected | Inward) -> Reads:
    match link:
        case Window():
            return link.reads
        case Inward(before=before, after=after):
            return lambda given: (given[0] - before, given[1] + after)
        case Reflected(before=shift):
            return lambda given: (given[0] - shift, given[1] - shift)
    return lambda given: given


def _at_borders(span: Span, link: Link, factor: Factor, call: Call) -> Span:
    """Return a span that holds what the first tile reads inside in place of what lies in front, and the last behind."""
    growth = call.sizes.growth(factor.extent)
    if not isinstance(link, Reflected | Inward) or growth is None:
        return span
    end = growth.step + growth.rest - 1
    turned = link if isinstance(link, Inward) else Reflected(link.dim, link.after, link.before)
    return Span(
        span.fore and _inside(span.fore, end, link),
        span.back and _inside(span.back, end, turned),
        span.boundless,
    )


def _inside(interval: Interval, end: int, link: Reflected | Inward) -> Interval:
    """Return an interval with what is read inside for what lies before 0 and after the end of the last tile."""
    first, last = interval
    front, behind = -first, interval[1] - end
    if front > 0:
        last = max(last, link.span if isinstance(link, Inward) else min(link.before, front))
    if behind > 0:
        first = min(first, end - (link.span if isinstance(link, Inward) else min(link.after, behind)))
    return first, last


def moved(reads: Reads, given: Factor, taken: Factor, span: Span | None) -> Span | None:
    """Return the span of an operand's factor for that of the result's.

    Returns:
        None if what is read a lattice step further on does not lie a lattice step further on.
    """
    if not isinstance(given, Space) or not isinstance(taken, Space) or given.axis != taken.axis:
        return None
    here, there = reads((0, given.step)), reads((given.step, 2 * given.step))
    if there != (here[0] + taken.step, here[1] + taken.step):
        return None
    return (span or Span()).through(reads, (given.extent[0], taken.extent[0]))
