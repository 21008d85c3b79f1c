"""Neighbourhood attention, as NATTEN's operators compute it from (N, *space, heads, channels).

    along an axis    i reads the k positions i - (k // 2) d, ..., d apart; near a border the k nearest it, so up to
                     (k - 1) d from it, and d - 1 more, as every d-th position is a map of its own
    causal           i reads i - (k - 1) d ... i, and what lies before the border not at all

Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, and "Dilated Neighborhood Attention Transformer", 2022.
No rule is known where several queries share a window (a stride above 1) or keys of another sequence are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normfix.networks.operators import NEIGHBOURHOODS
from normfix.tiling.reach.calls import Call
from normfix.tiling.reach.links import WHOLE, Along, ByDimension, Inward, Link, Reading, Unread, Window
from normfix.tiling.reach.needs import Reads
from normfix.tiling.reach.rules.rule import Rule

__all__ = ["NEIGHBOURS"]


def _neighbours(call: Call) -> list[Reading]:
    query, axes = call.tensor("query"), len(call.extents(call.tensor("query"))) - 3
    extents, dilation = call.numbers("kernel_size", axes), call.numbers("dilation", axes)
    causal: Sequence[Any] = call.get("is_causal")
    if any(n != 1 for n in call.numbers("stride", axes)) or call.get("num_extra_kv", 0):
        return []
    space = [_window(dim, *of) for dim, of in enumerate(zip(extents, dilation, causal, strict=True), start=1)]
    heads, answers = Along(axes + 1), call.item == 0
    readings: list[Reading] = [ByDimension(query, (*map(Along, range(axes + 2)), WHOLE))]
    for name, last in (("key", WHOLE), ("value", Along(axes + 2))):
        if answers or name == "key":  # a sum of weights takes no values
            readings.append(ByDimension(call.tensor(name), (Along(0), *space, heads, last)))
    return [*readings, *([] if answers else [Unread(call.tensor("value"))])]


def _window(dim: int, extent: int, dilation: int, causal: bool) -> Link:
    wide = dilation * (extent - 1)
    if causal:
        return Window(dim, _before(wide))
    before = dilation * (extent // 2)
    return Inward(dim, before, wide - before, wide + dilation - 1)


def _before(wide: int) -> Reads:
    return lambda given: (given[0] - wide, given[1])


NEIGHBOURS: dict[str, Rule] = {name.partition("::")[2]: _neighbours for name in NEIGHBOURHOODS}
