"""Pictures of predictions and their differences, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["closeup", "difference", "overview"]

Map = NDArray[Any]
_GRID = "#35c5e0"


def overview(pixels: Map, tiled: Map, repaired: Map, tile: int) -> bytes:
    """Draw the image and both tiled predictions beside each other; all (H, W)."""
    figure, axes = _panels(3, pixels.shape)
    _image(axes[0], pixels, "image")
    _probability(axes[1], tiled, "original network, tiled")
    _probability(axes[2], repaired, "converted network, tiled")
    for axis in axes[1:]:
        _draw_grid(axis, tiled.shape, tile)
    return _png(figure)


def closeup(pixels: Map, whole: Map, tiled: Map, repaired: Map, tile: int, extent: int = 320) -> bytes:
    """Draw the surroundings of the tile border along which tiled and whole prediction differ most."""
    rows, columns = _worst_window(np.abs(tiled - whole), tile, extent)
    figure, axes = _panels(4, (rows.stop - rows.start, columns.stop - columns.start))
    _image(axes[0], pixels[rows, columns], "image")
    _probability(axes[1], whole[rows, columns], "original, whole image")
    _probability(axes[2], tiled[rows, columns], "original, tiled")
    _probability(axes[3], repaired[rows, columns], "converted, tiled")
    for axis in axes[2:]:
        _draw_grid(axis, whole[rows, columns].shape, tile, (rows.start, columns.start))
    return _png(figure)


def difference(whole: Map, tiled: Map, repaired: Map, sd: float, tile: int) -> bytes:
    """Draw |tiled - whole| before and after on one colour scale, in sd of the whole-image output."""
    before, after = np.abs(tiled - whole) / sd, np.abs(repaired - whole) / sd
    figure, axes = _panels(2, whole.shape)
    shown = None
    for axis, values, name in ((axes[0], before, "original"), (axes[1], after, "converted")):
        shown = axis.imshow(values, cmap="magma", vmin=0, vmax=max(float(before.max()), 1e-12))
        axis.set_title(f"{name}: tiled minus whole, at most {values.max():.2g} sd", fontsize=10)
        _draw_grid(axis, whole.shape, tile)
    assert shown is not None
    figure.colorbar(shown, ax=list(axes), label="sd of the output", shrink=0.8)
    return _png(figure)


def _panels(count: int, shape: Sequence[int]) -> tuple[Figure, list[Axes]]:
    width = 4.6
    height = width * shape[0] / shape[1] + 0.4
    figure = Figure(figsize=(width * count, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.ravel(figure.subplots(1, count)))
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def _image(axis: Axes, pixels: Map, title: str) -> None:
    low, high = np.percentile(pixels, (0.5, 99.8))
    axis.imshow(pixels, cmap="gray", vmin=low, vmax=max(high, low + 1))
    axis.set_title(title, fontsize=10)


def _probability(axis: Axes, values: Map, title: str) -> None:
    axis.imshow(values, cmap="viridis", vmin=0, vmax=1)
    axis.set_title(title, fontsize=10)


def _draw_grid(axis: Axes, shape: Sequence[int], tile: int, start: tuple[int, int] = (0, 0)) -> None:
    for draw, offset, extent in ((axis.axhline, start[0], shape[0]), (axis.axvline, start[1], shape[1])):
        for cut in range(-offset % tile or tile, extent, tile):
            draw(cut - 0.5, color=_GRID, linewidth=0.6, linestyle=(0, (4, 4)))


def _worst_window(error: Map, tile: int, extent: int) -> tuple[slice, slice]:
    """Return the window around the crossing of tile borders with the largest summed difference."""
    height, width = error.shape
    centres = [(r, c) for r in range(tile, height, tile) for c in range(tile, width, tile)]
    windows = [
        (_around(r, extent, height), _around(c, extent, width))
        for r, c in centres or [(height // 2, width // 2)]
    ]
    return max(windows, key=lambda w: float(error[w].sum()))


def _around(centre: int, extent: int, limit: int) -> slice:
    start = min(max(0, centre - extent // 2), max(0, limit - extent))
    return slice(start, min(limit, start + extent))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
