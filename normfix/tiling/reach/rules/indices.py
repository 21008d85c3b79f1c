"""Indexing and gathering: places to read at that a tensor holds.

Nobody knows these places without running them, so along the dimension that they are of everything is read. The places
themselves are read one by one, and the other dimensions stay as they are: a table of channels has no reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normfix.tiling.reach.calls import Call, tensor_of
from normfix.tiling.reach.links import NOTHING, Along, ByDimension, Link, Reading, Whole
from normfix.tiling.reach.rules.rule import Rule, kept

__all__ = ["INDICES"]

_ANYWHERE = Whole("where it reads is not known")


def _index(call: Call) -> list[Reading]:
    """Read x[..., places, ...]: dimensions with places are replaced by those of the places, others are kept."""
    x = call.tensor("self")
    rank = len(call.extents(x))
    places: Sequence[Any] = list(call.get("indices"))
    places = [*places, *(None,) * (rank - len(places))]
    named = [d for d, place in enumerate(places) if place is not None]
    tensors = [places[d] for d in named]
    if any("bool" in str(tensor_of(t).dtype) or "uint8" in str(tensor_of(t).dtype) for t in tensors):  # type: ignore[union-attr]
        return []
    wide = max(len(call.extents(t)) for t in tensors)
    together = named == list(range(named[0], named[0] + len(named)))
    first = named[0] if together else 0
    links: list[Link] = []
    for dim in range(rank):
        if places[dim] is not None:
            links.append(_ANYWHERE)
            continue
        before = sum(d < dim for d in named)
        moved = dim - before + (wide if not together or dim > first else 0)
        links.append(Along(moved))
    readings: list[Reading] = [ByDimension(x, tuple(links))]
    for tensor in tensors:
        extents = call.extents(tensor)
        shift = first + wide - len(extents)
        of = [NOTHING if e == call.sizes.ones else Along(shift + d) for d, e in enumerate(extents)]
        readings.append(ByDimension(tensor, tuple(of)))
    return readings


def _index_select(call: Call) -> list[Reading]:
    x, places = call.tensor("self"), call.tensor("index")
    rank = len(call.extents(x))
    dim = call.dim(call.get("dim", 0), rank)
    return [kept(call, x, {dim: _ANYWHERE}), ByDimension(places, (Along(dim),) * len(call.extents(places)))]


def _gather(call: Call) -> list[Reading]:
    x, places = call.tensor("self"), call.tensor("index")
    rank = len(call.extents(x))
    dim = call.dim(call.get("dim", 0), rank)
    return [kept(call, x, {dim: _ANYWHERE}), kept(call, places)]


INDICES: dict[str, Rule] = {
    **dict.fromkeys(("index", "_unsafe_index"), _index),
    "index_select": _index_select,
    "gather": _gather,
}
