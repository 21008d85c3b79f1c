"""One array of a Zarr folder as a store that Zarr reads: plain chunks, from regular files of that folder alone.

Zarr is shown metadata without compression and without shards, and asks for chunks; here their files are found, read
within bounds and decompressed (normfix.images.formats.codecs). So a file decides nothing about which code
runs, how much memory a chunk takes, or what else is opened. What the files were when the image was opened is kept: a
chunk that changed or vanished since is never taken for one of the same image.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store

from normfix.errors import NormfixError
from normfix.images.formats.opened import ChangedError
from normfix.images.formats.zarr_layout import Layout, layout_of, require_inside

__all__ = ["Chunks", "open_array"]

_METADATA = ("zarr.json", ".zarray")


def open_array(folder: Path, root: Path) -> tuple[Any, Chunks]:
    """Open the array in a folder of an image for reading, and return it with its store; see `layout_of` for errors."""
    layout = layout_of(folder, root)
    store = Chunks(folder, root, layout)
    return zarr.open_array(store, mode="r", zarr_format=layout.version), store


class Chunks(Store):
    """A store that gives the metadata of one array and its plain chunks; it writes nothing."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False
    supports_partial_writes = False

    def __init__(self, folder: Path, root: Path, layout: Layout) -> None:
        super().__init__(read_only=True)
        self._folder, self._root, self._layout = folder, root, layout
        self._safe: set[Path] = set()
        self._index: dict[str, np.ndarray[Any, Any]] = {}
        self.seen = _listing(folder, root, layout)

    @property
    def missing(self) -> tuple[int, int]:
        """Return how many chunk files are missing, and how many a whole array has."""
        return max(0, self._layout.files - len(self.seen)), self._layout.files

    @property
    def listing(self) -> str:
        """Return a digest of names, sizes and times of the chunk files when the array was opened."""
        return hashlib.sha256(repr(sorted(self.seen.items())).encode()).hexdigest()

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return metadata or a plain chunk; see zarr.abc.store.Store."""
        found = await asyncio.to_thread(self._value, key)
        if found is None:
            return None
        if byte_range is not None:
            start = getattr(byte_range, "start", getattr(byte_range, "offset", 0))
            found = found[start : getattr(byte_range, "end", None)]
        return prototype.buffer.from_bytes(found)

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]) -> list[Any]:
        """Return several values; see zarr.abc.store.Store."""
        return [await self.get(key, prototype, given) for key, given in key_ranges]

    async def exists(self, key: str) -> bool:
        """Tell whether there is a value; see zarr.abc.store.Store."""
        return await asyncio.to_thread(self._value, key) is not None

    async def set(self, key: str, value: Any) -> None:
        """Refuse: images are only read."""
        raise NotImplementedError

    async def set_partial_values(self, key_start_values: Iterable[tuple[str, int, bytes]]) -> None:
        """Refuse: images are only read. Releases before zarr 3.1 ask for it."""
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        """Refuse: images are only read."""
        raise NotImplementedError

    async def list(self) -> AsyncIterator[str]:
        """Yield the metadata's name alone; see zarr.abc.store.Store."""
        yield "zarr.json" if self._layout.version == 3 else ".zarray"

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield nothing; see zarr.abc.store.Store."""
        nothing: tuple[str, ...] = ()
        for key in nothing:
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield nothing; see zarr.abc.store.Store."""
        nothing: tuple[str, ...] = ()
        for key in nothing:
            yield key

    def __eq__(self, other: object) -> bool:
        return self is other

    def _value(self, key: str) -> bytes | None:
        if key in _METADATA:
            expected = "zarr.json" if self._layout.version == 3 else ".zarray"
            return json.dumps(self._layout.shown).encode() if key == expected else None
        numbers = key.removeprefix("c/").replace(".", "/").split("/")
        if not all(number.isdecimal() for number in numbers):
            return None
        place = [int(number) for number in numbers][: len(self._layout.shape)]
        layout = self._layout
        data = self._read(layout.file(place)) if layout.index is None else self._inner(place)
        return None if data is None else layout.unpacking(data, key)

    def _inner(self, place: Sequence[int]) -> bytes | None:
        """Return the stored bytes of a chunk inside of its shard."""
        ratio = self._layout.ratio
        name = self._layout.file([p // r for p, r in zip(place, ratio, strict=True)])
        index = self._index_of(name)
        if index is None:
            return None
        start, length = (int(n) for n in index[tuple(p % r for p, r in zip(place, ratio, strict=True))])
        if (start, length) == (_NONE, _NONE):
            return None
        if length > self._layout.unpacking.most:
            raise ValueError("a chunk is longer than its array allows")
        found = self._read(name, start, length)
        if found is None or len(found) != length:
            raise ValueError("a shard is cut short")
        return found

    def _index_of(self, name: str) -> np.ndarray[Any, Any] | None:
        """Return (offset, length) of each chunk of a shard."""
        known = self._index.get(name)
        if known is not None:
            self._stamp(name)
            return known
        layout = self._layout
        assert layout.index is not None
        length = layout.index.size + sum(codec.added or 0 for codec in layout.index.codecs)
        data = self._read(name, -length if layout.index_last else 0, length)
        if data is None:
            return None
        if len(data) != length:
            raise ValueError("a shard is cut short")
        index = np.frombuffer(layout.index(data, name), "<u8").reshape(*layout.ratio, 2)
        while len(self._index) > _INDICES:
            self._index.pop(next(iter(self._index)))
        self._index[name] = index
        return index

    def _stamp(self, name: str) -> None:
        """Refuse a file that is not what it was when the array was opened."""
        now, then = _stamp(self._folder / name), self.seen.get(name)
        if now != then:
            raise ChangedError(name, written=(now or ())[:2] != (then or ())[:2])

    def _read(self, name: str, start: int = 0, length: int | None = None) -> bytes | None:
        """Return a file's bytes, or None where there was and is none."""
        path = self._folder / name
        self._stamp(name)
        if name not in self.seen:
            return None
        self._require_safe(path)
        most = self._layout.unpacking.most if length is None else length
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if length is None and status.st_size > most:
                raise NormfixError(
                    "NF121",
                    f"its chunk {name} has {status.st_size:,} bytes, and a chunk holds "
                    f"{self._layout.unpacking.size:,}. It is damaged or built to harm, and was not read.",
                    where=str(self._root),
                )
            file.seek(max(0, status.st_size + start) if start < 0 else start)
            found = file.read(most)
        self._stamp(name)
        return found

    def _require_safe(self, path: Path) -> None:
        """Refuse a chunk that is no file of the image's folder."""
        if path.is_symlink() or path.parent not in self._safe:
            require_inside(path, self._root)
            self._safe.add(path.parent)
        if not path.is_file():
            raise NormfixError("NF121", f"its chunk {path.name} is no file.", where=str(self._root))


_NONE = 2**64 - 1
"""Stands for a chunk that a shard does not hold, as offset and length."""

_INDICES = 64
"""Indices of shards that are kept."""


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _require_new(directory: str, visited: set[str], root: Path) -> None:
    """Refuse a folder of chunks a second time: links in a circle would be looked through without end."""
    real = os.path.realpath(directory)
    if real in visited:
        raise NormfixError(
            "NF121",
            f"two of its folders of chunks are one, by a link to {real}. Copy the image with what its links lead to "
            "(cp -rL).",
            where=str(root),
        )
    visited.add(real)


def _listing(folder: Path, root: Path, layout: Layout) -> dict[str, tuple[int, int, int] | None]:
    """Return the stamps of all chunk files that are there."""
    grid = [-(-n // c) for n, c in zip(layout.shape, layout.outer, strict=True)]
    head = [layout.prefix] if layout.prefix else []
    found: dict[str, tuple[int, int, int] | None] = {}
    pending: list[tuple[Path, list[str]]] = [(folder, [])]
    visited = {os.path.realpath(folder)}
    while pending:
        directory, parts = pending.pop()
        try:
            entries = list(os.scandir(directory))
        except OSError:
            continue
        for entry in entries:
            names = [*parts, *([entry.name] if layout.separator == "/" else entry.name.split("."))]
            numbers = names[len(head) :]
            if names[: len(head)] != head[: len(names)] or not all(map(_is_number, numbers)):
                continue
            if len(numbers) < len(grid) and layout.separator == "/":
                if len(names) < len(head) + len(grid) and entry.is_dir():
                    _require_new(entry.path, visited, root)
                    pending.append((Path(entry.path), names))
            elif len(numbers) == len(grid) and all(int(n) < m for n, m in zip(numbers, grid, strict=True)):
                found[layout.separator.join(names)] = _stamp(Path(entry.path))
    return found


def _is_number(text: str) -> bool:
    """Tell whether a chunk's file can be numbered so: 01 is another file than 1, and no chunk."""
    return text.isdecimal() and text == str(int(text[:20]))
