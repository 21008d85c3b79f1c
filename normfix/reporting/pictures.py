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

__all__ = ["closeups", "difference", "overview"]

Map = NDArray[Any]
_GRID = "#35c5e0"
_TITLE, _SMALL = 15, 11
_MASK, _UNDECIDED = 0.5, 0.1
"""Probability from which a pixel is of the mask; how near to 0 or 1 one is decided."""
_EVERY = 32
"""Pixels from one window that is tried as a close-up to the next."""


def overview(pixels: Map, tiled: Map, repaired: Map, tile: int) -> bytes:
    """Draw the image and both tiled predictions beside each other; all (H, W)."""
    figure, axes = _panels(3, pixels.shape)
    _image(axes[0], pixels, "image")
    _probability(axes[1], tiled, "original network, tiled")
    _probability(axes[2], repaired, "converted network, tiled")
    for axis in axes[1:]:
        _draw_grid(axis, tiled.shape, tile)
    return _png(figure)


def closeups(
    pixels: Map, whole: Map, tiled: Map, repaired: Map, tile: int, *, extent: int = 256, count: int = 2
) -> bytes:
    """Draw places where tile borders cut through what the whole image has in one piece, one a row; all (H, W).

    Titles tell how the masks of the tiled predictions overlap with that of the whole image (Dice).
    """
    windows = _cuts(whole, tiled, tile, extent, count)
    figure, axes = _panels(4, (extent, extent), rows=len(windows))
    for row, (rows, columns) in enumerate(windows):
        here = axes[4 * row : 4 * row + 4]
        expected = whole[rows, columns]
        _image(here[0], pixels[rows, columns], "image")
        _probability(here[1], expected, "original, whole image")
        for axis, values, name in ((here[2], tiled, "original"), (here[3], repaired, "converted")):
            shown = values[rows, columns]
            _probability(axis, shown, f"{name}, tiled: Dice {_dice(shown, expected):.3f}")
            _draw_grid(axis, shown.shape, tile, (rows.start, columns.start))
    return _png(figure)


def difference(whole: Map, tiled: Map, repaired: Map, sd: float, tile: int) -> bytes:
    """Draw |tiled - whole| before and after on one colour scale, in sd of the whole-image output."""
    before, after = np.abs(tiled - whole) / sd, np.abs(repaired - whole) / sd
    figure, axes = _panels(2, whole.shape)
    shown = None
    for axis, values, name in ((axes[0], before, "original"), (axes[1], after, "converted")):
        shown = axis.imshow(values, cmap="magma", vmin=0, vmax=max(float(before.max()), 1e-12))
        axis.set_title(
            f"{name}, tiled: up to {values.max():.2g} sd from the original's whole image", fontsize=_SMALL
        )
        _draw_grid(axis, whole.shape, tile)
    assert shown is not None
    bar = figure.colorbar(shown, ax=list(axes), shrink=0.8)
    bar.set_label("sd of the output", fontsize=_SMALL)
    return _png(figure)


def _panels(count: int, shape: Sequence[int], rows: int = 1) -> tuple[Figure, list[Axes]]:
    width = 4.6
    height = rows * (width * shape[0] / shape[1] + 0.4)
    figure = Figure(figsize=(width * count, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.ravel(figure.subplots(rows, count)))
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def _image(axis: Axes, pixels: Map, title: str) -> None:
    """Show pixels with a gamma of 0.5, so that dim structures are seen beside bright ones."""
    low, high = np.percentile(pixels, (0.5, 99.9))
    shown = np.clip((pixels - low) / max(high - low, 1), 0, 1) ** 0.5
    axis.imshow(shown, cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=_TITLE)


def _probability(axis: Axes, values: Map, title: str) -> None:
    axis.imshow(values, cmap="viridis", vmin=0, vmax=1)
    axis.set_title(title, fontsize=_TITLE)


def _draw_grid(axis: Axes, shape: Sequence[int], tile: int, start: tuple[int, int] = (0, 0)) -> None:
    for draw, offset, extent in ((axis.axhline, start[0], shape[0]), (axis.axvline, start[1], shape[1])):
        for cut in range(-offset % tile or tile, extent, tile):
            draw(cut - 0.5, color=_GRID, linewidth=0.6, linestyle=(0, (4, 4)))


def _cuts(whole: Map, tiled: Map, tile: int, extent: int, count: int) -> list[tuple[slice, slice]]:
    """Return the windows in which borders cut most, best first, apart.

    A cut is a step of the tiled prediction along a border, within what the whole image has in one piece. Where the
    whole image is undecided, neither is known to be right: of the windows that half which is least so is looked at.
    """
    height, width = whole.shape
    steps, undecided = _steps(whole, tiled, tile), (whole > _UNDECIDED) & (whole < 1 - _UNDECIDED)
    starts = [
        (r, c)
        for r in range(0, max(1, height - extent + 1), _EVERY)
        for c in range(0, max(1, width - extent + 1), _EVERY)
    ]
    windows = [(slice(r, min(height, r + extent)), slice(c, min(width, c + extent))) for r, c in starts]
    doubts = [float(undecided[window].mean()) for window in windows]
    clear = [window for window, doubt in zip(windows, doubts, strict=True) if doubt <= np.median(doubts)]
    chosen: list[tuple[slice, slice]] = []
    for window in sorted(clear, key=lambda w: -float(steps[w].sum())):
        if all(_apart(window, other, extent) for other in chosen):
            chosen.append(window)
        if len(chosen) == count:
            break
    return chosen


def _steps(whole: Map, tiled: Map, tile: int) -> Map:
    """Return by how much more the tiled prediction changes across borders, where the whole image has a mask there."""
    steps = np.zeros(whole.shape)
    for axis in (0, 1):
        w, t, found = (np.moveaxis(values, axis, 0) for values in (whole, tiled, steps))
        for cut in range(tile, len(w), tile):
            more = np.abs(t[cut] - t[cut - 1]) - np.abs(w[cut] - w[cut - 1])
            found[cut] += np.where(np.minimum(w[cut], w[cut - 1]) > _MASK, more, 0).clip(0)
    return steps


def _dice(a: Map, b: Map) -> float:
    a, b = a > _MASK, b > _MASK
    both = int(a.sum() + b.sum())
    return 2 * int((a & b).sum()) / both if both else 1.0


def _apart(a: tuple[slice, slice], b: tuple[slice, slice], extent: int) -> bool:
    return any(abs(x.start - y.start) >= extent for x, y in zip(a, b, strict=True))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
