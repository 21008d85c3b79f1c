"""Tiles against the whole at an image's size, or on strips as long, where no graph tells how a network treats sizes.

A mask that begins at the thousandth row, or rows read by number, no short strip shows. A strip is thin across, so that
its whole costs little whatever the image does; what begins far along both axes at once shows on small images alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from normfix.records.spans import round_up
from normfix.tiling.dependence import alike
from normfix.tiling.geometry import cross_section
from normfix.tiling.grid import Geometry
from normfix.tiling.material import textured
from normfix.tiling.stitching import tiled

__all__ = ["LARGEST", "differing", "strips_along"]

LARGEST = 1 << 18
"""Pixels of the largest image that is compared whole; of larger ones strips are."""


def differing(
    f: Callable[[Tensor], Tensor],
    example: Tensor,
    size: Sequence[int],
    tile: Sequence[int],
    geometry: Geometry,
    compared: Sequence[int],
) -> tuple[int, ...] | None:
    """Return the extents of an image at which tiles differ from the whole; None if there are none.

    Args:
        f: the network in float64.
        example: (1, C, *space) in float64, the material of what is compared.
        size: pixels of the image per spatial axis.
        tile: pixels per spatial axis.
        geometry: of the network.
        compared: pixels per axis of what was compared before: there are no strips along axes that are no longer.
    """
    for extents in _trials(f, example, size, geometry, compared):
        x = textured(example, extents)
        with torch.no_grad():
            if not alike(*(y.double() for y in (tiled(f, x, tile, geometry), f(x)))):
                return extents
    return None


def strips_along(size: Sequence[int], thin: Sequence[int]) -> list[tuple[int, ...]]:
    """Return for each axis the extents of a strip that is as long as an image along it, and thin across.

    >>> strips_along((600, 800), (16, 16))
    [(600, 16), (16, 800)]
    """
    return [(*thin[:axis], n, *thin[axis + 1 :]) for axis, n in enumerate(size)]


def _trials(
    f: Callable[[Tensor], Tensor],
    example: Tensor,
    size: Sequence[int],
    geometry: Geometry,
    compared: Sequence[int],
) -> Iterator[tuple[int, ...]]:
    exact = tuple(n + more for n, more in zip(size, geometry.padding(size), strict=True))
    if math.prod(exact) <= LARGEST:
        yield exact
        return
    cross = cross_section(f, example, geometry.stride)
    if cross is None:  # it runs on no strip
        return
    thin = tuple(map(round_up, cross, geometry.multiple))
    for extents, n, most in zip(strips_along(exact, thin), size, compared, strict=True):
        if n > most:
            yield extents
