"""The stride of a network, its output scale and its exact sizes, from shift equivariance in float64.

A network of total stride s commutes with shifts by s: f(shift x) = shift f(x) in the interior. In float64
the difference is zero up to 1e-13 at true strides and at least 1e-6 elsewhere, so the test needs no taste.
align_corners=True and position embeddings fail it at every shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from normfix.calling import refusals
from normfix.dye import strip, texture
from normfix.tiles import at, round_up

__all__ = [
    "EXACT",
    "common_unit",
    "cutting_grid",
    "exact_multiple",
    "is_equivariant",
    "output_scale",
    "smallest_stride",
    "smallest_tile",
]

EXACT = 1e-10
"""Largest relative difference in float64 that counts as none."""

_CLEARLY, _MARGIN = 1e-3, 32  # a difference that needs no float64; pixels compared at least

Function = Callable[[Tensor], Tensor]


def output_scale(f: Function, example: Tensor, axis: int, grid: int, cross: Sequence[int]) -> Fraction:
    """Return output pixels per input pixel along an axis, from the growth between two lengths."""
    least = round_up(max(64, cross[axis]), grid)
    lengths = [least, least + grid]
    outputs = []
    for length in lengths:
        size = [*cross]
        size[axis] = length
        outputs.append(f(strip(example, size)).shape[axis + 2])
    return Fraction(outputs[1] - outputs[0], lengths[1] - lengths[0])


def is_equivariant(
    f: Function,
    example: Tensor,
    axis: int,
    shift: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
    grid: int = 1,
) -> bool | None:
    """Tell whether shifting the input by `shift` pixels shifts the output, away from the ends.

    Args:
        f: the network in float64.
        example: (N, C, *space) in float64, the material of the strip.
        axis: spatial axis, from 0.
        shift: pixels; `shift * scale` must be whole.
        scale: output pixels per input pixel.
        reach: how far the ends of the strip are felt, (before, after), multiples of the stride.
        cross: extents of the other axes.
        grid: what the network's input must be a multiple of.

    Returns:
        None if the output is constant over space, which tells nothing.
    """
    if (shift * scale).denominator != 1:
        return False
    grid = math.lcm(grid, shift)
    length = round_up(reach[0] + reach[1] + 64, grid) + 2 * grid
    size = [*cross]
    size[axis] = length + shift
    x = strip(example, size) + texture(example, size)
    still, moved = f(x.narrow(axis + 2, 0, length)), f(x.narrow(axis + 2, shift, length))
    first = round_up(reach[0], scale.denominator) + shift
    last = length - round_up(reach[1], scale.denominator)
    width = int((last - first) * scale)
    a = still.narrow(axis + 2, int(first * scale), width)
    b = moved.narrow(axis + 2, int((first - shift) * scale), width)
    return _same(a, b)


def smallest_stride(
    f: Function,
    example: Tensor,
    axis: int,
    hint: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
) -> int | None:
    """Return the smallest divisor of `hint` (or of twice or four times it) that the network commutes with.

    Returns:
        None if it commutes with none of them: its output depends on size or position. A constant output
        tells nothing, so the hint stands.
    """

    def commutes(shift: int) -> bool | None:
        return is_equivariant(f, example, axis, shift, scale, reach, cross, hint)

    stride = next((hint * k for k in (1, 2, 4) if commutes(hint * k) is not False), None)
    if stride is None:
        return None
    for prime in _primes(stride):
        while stride % prime == 0 and commutes(stride // prime):
            stride //= prime
    return stride


def cutting_grid(
    f: Function,
    example: Tensor,
    axis: int,
    stride: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
) -> int | None:
    """Return the smallest multiple of the stride at which windows may be cut, in extent as well as in place.

    It is the stride itself unless the network treats extents by another unit, as one does that pads to a
    multiple of 16 around a net of stride 4. Whole and windows have odd and even numbers of units, so that they
    cannot agree by sharing a remainder.

    Returns:
        None if not even sixteen strides are enough.
    """
    for unit in (stride * k for k in (1, 2, 4, 8, 16)):
        start, length = _odd(64, unit), _odd(reach[0] + reach[1] + 64, unit)
        if _cuts_agree(f, example, axis, start, start + length, unit, scale, reach, cross) is not False:
            return unit
    return None


def common_unit(
    f: Function,
    example: Tensor,
    axis: int,
    hint: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
    *,
    settled: bool = False,
) -> int | None:
    """Return what smallest_stride and cutting_grid agree on where windows may be cut at every `hint`, else None.

    Each strip is run once and compared with several: a window one unit further on, shorter by that unit, and
    windows of the same length at every smaller shift that could be the stride. With `settled`, the hint is
    the answer of a like axis, and nothing smaller is tried.
    """
    unit, length = hint, _odd(max(sum(reach) + _MARGIN, cross[axis]) + hint, hint)
    size = [*cross]
    size[axis] = length + hint
    x = strip(example, size) + texture(example, size)
    begin = round_up(reach[0], scale.denominator)

    def run(start: int, stop: int) -> Tensor:
        return f(x.narrow(axis + 2, start, stop - start))

    def agree(start: int, stop: int) -> bool | None:
        """Compare the window [start, stop) with [0, length), to the end where both end there."""
        if (start * scale).denominator != 1:
            return False
        try:
            part = run(start, stop)
        except refusals():
            return False
        first = int(begin * scale)
        if stop == length:
            width = part.shape[axis + 2] - first
            if whole.shape[axis + 2] != part.shape[axis + 2] + int(start * scale):
                return False
        else:
            width = int((length - start - begin - round_up(reach[1], scale.denominator)) * scale)
        a = whole.narrow(axis + 2, int((start + begin) * scale), width)
        return _same(a, part.narrow(axis + 2, first, width))

    whole = run(0, length)
    if agree(unit, length) is False:
        return None
    for prime in [] if settled else _primes(hint):
        while unit % prime == 0 and agree(unit // prime, length + unit // prime):
            # equal lengths commute with the smaller shift; they may still be cut at larger units only
            if cutting_grid(f, example, axis, unit // prime, scale, reach, cross) != unit // prime:
                break
            unit //= prime
    return unit


def smallest_tile(
    f: Function, example: Tensor, axis: int, stride: int, scale: Fraction, after: int, cross: Sequence[int]
) -> int:
    """Return the least extent on the stride grid that the network runs on and answers rightly.

    Right: as many outputs as the scale promises, and, where the extent is larger than what lies ahead of a
    pixel, those of a longer strip.
    """
    length = round_up(cross[axis] + after, stride) + stride
    size = [*cross]
    size[axis] = length
    x = strip(example, size)
    whole = f(x)
    surplus = whole.shape[axis + 2] - length * scale
    for extent in range(stride, cross[axis], stride):
        try:
            part = f(x.narrow(axis + 2, 0, extent))
        except refusals():
            continue
        inner = max(0, int((extent - after) * scale))
        same = torch.allclose(part.narrow(axis + 2, 0, inner), whole.narrow(axis + 2, 0, inner), 1e-3, 1e-3)
        if part.shape[axis + 2] == extent * scale + surplus > 0 and same:
            return extent
    return round_up(cross[axis], stride)


def exact_multiple(
    f: Function,
    example: Tensor,
    axis: int,
    stride: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
    rough: Function | None = None,
    *,
    like: int | None = None,
) -> int:
    """Return 1 if sizes that the stride does not divide are exact as well, else the stride.

    A window that starts on the grid and ends at the image's end must give what the whole strip gives there;
    it does not where a feature map is resized to a skip connection of another ratio. A window of whole
    strides at the image's start must do so too; it does not where the network pads odd sizes on both sides.
    The remainder that is odd at every level of halving decides in float64; `rough`, the network in float32,
    looks for clear differences at the others first, at half the price. `like` is the answer of a like axis: a
    stride is taken over, exactness is held against float32 alone.
    """
    if like is not None and like != 1:
        return stride

    def holds(rest: int, function: Function, bound: float) -> bool | None:
        size = [*cross]
        size[axis] = length + rest
        x = strip(example, size) + texture(example, size)
        if function is rough:
            x = x.float()
        ends, whole = _ends_agree(function, x, axis, stride, scale, reach, bound)
        if not ends or whole is None:
            return ends
        inner = int((length - reach[1]) * scale)
        front = function(x.narrow(axis + 2, 0, length))
        return _same(whole.narrow(axis + 2, 0, inner), front.narrow(axis + 2, 0, inner), bound)

    length = stride + round_up(sum(reach) + _MARGIN, stride)
    quick = (f, EXACT) if rough is None else (rough, _CLEARLY)
    if like is not None and stride > 1:
        return 1 if holds(stride - 1, *quick) else stride
    trials = [(rest, *quick) for rest in (1, stride // 2) if 0 < rest < stride - 1]
    trials += [(stride - 1, f, EXACT)] if stride > 1 else []
    return 1 if all(holds(*trial) for trial in trials) else stride


def _ends_agree(
    f: Function,
    x: Tensor,
    axis: int,
    start: int,
    scale: Fraction,
    reach: tuple[int, int],
    bound: float = EXACT,
) -> tuple[bool | None, Tensor | None]:
    """Compare a strip with its window from `start` to the end; return how it came out, and the strip's output."""
    try:
        whole = f(x)
        part = f(x.narrow(axis + 2, start, x.shape[axis + 2] - start))
    except refusals():
        return False, None
    begin, offset = int((start + reach[0]) * scale), int(start * scale)
    wide, narrow = whole.shape[axis + 2] - begin, part.shape[axis + 2] - (begin - offset)
    if wide != narrow:
        return False, whole
    ends = whole.narrow(axis + 2, begin, wide), part.narrow(axis + 2, begin - offset, narrow)
    return _same(*ends, bound), whole


