"""Image files in and out: TIFF, PNG and npy, their axes brought into the order C, Z, Y, X.

Axes are those the caller names, else those the file names, else those the shape leaves no doubt about; doubt
is refused, since channels taken for slices would give statistics of something else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfix.errors import NormfixError

__all__ = [
    "SUFFIXES",
    "named_axes",
    "pixel_size_of",
    "read_image",
    "require_new_image",
    "to_tensor",
    "write_image",
]

Array = NDArray[Any]

SUFFIXES = (".tif", ".tiff", ".png", ".npy")
"""Endings of the files that are read as images."""


def read_image(path: Path, *, ndim: int, channels: int, axes: str | None = None) -> Array:
    """Read an image file as (C, *space) in its own dtype, space in the order Z, Y, X.

    Args:
        path: TIFF, PNG or npy.
        ndim: number of spatial axes the network takes.
        channels: number of channels the network takes.
        axes: one letter per array axis: C for channels, Z Y X for space. Default: what the file says, or
            what the shape leaves no doubt about.

    Raises:
        NormfixError: NF101 if the file cannot be read, NF106 if its axes or dtype do not fit the network.
    """
    array, said = _read(path)
    named = named_axes(
        array.shape, array.dtype, ndim=ndim, channels=channels, axes=axes or said, where=str(path)
    )
    array = array.transpose([named.index(letter) for letter in "CZYX" if letter in named])
    return array if "C" in named else array[np.newaxis]


def named_axes(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    ndim: int,
    channels: int,
    axes: str | None = None,
    where: str = "image",
) -> str:
    """Return one letter of C, Z, Y, X per axis of an array, as named or as its shape leaves no doubt.

    Raises:
        NormfixError: NF106 if axes, channels or dtype do not fit the network.
    """
    if dtype.kind not in "biuf":
        raise NormfixError(
            "NF106", f"its values are {dtype}; networks take real numbers. Convert it first.", where=where
        )
    named = (axes or _guess(shape, ndim, channels, where)).upper().replace("S", "C")
    if len(named) != len(shape) or len(set(named)) != len(named) or not set(named) <= set("CZYX"):
        raise NormfixError(
            "NF106",
            f"axes {named!r} do not name the {len(shape)} axes of an array of shape {shape}. "
            "Give --axes with one letter per axis, such as YX, CYX, YXC or ZYX.",
            where=where,
        )
    space = [letter for letter in named if letter != "C"]
    if len(space) != ndim:
        raise NormfixError(
            "NF106",
            f"the network takes {ndim} spatial axes, the image has {len(space)} ({named}, {shape}). "
            "Give --axes if they are named wrongly, or cut the image.",
            where=where,
        )
    ordered = tuple(shape[named.index(letter)] for letter in "CZYX" if letter in named)
    ordered = ordered if "C" in named else (1, *ordered)
    if 0 in ordered:
        raise NormfixError("NF106", f"the image has no pixels: its shape is {ordered}.", where=where)
    if ordered[0] != channels:
        raise NormfixError(
            "NF106",
            f"the network takes {channels} channels, the image has {ordered[0]} ({named}). "
            "Give --axes if they are named wrongly, or select channels first.",
            where=where,
        )
    return named


def to_tensor(array: Array) -> Tensor:
    """Return (C, *space) as a tensor (1, C, *space) of the same dtype."""
    return torch.from_numpy(np.ascontiguousarray(array))[None]


def pixel_size_of(path: Path) -> dict[str, Any]:
    """Return what a TIFF says of its pixels' size, as `write_image` takes it; empty if it says nothing."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return {}
    import tifffile

    with tifffile.TiffFile(path) as file:
        tags, described = file.pages.first.tags, file.imagej_metadata or {}
        found: dict[str, Any] = {key: described[key] for key in ("spacing", "unit") if key in described}
        x, y, unit = (tags.get(name) for name in ("XResolution", "YResolution", "ResolutionUnit"))
        if x is not None and y is not None and (1, 1) != x.value != (0, 0):
            found["resolution"] = tuple(tag.value[0] / tag.value[1] for tag in (x, y))
            found["resolutionunit"] = 1 if unit is None else int(unit.value)
    return found


