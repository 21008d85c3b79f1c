"""Statistics that are no norms: pools, hand-written means and variances, responses, contractions over space.

Each is the value of one call that no longer varies over space, and becomes a constant by its population law
(normfix.layers.laws):

    mean, average pools          mean                variance, std      by total variance
    sum                          total               L1, L2, Lp norm    norm
    max, amax, maximum pools     maximum             min, amin          minimum
    sum divided by its extent    mean                all others         none: one image only

A sum of one reduction after the other (`x.mean(3).mean(2)`) has no law either, as its parts are not weighted by
their pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from normfix.networks.functions import ATTENTION, COUNTED, axes_of_pool, reduced_by
from normfix.records.sites import Family, Law, StatisticSpec
from normfix.scanning.census import Call, Shaped
from normfix.scanning.growth import FIXED, REDUCED, Growth
from normfix.scanning.liveness import Role

__all__ = ["family_of", "refusal_of", "specify"]

_LAWS: Mapping[str, Law] = {
    "mean": "mean",
    "sum": "total",
    "var": "variance",
    "std": "deviation",
    "var_mean": "variance_mean",
    "std_mean": "deviation_mean",
    "amax": "maximum",
    "max": "maximum",
    "amin": "minimum",
    "min": "minimum",
    "aminmax": "extremes",
    "norm": "norm",
    "linalg_norm": "norm",
    "linalg_vector_norm": "norm",
}
_NORMS = frozenset({"norm", "linalg_norm", "linalg_vector_norm"})
_NAMES = frozenset(COUNTED.values())
_LAYOUT = (
    "its bins keep a layout of the image (a fixed number per axis), which no constant can stand for on a tile"
)
_HIDDEN_NORM = (
    "its norm over space is inside the call, where nothing can replace it. Write "
    "x / x.norm(dim=..., keepdim=True).clamp_min(eps), which is converted"
)
_REFUSALS = {
    Role.PARTIAL: "its result still varies along an axis of the image, so no constant can replace it",
    Role.MIXING: "it mixes the whole extent into every pixel; there is no constant that could replace that",
    Role.PAIRS: "every pixel looks at every other; there is no constant that could replace that",
    Role.LEAVING: "it takes a map's values, or how many there are of a kind, out of tensors, where nothing can be "
    "seen of what is computed from them",
    Role.PICKING: "it takes the values at one place of the image, and other pixels are computed from them: at that "
    "place a tile holds another part of the image. Decide by them before the network, or take them out",
}


def family_of(call: Call, role: Role) -> Family:
    """Return the kind of statistic."""
    if role is Role.PAIRS:
        return Family.ATTENTION
    if role in (Role.MIXING, Role.LEAVING, Role.PICKING):
        return Family.OTHER
    if "_pool" in call.function:
        return Family.POOL
    return Family.RESPONSE if call.function in _NORMS else Family.REDUCTION


def refusal_of(
    position: int, calls: Sequence[Call], role: Role, growth: Growth, after: Mapping[int, frozenset[int]]
) -> str:
    """Say why a call cannot become a constant, or return ''.

    Args:
        position: of the call.
        calls: of the forward pass.
        role: of the call.
        growth: of the calls.
        after: the calls on values that no longer vary over space (influence.tails).
    """
    call = calls[position]
    if call.function == "normalize" and role is Role.MIXING:
        return _HIDDEN_NORM
    if role in _REFUSALS:
        return _REFUSALS[role]
    if "_pool" in call.function and math.prod(call.outputs[0][-axes_of_pool(call.function) :]) > 1:
        return _LAYOUT
    if call.function not in _NAMES or call.function in ATTENTION:  # which is held, if at all, by its keys
        return f"normfix has no rule for {call.function} over space"
    if "complex" in call.kinds or len(call.outputs) > 2:
        return f"normfix has no rule for what {call.function} returns here"
    if len(call.outputs) == 2 and _selects(call) and _read_later(call.writes[1], position, calls):
        return "the places of its values are used, which no constant can stand for"
    reader = _uses_extent(position, calls, growth, after)
    if reader is not None:
        return f"{reader.function} ({reader.line}) combines it with the extent of the image"
    batch = growth.batch(position)
    if batch is not None and (len(batch[0]) > 1 or len(batch[1]) > 1 or (batch[1] and not batch[0])):
        return "images of a batch are folded into several of its dimensions"
    if batch is not None and batch[1] and batch[0] & growth.space(position):
        return "images of a batch share a dimension with space"
    return ""


def specify(
    position: int, calls: Sequence[Call], role: Role, growth: Growth, after: Mapping[int, frozenset[int]]
) -> StatisticSpec:
    """Describe the constant that replaces a call; arguments as for refusal_of."""
    call = calls[position]
    operand, space = call.inputs[0], growth.space(position)
    dims = reduced_by(call.function, call.arguments, len(operand)) or ()
    stacked = _stacking(position, call, growth, dims)
    law = _law(position, calls, role, growth, after)
    batch_dim = {stacked[0]} if stacked else set()
    return StatisticSpec(
        law=law,
        shape=call.outputs[0],
        outputs=2 if len(call.outputs) == 2 and not _selects(call) else 1,
        selects=len(call.outputs) == 2 and _selects(call),
        operand=call.operand,
        rank=len(operand),
        dims=tuple(dims),
        sizes=tuple(
            (d, n)
            for d, n in enumerate(operand)
            if d not in space | batch_dim and _fixed(d, growth, position)
        ),
        batch=stacked,
        correction=_correction(call.arguments),
        power=_power(call.arguments) or 2.0,
        quotient=role is Role.QUOTIENT,
        number=cast(Any, call.kinds[0]),
    )


def _law(
    position: int, calls: Sequence[Call], role: Role, growth: Growth, after: Mapping[int, frozenset[int]]
) -> Law:
    call = calls[position]
    if role is Role.QUOTIENT:
        makers = [p for p in range(position) if set(calls[p].writes) & set(call.reads)]
        plain = bool(makers) and calls[makers[-1]].function == "sum" and growth.inputs(makers[-1]) >= REDUCED
        return "mean" if plain and len(call.reads) == 1 and len(call.numbers) == 1 else "none"
    if growth.inputs(position) < REDUCED:
        return "none"
    if call.function in _NORMS and _power(call.arguments) is None:
        return "none"
    if call.function.startswith(("adaptive_avg", "avg_pool")):
        return "mean"
    if call.function.startswith(("adaptive_max", "max_pool")):
        return "maximum"
    return _LAWS.get(call.function, "none")


def _stacking(position: int, call: Call, growth: Growth, dims: Sequence[int]) -> tuple[int, int, int] | None:
    """Return (dimension of the operand, its extent, dimension of the result) along which images are stacked."""
    operand, result = call.inputs[0], call.outputs[0]
    batch = growth.batch(position)
    if batch is None:  # one image is all the network takes; others are told by the first dimension
        alike = 0 not in dims and result and operand[0] == result[0]
        return (0, operand[0], 0) if alike else None
    source, target = batch
    if not source or not target:
        return None
    (i,), (j,) = source, target
    return i, operand[i], j


def _fixed(dim: int, growth: Growth, position: int) -> bool:
    """Tell whether an extent stays what it is for another batch."""
    batch = growth.batch(position)
    return dim not in batch[0] if batch is not None else dim != 0


def _selects(call: Call) -> bool:
    return call.function in ("max", "min", "median", "nanmedian") or "max_pool" in call.function


def _read_later(serial: int, position: int, calls: Sequence[Call]) -> bool:
    return any(serial in call.reads for call in calls[position + 1 :])


def _uses_extent(
    position: int, calls: Sequence[Call], growth: Growth, after: Mapping[int, frozenset[int]]
) -> Call | None:
    """Return a later call on this value alone that is given a number which follows the extent."""
    for later in sorted(after):
        call = calls[later]
        if later > position and position in after[later] and growth.follows_size(later):
            scaled = call.function in ("div", "mul")  # a site of its own, which makes this one dead
            if not scaled and growth.inputs(later) < FIXED:
                return call
    return None


def _correction(given: Mapping[str, Any]) -> float:
    if given.get("correction") is not None:
        return float(given["correction"])
    return 0.0 if given.get("unbiased") is False else 1.0


def _power(given: Mapping[str, Any]) -> float | None:
    """Return p of a vector norm; None where p is no positive number, or may mean a norm of matrices."""
    p = given.get("p", 2.0)
    if p in (None, "fro"):
        return 2.0
    several = not isinstance(given.get("dim"), int)
    if isinstance(p, bool | str | Shaped) or (several and p != 2):
        return None
    return float(p) if 0 < p < math.inf else None
