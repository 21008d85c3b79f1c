"""Open image files to be read by window: npy by memory map, TIFF by tiles or strips (tifffile), Zarr by chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from normfix.errors import NormfixError
from normfix.reading import read_image
from normfix.streaming.origins import Origin
from normfix.streaming.windows import ArrayLike, Window, windowed

__all__ = ["open_image"]


def open_image(path: Path, *, ndim: int, channels: int, axes: str | None = None, level: int = 0) -> Window:
    """Open an image file or folder to be read by window.

    Args:
        path: .npy, .tif or .tiff (tiled and pyramidal too), .zarr (an array, or OME-Zarr), .png (read whole).
        ndim: number of spatial axes the network takes.
        channels: number of channels the network takes.
        axes: one letter per array axis; default: what the file says, or what the shape leaves no doubt about.
        level: of a pyramid, 0 is the finest.

    Raises:
        NormfixError: NF101 if it cannot be opened, NF106 if its axes or dtype do not fit the network.
    """
    suffix = path.suffix.lower()
    reopen = partial(open_image, path.resolve(), ndim=ndim, channels=channels, axes=axes, level=level)
    if suffix == ".png":
        whole = read_image(path, ndim=ndim, channels=channels, axes=axes)
        return Window(whole, "C" + "ZYX"[-ndim:], where=str(path), origin=Origin.of(path), reopen=reopen)
    try:
        origin = Origin.of(path)  # before it is read, so that no change goes unseen
        array, said, close = _opened(path, suffix, level)
        if path.is_dir():
            origin = Origin.of(path, str(getattr(array, "path", "")))
    except NormfixError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise NormfixError("NF101", f"cannot open it: {reason}.", where=str(path)) from error
    try:
        window = windowed(array, said, ndim=ndim, channels=channels, axes=axes, where=str(path))
    except NormfixError:
        close()
        raise
    return replace(window, close=close, origin=origin, reopen=reopen)


_Opened = tuple[ArrayLike, str | None, Callable[[], None]]


def _opened(path: Path, suffix: str, level: int) -> _Opened:
    """Return an array-like, the axes that the file itself names, if any, and what closes it."""
    if suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False), None, lambda: None
    if suffix in (".tif", ".tiff"):
        return _tiff(path, level)
    if (path / "zarr.json").exists() or (path / ".zgroup").exists() or (path / ".zarray").exists():
        return (*_zarr(path, level), lambda: None)
    raise NormfixError("NF101", "it is no .npy, .tif, .png or Zarr image.", where=str(path))


def _tiff(path: Path, level: int) -> _Opened:
    import tifffile
    import zarr

    file = tifffile.TiffFile(path)
    try:
        chosen = _level(file.series[0].levels, level, path)
        return zarr.open_array(chosen.aszarr(), mode="r"), chosen.axes, file.close
    except BaseException:
        file.close()
        raise


def _zarr(path: Path, level: int) -> tuple[ArrayLike, str | None]:
    import zarr

    node: Any = zarr.open(str(path), mode="r")
    if isinstance(node, zarr.Array):
        return node, None
    attributes: dict[str, Any] = dict(node.attrs)
    multiscales = attributes.get("ome", attributes).get("multiscales")
    if not multiscales:
        raise NormfixError(
            "NF101", "it is a Zarr group without OME metadata. Name the array inside it.", where=str(path)
        )
    datasets = _level(multiscales[0]["datasets"], level, path)
    names = [axis["name"] if isinstance(axis, dict) else axis for axis in multiscales[0].get("axes", "tczyx")]
    return node[datasets["path"]], "".join(str(name).upper() for name in names)


def _level(levels: Sequence[Any], level: int, path: Path) -> Any:
    if not 0 <= level < len(levels):
        raise NormfixError("NF101", f"it has {len(levels)} levels, and no level {level}.", where=str(path))
    return levels[level]
