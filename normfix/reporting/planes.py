"""What of an image of any number of axes is shown: a plane through the worst place, and the worst seam in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Plane", "Window", "worst_plane", "worst_seam"]

Map = NDArray[Any]
Window = tuple[slice, slice]

_THICK = 16
"""Rows as which an image of one axis is shown."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Two spatial axes of an output and where it lies on the others; one axis alone is drawn as a thick line."""

    axes: tuple[int, ...]
    at: dict[int, float]
    names: str

    def of(self, values: Map) -> Map:
        """Return the plane (C, rows, columns) of a map (C, *space); of another resolution the nearest one."""
        index = tuple(
            slice(None) if axis in self.axes else min(int(self.at[axis] * n), n - 1)
            for axis, n in enumerate(values.shape[1:])
        )
        plane = values[(slice(None), *index)]
        return np.repeat(plane[:, None], _THICK, axis=1) if plane.ndim == 2 else plane

    def cuts(self, cuts: Sequence[Sequence[int]]) -> tuple[Sequence[int], Sequence[int]]:
        """Return the cuts of its rows and columns."""
        own = [cuts[axis] for axis in self.axes]
        return ((), own[0]) if len(own) == 1 else (own[0], own[1])

    def words(self, size: Sequence[int]) -> str:
        """Say which plane it is, where there are others."""
        places = (f"{self.names[a]} = {int(f * size[a])} of {size[a]}" for a, f in self.at.items())
        shown = "".join(self.names[axis] for axis in self.axes)
        return f"plane {shown} at {', '.join(places)}" if self.at else ""


def worst_plane(difference: Map, cuts: Sequence[Sequence[int]]) -> Plane:
    """Return the plane to show: of the last axes, or with the axis that alone is cut; where tiles differ most."""
    space = difference.shape[1:]
    names = "ZYX"[-len(space) :]
    axes = tuple(range(len(space)))[-2:]
    if len(space) == 3 and not (cuts[1] or cuts[2]):
        axes = (0, 2)
    others = [axis for axis in range(len(space)) if axis not in axes]
    strength = difference.max(0)
    at = {}
    for axis in others:
        along = strength.mean(tuple(a for a in range(len(space)) if a != axis))
        at[axis] = (int(along.argmax()) + 0.5) / len(along)
    return Plane(axes, at, names)


def worst_seam(
    whole: Map, stitched: Map, cuts: tuple[Sequence[int], Sequence[int]], extents: tuple[int, int]
) -> Window | None:
    """Return the window in which stitched tiles step most across a cut where the whole image does not.

    Args:
        whole: (C, rows, columns).
        stitched: the same from tiles.
        cuts: rows and columns in which new tiles start.
        extents: of the window, in pixels, at most those of the prediction.

    Returns:
        None where nothing is cut.
    """
    best, found = -1.0, None
    size = whole.shape[1:]
    for axis, places in enumerate(cuts):
        along = 1 - axis
        for cut in places:
            before, after = (np.take(stitched - whole, place, axis=axis + 1) for place in (cut - 1, cut))
            steps = np.abs(after - before).sum(0)
            for start in range(0, size[along] - extents[along] + 1, max(1, extents[along] // 4)):
                step = float(steps[start : start + extents[along]].mean())
                if step > best:
                    corner = {
                        along: start,
                        axis: min(max(0, cut - extents[axis] // 2), size[axis] - extents[axis]),
                    }
                    best, found = step, corner
    if found is None:
        return None
    rows, columns = (slice(found[axis], found[axis] + extents[axis]) for axis in (0, 1))
    return rows, columns
