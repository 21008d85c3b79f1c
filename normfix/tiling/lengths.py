"""Tiles against the whole at an image's size, or on parts of it, where no graph tells how a network treats sizes.

A mask that begins at the thousandth row, or rows read by number, no short strip shows, and a branch on one width no
other width. A strip is thin across, so that its whole costs little whatever the image does; what hangs on both axes at
once shows on small images alone, and of a large one on its windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normfix.records.spans import round_up
from normfix.tiling.dependence import alike
from normfix.tiling.geometry import cross_section
from normfix.tiling.grid import Geometry, at, window_sizes
from normfix.tiling.material import textured
from normfix.tiling.stitching import tiled

__all__ = ["LARGEST", "differing", "exact_size", "is_compared_whole", "parts_compared", "strips_along"]

LARGEST = 1 << 18
"""Pixels of the largest image that is compared whole; of larger ones strips are, and a window."""


def is_compared_whole(size: Sequence[int], geometry: Geometry) -> bool:
    """Tell whether an image of a size is small enough to be compared whole."""
    return math.prod(exact_size(size, geometry)) <= LARGEST


def differing(
    f: Callable[[Tensor], Tensor],
    example: Tensor,
    size: Sequence[int],
    tile: Sequence[int],
    geometry: Geometry,
) -> tuple[int, ...] | None:
    """Return the extents of an image at which tiles differ from the whole; None if there are none.

    Of an image of more than LARGEST pixels strips are compared that are as long along an axis, and the windows that
    most of its tiles read with what a larger one gives there.

    Args:
        f: the network in float64.
        example: (1, C, *space) in float64, the material of what is compared.
        size: pixels of the image per spatial axis.
        tile: pixels per spatial axis.
        geometry: of the network.
    """
    exact = exact_size(size, geometry)
    if is_compared_whole(size, geometry):
        return None if _equals(f, textured(example, exact), tile, geometry) else exact
    for extents in _strips(f, example, exact, geometry):
        if not _equals(f, textured(example, extents), tile, geometry):
            return extents
    window = max(window_sizes(exact, tile, geometry), key=math.prod)
    larger = _beyond(window, exact, geometry)
    if math.prod(larger) <= LARGEST and not _fits(f, textured(example, larger), window, geometry):
        return window
    return None


def parts_compared(
    f: Callable[[Tensor], Tensor],
    example: Tensor,
    size: Sequence[int],
    tile: Sequence[int],
    geometry: Geometry,
) -> tuple[tuple[int, ...], ...]:
    """Return the extents of what `differing` compares of an image that is too large to be compared whole.

    Args:
        f: as for `differing`, and so is what follows.
        example: (1, C, *space) in float64.
        size: pixels of the image per spatial axis.
        tile: pixels per spatial axis.
        geometry: of the network.
    """
    exact = exact_size(size, geometry)
    larger = _beyond(max(window_sizes(exact, tile, geometry), key=math.prod), exact, geometry)
    return (*_strips(f, example, exact, geometry), *([larger] if math.prod(larger) <= LARGEST else []))


def _beyond(window: Sequence[int], exact: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """Return the extents of an image that is larger than a window, and no larger than the whole."""
    return tuple(min(n, w + s) for n, w, s in zip(exact, window, geometry.stride, strict=True))


def _equals(f: Callable[[Tensor], Tensor], x: Tensor, tile: Sequence[int], geometry: Geometry) -> bool:
    with torch.no_grad():
        return alike(*(y.double() for y in (tiled(f, x, tile, geometry), f(x))))


def _fits(f: Callable[[Tensor], Tensor], x: Tensor, window: Sequence[int], geometry: Geometry) -> bool:
    """Tell whether a window at an image's corner gives what the image gives, up to where the window's end is felt."""
    with torch.no_grad():
        part, whole = (f(y).double() for y in (x[at([slice(n) for n in window])], x))
    spans = []
    for n, w, s, halo, scale, have in zip(
        x.shape[2:], window, geometry.stride, geometry.halo, geometry.scale, part.shape[2:], strict=True
    ):
        felt = 0 if n == w else round_up(halo[1], s)
        spans.append(slice(have if n == w else max(0, int((w - felt) * scale))))
    kept = at(spans)
    return part[kept].numel() == 0 or alike(part[kept], whole[kept])


def strips_along(size: Sequence[int], thin: Sequence[int]) -> list[tuple[int, ...]]:
    """Return for each axis the extents of a strip that is as long as an image along it, and thin across.

    >>> strips_along((600, 800), (16, 16))
    [(600, 16), (16, 800)]
    """
    return [(*thin[:axis], n, *thin[axis + 1 :]) for axis, n in enumerate(size)]


def exact_size(size: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """Return the extents of an image once it is extended to a size that tiles are exact at."""
    return tuple(n + more for n, more in zip(size, geometry.padding(size), strict=True))


def _strips(
    f: Callable[[Tensor], Tensor], example: Tensor, exact: Sequence[int], geometry: Geometry
) -> Sequence[tuple[int, ...]]:
    """Return the extents of strips that the network runs on, as long as an image along an axis each."""
    cross = cross_section(f, example, geometry.stride)
    return () if cross is None else strips_along(exact, tuple(map(round_up, cross, geometry.multiple)))
