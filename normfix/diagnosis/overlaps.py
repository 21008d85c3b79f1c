"""Tile against tile: the same pixels, predicted from two windows that overlap.

The windows of a tiling meet those of the same tiling shifted by half a tile, so that a pixel lies far from
the cuts of both. Compared over all of the overlap, and over the part that is further than the halo from
every cut: there a network without live statistics agrees with itself exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from normfix.diagnosis.windows import Window
from normfix.proof.indicators import Accumulator, compare
from normfix.records.diagnoses import Kind, Mismatch, Pair
from normfix.records.spans import round_up
from normfix.tiling.grid import Geometry, at

__all__ = ["Overlaps", "PredictedWindow", "meeting", "overlaps"]

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PredictedWindow:
    """A window and the whole of its output."""

    window: Window
    output: Tensor


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Mismatch over all overlaps and beyond the halo, pooled, and beyond the halo (or at all) per pair."""

    everywhere: Mismatch | None
    beyond: Mismatch | None
    pairs: tuple[Pair, ...]


def overlaps(
    first: Sequence[PredictedWindow],
    second: Sequence[Window],
    predict: Callable[[Window], Tensor],
    size: Sequence[int],
    geometry: Geometry,
    kind: Kind,
    sd: float,
) -> Overlaps:
    """Compare every window of one tiling with every window of another where they overlap.

    Args:
        first: predicted windows.
        second: windows still to be predicted, one at a time.
        predict: gives the output of a window.
        size: of the image.
        geometry: its halo is what "beyond the halo" means.
        kind: of the output.
        sd: unit of differences.
    """
    everywhere, beyond, pairs = Accumulator(kind, sd), Accumulator(kind, sd), []
    met = meeting([one.window for one in first], second, size)
    for window, numbers in zip(second, met, strict=True):
        other = PredictedWindow(window, predict(window))
        for one in (first[number] for number in numbers):
            common = _common(_inside(one.window, size), _inside(window, size))
            assert common is not None
            here, there = _both(one, other, common, geometry)
            everywhere.add(here, there)
            inner = _common(_sure(one.window, size, geometry), _sure(window, size, geometry))
            found = None
            if inner is not None:
                here, there = _both(one, other, inner, geometry)
                beyond.add(here, there)
                found = compare(here, there, kind, sd)
            if found is not None:
                starts = (tuple(a for a, _ in w.read) for w in (one.window, window))
                pairs.append(Pair(first=next(starts), second=next(starts), mismatch=found))
    return Overlaps(everywhere.result(), beyond.result(), tuple(pairs))


def meeting(first: Sequence[Window], second: Sequence[Window], size: Sequence[int]) -> Iterator[list[int]]:
    """Yield for each window of the second tiling the numbers of those of the first that it overlaps."""
    low, high = (
        np.array([_inside(window, size) for window in first]).reshape(-1, len(size), 2).transpose(2, 0, 1)
    )
    for window in second:
        start, stop = np.array(_inside(window, size)).T
        yield np.flatnonzero((np.maximum(low, start) < np.minimum(high, stop)).all(axis=1)).tolist()


def _inside(window: Window, size: Sequence[int]) -> tuple[Span, ...]:
    return tuple((max(0, a), min(n, b)) for (a, b), n in zip(window.read, size, strict=True))


def _sure(window: Window, size: Sequence[int], geometry: Geometry) -> tuple[Span, ...]:
    """Return the part of a window that is further than the halo from its cuts, per axis."""
    return tuple(
        (
            max(0, a + round_up(before, stride)) if a > 0 else 0,
            b - round_up(after, stride) if b < n else n,
        )
        for (a, b), n, (before, after), stride in zip(
            window.read, size, geometry.halo, geometry.stride, strict=True
        )
    )


def _common(a: Sequence[Span], b: Sequence[Span]) -> tuple[Span, ...] | None:
    spans = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return spans if all(low < high for low, high in spans) else None


def _both(
    one: PredictedWindow, other: PredictedWindow, spans: Sequence[Span], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Return both outputs at a region, where both have any: outputs that are rounded down may end before it."""
    here, there = _at(one, spans, geometry), _at(other, spans, geometry)
    common = at([slice(0, min(a, b)) for a, b in zip(here.shape[2:], there.shape[2:], strict=True)])
    return here[common], there[common]


def _at(predicted: PredictedWindow, spans: Sequence[Span], geometry: Geometry) -> Tensor:
    """Return a window's output at a region given in pixels of the image."""
    cut = [
        slice(int(low * s) - int(a * s), int(high * s) - int(a * s))
        for (low, high), (a, _), s in zip(spans, predicted.window.read, geometry.scale, strict=True)
    ]
    return predicted.output[at(cut)]
