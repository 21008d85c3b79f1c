"""Predict an image tile by tile: read with halo in phase, run, crop, write. Nothing is blended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from normfix.errors import NormfixError
from normfix.records.progress import LOGGER
from normfix.tiling.grid import Geometry, Tile, at, grid

__all__ = ["cropped", "padded", "stitch", "tile_extents", "tiled"]

Function = Callable[[Tensor], Tensor]

_LOG = logging.getLogger(LOGGER)


def stitch(
    f: Function,
    image: Tensor,
    tiles: Sequence[Tile],
) -> Tensor:
    """Run `f` on every window and put the kept parts together.

    Args:
        f: (N, C, *window) -> (N, C', *out).
        image: (N, C, *space).
        tiles: of a grid over the image, in row-major order.

    Returns:
        (N, C', *out), on the image's device.
    """
    whole: Tensor | None = None
    for number, tile in enumerate(reversed(tiles), 1):
        _LOG.debug("tile %d of %d", number, len(tiles))
        window = f(image[at(tile.read)])
        if whole is None:  # the last window ends where the output ends, also if its tile keeps nothing of it
            ends = zip(tile.write, tile.keep, window.shape[2:], strict=True)
            extents = [write.start - keep.start + n for write, keep, n in ends]
            whole = window.new_empty((*window.shape[:2], *extents))
        whole[at(tile.write)] = window[at(tile.keep)]
    assert whole is not None
    return whole


def padded(image: Tensor, geometry: Geometry) -> Tensor:
    """Return the image extended at the end of each axis, by its edge pixels, to a size the network is exact at.

    This padded image is what "the whole image" means for sizes that the network's stride does not divide.
    """
    padding = geometry.padding(image.shape[2:])
    if not any(padding):
        return image
    pairs = [n for amount in reversed(padding) for n in (0, amount)]
    return F.pad(image, pairs, mode="replicate")


def cropped(output: Tensor, size: Sequence[int], scale: Sequence[Fraction]) -> Tensor:
    """Cut the output of a padded image back to the part that belongs to the image of `size`."""
    extents = (-int(-(n * s) // 1) for n, s in zip(size, scale, strict=True))
    return output[at([slice(0, n) for n in extents])]


def tile_extents(tile: int | Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """Return the tile size per axis.

    Raises:
        NormfixError: NF402 if a size is not a positive multiple of the stride.
    """
    ndim = len(geometry.stride)
    extents = tuple(tile) if isinstance(tile, Sequence) else (tile,) * ndim
    if len(extents) != ndim:
        raise NormfixError(
            "NF402", f"the network has {ndim} spatial axes, so give 1 or {ndim} numbers.", where="tile"
        )
    if not all(isinstance(n, int) for n in extents):
        raise NormfixError("NF402", f"give whole numbers of pixels, not {tile!r}.", where="tile")
    for n, stride in zip(extents, geometry.stride, strict=True):
        if n <= 0 or n % stride:
            near = max(stride, n // stride * stride)
            raise NormfixError(
                "NF402",
                f"a tile of {n} pixels does not start every tile in phase with the network's stride of {stride}. "
                f"Use a multiple of {stride}, such as {near}.",
                where="tile",
            )
    return extents


def tiled(f: Function, image: Tensor, tile: int | Sequence[int], geometry: Geometry) -> Tensor:
    """Predict one image of any size tile by tile; see `padded` for sizes the stride does not divide."""
    whole = padded(image, geometry)
    tiles = list(grid(whole.shape[2:], tile_extents(tile, geometry), geometry))
    with torch.no_grad():
        stitched = stitch(f, whole, tiles)
    return stitched if whole is image else cropped(stitched, image.shape[2:], geometry.scale)
