"""Tiles against the whole on strips that are as long as an image, where no graph tells how a network treats its size.

A mask that begins at the thousandth row, or rows read by number, no short strip shows. The strip is thin across, so
that its whole costs little whatever the image does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normfix.records.spans import round_up
from normfix.tiling.dependence import alike
from normfix.tiling.geometry import cross_section
from normfix.tiling.grid import Geometry
from normfix.tiling.halo import strip, texture
from normfix.tiling.stitching import tiled

__all__ = ["along"]


def along(
    f: Callable[[Tensor], Tensor],
    example: Tensor,
    size: Sequence[int],
    tile: Sequence[int],
    geometry: Geometry,
    compared: Sequence[int],
) -> tuple[int, ...] | None:
    """Return the extents of a strip, as long as the image, whose tiles differ from it; None if there is none.

    Args:
        f: the network in float64.
        example: (1, C, *space) in float64, the material of the strips.
        size: pixels of the image per spatial axis.
        tile: pixels per spatial axis.
        geometry: of the network.
        compared: pixels per axis of what was compared before: axes that are no longer are left out.
    """
    cross = cross_section(f, example, geometry.stride)
    if cross is None:  # it runs on no strip
        return None
    for axis, (n, most) in enumerate(zip(size, compared, strict=True)):
        if n <= most:
            continue
        extents = tuple(
            round_up(n if other == axis else m, multiple)
            for other, (m, multiple) in enumerate(zip(cross, geometry.multiple, strict=True))
        )
        x = strip(example, extents) + texture(example, extents)
        with torch.no_grad():
            whole = f(x)
            # a class may turn over by rounding
            if whole.is_floating_point() and not alike(tiled(f, x, tile, geometry), whole):
                return extents
    return None
