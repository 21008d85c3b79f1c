"""Cyclic shifts: which of them let the opposite border in, and which a mask keeps out.

A map that was rolled is turned: its last positions are the first of the image, and a seam lies between them and their
neighbours. Windows of attention are cut across the seam, masked so that no pair across it counts, and the result is
rolled back (Liu et al., "Swin Transformer", ICCV 2021). A value that is turned remembers

    turned   by how many pixels, along each axis
    dims     the factors of each of its dimensions, among them what lies inside of windows that were cut out
    pairs    "scores" of pairs inside a window to which a mask was applied that follows the image's size, "weights"
             after their softmax

Whatever is computed position by position is turned as its operands are. A shift is open where anything else mixes
positions along a turned axis, or inside its windows without such weights; where values that are turned otherwise meet;
and where a result is still turned. What a mask holds is not looked at: that it hides the seam is left to be measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from torch.fx import Node

from normfix.tiling.reach.calls import Call, call_of, tensor_of
from normfix.tiling.reach.extents import Sizes, Unsized, Vector, divides, quotient
from normfix.tiling.reach.frames import Frame, Layout, Opaque, Space
from normfix.tiling.reach.links import Along, ByDimension, Nothing, Reading, Unread
from normfix.tiling.reach.rules.pointwise import is_pointwise
from normfix.tiling.reach.rules.shapes import Regrouping

__all__ = ["open_shifts"]

_MASKING = frozenset({"add", "masked_fill", "where"})
"""What applies a mask to scores, or leaves one that was applied."""
_COPYING = frozenset({"to", "_to_copy", "clone", "contiguous", "alias", "detach", "dropout"})
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
_FUSED = "scaled_dot_product_attention"


@dataclass(frozen=True, slots=True)
class _Inner:
    """Positions that lie nowhere, or in windows of an axis: `unit` is the step of what these were cut out of."""

    extent: Vector
    axis: int | None = None
    unit: int = 0


_Factors = tuple[Space | _Inner, ...]


@dataclass(frozen=True, slots=True)
class _State:
    """How a value is turned, by which nodes, and how its dimensions lie."""

    turned: Mapping[int, Fraction]
    shifts: frozenset[Node]
    dims: tuple[_Factors, ...]
    pairs: str = ""


class _OpenError(Exception):
    """A call mixes what lies on either side of a seam."""


def open_shifts(
    order: Sequence[Node],
    readings: Mapping[Node, Sequence[Reading]],
    layouts: Mapping[Node, Layout],
    results: Collection[Node],
    sizes: Sizes,
) -> tuple[frozenset[Node], frozenset[Node]]:
    """Return the cyclic shifts through which the opposite border may be read, and the calls that apply masks.

    Args:
        order: calls that depend on the image, as they run.
        readings: what each reads of its operands.
        layouts: of what depends on the image.
        results: what is computed in the end.
        sizes: at which extents are told.
    """
    states: dict[Node, _State] = {}
    found: set[Node] = set()
    masks: dict[Node, frozenset[Node]] = {}
    for node in order:
        call = call_of(node, sizes)
        given = [(r, states[r.operand]) for r in readings[node] if r.operand in states]
        if call.name != "roll" and not given:
            continue
        try:
            if call.name == "roll":
                state = _rolled(call, states.get(call.tensor("self")), layouts[call.tensor("self")])
            else:
                _require_alike(readings[node], states, layouts)
                state = _carried(call, given, layouts)
        except (_OpenError, Unsized):
            found.update(*(s.shifts for _, s in given), {node} if call.name == "roll" else ())
            continue
        if state.turned:
            states[node] = state
        if given and _masks(call, state, layouts):
            masks[node] = state.shifts
    found.update(*(states[node].shifts for node in results if node in states))
    hiding = frozenset(node for node, shifts in masks.items() if not shifts & found)
    return frozenset(found), hiding


def _rolled(call: Call, state: _State | None, layout: Layout) -> _State:
    state = state or _State({}, frozenset(), tuple(map(_factors, layout)))
    turned = dict(state.turned)
    dims, shifts = (
        v if isinstance(v, list | tuple) else [v] for v in (call.get("dims", ()), call.get("shifts"))
    )
    if not dims:
        raise _OpenError
    for given, shift in zip(dims, shifts, strict=True):
        factors = state.dims[call.dim(given, len(layout))]
        if all(isinstance(factor, _Inner) and factor.axis is None for factor in factors):
            continue  # channels go around no border
        if len(factors) != 1 or not isinstance(factors[0], Space):
            raise _OpenError
        axis, pace = factors[0].axis, Fraction(factors[0].step, call.sizes.lattice[factors[0].axis])
        turned[axis] = turned.get(axis, Fraction(0)) + call.constant(shift) / pace
    left = {axis: shift for axis, shift in turned.items() if shift}
    return replace(state, turned=left, shifts=state.shifts | {call.origin})


def _require_alike(
    readings: Sequence[Reading], states: Mapping[Node, _State], layouts: Mapping[Node, Layout]
) -> None:
    """Refuse values that are turned otherwise; one that lies nowhere in the image meets any."""
    turned = [
        states[r.operand].turned if r.operand in states else {}
        for r in readings
        if not isinstance(r, Unread)
        and any(isinstance(f, Space | Opaque) for frame in layouts[r.operand] for f in frame)
    ]
    if any(other != turned[0] for other in turned[1:]):
        raise _OpenError


def _carried(call: Call, given: Sequence[tuple[Reading, _State]], layouts: Mapping[Node, Layout]) -> _State:
    """Return the state of what is computed from turned values.

    Raises:
        _OpenError: it mixes positions along a turned axis, or inside a window without masked weights.
    """
    found: dict[int, _Factors] = {}
    mixes = _may_mix(call, {state.pairs for _, state in given}, layouts)
    for reading, state in given:
        for dim, factors in _dims(reading, state, call, mixes=mixes):
            if found.setdefault(dim, factors) != factors:
                raise _OpenError
    dims = tuple(found.get(dim) or _factors(frame) for dim, frame in enumerate(layouts[call.node]))
    shifts = frozenset[Node]().union(*(state.shifts for _, state in given))
    return _State(given[0][1].turned, shifts, dims, _pairs(call, given, dims, layouts))


def _masks(call: Call, state: _State, layouts: Mapping[Node, Layout]) -> bool:
    """Tell whether a call applies a mask to scores."""
    if call.name == _FUSED:
        return _may_mix(call, (), layouts)
    return state.pairs == "scores" and any(_follows_size(call, node, layouts) for node in call.operands)


def _may_mix(call: Call, known: Collection[str], layouts: Mapping[Node, Layout]) -> bool:
    """Tell whether what a call mixes inside windows are pairs that a mask has seen."""
    if call.name in _SOFTMAX:
        return "scores" in known
    if call.name in _PRODUCTS:
        return "weights" in known
    mask = call.get("attn_mask") if call.name == _FUSED else None
    return isinstance(mask, Node) and _follows_size(call, mask, layouts)


def _dims(reading: Reading, state: _State, call: Call, *, mixes: bool) -> Iterator[tuple[int, _Factors]]:
    """Yield the factors of the result's dimensions that are an operand's, by their number."""
    if isinstance(reading, Regrouping):
        yield from enumerate(_regrouped(state, call))
    elif isinstance(reading, ByDimension):
        extents = call.extents(reading.operand)
        for link, factors, extent in zip(reading.links, state.dims, extents, strict=True):
            if isinstance(link, Along) and call.shape[link.dim] == extent:
                yield link.dim, factors
                continue
            cut = any(isinstance(f, _Inner) and f.axis in state.turned for f in factors)
            placed = any(isinstance(f, Space) and f.axis in state.turned for f in factors)
            if placed or (cut and not mixes and not isinstance(link, Nothing)):
                raise _OpenError
    elif not isinstance(reading, Unread):
        raise _OpenError


def _regrouped(state: _State, call: Call) -> Iterator[_Factors]:
    """Follow a view: (h) is (h')(8), and joined with its own (8) it is (h) again."""
    ones = call.sizes.ones
    left = [factor for factors in state.dims for factor in factors if factor.extent != ones]
    for target in call.shape:
        group: list[Space | _Inner] = []
        while target != ones:
            if not left:
                raise _OpenError
            factor = left.pop(0)
            if not divides(factor.extent, target):
                factor, inner = _split(factor, target, state)
                left.insert(0, inner)
            group.append(factor)
            target = quotient(target, factor.extent)
        yield _joined(group, state)
    if left:
        raise _OpenError


def _split(factor: Space | _Inner, outer: Vector, state: _State) -> tuple[Space | _Inner, _Inner]:
    """Return a factor's outer part, of the given extent, and what lies inside."""
    if not divides(outer, factor.extent):
        raise _OpenError
    extent = quotient(factor.extent, outer)
    if isinstance(factor, Space):
        if len(set(extent)) != 1 or factor.step % extent[0]:
            raise _OpenError
        axis = factor.axis if factor.axis in state.turned else None
        return Space(factor.axis, factor.step // extent[0], outer), _Inner(extent, axis, factor.step)
    return replace(factor, extent=outer, unit=factor.unit // extent[0]), replace(factor, extent=extent)


def _joined(group: Sequence[Space | _Inner], state: _State) -> _Factors:
    """Join what lies inside of windows to the places that it was cut out of."""
    found: list[Space | _Inner] = []
    for factor in group:
        last = found[-1] if found else None
        if isinstance(factor, _Inner) and isinstance(last, Space):
            own = factor.axis == last.axis and factor.unit == last.step * factor.extent[0]
            if own or (factor.axis is None and last.axis not in state.turned):
                extent = tuple(a * b for a, b in zip(last.extent, factor.extent, strict=True))
                found[-1] = Space(last.axis, last.step * factor.extent[0], extent)
                continue
        found.append(factor)
    return tuple(found)


def _pairs(
    call: Call,
    given: Sequence[tuple[Reading, _State]],
    dims: Sequence[_Factors],
    layouts: Mapping[Node, Layout],
) -> str:
    """Return what is known of the pairs of a result."""
    name, known = call.name.removesuffix("_"), {state.pairs for _, state in given}
    if name in _SOFTMAX:
        return "weights" if "scores" in known else ""
    if not is_pointwise(call):
        return known.pop() if len(given) == 1 and _moves(given[0][0]) else ""
    if name in _COPYING:
        return known.pop()
    turned = given[0][1].turned
    inside = [{f.axis for f in factors if isinstance(f, _Inner) and f.axis in turned} for factors in dims]
    pairs = any(a & b for a, b in itertools.combinations(inside, 2))
    masked = "scores" in known or any(_follows_size(call, node, layouts) for node in call.operands)
    return "scores" if name in _MASKING and pairs and masked else ""


def _moves(reading: Reading) -> bool:
    """Tell whether a call only lays values out otherwise."""
    return isinstance(reading, Regrouping) or (
        isinstance(reading, ByDimension) and all(isinstance(link, Along) for link in reading.links)
    )


def _follows_size(call: Call, node: Node, layouts: Mapping[Node, Layout]) -> bool:
    """Tell whether a tensor holds nothing of the image, and more entries the larger that is."""
    if node in layouts or tensor_of(node) is None:
        return False
    return not all(map(call.sizes.is_constant, call.extents(node)))


def _factors(frame: Frame) -> _Factors:
    """Return the factors of a dimension of which nothing was cut.

    Raises:
        _OpenError: nobody knows how it follows the image.
    """
    if any(isinstance(factor, Opaque) for factor in frame):
        raise _OpenError
    return tuple(f if isinstance(f, Space) else _Inner(f.extent) for f in frame)
