"""Strips that no window covers along one axis, as thin as the network runs on elsewhere: tiles of them are cheap."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from normfix.records.spans import round_up
from normfix.tiling.grid import Geometry
from normfix.tiling.material import strip

__all__ = ["longer_than_windows"]

_UNIT = 32
"""The least tile along the strip, in pixels."""


def longer_than_windows(
    image: Tensor, geometry: Geometry, axis: int, thin: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return a strip made from the image that no window covers along the axis, and its tile; elsewhere it stays thin.

    Tiles grow with the halo: small ones would compute it over and over.
    """
    halo, stride = sum(geometry.halo[axis]), geometry.stride[axis]
    tile, size = [round_up(n, s) for n, s in zip(thin, geometry.stride, strict=True)], [*thin]
    tile[axis] = round_up(max(_UNIT, halo // 2), stride)
    size[axis] = round_up(halo, stride) + 4 * tile[axis]
    return strip(image, size), tuple(tile)
