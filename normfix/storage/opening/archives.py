"""Read a zip archive in one way, and hand on only what was read.

A zip file says where its members are in two places, and programs disagree about which of them counts: what one
checks, another does not load. So there is one reader here. It takes the layout that torch.save, torch.export.save
and zip tools write and no other: members from the first byte on, one behind the other without gaps, one directory
behind them that agrees with every member's own header, and the end. torch then reads an archive that is written
anew from members that this reader has read (`Archive.rewritten`), never the file itself. Tensors are not copied
for that: the new archive is a view, of which headers and small members lie in memory.

torch.load ignores checksums, and an archive of a few kilobytes may claim terabytes. Neither torch.save nor
torch.export compresses, so what unpacks to many times its size was not written by them.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, cast

from normfix.errors import NormfixError
from normfix.storage.opening.request import unreadable
from normfix.storage.opening.zips import DamagedError, HarmfulError, Member, directory, layout

__all__ = [
    "CHUNK",
    "Archive",
    "Inventory",
    "View",
    "inventory",
    "is_archive",
    "start_of",
    "without_descriptor",
]

CHUNK = 1 << 20
_UNPACKED_IN_PARTS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def start_of(path: Path, size: int = 64) -> bytes:
    """Return the first bytes of a file; none if it cannot be read, or is a pipe or a device, which may never answer."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def is_archive(path: Path) -> bool:
    """Tell whether a file begins as a zip archive does."""
    return start_of(path, 2) == b"PK"


@dataclass(frozen=True, slots=True)
class Inventory:
    """What an archive holds, to recognise its kind by: names without the common top folder, the pickle's start."""

    names: frozenset[str] = frozenset()
    pickle: bytes = b""


def inventory(path: Path) -> Inventory:
    """Return what a file holds; nothing if it is no archive.

    Each format asks for it, and a directory of 60,000 members takes a second to read, so the last one is kept as
    long as the file is the same. Nothing is read by these names: `Archive` reads, and is stricter.
    """
    if not is_archive(path):
        return Inventory()
    try:
        state = path.stat()
        return _inventory(str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    except Exception:  # noqa: BLE001 - zipfile raises half a dozen kinds for damaged archives
        return Inventory()


@lru_cache(maxsize=1)
def _inventory(path: str, *_state: int) -> Inventory:
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2] or name: name for name in archive.namelist()}
        start = b""
        # zipfile unpacks all of what is compressed otherwise at once: two kilobytes of bzip2 hold two gigabytes
        if "data.pkl" in names and archive.getinfo(names["data.pkl"]).compress_type in _UNPACKED_IN_PARTS:
            with suppress(Exception), archive.open(names["data.pkl"]) as file:
                start = file.read(CHUNK)
        return Inventory(frozenset(names), start)


