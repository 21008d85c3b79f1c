"""Image files in and out: one small module per format, each importing its library when a file of it is opened.

To add a format, write `open_x(path) -> Opened` and, if it can be written by window, `create`, and name it below.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normfix.errors import NormfixError
from normfix.images.endings import SUFFIXES, is_zarr, suffix_of
from normfix.images.formats.npy import open_npy
from normfix.images.formats.opened import ArrayLike, Choice, Opened
from normfix.images.formats.placement import Placement
from normfix.images.formats.zarr_layout import require_zarr

__all__ = [
    "ArrayLike",
    "Choice",
    "Opened",
    "Placement",
    "create",
    "finish",
    "open_file",
    "unreadable",
    "why",
]


def open_file(path: Path, choice: Choice | None = None) -> Opened:
    """Open an image file or folder; what of it is read is up to the caller.

    Args:
        path: .tif, .png, .jpg, .npy, .nii, .nii.gz or a folder in Zarr.
        choice: which series and level, where a file has several.

    Raises:
        NormfixError: NF101 if it cannot be opened or has no such level, NF141 if it holds several images and none was
            chosen, or not the one that was, NF143 if the library that reads it is missing.
    """
    choice, suffix = choice or Choice(), suffix_of(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        # Opening a pipe waits for ever, and reading a device never ends.
        raise unreadable(path, ValueError("it is a pipe, a device or the like, and no file"))
    if suffix in (".nii", ".nii.gz", ".npy", ".png", ".jpg", ".jpeg"):
        choice.require_single(str(path))
    try:
        match suffix:
            case ".tif" | ".tiff":
                from normfix.images.formats.tiff import open_tiff

                return open_tiff(path, choice)
            case ".nii" | ".nii.gz":
                from normfix.images.formats.nifti import open_nifti

                return open_nifti(path)
            case ".npy":
                return open_npy(path)
            case ".png":
                from normfix.images.formats.png import open_png

                return open_png(path)
            case ".jpg" | ".jpeg":
                from normfix.images.formats.jpeg import open_jpeg

                return open_jpeg(path)
        if is_zarr(path):
            require_zarr(str(path))
            from normfix.images.formats.ome_zarr import open_zarr

            return open_zarr(path, choice)
    except NormfixError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error
    raise NormfixError("NF101", f"it is no {', '.join(SUFFIXES)} or Zarr image.", where=str(path))


def unreadable(path: Path, error: Exception) -> NormfixError:
    """Return the error (NF101) for a file that a library does not read."""
    return NormfixError(
        "NF101",
        f"cannot read this file as {', '.join(SUFFIXES)} or Zarr: {why(error)}.",
        where=str(path),
    )


def why(error: Exception) -> str:
    """Return in one line why a library does not read a file, and what to do next."""
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    hint = "pip install imagecodecs" if "imagecodecs" in reason else "check that it exists and is whole"
    return f"{reason}. Next: {hint}"


def create(
    path: Path,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    axes: str,
    placement: Placement,
    blocks: Sequence[int] | None = None,
    *,
    shown: tuple[float, float] | None = None,
) -> Any:
    """Make a file that takes windows of an array by assignment; `finish` makes it what its ending says.

    Args:
        path: ends in one of OUTPUTS.
        shape: of the array.
        dtype: of the array.
        axes: a letter per axis.
        placement: of the pixels; each format holds what it can.
        blocks: extents of the windows that will be written, per axis of the array.
        shown: darkest and brightest value, for a TIFF that Fiji shows by itself.
    """
    match suffix_of(path):
        case ".zarr":
            require_zarr(str(path))
            from normfix.images.formats.ome_zarr import create as create_zarr

            return create_zarr(path, shape, dtype, axes, placement, blocks or shape)
        case ".npy":
            return np.lib.format.open_memmap(path, "w+", dtype, tuple(shape))
        case ".nii" | ".nii.gz":
            from normfix.images.formats.nifti import create as create_nifti

            return create_nifti(path, shape, dtype, axes, placement)
    from normfix.images.formats.tiff import create as create_tiff

    return create_tiff(path, shape, dtype, axes, placement, shown=shown)


def finish(path: Path) -> None:
    """Compress a file that was made by `create` and is written whole, where its ending says so."""
    if suffix_of(path) == ".nii.gz":
        from normfix.images.formats.nifti import compress

        compress(path)
