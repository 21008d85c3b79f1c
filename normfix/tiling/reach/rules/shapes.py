"""What lays the same values out otherwise: views that split and merge dimensions, permutations, expansions.

A view keeps the order of all positions, so the factors of its operand, outermost first, are those of its result;
where a boundary of the result falls inside a factor it is split:

    (h)  ->  (h')(q)     position p is (p // q)(p mod q); what needs h' in [a, b] needs h in [q a, q b + q - 1]
    (h')(q)  ->  (h)     what needs h in [a, b] needs h' in [a // q, b // q]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from normfix.tiling.reach.calls import Call
from normfix.tiling.reach.extents import Sizes, Vector, divides, quotient
from normfix.tiling.reach.frames import Factor, Frame, Layout, Opaque, Rest, Space, joined
from normfix.tiling.reach.links import Along, ByDimension, Reading, Unread, whole
from normfix.tiling.reach.needs import Boundless, Interval, Need, Span, united
from normfix.tiling.reach.rules.rule import Rule, aligned

__all__ = ["SHAPES", "Regrouping", "regroup"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A factor of the result before it is joined with others: which factor of the operand it is the outer part of.

    `within` is the number of the operand's positions inside each of its own; None where it is an inner part, which
    needs all of what it is inside of.
    """

    factor: Factor
    dim: int
    number: int
    within: int | None


@dataclass(frozen=True, slots=True)
class Regrouping:
    """The reading of a view."""

    operand: Node

    def frames(self, layout: Layout, call: Call) -> Mapping[int, Frame]:
        """Return the frames of the result by the factors of the operand."""
        groups = regroup(layout, call.shape, call.sizes)
        if groups is None:
            return {}
        return {dim: joined([piece.factor for piece in group]) for dim, group in enumerate(groups)}

    def carried(self, need: Need, result: Layout, layout: Layout, call: Call) -> Need:
        """Carry each factor to the one that it is a part of."""
        groups = regroup(layout, call.shape, call.sizes)
        boundless = Boundless(call.origin, "it lays the image out in a way that is not followed")
        found: Need = {}
        if groups is None:
            for dim, frame in enumerate(layout):
                found.update({(dim, n): span for n, span in whole(frame, boundless).items()})
            return found
        for dim, group in enumerate(groups):
            for at, span in _unjoined(dim, group, result[dim], need):
                place = at.dim, at.number
                known = at.within is not None and not isinstance(at.factor, Opaque)
                span = _widened(span, at.within or 1) if known else Span(boundless=boundless)
                found[place] = united(found.get(place), span)
        return found


def regroup(layout: Layout, shape: Sequence[Vector], sizes: Sizes) -> list[list[Piece]] | None:
    """Return the pieces that make up each dimension of a view's result, None where they cannot be told."""
    ones = sizes.ones
    rest = [
        Piece(factor, dim, number, 1)
        for dim, frame in enumerate(layout)
        for number, factor in enumerate(frame)
        if factor.extent != ones
    ]
    groups: list[list[Piece]] = []
    for target in shape:
        group: list[Piece] = []
        left = target
        while left != ones:
            if not rest:
                return None
            piece = rest.pop(0)
            if divides(piece.factor.extent, left):
                group.append(piece)
                left = quotient(left, piece.factor.extent)
                continue
            if not divides(left, piece.factor.extent):
                return None
            outer, inner = _split(piece, left, sizes)
            group.append(outer)
            rest.insert(0, inner)
            left = ones
        groups.append(group)
    return None if rest else groups


def _split(piece: Piece, outer: Vector, sizes: Sizes) -> tuple[Piece, Piece]:
    factor = piece.factor
    inner = quotient(factor.extent, outer)
    inside = Piece(Rest(inner), piece.dim, piece.number, None)
    if isinstance(factor, Rest):
        return Piece(Rest(outer), piece.dim, piece.number, None), inside
    width = inner[0]
    if isinstance(factor, Space) and set(inner) == {width} and factor.step % width == 0 and piece.within:
        step = factor.step // width
        return Piece(Space(factor.axis, step, outer), piece.dim, piece.number, piece.within * width), inside
    parts = [Piece(Opaque(extent), piece.dim, piece.number, None) for extent in (outer, inner)]
    return parts[0], parts[1]


