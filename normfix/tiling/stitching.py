"""Predict an image tile by tile: read with halo in phase, run, crop, write. Nothing is blended.

Windows of one shape may share a call of the network: small ones leave most of a GPU idle. Whether a network treats the
images of a batch apart is seen by the first of such calls, whose ends are compared with calls of their own, whatever
the others hold.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from normfix.errors import NormfixError
from normfix.networks.calling import NotTaken, OutOfMemory, refusals
from normfix.networks.numerics import IDENTITY, deviation
from normfix.records.progress import LOGGER
from normfix.records.spans import per_axis
from normfix.tiling.grid import Geometry, Tile, at, grid

__all__ = ["cropped", "dividing", "in_tiles", "padded", "require_fit", "stitch", "tile_extents", "tiled"]

Function = Callable[[Tensor], Tensor]

_LOG = logging.getLogger(LOGGER)


def stitch(f: Function, image: Tensor, tiles: Sequence[Tile], batch: int | None = 1) -> Tensor:
    """Run `f` on every window and put the kept parts together.

    Args:
        f: (N, C, *window) -> (N, C', *out).
        image: (N, C, *space).
        tiles: of a grid over the image, in row-major order.
        batch: windows of one shape that share a call, at most; None is as many as pay on the image's device.

    Returns:
        (N, C', *out), on the image's device.

    Raises:
        NormfixError: NF115 if a window's output has another size than its tile was planned for; NF410 for a batch of
            which `f` does not treat the images apart; with None each has a call then.
    """
    first, last = f(image[at(tiles[0].read)]), tiles[-1]
    end = first if len(tiles) == 1 else f(image[at(last.read)])
    whole = end.new_empty((*end.shape[:2], *_extents(tiles, first, end)))

    done = 0

    def put(tile: Tile, window: Tensor) -> None:
        nonlocal done
        done += 1
        _LOG.debug("tile %d of %d", done, len(tiles))
        place, part = whole[at(tile.write)], window[at(tile.keep)]
        if place.shape != part.shape or _grows_otherwise(tiles[0], first, tile, window):
            raise _misfit(window, tile)
        place.copy_(part)

    put(tiles[0], first)
    if len(tiles) > 1:
        put(last, end)
    del end
    for group in _groups(f, image, tiles[1:-1], batch):
        for tile, window in zip(group, _answers(f, image, group), strict=True):
            put(tile, window)
    return whole


_PAYS = 1 << 20
"""Pixels of a call that keep a GPU busy."""

_MOST = 64
"""Windows in a call, at most."""


def _groups(f: Function, image: Tensor, tiles: Sequence[Tile], batch: int | None) -> Iterator[Sequence[Tile]]:
    """Yield the tiles that share a call: of one shape, as many as are asked for or pay, if `f` treats them apart."""
    shapes: dict[tuple[int, ...], list[Tile]] = {}
    for tile in tiles:
        shapes.setdefault(tuple(_length(span) for span in tile.read), []).append(tile)
    apart: bool | None = None
    for shape, alike in shapes.items():
        most = _paying(image.device, shape) if batch is None else batch
        if min(most, len(alike)) > 1 and apart is None:
            apart = _are_apart(f, image, alike[:most])
            if not apart and batch is not None:
                raise NormfixError(
                    "NF410",
                    "it gives an image in a batch another output than alone, or takes no batch, so tiles cannot share "
                    "a call. Leave batch out.",
                    where=f"batch={batch}",
                )
        step = most if apart else 1
        yield from (alike[i : i + step] for i in range(0, len(alike), step))


def _paying(device: torch.device, shape: Sequence[int]) -> int:
    """Return how many windows pay: one on a CPU, which is as busy with one."""
    return 1 if device.type == "cpu" else max(1, min(_MOST, _PAYS // math.prod(shape)))


_LOUD = 1e6
"""What the other images of a batch are multiplied by, with either sign: what a gate keeps shut is opened."""


def _are_apart(f: Function, image: Tensor, tiles: Sequence[Tile]) -> bool:
    """Tell whether the first and the last image of a batch give what each gives alone, whatever the others hold."""
    windows = [image[at(tile.read)] for tile in tiles]
    loud = [window * (-_LOUD if number % 2 else _LOUD) for number, window in enumerate(windows)]
    try:
        quiet = _in_calls(f, windows)
        for kept in (0, -1):
            alone = f(windows[kept])
            sd = float(alone.double().std(correction=0)) or 1.0
            batch = [*loud]
            batch[kept] = windows[kept]
            for together in (quiet, _in_calls(f, batch)):
                if len(together) != len(windows) or together[kept].shape != alone.shape:
                    return False
                if deviation(together[kept], alone, sd)[0] > IDENTITY.get(alone.dtype, 0.0):
                    return False
    except refusals():
        return False
    return True


def _answers(f: Function, image: Tensor, tiles: Sequence[Tile]) -> Sequence[Tensor]:
    """Return what `f` gives for each window of an image; see `_in_calls`."""
    return _in_calls(f, [image[at(tile.read)] for tile in tiles])


def _in_calls(f: Function, windows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return what `f` gives for each window, in one call, or in several where memory runs out."""
    if len(windows) == 1:
        return [f(windows[0])]
    half = len(windows) // 2
    try:
        return torch.chunk(f(torch.cat([*windows])), len(windows))
    except (torch.OutOfMemoryError, OutOfMemory):
        pass  # outside, where what the call held is free
    return [*_in_calls(f, windows[:half]), *_in_calls(f, windows[half:])]


def _extents(tiles: Sequence[Tile], first: Tensor, end: Tensor) -> list[int]:
    """Return the extents of the whole output: the last window ends where it ends, also if nothing of it is kept.

    Raises:
        NormfixError: NF115 if the windows could not fill them.
    """
    extents = []
    for axis, (write, keep) in enumerate(zip(tiles[-1].write, tiles[-1].keep, strict=True)):
        lengths = [window.shape[axis + 2] for window in (first, end)]
        count = len({tile.write[axis].start for tile in tiles})
        extents.append(write.start - keep.start + lengths[1])
        if not 0 <= extents[-1] <= _SLACK * count * max(lengths):
            raise _misfit(end, tiles[-1])
    return extents


def _grows_otherwise(one: Tile, first: Tensor, other: Tile, window: Tensor) -> bool:
    """Tell whether windows of two extents differ by other extents of their outputs than the scale says.

    A stride more of input is exactly scale * stride more of output; what ends within a stride may be rounded to either.
    """
    for axis, (stride, scale) in enumerate(zip(other.stride, other.scale, strict=True)):
        more = _length(other.read[axis]) - _length(one.read[axis])
        rounded = scale * stride if more % stride else 1
        if abs(window.shape[axis + 2] - first.shape[axis + 2] - scale * more) >= max(1, rounded):
            return True
    return False


def _length(span: slice) -> int:
    length: int = span.stop - span.start
    return length


_SLACK = 16
"""Tiles in the middle are wider than the first and the last, which may be cut anywhere."""


def require_fit(stitched: Tensor, whole: Tensor) -> None:
    """Refuse stitched tiles of another size than the whole output.

    Raises:
        NormfixError: NF115.
    """
    if stitched.shape != whole.shape:
        found, wanted = tuple(stitched.shape), tuple(whole.shape)
        raise NormfixError(
            "NF115", f"its tiles make an output of {found} and its whole {wanted}. {_EDITED}", where="scale"
        )


_EDITED = (
    "What is stored of its scale is not so: the file was edited, or the network's code is another version. Convert the "
    "network again."
)


def _misfit(window: Tensor, tile: Tile) -> NormfixError:
    read = tuple(_length(span) for span in tile.read)
    return NormfixError(
        "NF115", f"of {read} pixels it makes an output of {tuple(window.shape[2:])}. {_EDITED}", where="scale"
    )


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


def dividing(image: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """Return tiles that divide an image (N, C, *space); see `Geometry.dividing`."""
    size = image.shape[2:]
    return geometry.dividing([n + more for n, more in zip(size, geometry.padding(size), strict=True)])


def tile_extents(tile: int | Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """Return the tile size per axis.

    Raises:
        NormfixError: NF402 if a size is not a positive multiple of the stride.
    """
    ndim = len(geometry.stride)
    extents = per_axis(tile, ndim)
    if extents is None:
        raise NormfixError(
            "NF402",
            f"the network has {ndim} spatial axes, so give 1 or {ndim} whole numbers of pixels, not {tile!r}.",
            where="tile",
        )
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


def tiled(
    f: Function, image: Tensor, tile: int | Sequence[int], geometry: Geometry, batch: int | None = 1
) -> Tensor:
    """Predict one image of any size tile by tile; see `padded` for sizes the stride does not divide, `stitch` else.

    Raises:
        NotTaken: NF109 if the network does not run on a window of these tiles.
    """
    whole = padded(image, geometry)
    extents = tile_extents(tile, geometry)
    with torch.no_grad():
        try:
            stitched, _ = in_tiles(f, whole, extents, geometry, batch)
        except NotTaken as error:
            if type(error) is not NotTaken or all(
                n <= t for n, t in zip(whole.shape[2:], extents, strict=True)
            ):
                raise
            too_small = (
                f"That is a window of tiles of {'x'.join(map(str, extents))} pixels: give a larger tile."
            )
            raise NotTaken(error.code, f"{error.message} {too_small}", where=error.where) from error
    return stitched if whole is image else cropped(stitched, image.shape[2:], geometry.scale)


def in_tiles(
    f: Function, image: Tensor, extents: Sequence[int], geometry: Geometry, batch: int | None = 1
) -> tuple[Tensor, list[Tile]]:
    """Stitch the tiles of an image that a network is exact at, and return them too; see `stitch`.

    Where the network does not run on the windows of the last tiles, these are as wide as the first ones: keys that are
    held leave a network a small halo, and it still pools maps as wide as theirs were.
    """
    tiles = list(grid(image.shape[2:], extents, geometry))
    try:
        return stitch(f, image, tiles, batch), tiles
    except NotTaken as error:
        wide = list(grid(image.shape[2:], extents, geometry, wide=True))
        if type(error) is not NotTaken or wide == tiles:
            raise
    return stitch(f, image, wide, batch), wide
