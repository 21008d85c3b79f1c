"""Endings of image files, read and written; known without NumPy, so that wrong names are told at once."""

from __future__ import annotations

from pathlib import Path

__all__ = ["OUTPUTS", "SUFFIXES", "is_zarr", "suffix_of"]

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".npy", ".nii", ".nii.gz")
"""Endings of the files that are read as images; folders in Zarr are too."""

OUTPUTS = (".npy", ".tif", ".tiff", ".zarr", ".nii", ".nii.gz")
"""Endings of the files that are written."""


def suffix_of(path: Path) -> str:
    """Return the ending that tells the format, in small letters."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is a Zarr array or group."""
    return any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray"))
