"""Look at an archive before anything reads it: its members, their names, sizes and checksums.

torch.load ignores checksums, and an archive of a few kilobytes may claim terabytes. Neither torch.save nor
torch.export compresses, so what unpacks to many times its size was not written by them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

from normfix.errors import NormfixError
from normfix.loading.request import unreadable

__all__ = ["CHUNK", "is_archive", "members", "opened", "require_sound", "start_of"]

CHUNK = 1 << 20
_GROWTH = 8
"""An archive may unpack to this many times its size; torch writes members as they are (1)."""


def start_of(path: Path, size: int = 64) -> bytes:
    """Return the first bytes of a file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def is_archive(path: Path) -> bool:
    """Tell whether a file begins as a zip archive does."""
    return start_of(path, 2) == b"PK"


def members(path: Path) -> frozenset[str]:
    """Return the names of an archive's members without the common top folder; none if it is no archive."""
    if not is_archive(path):
        return frozenset()
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(name.partition("/")[2] for name in archive.namelist())
    except Exception:  # noqa: BLE001 - zipfile raises half a dozen kinds for damaged archives
        return frozenset()


def opened(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Open a member by its name below the top folder.

    Raises:
        KeyError: if there is none.
    """
    for full in archive.namelist():
        if full.partition("/")[2] == name:
            return archive.open(full)
    raise KeyError(name)


def require_sound(path: Path) -> None:
    """Refuse an archive that is damaged, leads outside itself, or unpacks to far more than it is.

    Raises:
        NormfixError: NF101 damaged, NF121 built to harm.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            problem = _harm(archive.infolist(), path.stat().st_size)
            broken = None if problem else archive.testzip()
    except Exception as error:  # zipfile raises half a dozen kinds for damaged archives
        raise unreadable(path, error) from error
    if problem:
        raise NormfixError(
            "NF121", f"{problem}. It is not opened; get the file from its origin.", where=str(path)
        )
    if broken:
        raise unreadable(path, f"the checksum of {broken[:80]} is wrong")


def _harm(infos: list[zipfile.ZipInfo], size: int) -> str:
    """Say what no archive of torch's has, or nothing."""
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        return "two members of the archive have one name, so programs disagree about what it holds"
    outside = [n for n in names if n.startswith(("/", "\\")) or ".." in n.replace("\\", "/").split("/")]
    if outside:
        return f"a member of the archive leads outside of it ({outside[0][:80]!r})"
    if any(info.flag_bits & 1 for info in infos):
        return "the archive is encrypted"
    total = sum(info.file_size for info in infos)
    if total > _GROWTH * size:
        return f"the archive of {size} bytes unpacks to {total}"
    return ""
