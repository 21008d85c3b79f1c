"""Where candidates differ most: a close-up of each prediction at the places where they agree least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfix.records.diagnoses import Kind
from normfix.reporting.panels import Drawing, classes, grey, numbers, rgb
from normfix.reporting.planes import Window, worst_plane

__all__ = ["Place", "Places", "places"]

Map = NDArray[Any]

_CLOSE = 96
"""Pixels of the output on each side of a close-up."""

_COUNT = 3
"""Places that are shown, apart from each other."""


@dataclass(frozen=True, slots=True)
class Places:
    """An image (C, *space), its labels, and named predictions of it; the first `compared` are candidates."""

    name: str
    image: Map
    labels: Map | None
    predictions: tuple[tuple[str, Map], ...]
    kind: Kind
    compared: int


@dataclass(frozen=True, slots=True)
class Place:
    """A part of an image, and what is predicted there."""

    caption: str
    drawings: tuple[Drawing, ...]


def places(given: Places) -> list[Place]:
    """Return close-ups where candidates differ most, the worst first."""
    stack = np.stack([values for _, values in given.predictions[: given.compared]])
    apart = np.atleast_1d(stack.astype(np.float64).std(0))
    plane = worst_plane(apart, tuple(() for _ in apart.shape[1:]))
    shown = [(name, plane.of(values)) for name, values in given.predictions]
    flat = replace(
        given,
        image=plane.of(given.image),
        labels=None if given.labels is None else plane.of(_with_channel(given.labels, given.image.ndim)),
        predictions=tuple(shown),
    )
    words = plane.words(apart.shape[1:])
    windows = _windows(plane.of(apart).sum(0))
    return [_place(flat, window, words) for window in windows]


def _with_channel(labels: Map, ndim: int) -> Map:
    while labels.ndim > ndim:
        labels = labels[0]
    return labels if labels.ndim == ndim else labels[None]


def _windows(apart: Map) -> list[Window]:
    """Return windows in which most differs, no two of which overlap."""
    size = [min(_CLOSE, n) for n in apart.shape]
    starts = [range(0, n - m + 1, max(1, m // 4)) for n, m in zip(apart.shape, size, strict=True)]
    found = [(slice(r, r + size[0]), slice(c, c + size[1])) for r in starts[0] for c in starts[1]]
    chosen: list[Window] = []
    for window in sorted(found, key=lambda w: -float(apart[w].sum())):
        if all(_is_apart(window, other, size) for other in chosen):
            chosen.append(window)
        if len(chosen) == _COUNT:
            break
    return chosen


def _is_apart(a: Window, b: Window, size: Sequence[int]) -> bool:
    return any(abs(x.start - y.start) >= n for x, y, n in zip(a, b, size, strict=True))


def _place(given: Places, window: Window, words: str) -> Place:
    rows, columns = window
    caption = f"{given.name}, rows {rows.start} to {rows.stop}, columns {columns.start} to {columns.stop}"
    drawn = [_image(given, window)]
    if given.labels is not None:
        drawn.append(Drawing("labels", classes(given.labels[0][window].astype(np.int64)), "True classes."))
    low, high = _range(given)
    for name, values in given.predictions:
        drawn.append(
            Drawing(name, _drawn(values[(..., *window)], given.kind, low, high), f"Predicted with {name}.")
        )
    return Place(f"{caption}{f', {words}' if words else ''}", tuple(drawn))


def _image(given: Places, window: Window) -> Drawing:
    """Return the part of the image, which may be of another resolution than the output."""
    size = given.predictions[0][1].shape[1:]
    spans: Any = [
        slice(s.start * m // n, max(s.start * m // n + 1, -(-s.stop * m // n)))
        for s, n, m in zip(window, size, given.image.shape[1:], strict=True)
    ]
    pixels = given.image[(slice(None), *spans)]
    return Drawing("image", rgb(pixels) if len(pixels) == 3 else grey(pixels[0]), "The image there.")


def _drawn(values: Map, kind: Kind, low: float, high: float) -> bytes:
    if kind == "labels" or (kind in ("softmax", "scores") and len(values) > 1):
        return classes(np.asarray(values.argmax(0) if len(values) > 1 else values[0]).astype(np.int64))
    return numbers(values.mean(0), low, high, "viridis")


def _range(given: Places) -> tuple[float, float]:
    if given.kind in ("probability", "softmax"):
        return 0.0, 1.0
    low, high = np.percentile(given.predictions[0][1].mean(0), (0.5, 99.5))
    return float(low), float(high)
