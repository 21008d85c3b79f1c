"""Pixels as PNG without a word in them: their names stand beside them in the page, and follow its colours.

Numbers are drawn by a table of 255 colours and the grid's, classes by one colour each, images of three channels as they
are: no colour is rounded to another.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["GRID", "Drawing", "boxed", "classes", "colour_of_class", "grey", "numbers", "rgb", "strip"]

Map = NDArray[Any]
Cuts = tuple[Sequence[int], Sequence[int]]
Scale = Literal["gray", "viridis", "magma"]

GRID = (53, 197, 224)
"""Colour of the borders of tiles."""

_BOX = (255, 255, 255)
_LINE = 255
"""The number of the grid's colour in a table; those below are of values."""

_CLASSES = (
    *(
        (40, 44, 52),
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (213, 94, 0),
        (204, 121, 167),
    ),
    *((0, 114, 178), (170, 170, 170), (148, 103, 60), (160, 220, 120), (120, 94, 240)),
)
"""Background, then the colours of Okabe and Ito (2008), which most colour-blind people tell apart, and some more."""

_SMALL, _LARGE = 240, 400
"""Pixels that the longer side of a drawing has at least and at most."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture, what it is called, and what someone is told who does not see it."""

    name: str
    png: bytes
    alt: str


def numbers(
    values: Map, low: float, high: float, scale: Scale, cuts: Cuts = ((), ()), *, peaks: bool = False
) -> bytes:
    """Draw values (rows, columns) from low to high; of peaks the largest stay where pixels are merged."""
    fitted = _fitted(values, np.max if peaks else np.mean)
    places = np.clip((fitted.astype(np.float64) - low) / max(high - low, 1e-30), 0, 1)
    indices = (places * (_LINE - 1)).round().astype(np.uint8)
    return _indexed(_ruled(_enlarged(indices), values.shape, cuts), _table(scale))


def grey(pixels: Map, cuts: Cuts = ((), ())) -> bytes:
    """Draw one channel with a gamma of 0.5, so that dim structures are seen beside bright ones."""
    low, high = np.percentile(pixels, (0.5, 99.9))
    shown = np.clip((pixels - low) / max(float(high - low), 1e-30), 0, 1) ** 0.5
    return numbers(shown, 0, 1, "gray", cuts)


def classes(found: Map, cuts: Cuts = ((), ())) -> bytes:
    """Draw class numbers (rows, columns), each in its colour."""
    fitted = _fitted(found.astype(np.int64) % (_LINE - 1), _first)
    table = [*(colour_of_class(number) for number in range(_LINE)), GRID]
    return _indexed(_ruled(_enlarged(fitted.astype(np.uint8)), found.shape, cuts), table)


def rgb(pixels: Map, cuts: Cuts = ((), ())) -> bytes:
    """Draw three channels (3, rows, columns) as red, green and blue, in their own balance.

    Values that are bytes, or from 0 to 1, are shown as they are; others from their smallest to their largest.
    """
    low, high = _limits(pixels)
    shown = np.clip((pixels.astype(np.float64) - low) / max(high - low, 1e-30), 0, 1)
    fitted = np.stack([_fitted(channel, np.mean) for channel in shown], axis=-1)
    colours = _enlarged((fitted * 255).round().astype(np.uint8))
    return _png(Image.fromarray(_ruled(colours, pixels.shape[1:], cuts)))


def boxed(values: Map, low: float, high: float, boxes: Sequence[tuple[slice, slice]]) -> bytes:
    """Draw values with frames: of the first as the grid, of the others in white."""
    indices = (np.clip((values - low) / max(high - low, 1e-30), 0, 1) * (_LINE - 1)).round().astype(np.uint8)
    table = np.asarray(_table("magma"), np.uint8)
    colours = _enlarged(table[_fitted(indices, _first)])
    for colour, box in list(zip((GRID, *[_BOX] * len(boxes)), boxes, strict=False))[::-1]:
        _frame(colours, values.shape, box, colour)
    return _png(Image.fromarray(colours))


def strip(scale: Scale) -> bytes:
    """Draw the colours of a scale from low to high."""
    return _indexed(np.repeat(np.arange(_LINE, dtype=np.uint8)[None], 8, axis=0), _table(scale))


def colour_of_class(number: int) -> tuple[int, int, int]:
    """Return the colour of a class; further ones than have a colour of their own go round."""
    return _CLASSES[number] if number < len(_CLASSES) else _CLASSES[1 + number % (len(_CLASSES) - 1)]


def _limits(pixels: Map) -> tuple[float, float]:
    low, high = float(pixels.min()), float(pixels.max())
    if 0 <= low <= high <= 1:
        return 0.0, 1.0
    if 0 <= low <= high <= 255 and bool((pixels == np.round(pixels)).all()):
        return 0.0, 255.0
    return tuple(float(v) for v in np.percentile(pixels, (0.1, 99.9)))  # type: ignore[return-value]


def _table(scale: Scale) -> list[tuple[int, int, int]]:
    shades = matplotlib.colormaps[scale].resampled(_LINE)(np.arange(_LINE))[:, :3]
    return [*(tuple(int(v) for v in (shade * 255).round()) for shade in shades), GRID]  # type: ignore[list-item]


def _first(blocks: Map, axis: tuple[int, int]) -> Map:
    """Return one pixel of each block: numbers of classes have no mean."""
    return blocks[:, 0, :, 0]


def _fitted(values: Map, merge: Any) -> Map:
    """Return values with pixels merged into blocks, so that neither side is larger than a drawing."""
    step = -(-max(values.shape) // _LARGE)
    if step == 1:
        return values
    rows, columns = (-(-n // step) for n in values.shape)
    padded = np.pad(
        values, ((0, rows * step - values.shape[0]), (0, columns * step - values.shape[1])), mode="edge"
    )
    blocks = padded.reshape(rows, step, columns, step)
    return np.asarray(merge(blocks, axis=(1, 3)))


def _enlarged(pixels: Map) -> Map:
    """Return pixels drawn several times as large, where the picture would be small."""
    times = max(1, -(-_SMALL // max(pixels.shape[:2])))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def _ruled(pixels: Map, shape: Sequence[int], cuts: Cuts) -> Map:
    """Draw dashes where tiles begin, of which the places are those in a map of that shape."""
    ruled = pixels.copy()
    colour: Any = _LINE if ruled.ndim == 2 else GRID
    for axis, places in enumerate(cuts):
        along = np.arange(ruled.shape[1 - axis]) % 8 < 4
        for place in places:
            line = min(round(place * ruled.shape[axis] / shape[axis]), ruled.shape[axis] - 1)
            if axis == 0:
                ruled[line, along] = colour
            else:
                ruled[along, line] = colour
    return ruled


def _frame(pixels: Map, shape: Sequence[int], box: tuple[slice, slice], colour: tuple[int, int, int]) -> None:
    (top, bottom), (left, right) = (
        (max(0, round(s.start * n / m)), min(n - 1, round(s.stop * n / m) - 1))
        for s, n, m in zip(box, pixels.shape[:2], shape, strict=True)
    )
    pixels[[top, bottom], left : right + 1] = colour
    pixels[top : bottom + 1, [left, right]] = colour


def _indexed(indices: Map, table: Sequence[tuple[int, int, int]]) -> bytes:
    image = Image.fromarray(indices, mode="P")
    image.putpalette([value for colour in table for value in colour])
    return _png(image)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