def _unjoined(dim: int, group: Sequence[Piece], frame: Frame, need: Need) -> list[tuple[Piece, Span]]:
    """Return what is needed of each piece over space, from what is needed of the factors they were joined to."""
    found: list[tuple[Piece, Span]] = []
    for place, piece in enumerate(group):
        number = len(joined([part.factor for part in group[: place + 1]])) - 1
        if isinstance(piece.factor, Rest):
            continue
        if (
            isinstance(piece.factor, Opaque)
            or number >= len(frame)
            or not _is_of(frame[number], piece.factor)
        ):
            found.append((Piece(Opaque(piece.factor.extent), piece.dim, piece.number, None), Span()))
        elif (span := need.get((dim, number))) is not None:
            found.append((piece, _narrowed(span, _inside(group, place))))
    return found


def _is_of(joint: Factor, part: Factor) -> bool:
    """Tell whether a joined factor lies along the axis of its outermost part."""
    return isinstance(joint, Space) and isinstance(part, Space) and joint.axis == part.axis


def _inside(group: Sequence[Piece], place: int) -> int:
    """Return how many positions were joined into each of a piece."""
    width = 1
    for piece in group[place + 1 :]:
        if not isinstance(piece.factor, Rest) or len(set(piece.factor.extent)) != 1:
            break
        width *= piece.factor.extent[0]
    return width


def _narrowed(span: Span, width: int) -> Span:
    return _mapped(span, lambda given: (given[0] // width, given[1] // width))


def _widened(span: Span, width: int) -> Span:
    return _mapped(span, lambda given: (given[0] * width, given[1] * width + width - 1))


def _mapped(span: Span, change: Callable[[Interval], Interval]) -> Span:
    # whole windows count alike from the front and from the end
    fore = None if span.fore is None else change(span.fore)
    return Span(fore, None if span.back is None else change(span.back), span.boundless)


def _view(call: Call) -> list[Reading]:
    return [Regrouping(call.first()), *_of_shape_alone(call)]


def _permuted(order: Callable[[Call, int], Sequence[int]]) -> Rule:
    """Return the rule of what puts dimension order[d] of its operand at d."""

    def rule(call: Call) -> list[Reading]:
        x = call.first()
        rank = len(call.extents(x))
        places = [d % rank for d in order(call, rank)]
        return [ByDimension(x, tuple(Along(places.index(d)) for d in range(rank)))]

    return rule


def _swapped(a: str, b: str) -> Callable[[Call, int], Sequence[int]]:
    def order(call: Call, rank: int) -> Sequence[int]:
        places = list(range(rank))
        one, other = call.dim(call.get(a), rank), call.dim(call.get(b), rank)
        places[one], places[other] = places[other], places[one]
        return places

    return order


def _last_swapped(call: Call, rank: int) -> Sequence[int]:
    return [*range(rank - 2), rank - 1, rank - 2] if rank > 1 else [0]


def _moved(call: Call, rank: int) -> Sequence[int]:
    listed = [
        value if isinstance(value, list | tuple) else [value]
        for value in map(call.get, ("source", "destination"))
    ]
    sources, places = ([call.dim(d, rank) for d in dims] for dims in listed)
    order = [d for d in range(rank) if d not in sources]
    for place, source in sorted(zip(places, sources, strict=True)):
        order.insert(place, source)
    return order


def _expand(call: Call) -> list[Reading]:
    return [aligned(call, call.first()), *_of_shape_alone(call)]


def _of_shape_alone(call: Call) -> list[Reading]:
    """Read nothing of the tensor that only gives its shape (expand_as, view_as, reshape_as)."""
    other = call.get("other")
    return [Unread(other)] if isinstance(other, Node) else []


_VIEWS = (
    "view",
    "reshape",
    "_unsafe_view",
    "_reshape_alias",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
    "reshape_as",
)


def _broadcast(call: Call) -> list[Reading]:
    """Read number `item` of several tensors, over the extents of all; of the others, none of their values."""
    tensors = call.get("tensors")
    others = (node for node in tensors if node is not tensors[call.item])
    return [
        aligned(call, tensors[call.item]),
        *map(Unread, others),
    ]


SHAPES: dict[str, Rule] = {
    **dict.fromkeys(_VIEWS, _view),
    "permute": _permuted(lambda call, rank: call.get("dims")),
    **dict.fromkeys(("transpose", "swapdims"), _permuted(_swapped("dim0", "dim1"))),
    "swapaxes": _permuted(_swapped("axis0", "axis1")),
    **dict.fromkeys(("t", "mT", "mH", "adjoint"), _permuted(_last_swapped)),
    "numpy_T": _permuted(lambda call, rank: list(range(rank))[::-1]),
    "movedim": _permuted(_moved),
    "moveaxis": _permuted(_moved),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "broadcast_tensors": _broadcast,
}
