"""Names of images: which files a name means, and what an image can be written to; told without torch."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from normfix.errors import NormfixError
from normfix.images.endings import OUTPUTS, SUFFIXES, is_zarr, suffix_of
from normfix.networks.naming import file_hint

__all__ = ["find_images", "repeated", "require_image_name"]


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Return the image files that files, folders and globs name, sorted within each.

    Raises:
        NormfixError: NF101 if one of them names nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        try:
            # an empty name would be the working directory
            matched = _matched(pattern) if str(pattern) else []
        except OSError:  # no file can have such a name
            matched = []
        if not matched:
            raise NormfixError("NF101", _nothing(pattern), where=pattern)
        found += matched
    return found


def repeated(paths: Sequence[Path]) -> dict[Path, int]:
    """Return the images that are named several times, as by a pattern and by their own name, and how often each is."""
    counts = Counter(path.resolve() for path in paths)
    return {path: counts[path.resolve()] for path in dict.fromkeys(paths) if counts[path.resolve()] > 1}


def require_image_name(path: Path) -> None:
    """Refuse what no image can be written to.

    Raises:
        NormfixError: NF114 for another kind of file, or a folder that does not exist.
    """
    if suffix_of(path) not in OUTPUTS:
        raise NormfixError(
            "NF114",
            "give a new name ending in .npy, .tif, .zarr, .nii or .nii.gz; nothing is overwritten.",
            where=str(path),
        )
    if not path.parent.is_dir():
        raise NormfixError("NF114", f"there is no folder {path.parent} to write it to.", where=str(path))


def _matched(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir() and not is_zarr(path):
        return sorted(p for p in path.iterdir() if suffix_of(p) in SUFFIXES or is_zarr(p))
    if path.exists():
        return [path]
    return sorted(Path(p) for p in glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute globs


def _nothing(pattern: str) -> str:
    """Say that a name means no image, and which name it may be a slip of."""
    if not str(pattern):
        return "its name is empty. Give a file, a folder or a pattern; the working directory is '.'."
    path = Path(pattern)
    try:
        if path.is_dir():
            return f"the folder holds no image: no {', '.join(SUFFIXES)} file, and no folder in Zarr."
    except OSError:  # no folder can have such a name
        pass
    return f"there is no such image file.{file_hint(path)}"
