"""How far tiles are from the whole image, for halos from none to the exact one, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass

from normfix.records.encoding import Record
from normfix.records.spans import Spans

__all__ = ["HaloCurve", "HaloPoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HaloPoint(Record):
    """One halo: the stitched tiles against the whole, in sd of the whole, and pixels computed per pixel of the image.

    `axis` is the one along which alone the halo is this short, while it is exact along the others; None where all are
    short together. `compared` are the axes along which a window is smaller than the image: where there is none, the
    point says nothing.
    """

    axis: int | None
    halo: Spans
    max_sd: float
    mean_sd: float
    cost: float
    compared: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HaloCurve(Record):
    """The error against the halo on one image; its last point of all axes together has the exact halo.

    `smallest` is the cheapest of the halos within `tolerance`, if all longer ones are within it too. `live` are sites
    that are computed from the tile: no halo helps against these.
    """

    tile: tuple[int, ...]
    exact: Spans
    points: tuple[HaloPoint, ...]
    tolerance: float | None
    smallest: HaloPoint | None
    live: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Tell whether a halo within the tolerance was found, or none was asked for."""
        return self.tolerance is None or self.smallest is not None
