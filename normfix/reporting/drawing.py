"""The charts of a diagnosis, once for a light page and once for a dark one, and the picture of a receptive field."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from normfix.records.diagnoses import Profile, ReceptiveField
from normfix.records.halo_curves import HaloCurve
from normfix.reporting.panels import boxed

__all__ = ["THEMES", "course", "field_picture", "halo_picture"]

Map = NDArray[Any]

THEMES: Mapping[str, tuple[str, str, str]] = {
    "light": ("#1a1d21", "#b3401f", "#1f6f8b"),
    "dark": ("#e6e9ec", "#ff9d76", "#6cc5e0"),
}
"""Ink, tiles as they are, and what they are held against; the grounds are the page's own."""

_SMALL = 10
_LEAST = 1e-16
"""What no difference at all is drawn as."""


def halo_picture(curve: HaloCurve) -> dict[str, bytes]:
    """Draw the largest and the mean error against the halo, on a log scale; each axis alone where they differ."""
    return {theme: _halos(curve, *colours) for theme, colours in THEMES.items()}


def _halos(curve: HaloCurve, ink: str, before: str, after: str) -> bytes:
    with matplotlib.rc_context(_inks(ink)):
        figure, axis = _chart()
        for number in sorted({point.axis for point in curve.points}, key=lambda a: -1 if a is None else a):
            points = [point for point in curve.points if point.axis == number and point.compared]
            name = "all axes" if number is None else f"axis {number} alone"
            style: Any = (
                {"color": before} if number is None else {"color": after, "linestyle": (0, (3, 1 + number))}
            )
            away = [max(map(max, p.halo if number is None else p.halo[number : number + 1])) for p in points]
            axis.semilogy(
                away, [max(p.max_sd, _LEAST) for p in points], marker="o", label=f"largest, {name}", **style
            )
            if number is None:
                mean = [max(p.mean_sd, _LEAST) for p in points]
                axis.semilogy(away, mean, marker=".", color=before, alpha=0.5, label="mean, all axes")
        axis.set_xlabel("halo (pixels)", fontsize=_SMALL)
        return _finished(figure, axis)


def course(profile: Profile, noise: float, halo: int) -> dict[str, bytes]:
    """Draw the difference against the distance from the nearest cut, on a log scale, with the noise floor."""
    return {theme: _course(profile, noise, halo, *colours) for theme, colours in THEMES.items()}


def _course(profile: Profile, noise: float, halo: int, ink: str, before: str, after: str) -> bytes:
    with matplotlib.rc_context(_inks(ink)):
        figure, axis = _chart()
        away = np.arange(len(profile.mean_sd))
        floor = max(noise, 1e-12) / 10
        axis.semilogy(away, np.maximum(profile.max_sd, floor), color=before, alpha=0.5, label="largest")
        axis.semilogy(away, np.maximum(profile.mean_sd, floor), color=before, label="mean")
        if noise > 0:
            axis.axhline(noise, color=after, linestyle="--", linewidth=1, label="noise floor")
        if 0 < halo < len(away):
            axis.axvline(halo, color=ink, linestyle=":", linewidth=1, label="exact halo")
        axis.set_xlabel("output pixels from the nearest cut", fontsize=_SMALL)
        return _finished(figure, axis)


def _chart() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _finished(figure: Figure, axis: Axes) -> bytes:
    axis.set_ylabel("difference (sd)", fontsize=_SMALL)
    axis.legend(fontsize=_SMALL, frameon=False)
    _plain(axis)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", transparent=True, metadata={"Software": None})
    return stream.getvalue()


def _inks(ink: str) -> Any:
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return dict.fromkeys(names, ink)


def _plain(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def field_picture(gradient: Map, field: ReceptiveField) -> bytes:
    """Draw the input gradient of a central output on a log scale, with both receptive fields as boxes.

    The effective one is drawn in the colour of the tiles' borders, the theoretical one in white.
    """
    values = gradient[gradient.shape[0] // 2] if gradient.ndim == 3 else np.atleast_2d(gradient)
    top = max(float(values.max()), 1e-30)
    middle = [n // 2 for n in values.shape]
    boxes = [
        tuple(slice(m - before, m + after + 1) for m, (before, after) in zip(middle, spans[-2:], strict=True))
        for spans in (field.effective, field.theoretical)
        if spans is not None and len(spans) >= 2
    ]
    strength = np.log10(np.maximum(values, top * 1e-6))
    return boxed(strength, float(np.log10(top * 1e-6)), float(np.log10(top)), boxes)  # type: ignore[arg-type]