def write_image(path: Path, array: Array, pixel_size: Mapping[str, Any] | None = None) -> None:
    """Write (C, *space) as .npy or TIFF (single channels without the axis), whole or not at all.

    Args:
        path: must not exist.
        array: the image.
        pixel_size: what `pixel_size_of` found in the image it belongs to; a .npy cannot hold it.

    Raises:
        NormfixError: NF114 for another kind of file, one that exists, or a folder that cannot be written.
    """
    require_new_image(path)
    suffix = path.suffix.lower()
    draft = path.with_name(f".{path.stem}-draft{path.suffix}")
    try:
        if suffix == ".npy":
            np.save(draft, array)
        else:
            import tifffile

            axes = "ZYX"[-(array.ndim - 1) :]
            data, named = (array[0], axes) if array.shape[0] == 1 else (array, f"C{axes}")
            grey = "minisblack" if data.ndim > 1 else None  # else 3 or 4 channels would become RGB
            size = dict(pixel_size or {})
            described: dict[str, Any] = {key: size.pop(key) for key in ("spacing", "unit") if key in size}
            tifffile.imwrite(draft, data, photometric=grey, metadata={"axes": named, **described}, **size)
        draft.rename(path)
    except OSError as error:
        raise NormfixError("NF114", f"cannot write it: {error.strerror}.", where=str(path)) from error
    finally:
        draft.unlink(missing_ok=True)


def require_new_image(path: Path) -> None:
    """Refuse an output that `write_image` would refuse, before anything is computed for it.

    Raises:
        NormfixError: NF114 for another kind of file, one that exists, or a folder that does not.
    """
    if path.suffix.lower() not in (".npy", ".tif", ".tiff") or path.exists():
        raise NormfixError(
            "NF114", "give a new file ending in .npy or .tif; nothing is overwritten.", where=str(path)
        )
    if not path.parent.is_dir():
        raise NormfixError("NF114", f"there is no folder {path.parent} to write it to.", where=str(path))


def _read(path: Path) -> tuple[Array, str | None]:
    """Return the array and the axes that the file itself names, if any."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return np.load(path, allow_pickle=False), None
        if suffix in (".tif", ".tiff"):
            return _read_tiff(path)
        import imageio.v3 as iio

        array = np.asarray(iio.imread(path, plugin="pillow"))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        hint = "pip install imagecodecs" if "imagecodecs" in reason else "check that it exists and is whole"
        raise NormfixError(
            "NF101",
            f"cannot read this file as {', '.join(SUFFIXES)}: {reason}. Next: {hint}.",
            where=str(path),
        ) from error
    return array, "YX" if array.ndim == 2 else "YXC"


def _read_tiff(path: Path) -> tuple[Array, str | None]:
    import tifffile

    with _complaints("tifffile") as complaints, tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes = series.axes
        array = series.asarray()
    if complaints:  # such as a page beyond the end of a truncated file, which is left out of the stack
        raise ValueError(complaints[0])
    singles = [
        i
        for i, (letter, n) in enumerate(zip(axes, array.shape, strict=True))
        if n == 1 and letter not in "YX"
    ]
    array = np.squeeze(array, tuple(singles))
    axes = "".join(letter for i, letter in enumerate(axes) if i not in singles)
    said = not set(axes) & set("QI")  # unknown, or a plain sequence of pages
    return array, axes if said else None


@contextmanager
def _complaints(name: str) -> Iterator[list[str]]:
    """Collect the errors that a library only logs."""
    found: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _guess(shape: tuple[int, ...], ndim: int, channels: int, where: str) -> str:
    space = "ZYX"[-ndim:]
    if len(shape) == ndim and channels == 1:
        return space
    if len(shape) == ndim + 1 and (shape[0] == channels) != (shape[-1] == channels):
        return f"C{space}" if shape[0] == channels else f"{space}C"
    raise NormfixError(
        "NF106",
        f"the axes of an array of shape {shape} are not certain for a network with {channels} channels and "
        f"{ndim} spatial axes. Name them with --axes, such as C{space} or {space}C.",
        where=where,
    )
