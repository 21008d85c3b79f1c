"""The pictures of a diagnosis, as PNG bytes small enough to travel inside a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from normfix.records.diagnoses import Culprit, Profile, ReceptiveField

__all__ = ["bars", "course", "field_picture", "plane", "seams", "sides"]

Map = NDArray[Any]
_GRID, _BEFORE, _AFTER = "#35c5e0", "#b3401f", "#1f6f8b"
_TITLE, _SMALL = 12, 10
_WIDTH, _PIXELS = 5.2, 620
_LARGEST = 260_000


def plane(values: Map) -> Map:
    """Return what is drawn of a map (C, *space): its first channel, the middle slice of a volume, a thick line."""
    first = values[0] if values.ndim > 1 else values
    if first.ndim == 3:
        return np.asarray(first[first.shape[0] // 2])
    if first.ndim == 1:
        return np.repeat(first[None], max(8, len(first) // 16), axis=0)
    return np.asarray(first)


def seams(image: Map, difference: Map, cuts: Sequence[Sequence[int]]) -> bytes:
    """Draw the image, and over it where and how far stitched tiles stray from the whole, with the tile grid."""
    pixels, apart = plane(image), plane(difference)
    figure, (left, right) = _panels(2, apart.shape)
    _grey(left, pixels)
    left.set_title("image", fontsize=_TITLE)
    _grey(right, pixels, faint=True)
    strength = np.clip(apart / max(float(np.percentile(apart, 99.5)), 1e-12), 0, 1)
    extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
    shown = right.imshow(
        _fit(apart),
        cmap="magma",
        alpha=_fit(0.25 + 0.75 * strength),
        extent=extent,
        vmin=0,
        interpolation="nearest",
    )
    right.set_title("stitched tiles against the whole, in sd", fontsize=_TITLE)
    scale = [p / a for p, a in zip(pixels.shape, apart.shape, strict=True)]
    _draw_grid(right, cuts[-2:], scale)
    figure.colorbar(shown, ax=right, shrink=0.8)
    return _png(figure)


def sides(whole: Map, before: Map, after: Map, cuts: Sequence[Sequence[int]]) -> bytes:
    """Draw the whole-image prediction, the tiles as they are and the tiles with every cause fixed."""
    maps = [plane(m) for m in (whole, before, after)]
    low, high = (float(v) for v in np.percentile(maps[0], (0.5, 99.5)))
    figure, axes = _panels(3, maps[0].shape)
    names = ("whole image", "tiles as they are", "tiles, causes fixed")
    for axis, values, name in zip(axes, maps, names, strict=True):
        axis.imshow(
            _fit(values), cmap="viridis", vmin=low, vmax=max(high, low + 1e-12), extent=_extent(values)
        )
        axis.set_title(name, fontsize=_TITLE)
    for axis in axes[1:]:
        _draw_grid(axis, cuts[-2:], (1, 1))
    return _png(figure)


def course(profile: Profile, noise: float, halo: int) -> bytes:
    """Draw the difference against the distance from the nearest cut, on a log scale, with the noise floor."""
    figure = Figure(figsize=(7, 3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    away = np.arange(len(profile.mean_sd))
    floor = max(noise, 1e-12) / 10
    axis.semilogy(away, np.maximum(profile.max_sd, floor), color=_BEFORE, alpha=0.5, label="largest")
    axis.semilogy(away, np.maximum(profile.mean_sd, floor), color=_BEFORE, label="mean")
    if noise > 0:
        axis.axhline(noise, color=_AFTER, linestyle="--", linewidth=1, label="noise floor")
    if 0 < halo < len(away):
        axis.axvline(halo, color="#777777", linestyle=":", linewidth=1, label="exact halo")
    axis.set_xlabel("output pixels from the nearest cut", fontsize=_SMALL)
    axis.set_ylabel("difference (sd)", fontsize=_SMALL)
    axis.legend(fontsize=_SMALL, frameon=False)
    _plain(axis)
    return _png(figure)


def bars(culprits: Sequence[Culprit]) -> bytes:
    """Draw for each cause what it introduces alone and what its fix removes."""
    figure = Figure(figsize=(7, 1.2 + 0.7 * len(culprits)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    places = np.arange(len(culprits))
    axis.barh(places - 0.19, [c.introduced for c in culprits], 0.36, color=_BEFORE, label="introduced alone")
    axis.barh(
        places + 0.19,
        [max(0.0, c.removed or 0.0) for c in culprits],
        0.36,
        color=_AFTER,
        label="removed when fixed",
    )
    axis.set_yticks(places, [c.cause for c in culprits], fontsize=_TITLE)
    axis.invert_yaxis()
    axis.set_xlabel("mean difference from the whole (sd)", fontsize=_SMALL)
    figure.legend(loc="outside upper left", ncols=2, fontsize=_SMALL, frameon=False)
    _plain(axis)
    return _png(figure)


def field_picture(gradient: Map, field: ReceptiveField) -> bytes:
    """Draw the input gradient of a central output on a log scale, with both receptive fields as boxes."""
    values = gradient[gradient.shape[0] // 2] if gradient.ndim == 3 else gradient
    values = values if values.ndim == 2 else plane(values)
    figure, (axis,) = _panels(1, values.shape)
    top = max(float(values.max()), 1e-30)
    shown = axis.imshow(np.maximum(values, top * 1e-6), cmap="magma", norm=LogNorm(top * 1e-6, top))
    middle = [n // 2 for n in values.shape]
    boxes = [(field.effective, _GRID, "-"), (field.theoretical, "#ffffff", "--")]
    for spans, colour, style in boxes:
        if spans is not None and len(spans) >= 2:
            _box(axis, middle, spans[-2:], colour, style)
    axis.set_title("gradient; solid: effective, dashed: theoretical", fontsize=_SMALL)
    figure.colorbar(shown, ax=axis, shrink=0.8)
    return _png(figure)


def _box(
    axis: Axes, middle: Sequence[int], spans: Sequence[tuple[int, int]], colour: str, style: str
) -> None:
    (up, down), (left, right) = spans
    y, x = middle
    corners = [
        (x - left, y - up),
        (x + right, y - up),
        (x + right, y + down),
        (x - left, y + down),
        (x - left, y - up),
    ]
    axis.plot(*zip(*corners, strict=True), color=colour, linestyle=style, linewidth=1)


def _panels(count: int, shape: Sequence[int]) -> tuple[Figure, list[Axes]]:
    ratio = min(1.6, max(0.25, shape[0] / shape[1]))
    figure = Figure(figsize=(_WIDTH * count, _WIDTH * ratio + 0.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.ravel(figure.subplots(1, count)))
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def _grey(axis: Axes, pixels: Map, *, faint: bool = False) -> None:
    """Show pixels with a gamma of 0.5, so that dim structures are seen beside bright ones."""
    low, high = np.percentile(pixels, (0.5, 99.9))
    shown = np.clip((pixels - low) / max(high - low, 1e-12), 0, 1) ** 0.5
    axis.imshow(_fit(shown), cmap="gray", vmin=0, vmax=1.5 if faint else 1, extent=_extent(pixels))


def _fit(values: Map) -> Map:
    """Take every n-th pixel of a map that is larger than it is drawn."""
    step = max(1, max(values.shape) // _PIXELS)
    return values[::step, ::step]


def _extent(values: Map) -> tuple[float, float, float, float]:
    return (-0.5, values.shape[1] - 0.5, values.shape[0] - 0.5, -0.5)


def _draw_grid(axis: Axes, cuts: Sequence[Sequence[int]], scale: Sequence[float]) -> None:
    if len(cuts) == 1:
        cuts, scale = ((), cuts[0]), (1, scale[-1])
    for draw, places, factor in zip((axis.axhline, axis.axvline), cuts, scale, strict=True):
        for cut in places:
            draw(cut * factor - 0.5, color=_GRID, linewidth=0.7, linestyle=(0, (4, 4)))


def _plain(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _png(figure: Figure) -> bytes:
    """Save with 256 colours, and smaller if it must be, so that five pictures and a page stay under 2 MB."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", metadata={"Software": None})
    raw.seek(0)
    picture = Image.open(raw).convert("RGB")
    while True:
        small = io.BytesIO()
        picture.quantize(256).save(small, format="PNG", optimize=True)
        if small.tell() <= _LARGEST:
            return small.getvalue()
        picture = picture.resize((picture.width * 4 // 5, picture.height * 4 // 5), Image.Resampling.LANCZOS)
