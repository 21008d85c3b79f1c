"""The file an image is read from: whether it is still what it was when it was opened, and how to open it again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from normfix.errors import NormfixError

__all__ = ["Origin"]

_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")

Stamp = tuple[tuple[str, int, int], ...]
"""Names, sizes and times of change of files."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A file, or a folder in Zarr of which `array` is read, and its stamp when it was opened."""

    path: Path
    array: str
    seen: Stamp

    @classmethod
    def of(cls, path: Path, array: str = "") -> Origin:
        """Note what a file or the metadata of a Zarr array is like now."""
        return cls(path, array, _stamp(path, array))

    def require_unchanged(self) -> None:
        """Refuse to go on with a file that changed or is gone.

        A shortened file under a memory map would end the process, and a chunk that is gone reads as zeros.

        Raises:
            NormfixError: NF331.
        """
        now = _stamp(self.path, self.array)
        if now != self.seen:
            what = "changed" if now else "is gone"
            raise NormfixError(
                "NF331",
                f"the image {what} while it was read, so parts of it would be of another image. Put it back as it was, "
                "or start anew on the new one.",
                where=str(self.path),
            )

    def fingerprint(self) -> str:
        """Return what differs if the file does: path, size and time of change, of every file in a folder."""
        found = hashlib.sha256(str(self.path.resolve()).encode())
        files = sorted(p for p in self.path.rglob("*") if p.is_file()) if self.path.is_dir() else [self.path]
        for file in files:
            stat = file.stat()
            found.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return found.hexdigest()


def _stamp(path: Path, array: str) -> Stamp:
    files = [path]
    if path.is_dir():
        files = [folder / name for folder in dict.fromkeys((path, path / array)) for name in _METADATA]
    found = []
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            continue
        found.append((file.name, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
