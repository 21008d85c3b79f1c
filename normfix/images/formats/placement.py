"""Where an image's pixels lie: what a file says of it, and what goes with a prediction.

Axes of space are in the order Z, Y, X. A prediction with s pixels per pixel of the image has spacing d / s; its first
pixel's centre lies (d / s - d) / 2 from the image's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

__all__ = ["UNITS", "Native", "Placement", "unit_named"]


class Native(Protocol):
    """What files of one format alone can hold."""

    def scaled(self, scale: Sequence[Fraction]) -> Native | None:
        """Return the same for so many pixels per pixel on each axis of space; None where that cannot be said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Spacing and the first pixel's centre per axis of space in `unit`, names of channels, channels last or first.

    Empty where the file does not say. `native` is for a file of the same format.
    """

    spacing: tuple[float, ...] = ()
    unit: str = ""
    origin: tuple[float, ...] = ()
    channels: tuple[str, ...] = ()
    channels_last: bool = False
    native: Any = None

    def believed(self) -> Placement:
        """Return it without sizes of pixels and places that are none: 0, negative, or not finite."""
        if all(math.isfinite(d) and d > 0 for d in self.spacing) and all(map(math.isfinite, self.origin)):
            return self
        return replace(self, spacing=(), unit="", origin=())

    def scaled(self, scale: Sequence[Fraction]) -> Placement:
        """Return the placement of a map with so many pixels per pixel on each axis."""
        if all(s == 1 for s in scale):
            return self
        spacing = tuple(float(d / s) for d, s in zip(self.spacing, scale, strict=False))
        moved = zip(self.origin, self.spacing, spacing, strict=False)
        origin = tuple(o + (new - old) / 2 for o, old, new in moved)
        native = None if self.native is None else self.native.scaled(scale)
        return replace(self, spacing=spacing, origin=origin, native=native)

    def of_level(self, full: Sequence[int], level: Sequence[int]) -> Placement:
        """Return the placement of a level of a pyramid, by the extents of the finest and its own."""
        return self.scaled(
            [Fraction(round(n / m)) ** -1 if m else Fraction(1) for n, m in zip(full, level, strict=True)]
        )


UNITS = {
    "nanometer": "nm",
    "micrometer": "µm",
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
    "inch": "in",
}
"""Units by their names in OME-Zarr, with the symbols of OME-XML."""

_ALIASES = {
    **{name: name for name in UNITS},
    **{symbol: name for name, symbol in UNITS.items()},
    "um": "micrometer",
    "μm": "micrometer",
    "\\u00b5m": "micrometer",
    "micron": "micrometer",
    "microns": "micrometer",
}


def unit_named(text: object) -> str:
    """Return a unit's name in OME-Zarr, or the text itself where it is none known.

    >>> unit_named("um"), unit_named("parsec")
    ('micrometer', 'parsec')
    """
    given = str(text or "").strip()
    return _ALIASES.get(given.lower(), given)
