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

from normfix.calling import REFUSALS
from normfix.dye import strip, texture
from normfix.tiles import at, round_up

__all__ = ["EXACT", "cutting_grid", "exact_multiple", "is_equivariant", "output_scale", "smallest_stride"]

EXACT = 1e-10
"""Largest relative difference in float64 that counts as none."""

Function = Callable[[Tensor], Tensor]


def output_scale(f: Function, example: Tensor, axis: int, grid: int, cross: Sequence[int]) -> Fraction:
    """Return output pixels per input pixel along an axis, from the growth between two lengths."""
    lengths = [round_up(n, grid) for n in (128, 128 + grid)]
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


def exact_multiple(
    f: Function,
    example: Tensor,
    axis: int,
    stride: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
) -> int:
    """Return 1 if sizes that the stride does not divide are exact as well, else the stride.

    A window that starts on the grid and ends at the image's end must give what the whole strip gives there;
    it does not where a feature map is resized to a skip connection of another ratio. A window of whole
    strides at the image's start must do so too; it does not where the network pads odd sizes on both sides.
    """
    start = round_up(64, stride)
    length = start + round_up(reach[0] + reach[1] + 64, stride)
    for rest in {1, stride // 2, stride - 1} - {0}:
        if _cuts_agree(f, example, axis, start, length + rest, rest, scale, reach, cross) is not True:
            return stride
    return 1


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
    try:
        whole = f(x)
        part = f(x.narrow(axis + 2, start, length - start))
        front = f(x.narrow(axis + 2, 0, length - cut))
    except REFUSALS:
        return False
    begin, offset = int((start + reach[0]) * scale), int(start * scale)
    inner = int((length - cut - reach[1]) * scale)
    wide, narrow = whole.shape[axis + 2] - begin, part.shape[axis + 2] - (begin - offset)
    if wide != narrow:
        return False
    at_end = _same(whole.narrow(axis + 2, begin, wide), part.narrow(axis + 2, begin - offset, narrow))
    at_start = _same(whole.narrow(axis + 2, 0, inner), front.narrow(axis + 2, 0, inner))
    return None if None in (at_end, at_start) else bool(at_end and at_start)


def _same(a: Tensor, b: Tensor) -> bool | None:
    """Compare relative to the larger output; an output without any variation proves nothing: None."""
    if all(torch.equal(y, y[at([slice(1)] * (y.dim() - 2))].expand_as(y)) for y in (a, b)):
        return None
    extent = float(torch.maximum(a.abs().max(), b.abs().max()))
    return bool((a - b).abs().max() <= EXACT * max(extent, 1e-300))


def _primes(n: int) -> list[int]:
    return [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]
