"""Open image files to be read by window: nothing of them is read whole but PNG."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from normfix.errors import NormfixError
from normfix.images.axes import Channels
from normfix.images.contents import Contents
from normfix.images.formats import open_file, unreadable
from normfix.images.formats.opened import Choice
from normfix.images.origins import Origin
from normfix.images.windows import Unread, windowed

__all__ = ["open_windows"]


def open_windows(
    path: Path,
    *,
    ndim: int,
    channels: Channels,
    axes: str | None = None,
    level: int = 0,
    series: str | None = None,
) -> Unread:
    """Open an image file or folder to be read by window.

    Args:
        path: .npy, .tif or .tiff (tiled and pyramidal too), .zarr (an array, or OME-Zarr), .nii, .png (read whole).
        ndim: number of spatial axes the network takes.
        channels: how many channels the network takes, or what knows it.
        axes: one letter per array axis; default: what the file says, or what the shape leaves no doubt about.
        level: of a pyramid, 0 is the finest.
        series: name or number of the image, where a file holds several.

    Raises:
        NormfixError: NF101 if it cannot be opened, NF106 if its axes or dtype do not fit the network, NF141 if it
            holds several images.
    """
    try:
        origin = Origin.of(path)  # before it is read, so that no change goes unseen
    except OSError as error:
        raise unreadable(path, error) from error
    opened = open_file(path, Choice(series, level))
    if path.is_dir():
        origin = Origin.of(path, opened.part, opened.listing)
    try:
        window = windowed(opened.array, opened.axes, ndim=ndim, channels=channels, axes=axes, where=str(path))
    except NormfixError:
        opened.close()
        raise
    reopen = partial(
        open_windows,
        path.resolve(),
        ndim=ndim,
        channels=window.shape[0],
        axes=axes if axes or opened.axes else window.named,
        level=level,
        series=series,
    )
    placement = opened.placed(window.named)
    return replace(
        window,
        close=opened.close,
        contents=Contents(origin),
        reopen=reopen,
        placement=placement,
        notes=opened.notes,
    )