class Archive:
    """A zip archive of one top folder, opened for reading; a context manager.

    Args:
        path: of the file.
        flat: it has no top folder, and names are taken whole.

    Raises:
        NormfixError: NF101 damaged, NF121 of a layout that programs read differently, or that unpacks to far more
            than it is.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        ...     torch.save({"a": torch.ones(2)}, file.name)
        ...     with Archive(Path(file.name)) as archive:
        ...         names = archive.names
        >>> "data.pkl" in names
        True
    """

    def __init__(self, path: Path, *, flat: bool = False) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            with self._refusing():
                self._members = directory(self._file, path.stat().st_size, flat=flat)
                self._check()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Return the members' names below the top folder, in their order in the file."""
        return tuple(self._members)

    def size(self, name: str) -> int:
        """Return a member's length in bytes, unpacked."""
        return self._members[name].size

    def read(self, name: str, largest: int) -> bytes:
        """Return a member's content.

        Raises:
            KeyError: if there is none of this name.
            NormfixError: NF121 if it is longer than `largest`.
        """
        member = self._members[name]
        if member.size > largest:
            raise _harmful(self._path, f"its {name[:80]} is longer than {largest >> 20} MB")
        with self._refusing():
            return b"".join(self._content(member))

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield a member's content in parts; raises as `read`, but for its length, which the directory bounds."""
        with self._refusing():
            yield from self._content(self._members[name])

    def rewritten(self, names: list[str], replaced: Mapping[str, bytes]) -> IO[bytes]:
        """Return a new archive of the named members and of these contents, for torch to read.

        Tensors stay in this archive's file, so it must stay open as long as the new one is read.
        """
        parts: dict[str, tuple[IO[bytes], int, int, int]] = {
            name: (io.BytesIO(content), 0, len(content), zlib.crc32(content))
            for name, content in replaced.items()
        }
        for name in names:
            member = self._members[name]
            if member.compressed:
                file: IO[bytes] = io.BytesIO(self.read(name, member.size))
                parts[name] = (file, 0, member.size, member.crc)
            else:
                parts[name] = (self._file, member.start, member.size, member.crc)
        return cast("IO[bytes]", View(layout(parts)))

    def _check(self) -> None:
        """Read every member once, and compare its checksum."""
        for member in self._members.values():
            for _ in self._content(member):
                pass

    def _content(self, member: Member) -> Iterator[bytes]:
        """Yield a member's content in chunks; its length and checksum are checked at the end."""
        crc = length = 0
        for chunk in self._unpacked(member):
            crc, length = zlib.crc32(chunk, crc), length + len(chunk)
            yield chunk
        if length != member.size or crc != member.crc:
            raise DamagedError(f"the checksum of {member.name[:80]} is wrong")

    def _unpacked(self, member: Member) -> Iterator[bytes]:
        self._file.seek(member.start)
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS) if member.compressed else None
        left, room = member.packed, member.size
        while left:
            data = self._file.read(min(CHUNK, left))
            if not data:
                raise DamagedError("it ends before its members do")
            left -= len(data)
            while unpacker is not None and data:
                chunk = unpacker.decompress(data, min(CHUNK, room + 1))
                room -= len(chunk)
                if room < 0:
                    raise HarmfulError(f"its {member.name[:80]} unpacks to more than it says")
                yield chunk
                data = unpacker.unconsumed_tail
            if unpacker is None:
                yield data
        if unpacker is not None and (not unpacker.eof or unpacker.unused_data):
            raise HarmfulError(f"the compressed data of {member.name[:80]} end elsewhere than it says")

    def _refusing(self) -> _Refusing:
        return _Refusing(self._path)


class View(io.RawIOBase):
    """A file made of parts of others, which are not copied together.

    It has no descriptor, so that what reads it cannot read anything else.

    Args:
        parts: file, first byte and length of each, in order.
    """

    def __init__(self, parts: list[tuple[IO[bytes], int, int]]) -> None:
        super().__init__()
        self._parts = [part for part in parts if part[2]]
        self._starts = [0]
        for _, _, length in self._parts:
            self._starts.append(self._starts[-1] + length)
        self._place = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, as files do."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._starts[-1]}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: object) -> int:
        """Fill a buffer as far as there is something to read; return how many bytes that were."""
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        filled, place, end = 0, self._place, self._starts[-1]
        while filled < len(target) and place < end:
            number = bisect_right(self._starts, place) - 1
            file, first, length = self._parts[number]
            within = place - self._starts[number]
            file.seek(first + within)
            count = file.readinto(target[filled : filled + length - within])  # type: ignore[attr-defined]
            if not count:
                break
            filled += count
            place += count
        self._place = place
        return filled


def without_descriptor(file: IO[bytes], length: int) -> IO[bytes]:
    """Return a file as one that can be read and nothing else."""
    return cast("IO[bytes]", View([(file, 0, length)]))


class _Refusing:
    """Give what the reader found the file's name and a code."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HarmfulError):
            raise _harmful(self._path, str(error)) from error
        if isinstance(error, DamagedError | OSError | struct.error | zlib.error | UnicodeDecodeError):
            raise unreadable(self._path, str(error)) from error


def _harmful(path: Path, problem: str) -> NormfixError:
    return NormfixError(
        "NF121", f"{problem}. It is not opened; get the file from its origin.", where=str(path)
    )
