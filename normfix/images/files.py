"""Open image files to be read by window, or whole: nothing of them is read whole unasked but PNG and JPEG."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfix.errors import NormfixError
from normfix.images.axes import Channels
from normfix.images.contents import Contents
from normfix.images.endings import suffix_of
from normfix.images.formats import open_file, unreadable
from normfix.images.formats.opened import ArrayLike, Choice
from normfix.images.origins import Origin
from normfix.images.views import Part, part_of
from normfix.images.windows import Unread, windowed

__all__ = ["open_windows", "read_all", "read_image", "require_walkable"]

_LARGE = 1 << 29
"""Bytes of an image from which it is asked whether its file can hold it."""

_RATIO = 500
"""Bytes of an image for each of its file, from which it is nearly empty or built to harm. Real images have 1 to 20."""


_LONG = 1 << 34
"""Bytes of an image that are walked over in about a minute."""

_BLOCK = 512
"""Bytes in which systems say how much of a file is stored, whatever the size of its blocks."""

_CHUNKS, _BYTES_A_CHUNK = 1 << 16, 64
"""Chunks that an image may always have, and bytes of its files for each one more; reading one takes a tenth of a
millisecond, whether it is there or not.
"""


def open_windows(
    path: Path,
    *,
    ndim: int,
    channels: Channels,
    axes: str | None = None,
    level: int = 0,
    series: str | None = None,
    part: Part | None = None,
) -> Unread:
    """Open an image file or folder to be read by window.

    Args:
        path: .npy, .tif or .tiff (tiled and pyramidal too), .zarr (an array, or OME-Zarr), .nii; .png and .jpg are
            read whole.
        ndim: number of spatial axes the network takes.
        channels: how many channels the network takes, or what knows it.
        axes: one letter per array axis; default: what the file says, or what the shape leaves no doubt about.
        level: of a pyramid, 0 is the finest.
        series: name or number of the image, where a file holds several.
        part: which channels, and which plane of a stack; default: all of it. The placement is then that of the stack.

    Raises:
        NormfixError: NF101 if it cannot be opened, NF106 if its axes or dtype do not fit the network, NF141 if it
            holds several images, NF532 and NF533 for a part that it has not.
    """
    try:
        origin = Origin.of(path)  # before it is read, so that no change goes unseen
    except OSError as error:
        raise unreadable(path, error) from error
    opened = open_file(path, Choice(series, level))
    if path.is_dir():
        origin = Origin.of(path, opened.part, opened.listing)
    try:
        array, said, planes = opened.array, opened.axes, 1
        if part is not None:
            array, said, planes = part_of(array, axes or said, part, ndim=ndim, where=str(path))
        named = said if axes and part is not None else axes
        window = windowed(array, said, ndim=ndim, channels=channels, axes=named, where=str(path))
    except NormfixError:
        opened.close()
        raise
    reopen = partial(
        _reopened,
        window.named,
        window.fixed,
        path=path.resolve(),
        ndim=ndim,
        channels=window.shape[0],
        axes=axes if axes or opened.axes else window.named,
        level=level,
        series=series,
        part=part,
    )
    stacked = part is not None and part.slices == "Z"
    placement = opened.placed(f"Z{window.named}" if stacked else window.named)
    return replace(
        window,
        close=opened.close,
        contents=Contents(origin, plain=_is_plain(path, opened.array)),
        reopen=reopen,
        placement=placement,
        notes=opened.notes,
        planes=planes,
    )


def _reopened(named: str, fixed: tuple[int, ...], **options: Any) -> Unread:
    """Open a file again with the axes that it had: one of extent 1 may have a name or none, by how they were found."""
    window = open_windows(**options)
    if len(window.array.shape) != len(named) + len(fixed):  # another image, which whoever compares them says
        return window
    return replace(window, named=named, fixed=fixed, reopen=partial(_reopened, named, fixed, **options))


def _is_plain(path: Path, array: ArrayLike) -> bool:
    """Tell whether values lie in a file as they are, where a program may write them through a map of it."""
    return suffix_of(path) in (".npy", ".nii") or bool(getattr(array, "plain", False))


def read_image(
    path: Path,
    *,
    ndim: int,
    channels: Channels,
    axes: str | None = None,
    choice: Choice | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> NDArray[Any]:
    """Read an image file as (C, *space) in its own dtype, space in the order Z, Y, X.

    Args:
        path: as for `open_windows`, as are the number of axes, the channels and the names of axes.
        ndim: number of spatial axes the network takes.
        channels: how many channels the network takes, or what knows it.
        axes: one letter per array axis.
        choice: which series and level, where a file has several.
        tell: is told what a user should know of the file, such as chunks that are missing.

    Raises:
        NormfixError: codes of `open_windows`, NF104 for NaN or infinity, NF121 if it is far larger in memory than on
            disk, NF331 if it changes meanwhile.
    """
    choice = choice or Choice()
    with open_windows(
        path, ndim=ndim, channels=channels, axes=axes, level=choice.level, series=choice.series
    ) as window:
        for text in window.notes:
            tell(f"{path}: {text}")
        return read_all(window, path)


def require_walkable(path: Path, window: Unread) -> None:
    """Refuse to measure the values of an image that is long and hardly stored: holes of any length cost nothing.

    Raises:
        NormfixError: NF121.
    """
    array = window.array
    size, chunks = math.prod(window.shape) * np.dtype(array.dtype).itemsize, _chunks_of(array)
    if size <= _LONG and chunks <= _CHUNKS:
        return
    stored = _stored(path)
    # a pyramid or a compressed file is shorter than its image; what is not stored of either is a hole
    length = size if path.is_dir() else min(size, path.stat().st_size)
    if (size > _LONG and length > _RATIO * stored) or chunks > _CHUNKS + stored // _BYTES_A_CHUNK:
        raise NormfixError(
            "NF121",
            f"its {size:,} bytes in {chunks:,} chunks would be walked over to measure the scaling, and {stored:,} are "
            "stored: it is damaged, built to harm, or nearly empty. If it is right, state a scaling that is not "
            "measured on it: --scale MEAN,STD, unit or none.",
            where=str(path),
        )


def _stored(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder, that are no holes."""
    found = _statuses(path)
    return sum(getattr(status, "st_blocks", -(-status.st_size // _BLOCK)) * _BLOCK for status in found)


def _statuses(path: Path) -> list[os.stat_result]:
    """Return what the file system says of a file, or of the files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return [file.stat() for file in files if file.is_file()]


def _chunks_of(array: ArrayLike) -> int:
    """Return in how many chunks an array lies."""
    shape = tuple(array.shape)
    sides = getattr(array, "chunks", None) or shape
    return math.prod(-(-n // max(1, side)) for n, side in zip(shape, sides, strict=True))


def read_all(window: Unread, path: Path) -> NDArray[Any]:
    """Read all of an image file that was opened; raises as `read_image`."""
    _require_proportion(path, window.array)
    array = window.read([(0, n) for n in window.shape[1:]])
    if window.contents is not None:
        window.contents.complete = True
    return array


def _require_proportion(path: Path, array: ArrayLike) -> None:
    """Refuse to unpack a small file to a large image, or to look for chunks without end.

    Raises:
        NormfixError: NF121.
    """
    shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    size = math.prod(shape) * dtype.itemsize
    chunks = _chunks_of(array)
    if size <= _LARGE and chunks <= _CHUNKS:
        return
    stored = sum(status.st_size for status in _statuses(path))
    extents = "x".join(map(str, shape))
    if size > _LARGE and size > _RATIO * stored:
        raise NormfixError(
            "NF121",
            f"its {stored:,} bytes would be {size:,} in memory ({extents}, {dtype}): it is damaged, "
            "built to harm, or nearly empty. If it is right, read it by window: --tile, or --engine stages.",
            where=str(path),
        )
    if chunks > _CHUNKS + stored // _BYTES_A_CHUNK:
        raise NormfixError(
            "NF121",
            f"its {extents} pixels lie in {chunks:,} chunks, and its files have {stored:,} bytes: it is damaged, built "
            "to harm, or nearly empty. Write it again with larger chunks if it is right.",
            where=str(path),
        )