def _odd(least: int, unit: int) -> int:
    """Return the smallest odd number of units that is at least `least`."""
    count = -(-least // unit)
    return (count + 1 - count % 2) * unit


def _cuts_agree(
    f: Function,
    example: Tensor,
    axis: int,
    start: int,
    length: int,
    cut: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
) -> bool | None:
    """Compare a strip with its windows from `start` to the end, and from 0 to `cut` before the end.

    Returns:
        None if the output does not vary, so that nothing was compared.
    """
    size = [*cross]
    size[axis] = length
    x = strip(example, size) + texture(example, size)
    at_end, whole = _ends_agree(f, x, axis, start, scale, reach)
    if at_end is False or whole is None:
        return False
    try:
        front = f(x.narrow(axis + 2, 0, length - cut))
    except refusals():
        return False
    inner = int((length - cut - reach[1]) * scale)
    at_start = _same(whole.narrow(axis + 2, 0, inner), front.narrow(axis + 2, 0, inner))
    return None if None in (at_end, at_start) else bool(at_end and at_start)


def _same(a: Tensor, b: Tensor, bound: float = EXACT) -> bool | None:
    """Compare relative to the larger output; an output without any variation proves nothing: None."""
    if all(torch.equal(y, y[at([slice(1)] * (y.dim() - 2))].expand_as(y)) for y in (a, b)):
        return None
    extent = float(torch.maximum(a.abs().max(), b.abs().max()))
    return bool((a - b).abs().max() <= bound * max(extent, 1e-300))


def _primes(n: int) -> list[int]:
    return [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]
