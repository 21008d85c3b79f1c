"""The stride of a network, its output scale and its exact sizes, from shift equivariance in float64.

A network of total stride s commutes with shifts by s: f(shift x) = shift f(x) in the interior. In float64
the difference is zero up to 1e-13 at true strides and at least 1e-6 elsewhere, so the test needs no taste.
align_corners=True and position embeddings fail it at every shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from normfix.networks.calling import refusals
from normfix.networks.numerics import EXACT
from normfix.records.spans import round_up
from normfix.tiling.grid import at
from normfix.tiling.material import strip, textured

__all__ = [
    "common_strip",
    "common_unit",
    "cutting_grid",
    "ends_held",
    "exact_multiple",
    "is_equivariant",
    "lattices",
    "output_scale",
    "pads_inside",
    "smallest_stride",
    "smallest_tile",
]

_CLEARLY, _HARDLY = 1e-3, 1e-5
"""Differences in float32 that need no float64 to count as one, or as none: rounding gives 2e-6 in a ResNet U-Net."""

_MARGIN = 32  # pixels compared at least
_FAR = 640  # pixels of growth that tell fractions of denominators up to 17 apart
_COARSEST_LATTICE = 384
_COMMON = (
    200  # pixels: 192 is a multiple of every even number up to 16 but 10 and 14, and of 24, 32, 48, 64, 96
)

Function = Callable[[Tensor], Tensor]


def output_scale(f: Function, example: Tensor, axis: int, grid: int, cross: Sequence[int]) -> Fraction | None:
    """Return output pixels per input pixel along an axis, from the growth between several lengths.

    Extents are rounded, so one step of `grid` pixels tells the scale only where a larger one agrees. Where they do
    not (1.5 output pixels per pixel, floor(n / 3) of them), the simplest fraction is taken that explains the growth
    over hundreds of pixels, and one more length must give exactly what it promises.

    Returns:
        0 or less where the output does not grow with the input; None where no simple fraction explains how it does.
    """
    least = round_up(max(64, cross[axis]), grid)

    def extent(length: int) -> int:
        size = [*cross]
        size[axis] = length
        return int(f(strip(example, size)).shape[axis + 2])

    first = extent(least)
    scale = Fraction(extent(least + grid) - first, grid)
    far = grid * max(2, 48 // grid)
    if extent(least + far) - first == scale * far:
        return scale
    far = round_up(_FAR, grid)
    growth = extent(least + far) - first
    if growth <= 0:
        return Fraction(0)
    scale = _simplest(Fraction(growth - 1, far), Fraction(growth + 1, far))
    period = math.lcm(grid, scale.denominator)
    promised = round_up(far, period)
    return scale if extent(least + promised) - first == scale * promised else None


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """Return the fraction of the smallest denominator strictly between two, the lower of which is not negative.

    >>> _simplest(Fraction(299, 200), Fraction(301, 200))
    Fraction(3, 2)
    """
    whole = low.numerator // low.denominator
    if whole + 1 < high:
        return Fraction(whole + 1)
    if low == whole:  # the least n for which whole + 1/n lies below `high`
        return whole + Fraction(1, math.floor(1 / (high - whole)) + 1)
    return whole + 1 / _simplest(1 / (high - whole), 1 / (low - whole))


def lattices(grid: int) -> Iterator[int]:
    """Yield coarser units that a network may bring its input to, on multiples of `grid`.

    A network that pads to a lattice of blocks (windows of attention, a block MLP) runs on every size, so its maps do
    not show the lattice. Each unit here is a multiple of many: 64 stands for 2, 4, ..., 64.
    """
    if 4 * grid > 64:
        # the multiple that is missed by one halving, at half the price
        yield 2 * grid
    for odd, least in ((1, 64), (3, 96), (5, 80), (7, 112), (9, 72), (11, 44), (13, 52)):
        unit = 4 * math.lcm(grid, odd)
        while unit < least:
            unit *= 2
        if unit <= _COARSEST_LATTICE or odd == 1:
            yield unit


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
    x = textured(example, size)
    still, moved = f(x.narrow(axis + 2, 0, length)), f(x.narrow(axis + 2, shift, length))
    first = round_up(reach[0], scale.denominator) + shift
    last = length - round_up(reach[1], scale.denominator)
    width = min(int((last - first) * scale), still.shape[axis + 2] - int(first * scale))
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
    multiple of 16 around a net of stride 4. The whole is a multiple of many such units (`_common_length`), windows are
    not, so that they cannot agree by sharing a remainder.

    Returns:
        None if not even sixteen strides are enough.
    """
    for unit in (stride * k for k in (1, 2, 4, 8, 16)):
        start = _prime_to_many(64, unit)
        length = _common_length(start + reach[0] + reach[1] + 64, unit)
        if _cuts_agree(f, example, axis, start, length, unit, scale, reach, cross) is not False:
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
    refuted: int = 0,
    short: bool = False,
) -> int | None:
    """Return what smallest_stride and cutting_grid agree on where windows may be cut at every `hint`, else None.

    One strip is compared with several windows: one that starts a unit further on and is shorter by that unit, and
    some of the same length at every smaller shift that could be the stride. With `settled`, the hint is
    the answer of a like axis, and nothing smaller is tried; nor are divisors of `refuted`, a hint that was none.
    `short` takes a strip as long as the comparison needs, where it is known that no coarser unit hides.
    """
    unit, x = hint, common_strip(example, axis, hint, scale, reach, cross, short=short)
    length = x.shape[axis + 2] - hint
    if _window_agrees(f, x, axis, length, (unit, length), scale, reach) is False:
        return None
    for prime in [] if settled else _primes(hint):
        while unit % prime == 0:
            further = unit // prime, length + unit // prime
            if refuted % (unit // prime) == 0 < refuted:
                break
            if not _window_agrees(f, x, axis, length, further, scale, reach):
                break
            # equal lengths commute with the smaller shift; they may still be cut at larger units only
            if cutting_grid(f, example, axis, unit // prime, scale, reach, cross) != unit // prime:
                break
            unit //= prime
    return unit


def common_strip(
    example: Tensor,
    axis: int,
    hint: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
    *,
    short: bool,
) -> Tensor:
    """Return the strip of common_unit, which is a unit longer than the windows that it compares."""
    if short:
        # both windows end where the strip does
        length = round_up(max(reach[0] + _margin(scale), cross[axis]) + hint, hint)
    else:
        length = _common_length(max(sum(reach) + _margin(scale), cross[axis]) + hint, hint)
    size = [*cross]
    size[axis] = length + hint
    return textured(example, size)


def _window_agrees(
    f: Function,
    x: Tensor,
    axis: int,
    length: int,
    window: tuple[int, int],
    scale: Fraction,
    reach: tuple[int, int],
) -> bool | None:
    """Compare a window (start, stop) of a strip with [0, length), to the end where both end there."""
    start, stop = window
    if (start * scale).denominator != 1:
        return False
    whole = f(x.narrow(axis + 2, 0, length))
    try:
        part = f(x.narrow(axis + 2, start, stop - start))
    except refusals():
        return False
    begin = round_up(reach[0], scale.denominator)
    first = int(begin * scale)
    if stop == length:
        width = part.shape[axis + 2] - first
        if whole.shape[axis + 2] != part.shape[axis + 2] + int(start * scale):
            return False
    else:
        width = int((length - start - begin - round_up(reach[1], scale.denominator)) * scale)
        width = min(width, part.shape[axis + 2] - first)
    a = whole.narrow(axis + 2, int((start + begin) * scale), width)
    return _same(a, part.narrow(axis + 2, first, width))


def smallest_tile(
    f: Function, x: Tensor, axis: int, stride: int, scale: Fraction, after: int, most: int
) -> int:
    """Return the least extent on the stride grid that the network runs on and answers rightly.

    Right: as many outputs as the scale promises, and, where the extent is larger than what lies ahead of a
    pixel, those of a longer strip.

    Args:
        f: the network.
        x: a strip that it runs on.
        axis: spatial axis, from 0.
        stride: along it.
        scale: output pixels per input pixel.
        after: how far ahead a pixel depends on the input.
        most: the least extent of those that were run, which need not be tried.
    """
    for extent in range(stride, min(most, x.shape[axis + 2]), stride):
        try:
            part = f(x.narrow(axis + 2, 0, extent))
        except refusals():
            continue
        whole = f(x)
        surplus = whole.shape[axis + 2] - x.shape[axis + 2] * scale
        inner = max(0, int((extent - after) * scale))
        same = torch.allclose(*_fronts(whole, part, axis, inner), 1e-3, 1e-3)
        if part.shape[axis + 2] == extent * scale + surplus > 0 and same:
            return extent
    return round_up(most, stride)


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
    The remainder that is odd at every level of halving decides in float64. At the others `rough`, the network in
    float32, tells clear differences and clear equality at half the price; between the two float64 decides. `like` is
    the answer of a like axis: a stride is taken over, since padding to it is always right; exactness is tried at the
    same remainders, all of them roughly, since axes of one stride and halo may be padded at different ends.
    """
    if like is not None and like != 1:
        return stride

    def difference(rest: int, function: Function) -> float:
        """Return the largest relative difference; infinite where sizes differ, or nothing varies."""
        size = [*cross]
        size[axis] = length + rest
        x = textured(example, size)
        if function is rough:
            x = x.float()
        ends, whole = _ends(function, x, axis, stride, scale, reach)
        if ends is None or whole is None:
            return math.inf
        front = function(x.narrow(axis + 2, 0, length))
        fronts = _fronts(whole, front, axis, int((length - reach[1]) * scale))
        both = _difference(*ends), _difference(*fronts)
        return max(math.inf if d is None else d for d in both)

    def is_exact(rest: int) -> bool:
        if rough is not None and (like is not None or rest != stride - 1):
            roughly = difference(rest, rough)
            if not _HARDLY < roughly <= _CLEARLY:
                return roughly <= _HARDLY
        return difference(rest, f) <= EXACT

    length = stride + round_up(sum(reach) + _margin(scale), stride)
    return 1 if all(map(is_exact, _remainders(stride))) else stride


def pads_inside(
    f: Function,
    example: Tensor,
    axis: int,
    stride: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
) -> bool:
    """Tell whether windows that leave as much over of whole strides as an image give what that gives.

    So it is where a network pads to whole strides on both sides, or before the image, and cuts back: what is left over
    says where its grid begins. A window from the front, one from the middle and one to the end are compared, each but
    for a stride more than the halo.

    Args:
        f: the network in float64, and the others as for `exact_multiple`.
        example: the material of the strips.
        axis: spatial axis, from 0.
        stride: along it, of which sizes are not exact in any windows.
        scale: output pixels per input pixel.
        reach: halo in whole strides.
        cross: extents of the other axes.
    """
    before, after = reach[0] + stride, reach[1] + stride
    inner = round_up(_margin(scale), stride)
    reads = before + inner + after
    for rest in _remainders(stride):
        length = 3 * stride + reads + rest
        x = textured(example, (*cross[:axis], length, *cross[axis + 1 :]))
        try:
            whole = f(x)
            if whole.shape[axis + 2] != math.ceil(length * scale):
                return False
            for start in (0, stride, 3 * stride):
                # by two strides and by three fewer than the strip, so that no coarser grid is shared by chance
                part = f(x.narrow(axis + 2, start, reads + rest + stride * (start == 0)))
                first = int(before * scale) if start else 0
                # the last window ends where the strip does
                last = part.shape[axis + 2] if start == 3 * stride else int((before + inner) * scale)
                offset = int(start * scale)
                if offset + last > whole.shape[axis + 2]:
                    return False
                pair = (
                    y.narrow(axis + 2, n, last - first) for y, n in ((whole, offset + first), (part, first))
                )
                if not _same(*pair):
                    return False
        except refusals():
            return False
    return True


def _remainders(stride: int) -> tuple[int, ...]:
    """Return the remainders of extents at which it is tried whether sizes that a stride does not divide are exact."""
    return tuple(sorted({1, stride // 2, stride - 1} - {0, stride}))


def ends_held(
    f: Function,
    example: Tensor,
    axis: int,
    unit: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
) -> tuple[bool, bool]:
    """Tell whether windows that start later, and that end earlier, give what the whole strip gives within the halo.

    A map that is shifted forward and then convolved depends on no pixel behind, and ends where the window does.
    """
    start = _prime_to_many(_MARGIN, unit)
    length = start + round_up(max(sum(reach) + _margin(scale), cross[axis]), unit)
    size = [*cross]
    size[axis] = length + start
    x = textured(example, size)
    ends, whole = _ends(f, x, axis, start, scale, reach)
    if ends is None or whole is None:
        return False, False
    try:
        front = f(x.narrow(axis + 2, 0, length))
    except refusals():
        return False, False
    fronts = _fronts(whole, front, axis, int((length - reach[1]) * scale))
    return _same(*ends) is not False, _same(*fronts) is not False


def _ends(
    f: Function, x: Tensor, axis: int, start: int, scale: Fraction, reach: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Return what a strip and its window from `start` give at the end, None where sizes differ; and the whole."""
    try:
        whole = f(x)
        part = f(x.narrow(axis + 2, start, x.shape[axis + 2] - start))
    except refusals():
        return None, None
    begin, offset = int((start + reach[0]) * scale), int(start * scale)
    wide, narrow = whole.shape[axis + 2] - begin, part.shape[axis + 2] - (begin - offset)
    if wide != narrow:
        return None, whole
    return (whole.narrow(axis + 2, begin, wide), part.narrow(axis + 2, begin - offset, narrow)), whole


def _fronts(whole: Tensor, front: Tensor, axis: int, inner: int) -> tuple[Tensor, Tensor]:
    """Return what a strip and its window from 0 give up to `inner`, as far as a network that crops its end gives it."""
    inner = min(inner, front.shape[axis + 2])
    return whole.narrow(axis + 2, 0, inner), front.narrow(axis + 2, 0, inner)


def _margin(scale: Fraction) -> int:
    """Return how many input pixels to compare at least: some, and several of the output."""
    return max(_MARGIN, math.ceil(4 / scale))


def _prime_to_many(least: int, unit: int) -> int:
    """Return a number of units that no small prime divides: one, or enough of a small unit to be at least `least`."""
    count = -(-least // unit) if unit < 16 else 1
    while math.gcd(count, 2 * 3 * 5 * 7) > 1:
        count += 1
    return count * unit


def _common_length(least: int, unit: int) -> int:
    """Return a length that is a multiple of the unit and of many of its multiples, which it may be padded to.

    A network that pads to 24 around a net of stride 4 answers differently only where nothing is to be padded: a
    length that 24 does not divide looks like any other.
    """
    factor = next((k for k in (192, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3) if k * unit <= _COMMON), 2)
    return round_up(least, factor * unit)


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
    # the strip of common_unit, where the extents are the same: its runs need not be made again
    size[axis] = length + cut
    x = textured(example, size).narrow(axis + 2, 0, length)
    ends, whole = _ends(f, x, axis, start, scale, reach)
    at_end = False if ends is None else _same(*ends)
    if at_end is False or whole is None:
        return False
    try:
        front = f(x.narrow(axis + 2, 0, length - cut))
    except refusals():
        return False
    at_start = _same(*_fronts(whole, front, axis, int((length - cut - reach[1]) * scale)))
    return None if None in (at_end, at_start) else bool(at_end and at_start)


def _same(a: Tensor, b: Tensor) -> bool | None:
    """Tell whether two outputs are equal; None where that proves nothing."""
    difference = _difference(a, b)
    return None if difference is None else difference <= EXACT


def _difference(a: Tensor, b: Tensor) -> float | None:
    """Compare relative to the larger output; an output without any variation proves nothing: None."""
    if all(torch.equal(y, y[at([slice(1)] * (y.dim() - 2))].expand_as(y)) for y in (a, b)):
        return None
    difference = float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-300))
    return difference if difference == difference else math.inf


def _primes(n: int) -> list[int]:
    return [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]
