"""Which statistics reach the network's result, once those that can be frozen are.

Calls that look at the whole extent play one of these roles:

    total     the result no longer varies over space: it can become a constant
    quotient  a number on its way from such a result that is divided (or multiplied) by the extent
    partial   the result still varies along an axis of the image (strip pooling)
    mixing    a map in, a map out, and each pixel has seen all (softmax, cumsum, sort, Fourier)
    pairs     every pixel is compared with every other (attention)
    leaving   a map's values leave tensors, or say by a result's size how many they are (`equal`, `x[mask]`); a few of
              them do, for a branch (`if x[0, 0, 0, 0] > .5`)
    picking   values at one place of a map, which a larger one is computed from (`where(x[..., :1, :1] > .5, a, b)`)

A statistic is live if a path leads from it to the network's result, or to a value that leaves tensors and may
decide a branch, without passing a total or quotient that is frozen: a constant cuts all that leads to it.
So `x.mean(3).mean(2)` and `softmax(q) @ x` are frozen at their last, size-independent value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from normfix.networks.functions import ATTENTION, CONTRACTING, NEW, tokens_of
from normfix.records.choices import StrEnum
from normfix.scanning.census import LEAVES, PICKS, Call
from normfix.scanning.growth import FIXED, REDUCED, SQUARED, Growth

__all__ = ["Role", "live_positions", "looks_alone", "reached_positions", "roles", "tails"]


class Role(StrEnum):
    """What a call does to the extent of the image."""

    TOTAL = "total"
    QUOTIENT = "quotient"
    PARTIAL = "partial"
    MIXING = "mixing"
    PAIRS = "pairs"
    LEAVING = "leaving"
    PICKING = "picking"


_FREQUENCY = frozenset(
    f"fft_{kind}fft{n}" for kind in ("", "i", "r", "ir", "h", "ih") for n in ("", "2", "n")
)
_ALONG = frozenset(
    {"softmax", "log_softmax", "softmin", "normalize", "cumsum", "cumprod", "logcumsumexp", "sort"}
)
_ALONG_TOO = frozenset({"argsort", "cummax", "cummin", "cumsum_", "cumprod_", "flip"})
_SHAPING = frozenset({"__getitem__", "interpolate", "upsample", "size", "expand", "expand_as", "pad"})
_PICKING = frozenset({"narrow", "select", "index_select", "split", "chunk", "unbind", "gather", "take", "t"})

_MADE = NEW | {"new_tensor"}

_RESIZING = frozenset({"interpolate", "upsample"})
_PLACED = (
    (_PICKING - {"t"}) | _RESIZING | frozenset({"__getitem__", "take_along_dim", "diagonal", "as_strided"})
)
"""What takes values from places of a map."""
_JOINING = frozenset(
    {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "pad", "copy_"}
) | frozenset({"__setitem__", "index_put", "index_put_", "slice_scatter", "select_scatter"})
"""What puts values beside others, as replicated padding does with those of the border."""

_SLIDING = ("max_pool", "avg_pool", "lp_pool", "conv1d", "conv2d", "conv3d", "conv_transpose", "unfold")


def roles(calls: Sequence[Call], growth: Growth, is_norm: Callable[[str], bool]) -> dict[int, Role]:
    """Return the role of each call, by position, that has one.

    Args:
        calls: of one forward pass.
        growth: of these calls.
        is_norm: tells normalising functions, which have rules of their own.
    """
    found = {
        position: role
        for position, call in enumerate(calls)
        if call.reads and not is_norm(call.function) and (role := _role(position, call, growth)) is not None
    }
    after = tails(calls, growth, found)
    for position, call in enumerate(calls):
        scales = call.function in ("div", "mul") and growth.follows_size(position)
        if scales and position not in found and after.get(position):
            found[position] = Role.QUOTIENT
    return {**_picks(calls, growth, found), **found}


def tails(calls: Sequence[Call], growth: Growth, found: Mapping[int, Role]) -> dict[int, frozenset[int]]:
    """Return for each call on values that no longer vary over space which totals these come from."""
    carried: dict[int, frozenset[int]] = {}
    result: dict[int, frozenset[int]] = {}
    for position, call in enumerate(calls):
        inherited = frozenset().union(*(carried.get(serial, frozenset()) for serial in call.reads))
        if growth.outputs(position) < FIXED and call.writes:
            if inherited:
                result[position] = inherited
            if found.get(position) is Role.TOTAL:
                inherited = frozenset({position})
            for serial in call.writes:
                carried[serial] = carried.get(serial, frozenset()) | inherited
    return result


def reached_positions(calls: Sequence[Call]) -> frozenset[int]:
    """Return the calls from which any path leads to the result that counts, or out of tensors."""
    needed: set[int] = set()
    found: set[int] = set()
    for position in reversed(range(len(calls))):
        call = calls[position]
        if call.returned or call.function in LEAVES | PICKS or needed.intersection(call.writes):
            found.add(position)
            needed.update(call.reads)
    return frozenset(found)


def live_positions(
    calls: Sequence[Call],
    growth: Growth,
    cuts: Collection[int],
    kept: Mapping[int, Collection[int]] = MappingProxyType({}),
) -> frozenset[int]:
    """Return the calls from which a path leads to a map in the result or out of tensors without passing a cut.

    A cut itself is live if a path leads on from it; `kept` says what it reads all the same, as attention does its
    queries. A result that is no map, a classifier's, does not count.
    """
    needed: set[int] = set()
    live: set[int] = set()
    for position in reversed(range(len(calls))):
        call = calls[position]
        if call.function in LEAVES | PICKS:
            live.add(position)
            needed.update(call.reads)
        elif (call.returned and growth.outputs(position) >= FIXED) or needed.intersection(call.writes):
            live.add(position)
            needed.update(kept.get(position, ()) if position in cuts else call.reads)
    return frozenset(live)


def looks_alone(call: Call, role: Role, space: Collection[int]) -> bool:
    """Tell whether a call looks as if each pixel had seen all by its name or growth, where its operand may say no.

    Attention over tokens that follow the image is what it looks like; over a fixed number of them it may be blocks.

    Args:
        call: of the forward pass.
        role: of the call.
        space: dimensions of its main operand that follow the image.
    """
    if role is Role.PAIRS:
        return call.function in ATTENTION and tokens_of(call.function, len(call.inputs[0])) not in space
    return role in (Role.MIXING, Role.PARTIAL)


def _role(position: int, call: Call, growth: Growth) -> Role | None:
    name = call.function
    into, out = growth.inputs(position), growth.outputs(position)
    if name in LEAVES | PICKS:
        return Role.LEAVING if into >= FIXED else None
    if name in _SHAPING or name in _PICKING or not call.outputs:
        return None
    if into < FIXED:
        return None
    if out < FIXED:
        total = (name in CONTRACTING and growth.two_sizes) or _smaller(call)
        return Role.TOTAL if total and name not in _MADE else None
    pairs = out > SQUARED * max(1.0, into) and not _slides(call)
    if name in ATTENTION and not call.operand and len(call.reads) == 1:
        return None  # queries alone are of the image
    if name in ATTENTION or pairs:
        return Role.PAIRS
    if name in _FREQUENCY or (name in _ALONG | _ALONG_TOO and _along_space(position, call, growth)):
        return Role.MIXING
    # what shrinks from squared is the second half of an attention, named at its first half
    return Role.PARTIAL if into <= SQUARED and out < REDUCED * into else None


def _picks(calls: Sequence[Call], growth: Growth, found: Mapping[int, Role]) -> dict[int, Role]:
    """Return the calls that take values from places of a map, where a larger map or a branch is made of these.

    A view shares the memory of what it is of, so a value is known by its memory and its shape.
    """
    carried: dict[tuple[int, tuple[int, ...]], frozenset[int]] = {}
    picks: dict[int, Role] = {}
    for position, call in enumerate(calls):
        given = list(zip(call.reads, call.inputs, strict=True))
        sources = [carried.get(key, frozenset()) for key in given]
        if call.function in LEAVES and any(sources):
            picks[position] = Role.LEAVING
        if position in found or not call.writes:
            continue
        out = growth.outputs(position)
        spread = [
            source
            for number, source in enumerate(sources)
            if growth.two_sizes and out >= FIXED and growth.input(position, number) < REDUCED * out
        ]
        if call.function not in _JOINING:
            met = (p for source in spread for p in source if calls[p].function not in _RESIZING)
            picks.update(dict.fromkeys(met, Role.PICKING))
        kept = frozenset().union(*(source for source in sources if source not in spread))
        if (
            call.function in _PLACED
            and growth.inputs(position) >= FIXED
            and out < REDUCED * growth.inputs(position)
        ):
            kept |= {position}
        for key in zip(call.writes, call.outputs, strict=True):
            carried[key] = kept
    return picks


def _slides(call: Call) -> bool:
    """Tell whether a window moves over the map: without padding, a small map of windows grows faster than the image."""
    return call.function.startswith(_SLIDING) and len(call.inputs) == 1


def _smaller(call: Call) -> bool:
    """Tell a reduction from a view, where only one size is known."""
    return max(map(math.prod, call.outputs)) < max(map(math.prod, call.inputs))


def _along_space(position: int, call: Call, growth: Growth) -> bool:
    rank = len(call.inputs[0])
    dims = [int(n) for n in call.numbers if -rank <= n < rank]
    given = call.arguments.get("dim", dims[0] if dims else -1)
    if given is None:
        return True
    along = given if isinstance(given, list | tuple) else (given,)
    return bool({int(d) % rank for d in along} & growth.space(position))
