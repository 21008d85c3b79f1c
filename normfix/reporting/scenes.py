"""What a page shows of the maps behind a result: the worst seam close by, then all of it; each channel named.

Outputs that exclude each other are shown as classes, the others channel by channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfix.reporting.maps import Maps
from normfix.reporting.panels import Cuts, Drawing, classes, colour_of_class, grey, numbers, rgb, strip
from normfix.reporting.planes import Plane, Window, worst_plane, worst_seam

__all__ = ["Bar", "Key", "Scene", "scenes"]

Map = NDArray[Any]

_CLOSE = 96
"""Pixels of the output on each side of a close-up."""

_CHANNELS = 6
"""Of an output, and of an image, that are drawn; a page says how many there are."""

_MOST_CLASSES = 24
"""Class numbers that are named; more are objects of their own, such as instances."""

_PROBABILITIES = ("probability", "softmax")

_ALL: Window = (slice(None), slice(None))


@dataclass(frozen=True, slots=True)
class Bar:
    """A scale of colours: what it is of, from what to what."""

    name: str
    low: str
    high: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Key:
    """A class: its name, its colour and how much of the image it takes in the whole-image prediction."""

    name: str
    colour: str
    share: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Drawings beside each other, in rows, and what their colours mean."""

    caption: str
    rows: tuple[tuple[Drawing, ...], ...]
    bars: tuple[Bar, ...]
    keys: tuple[Key, ...]
    changed: float | None

    @property
    def columns(self) -> int:
        """Return how many drawings are beside each other, of the longest row."""
        return max(map(len, self.rows))


def scenes(maps: Maps) -> tuple[Scene | None, Scene]:
    """Return a close-up of the worst seam, None where nothing is cut, and a view of everything."""
    plane = worst_plane(maps.difference, maps.cuts)
    shown = _Shown.of(maps, plane)
    words = plane.words(maps.whole.shape[1:])
    window = worst_seam(shown.whole, shown.stitched, shown.cuts, _close(shown.whole.shape[1:]))
    everything = shown.scene(_ALL, words or "All of the image")
    if window is None:
        return None, everything
    rows, columns = window
    where = f"Rows {rows.start} to {rows.stop}, columns {columns.start} to {columns.stop} of the prediction"
    return shown.scene(window, f"{where}{f', {words}' if words else ''}"), everything


