"""What only moves positions along a dimension: pads, slices, joins, shifts, flips, repeats, shuffles into space.

A pad that mirrors reads up to its own width inside the border, one that wraps reads the opposite border: an aligned
tile that ends at the border reads as far as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from normfix.tiling.reach.calls import Call, call_of, tensor_of
from normfix.tiling.reach.extents import Vector
from normfix.tiling.reach.links import (
    NOTHING,
    WHOLE,
    Along,
    ByDimension,
    Link,
    Mirror,
    Reading,
    Reflected,
    Unread,
    Whole,
    Window,
)
from normfix.tiling.reach.needs import Reads
from normfix.tiling.reach.rules.rule import Rule, aligned, kept

__all__ = ["MOVES"]

_PLACE = Whole("it picks a place of the image")


def _shifted(offset: int, step: int = 1) -> Reads:
    """Return that position p of the result is position step p + offset of the operand."""
    return lambda given: (step * given[0] + offset, step * given[1] + offset)


def _by(call: Call, dim: int, offset: Vector, step: int = 1) -> Link:
    """Return a link by an offset that is a constant; one that follows the size is a place."""
    if not call.sizes.is_constant(offset):
        return Whole("it moves the image by an amount that follows its size")
    return Along(dim) if (offset[0], step) == (0, 1) else Window(dim, _shifted(offset[0], step))


def _pad(call: Call) -> list[Reading]:
    x = call.first()
    amounts = [call.sizes(amount) for amount in call.get("pad", call.get("padding", ()))]
    mode = call.get("mode", "constant") if call.name == "pad" else call.name
    rank = len(call.extents(x))
    links: dict[int, Link] = {}
    for pair in range(len(amounts) // 2):
        dim = rank - 1 - pair
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        if not call.sizes.is_constant(before) or not call.sizes.is_constant(after):
            # what is added behind at some sizes only moves nothing
            link = _by(call, dim, tuple(-n for n in before)) if mode.startswith("constant") else _PLACE
        elif mode.startswith("reflect"):
            link = Reflected(dim, before[0], after[0])
        else:
            link = _by(call, dim, tuple(-n for n in before))
        links[dim] = link
    return [kept(call, x, links)]


def _slice(call: Call) -> list[Reading]:
    x = call.tensor("self")
    extents = call.extents(x)
    dim = call.dim(call.get("dim", 0), len(extents))
    start = _from_front(call.sizes(call.get("start", 0)), extents[dim])
    step = call.constant(call.get("step", 1))
    whole = _joined(call, x, dim, start) if step == 1 else []
    return whole or [kept(call, x, {dim: _cut(call, dim, start, step)})]


def _narrow(call: Call) -> list[Reading]:
    x = call.tensor("self")
    extents = call.extents(x)
    dim = call.dim(call.get("dim", 0), len(extents))
    if isinstance(call.get("start"), Node) and tensor_of(call.get("start")) is not None:
        return []
    start = _from_front(call.sizes(call.get("start", 0)), extents[dim])
    return _joined(call, x, dim, start) or [kept(call, x, {dim: _cut(call, dim, start, 1)})]


def _cut(call: Call, dim: int, start: Vector, step: int) -> Link:
    """Return what a slice reads; one of fixed extent out of space is a place."""
    return _PLACE if call.sizes.is_constant(call.shape[dim]) else _by(call, dim, start, step)


def _from_front(start: Vector, extent: Vector) -> Vector:
    return tuple(min(max(s + n if s < 0 else s, 0), n) for s, n in zip(start, extent, strict=True))


def _select(call: Call) -> list[Reading]:
    x = call.tensor("self")
    rank = len(call.extents(x))
    dim = call.dim(call.get("dim", 0), rank)
    links = [_PLACE if d == dim else Along(d - (d > dim)) for d in range(rank)]
    return [ByDimension(x, tuple(links))]


def _part(call: Call) -> list[Reading]:
    """Part number `item` of a tensor that was split."""
    x = call.first()
    extents = call.extents(x)
    dim = call.dim(call.get("dim", 0), len(extents))
    parts = call.origin.meta["val"]
    start = call.sizes(0)
    for part in list(parts)[: call.item]:
        start = _sum(start, call.sizes(part.shape[dim]))
    return _joined(call, x, dim, start) or [kept(call, x, {dim: _cut(call, dim, start, 1)})]


def _joined(call: Call, x: Node, dim: int, start: Vector) -> list[Reading]:
    """Return the reading of what was joined into a tensor and is taken out of it again; nothing for other parts.

    Tokens of several maps in a row lie nowhere; those of one of them lie where they did.
    """
    join = call_of(x, call.sizes)
    if join.name != "cat" or join.dim(join.get("dim", 0), len(call.shape)) != dim:
        return []
    first = call.sizes(0)
    for tensor in join.get("tensors"):
        extents = call.extents(tensor)
        if first == start and extents == call.shape:
            return [kept(call, tensor), Unread(x)]
        first = _sum(first, extents[dim])
    return []


def _sum(a: Vector, b: Vector) -> Vector:
    return tuple(m + n for m, n in zip(a, b, strict=True))


def _cat(call: Call) -> list[Reading]:
    tensors = call.get("tensors")
    dim = call.dim(call.get("dim", 0), len(call.shape))
    start, readings = call.sizes(0), []
    for tensor in tensors:
        extents = call.extents(tensor)
        if len(extents) != len(call.shape):  # torch lets an empty one pass
            continue
        readings.append(kept(call, tensor, {dim: _by(call, dim, tuple(-n for n in start))}))
        start = _sum(start, extents[dim])
    return readings


def _stack(call: Call) -> list[Reading]:
    dim = call.dim(call.get("dim", 0), len(call.shape))
    rank = len(call.shape) - 1
    links = tuple(Along(d + (d >= dim)) for d in range(rank))
    return [ByDimension(tensor, links) for tensor in call.get("tensors")]


def _roll(call: Call) -> list[Reading]:
    """Move a map; what comes in at the border is not counted here: the derivation names what wraps."""
    x = call.tensor("self")
    rank = len(call.extents(x))
    dims = [call.dim(d, rank) for d in call.get("dims", ())]
    if not dims:
        return [kept(call, x, dict.fromkeys(range(rank), WHOLE))]
    shifts = [call.sizes(shift) for shift in _listed(call.get("shifts"))]
    links = {d: _by(call, d, tuple(-n for n in shift)) for d, shift in zip(dims, shifts, strict=True)}
    return [kept(call, x, links)]


def _flip(call: Call) -> list[Reading]:
    x = call.tensor("self")
    rank = len(call.extents(x))
    return [kept(call, x, {call.dim(d, rank): Mirror(call.dim(d, rank)) for d in _listed(call.get("dims"))})]


def _repeat(call: Call) -> list[Reading]:
    x = call.tensor("self")
    extents, shape = call.extents(x), call.shape
    shift = len(shape) - len(extents)
    links: list[Link] = []
    for dim, extent in enumerate(extents):
        same = extent == shape[dim + shift]
        links.append(Along(dim + shift) if same else NOTHING if extent == call.sizes.ones else WHOLE)
    return [ByDimension(x, tuple(links))]


def _repeat_interleave(call: Call) -> list[Reading]:
    x, repeats = call.tensor("self"), call.get("repeats")
    if isinstance(repeats, Node) or call.get("dim") is None:
        return []
    rank = len(call.extents(x))
    dim, count = call.dim(call.get("dim"), rank), call.constant(repeats)
    return [kept(call, x, {dim: Window(dim, lambda given: (given[0] // count, given[1] // count))})]


def _pixel_shuffle(call: Call) -> list[Reading]:
    factor = call.constant(call.get("upscale_factor"))
    return [_into_space(call, lambda given: (given[0] // factor, given[1] // factor))]


def _pixel_unshuffle(call: Call) -> list[Reading]:
    factor = call.constant(call.get("downscale_factor"))
    return [_into_space(call, lambda given: (factor * given[0], factor * given[1] + factor - 1))]


def _into_space(call: Call, reads: Reads) -> Reading:
    rank = len(call.shape)
    return kept(
        call,
        call.tensor("self"),
        {rank - 3: WHOLE, rank - 2: Window(rank - 2, reads), rank - 1: Window(rank - 1, reads)},
    )


def _slice_scatter(call: Call) -> list[Reading]:
    """Write a part into a map: the map is read where it is, the part where it was put."""
    x, part = call.tensor("self"), call.tensor("src")
    extents = call.extents(x)
    dim = call.dim(call.get("dim", 0), len(extents))
    start = _from_front(call.sizes(call.get("start", 0)), extents[dim])
    step = call.constant(call.get("step", 1))
    if step == 1:
        link = _by(call, dim, tuple(-n for n in start))
    elif call.sizes.is_constant(start):
        first = start[0]
        link = Window(dim, lambda given: (-((first - given[0]) // step), (given[1] - first) // step))
    else:
        link = _PLACE
    return [kept(call, x), kept(call, part, {dim: link})]


def _select_scatter(call: Call) -> list[Reading]:
    x, part = call.tensor("self"), call.tensor("src")
    dim = call.dim(call.get("dim", 0), len(call.shape))
    links = tuple(Along(d + (d >= dim)) for d in range(len(call.shape) - 1))
    return [kept(call, x), ByDimension(part, links)]


def _copy(call: Call) -> list[Reading]:
    return [Unread(call.tensor("self")), aligned(call, call.tensor("src"))]


def _triangle(call: Call) -> list[Reading]:
    """Tril and triu keep values by their place: what is left is at its own place."""
    return [kept(call, call.tensor("self"))]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


_PADS = (
    "pad",
    "constant_pad_nd",
    "_pad_circular",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
)
_PARTS = ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")

MOVES: dict[str, Rule] = {
    **dict.fromkeys((*_PADS, "replication_pad1d", "replication_pad2d", "replication_pad3d"), _pad),
    **dict.fromkeys((*_PARTS, "unsafe_split_with_sizes"), _part),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "unbind": _select,
    "stack": _stack,
    "roll": _roll,
    "flip": _flip,
    "repeat_interleave": _repeat_interleave,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "copy": _copy,
    **dict.fromkeys(("tril", "triu"), _triangle),
}
