"""Interpolation: which source positions an output position weighs, r = source positions per output position.

    nearest          floor(i r)
    nearest-exact    floor((i + 1/2) r)
    linear           floor(x), floor(x) + 1        x = (i + 1/2) r - 1/2, or i (m - 1)/(n - 1) where corners are aligned
    cubic            floor(x) - 1 ... floor(x) + 2
    antialiased      floor(c - w + 1/2) ... floor(c + w + 1/2) - 1     c = (i + 1/2) r,  w = max(1, r) or twice that

Torch computes i r in float32. Where r is no power of two that may round to the neighbour below, far from the front.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import floor

from normfix.tiling.reach.calls import Call
from normfix.tiling.reach.extents import Vector
from normfix.tiling.reach.links import Along, ByDimension, Link, Reading, Whole, Window
from normfix.tiling.reach.needs import Interval, Reads
from normfix.tiling.reach.rules.rule import Rule
from normfix.tiling.reach.rules.windows import proportional

__all__ = ["RESIZING", "is_stretched"]

_HALF = Fraction(1, 2)


def _rule(
    weighs: Callable[[Fraction, Fraction], tuple[int, int]], *, half: bool, nearest: bool = False
) -> Rule:
    """Return the rule of a kind of interpolation.

    Args:
        weighs: first and last source position by (source coordinate, r).
        half: whether coordinates are those of pixel centres.
        nearest: whether the coordinate itself is rounded, which rounding in float32 may change.
    """

    def rule(call: Call) -> list[Reading]:
        x = call.first()
        aligned = bool(call.get("align_corners", False))
        links: list[Link] = [Along(0), Along(1)]
        for dim, (given, taken) in enumerate(zip(call.shape, call.extents(x), strict=True)):
            if dim > 1:
                links.append(_link(call, dim, given, taken, aligned))
        return [ByDimension(x, tuple(links))]

    def _link(call: Call, dim: int, given: Vector, taken: Vector, aligned: bool) -> Link:
        if call.sizes.is_constant(given):
            return Whole("it resizes to a fixed size")
        ratio, slack = proportional(call, given, taken, less=int(aligned))
        if not ratio:
            return Whole("it resizes by a factor that follows the size")
        if not aligned and (scale := _scale(call, dim)) is not None:
            if abs(scale * ratio - 1) > Fraction(1, 10**6):
                return Whole("it resizes by a factor that its extents do not have")
            slack = Fraction(0), Fraction(0)
        if nearest and not _is_dyadic(ratio):
            slack = slack[0] - Fraction(1, 1000), slack[1] + Fraction(1, 1000)
        return Window(dim, _reads(ratio, slack, centred=half and not aligned))

    def _reads(ratio: Fraction, slack: tuple[Fraction, Fraction], *, centred: bool) -> Reads:
        def source(i: int) -> Fraction:
            return (i + _HALF) * ratio - _HALF if centred else i * ratio

        def reads(given: Interval) -> Interval:
            first = weighs(source(given[0]) + slack[0], ratio)[0]
            return first, weighs(source(given[1]) + slack[1], ratio)[1]

        return reads

    return rule


def is_stretched(call: Call) -> bool:
    """Tell whether a map is resized, or pooled in proportion, by a factor that is another at every size of the image.

    Of a map of n / 2 + 1 positions, n are made by a factor that is not 2 at any n: what is weighed depends on the
    place in the whole extent, by up to the positions that are too many.
    """
    if call.name not in RESIZING and not call.name.removeprefix("_").startswith("adaptive_"):
        return False
    if call.get("align_corners", False):
        return False
    pairs = enumerate(zip(call.shape, call.extents(call.first()), strict=True))
    return any(
        any(proportional(call, given, taken)[1]) and _scale(call, dim) is None
        for dim, (given, taken) in pairs
        if not call.sizes.is_constant(given)
    )


def _scale(call: Call, dim: int) -> Fraction | None:
    """Return the factor that was given, None where the extents decide."""
    factors = call.get("scale_factors")
    factor = factors[dim - 2] if factors else None
    return Fraction(factor).limit_denominator(1 << 12) if isinstance(factor, int | float) else None


def _is_dyadic(ratio: Fraction) -> bool:
    """Tell whether multiples of a ratio are exact in binary."""
    return ratio.denominator & (ratio.denominator - 1) == 0


def _nearest(x: Fraction, ratio: Fraction) -> tuple[int, int]:
    return floor(x), floor(x)


def _nearest_exact(x: Fraction, ratio: Fraction) -> tuple[int, int]:
    return floor(x + _HALF), floor(x + _HALF)


def _linear(x: Fraction, ratio: Fraction) -> tuple[int, int]:
    return floor(x), floor(x) + 1


def _cubic(x: Fraction, ratio: Fraction) -> tuple[int, int]:
    return floor(x) - 1, floor(x) + 2


def _antialiased(taps: int) -> Callable[[Fraction, Fraction], tuple[int, int]]:
    def weighs(x: Fraction, ratio: Fraction) -> tuple[int, int]:
        centre, width = x + _HALF, taps * max(Fraction(1), ratio)
        return floor(centre - width + _HALF), floor(centre + width + _HALF) - 1

    return weighs


RESIZING: dict[str, Rule] = {
    **{f"upsample_nearest{n}d": _rule(_nearest, half=False, nearest=True) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": _rule(_nearest_exact, half=True, nearest=True) for n in (1, 2, 3)},
    **dict.fromkeys(
        ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"), _rule(_linear, half=True)
    ),
    "upsample_bicubic2d": _rule(_cubic, half=True),
    "_upsample_bilinear2d_aa": _rule(_antialiased(1), half=True),
    "_upsample_bicubic2d_aa": _rule(_antialiased(2), half=True),
}
