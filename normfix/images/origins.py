"""The file an image is read from: whether it is still what it was when it was opened, and how to open it again.

Times tell that a file may have changed, contents whether it did (normfix.images.contents).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Origin", "Stamp"]

_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")

Stamp = tuple[tuple[str, int, int, int], ...]
"""Names, sizes and times of change of files: that of the contents, which any program can set, and that of the file
itself, which none can."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A file, or a folder in Zarr of which `array` is read, and its stamp when it was opened.

    `listing` is a digest of the stamps of a Zarr array's chunks.
    """

    path: Path
    array: str
    seen: Stamp
    listing: str = ""

    @classmethod
    def of(cls, path: Path, array: str = "", listing: str = "") -> Origin:
        """Note what a file or the metadata of a Zarr array is like now."""
        origin = cls(path, array, (), listing)
        return cls(path, array, origin.now(), listing)

    def now(self) -> Stamp:
        """Return its stamp; of what is gone, nothing."""
        files = [self.path]
        if self.path.is_dir():
            folders = dict.fromkeys((self.path, self.path / self.array))
            files = [folder / name for folder in folders for name in _METADATA]
        found = []
        for file in files:
            try:
                stat = file.stat()
            except OSError:
                continue
            found.append((file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        return tuple(found)