def _close(size: Sequence[int]) -> tuple[int, int]:
    """Return the extents of a close-up: not much more than half the image, or nobody would come closer."""
    rows, columns = (min(n, _CLOSE, max(24, n * 5 // 8)) for n in size)
    return rows, columns


@dataclass(frozen=True, slots=True)
class _Shown:
    """A plane of the maps, each (C, rows, columns), and how values are drawn."""

    image: Map
    whole: Map
    stitched: Map
    fixed: Map | None
    difference: Map
    cuts: Cuts
    kind: str
    names: tuple[str, str]

    @classmethod
    def of(cls, maps: Maps, plane: Plane) -> _Shown:
        return cls(
            plane.of(maps.image),
            plane.of(maps.whole),
            plane.of(maps.stitched),
            None if maps.fixed is None else plane.of(maps.fixed),
            plane.of(maps.difference),
            plane.cuts(maps.cuts),
            maps.kind,
            maps.names,
        )

    def scene(self, window: Window, caption: str) -> Scene:
        """Return the drawings of a window of the output."""
        part = self._within(window)
        if self._is_classes():
            rows, bars, keys, changed = part._classes(self)
        else:
            rows, bars, keys, changed = part._numbers(self)
        return Scene(caption, rows, bars, keys, changed)

    def _within(self, window: Window) -> _Shown:
        """Return what lies in a window of the output, and in the same part of the image."""
        size, rows, columns = self.whole.shape[1:], *self.cuts
        spans = [s.indices(n)[:2] for s, n in zip(window, size, strict=True)]
        there: Any = tuple(
            slice(a * m // n, max(a * m // n + 1, -(-b * m // n)))
            for (a, b), n, m in zip(spans, size, self.image.shape[1:], strict=True)
        )
        near = tuple(
            [place - a for place in places if a < place < b]
            for (a, b), places in zip(spans, (rows, columns), strict=True)
        )
        inside: Any = (..., *window)
        return replace(
            self,
            image=self.image[(..., *there)],
            whole=self.whole[inside],
            stitched=self.stitched[inside],
            fixed=None if self.fixed is None else self.fixed[inside],
            difference=self.difference[inside],
            cuts=(near[0], near[1]),
        )

    def _is_classes(self) -> bool:
        return self.kind == "labels" or (self.kind in ("softmax", "scores") and len(self.whole) > 1)

    def _predictions(self) -> Iterator[tuple[str, Map, Cuts]]:
        yield self.names[0], self.whole, ((), ())
        yield self.names[1], self.stitched, self.cuts
        if self.fixed is not None:
            yield "tiles, causes fixed", self.fixed, self.cuts

    def _apart(self, channel: int | None = None) -> Drawing:
        chosen = self.difference.max(0) if channel is None else self.difference[channel]
        png = numbers(chosen, 0, self._strong(), "magma", self.cuts, peaks=True)
        alt = f"Where tiles differ from the whole image: by up to {chosen.max():.2g} sd here."
        return Drawing("difference of tiles from the whole", png, alt)

    def _strong(self) -> float:
        """Return the difference that is drawn brightest: single pixels may have more."""
        return float(np.percentile(self.difference.max(0), 99.8))

    def _classes(self, all_: _Shown) -> Any:
        drawn = list(self._images())
        for name, values, cuts in self._predictions():
            drawn.append(Drawing(name, classes(_numbered(values), cuts), f"Classes predicted from: {name}."))
        drawn.append(self._apart())
        found = _numbered(all_.whole)
        present, counts = np.unique(found, return_counts=True)
        keys: tuple[Key, ...] = ()
        if len(present) <= _MOST_CLASSES:
            count = len(all_.whole) if len(all_.whole) > 1 else int(present.max()) + 1
            shares = dict(zip(present.tolist(), (counts / found.size).tolist(), strict=True))
            keys = tuple(
                Key(f"class {n}", _css(n), shares.get(n, 0.0)) for n in range(min(count, _MOST_CLASSES))
            )
        changed = float((_numbered(self.whole) != _numbered(self.stitched)).mean())
        return (tuple(drawn),), (self._bar(),), keys, changed

    def _numbers(self, all_: _Shown) -> Any:
        rows, count = [], len(self.whole)
        for channel in range(min(count, _CHANNELS)):
            named = f", channel {channel} of {count}" if count > 1 else ""
            low, high = _range(all_.whole[channel], self.kind)
            drawn = list(self._images()) if channel == 0 else []
            for name, values, cuts in self._predictions():
                png = numbers(values[channel], low, high, "viridis", cuts)
                drawn.append(Drawing(f"{name}{named}", png, f"Predicted from: {name}{named}."))
            rows.append((*drawn, self._apart(channel)))
        return tuple(rows), (all_._scale(), self._bar()), (), self._changed()

    def _scale(self) -> Bar:
        """Return the scale of predictions."""
        low, high = (f"{value:.2g}" for value in _range(self.whole[0], self.kind))
        if self.kind in _PROBABILITIES:
            return Bar("probability", low, high, strip("viridis"))
        if len(self.whole) == 1:
            return Bar("prediction", low, high, strip("viridis"))
        return Bar("prediction, each channel in its own range", "low", "high", strip("viridis"))

    def _bar(self) -> Bar:
        return Bar("difference in sd", "0", f"{self._strong():.2g} and more", strip("magma"))

    def _changed(self) -> float | None:
        """Return the share of pixels that a threshold tells otherwise, where outputs have one."""
        threshold = {"probability": 0.5, "softmax": 0.5, "logits": 0.0}.get(self.kind)
        if threshold is None:
            return None
        return float(((self.whole > threshold) != (self.stitched > threshold)).mean())

    def _images(self) -> Iterator[Drawing]:
        if len(self.image) == 3:
            yield Drawing("image", rgb(self.image), "The image, in its colours.")
            return
        for channel, pixels in enumerate(self.image[:_CHANNELS]):
            named = f", channel {channel} of {len(self.image)}" if len(self.image) > 1 else ""
            yield Drawing(f"image{named}", grey(pixels), f"The image that is predicted{named}.")


def _numbered(values: Map) -> Map:
    return np.asarray(values.argmax(0) if len(values) > 1 else values[0].astype(np.int64))


def _range(values: Map, kind: str) -> tuple[float, float]:
    if kind in _PROBABILITIES:
        return 0.0, 1.0
    low, high = np.percentile(values, (0.5, 99.5))
    return float(low), float(high)


def _css(number: int) -> str:
    return "#" + "".join(f"{value:02x}" for value in colour_of_class(number))
