"""A package is a folder, or a zip archive of one, with a description beside files: only what lies within it is read.

An archive is read by the one reader of archives and unpacked into a temporary folder as plain files; names that lead
out of a folder, through links too, and addresses are refused, and nothing is fetched.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfix.errors import NormfixError, printable
from normfix.storage.opening.archives import CHUNK, Archive, inventory, start_of
from normfix.storage.opening.request import unreadable

__all__ = [
    "PackageError",
    "array_of",
    "described_in",
    "inside",
    "leads_out",
    "require_digest",
    "sha256_of",
    "unpacked",
]

_DESCRIPTIONS = ("rdf.yaml", "bioimageio.yaml", "rdf.yml", "bioimageio.yml")
_NPY = b"\x93NUMPY"
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:")


class PackageError(NormfixError):
    """A package that is not what it says, or reaches out of itself (NF592)."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__("NF592", message, where=where)


def described_in(path: Path) -> str:
    """Return the name of a package's description: of a folder, a zip archive, or of the description itself; else ''."""
    if path.is_dir():
        names = {entry.name for entry in os.scandir(path)}
    elif path.name in _DESCRIPTIONS:
        return path.name
    else:
        names = set(inventory(path).names)
    return next((name for name in _DESCRIPTIONS if name in names), "")


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Give the folder of a package: its own, or a temporary one with the files of an archive.

    Raises:
        NormfixError: NF101 damaged, NF121 an archive that programs read differently, leads out, or grows too much.
    """
    if path.is_dir() or path.name in _DESCRIPTIONS:
        yield path if path.is_dir() else path.parent
        return
    with tempfile.TemporaryDirectory(prefix="normfix-package-") as temporary:
        folder = Path(temporary)
        with Archive(path, flat=True) as archive:
            for name in archive.names:
                target = folder.joinpath(*PurePosixPath(name).parts)
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("xb") as file:
                        file.writelines(archive.chunks(name))
                except OSError as error:
                    raise unreadable(path, error) from error
        yield _described_folder(folder)


def _described_folder(folder: Path) -> Path:
    """Return the folder with the description: the archive's own, or the one folder in it that people packed."""
    if described_in(folder):
        return folder
    inner = [entry for entry in folder.iterdir() if entry.is_dir() and described_in(entry)]
    return inner[0] if len(inner) == 1 else folder


def inside(folder: Path, name: Any, what: str) -> Path:
    """Return a file of a package by the name that its description gives it.

    Raises:
        PackageError: NF592 if it is an address, leads out of the folder, or is not there.
    """
    if not isinstance(name, str) or not name:
        raise PackageError(f"{what} is not named.", str(folder))
    path = PurePosixPath(name)
    if _ADDRESS.match(name):
        raise PackageError(
            f"{what} is an address ({name[:120]}), and nothing is fetched. Give the whole package, as "
            "bioimage.io's download or bioimageio.core's save_bioimageio_package makes it.",
            str(folder),
        )
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise PackageError(f"{what} lies outside of the package ({name[:120]}).", str(folder))
    found = folder.joinpath(*path.parts)
    try:
        if leads_out(found, folder):
            raise PackageError(f"{what} is a link that leads out of the package ({name[:120]}).", str(folder))
        there = found.is_file()
    except (OSError, ValueError):  # no system has a file of such a name
        there = False
    if not there:
        raise PackageError(f"{what} is missing ({printable(name[:120])}).", str(folder))
    return found


def leads_out(path: Path, folder: Path) -> bool:
    """Tell whether a file of a folder is a link to another place, or lies in one.

    In the hub's cache the files of a snapshot are links into `blobs` beside `snapshots`, and lead nowhere else.
    """
    place, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    return not place.is_relative_to(home) and place.parent != blobs


def sha256_of(path: Path) -> str:
    """Return the checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def require_digest(path: Path, stated: Any, what: str) -> None:
    """Refuse a file whose checksum is not the stated one; None states nothing.

    Raises:
        PackageError: NF592.
    """
    if stated is None:
        return
    actual = sha256_of(path)
    if str(stated).lower() != actual:
        raise PackageError(
            f"{what} has the sha256 {actual}, and the description says {str(stated)[:64]}. It was changed or cut "
            "short: fetch the package again.",
            str(path),
        )


def array_of(path: Path) -> NDArray[Any]:
    """Return a test tensor (.npy) without running pickles, mapped so that it takes no more than the file has.

    Raises:
        PackageError: NF592.
    """
    if start_of(path, len(_NPY)) != _NPY:
        raise PackageError("this test tensor is no .npy file.", str(path))
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise PackageError(f"cannot read this test tensor: {reason}.", str(path)) from error
    if array.dtype.kind not in "biuf":
        raise PackageError("this test tensor is no array of real numbers (.npy).", str(path))
    return array
