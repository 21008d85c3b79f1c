"""What a comparison is drawn from, for reports."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from normfix.proof.indicators import differences, recognise, spread_of
from normfix.reporting.maps import Maps

__all__ = ["Viewer", "viewed"]

Viewer = Callable[[Maps], None]
"""Is given the arrays behind a verdict."""


def viewed(image: Tensor, whole: Tensor, stitched: Tensor, cuts: tuple[tuple[int, ...], ...]) -> Maps:
    """Return the arrays of the first of a batch (N, C, *space); `cuts` is where tiles start in the output."""
    kind = recognise(whole)
    apart = differences(stitched, whole, kind, spread_of(whole, kind))
    first = (part[0].detach().float().cpu().numpy() for part in (image, whole, stitched, apart))
    pixels, expected, tiles, difference = first
    return Maps(pixels, expected, tiles, None, difference, None, cuts, kind)
