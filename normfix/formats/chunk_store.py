"""One array of a Zarr folder as a store that Zarr reads: plain chunks, from regular files of that folder alone.

Zarr is shown metadata without compression and without shards, and asks for chunks; here their files are found, read
within bounds and decompressed (normfix.formats.codecs). So a file decides nothing about which code runs, how much
memory a chunk takes, or what else is opened. What the files were when the image was opened is kept: a chunk that
changed or vanished since is never taken for one of the same image.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import stat
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store

from normfix.errors import NormfixError
from normfix.formats.codecs import Codec, Unpacking, codec_of, is_filter
from normfix.formats.opened import Changed

__all__ = ["Chunks", "metadata_of", "open_array", "within"]

_JSON = 1 << 26
"""Bytes of metadata that are read."""

_CHUNK = 1 << 27
"""Bytes that a chunk may always have; a larger one has to be smaller than a few of its array."""

_METADATA = ("zarr.json", ".zarray")

Metadata = dict[str, Any]


def metadata_of(folder: Path, root: Path, name: str) -> Metadata | None:
    """Return what a JSON file of metadata says, or None where there is none.

    Raises:
        NormfixError: NF121 for one that leads out of the folder or is larger than metadata is; ValueError for what is
            no object.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    require_inside(path, root)
    if path.stat().st_size > _JSON:
        raise NormfixError(
            "NF121", f"its metadata is larger than {_JSON >> 20} MiB and was not read.", where=str(path)
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no metadata")
    return found


def within(root: Path, part: object) -> Path:
    """Return the folder of an array inside of an image.

    Raises:
        NormfixError: NF121 for a path that leads out of it.
    """
    given = str(part)
    if given.startswith(("/", "\\")) or ".." in given.replace("\\", "/").split("/") or ":" in given:
        raise NormfixError("NF121", f"it names {given!r}, which leads out of it.", where=str(root))
    return root / given


def open_array(folder: Path, root: Path) -> tuple[Any, Chunks]:
    """Open an array for reading, and return it with its store.

    Args:
        folder: of the array.
        root: of the image, which nothing leads out of.

    Raises:
        NormfixError: NF106 for values that are no numbers, NF121 for sizes that no image has, NF150 for a codec
            or layout that is not read, and whatever Zarr says of metadata that is wrong.
    """
    third = metadata_of(folder, root, "zarr.json")
    second = None if third is not None else metadata_of(folder, root, ".zarray")
    if third is not None:
        layout = _third(third, str(root))
    elif second is not None:
        layout = _second(second, str(root))
    else:
        raise ValueError(f"there is no array {folder.name}")
    store = Chunks(folder, root, layout)
    return zarr.open_array(store, mode="r", zarr_format=layout.version), store


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """What of an array's metadata counts here: `shown` is the metadata that Zarr sees.

    `inner` are the extents of the chunks that Zarr asks for, `outer` those of the files, `ratio` inner chunks of a
    shard per axis where there are shards.
    """

    version: Any
    shown: Metadata
    shape: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    prefix: str
    separator: str
    unpacking: Unpacking
    index_last: bool = True
    index: Unpacking | None = None

    @property
    def ratio(self) -> tuple[int, ...]:
        return tuple(o // i for o, i in zip(self.outer, self.inner, strict=True))

    @property
    def files(self) -> int:
        """Return how many files a whole array has."""
        return math.prod(-(-n // c) for n, c in zip(self.shape, self.outer, strict=True))

    def file(self, place: Sequence[int]) -> str:
        """Return the name of the file of a chunk or shard."""
        numbers = self.separator.join(map(str, place))
        if not self.prefix:
            return numbers or "0"
        return f"{self.prefix}{self.separator}{numbers}" if numbers else self.prefix


class Chunks(Store):
    """A store that gives the metadata of one array and its plain chunks; it writes nothing."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False
    supports_partial_writes = False

    def __init__(self, folder: Path, root: Path, layout: _Layout) -> None:
        super().__init__(read_only=True)
        self._folder, self._root, self._layout = folder, root, layout
        self._safe: set[Path] = set()
        self._index: dict[str, np.ndarray[Any, Any]] = {}
        self.seen = _listing(folder, layout)

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

    async def delete(self, key: str) -> None:
        """Refuse: images are only read."""
        raise NotImplementedError

    async def list(self) -> AsyncIterator[str]:
        """Yield the metadata's name alone; see zarr.abc.store.Store."""
        yield "zarr.json" if self._layout.version == 3 else ".zarray"

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield nothing; see zarr.abc.store.Store."""
        return
        yield ""

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield nothing; see zarr.abc.store.Store."""
        return
        yield ""

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
        if layout.index is None:
            data = self._read(layout.file(place))
        else:
            data = self._inner(place)
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
            raise Changed(name, written=(now or ())[:2] != (then or ())[:2])

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
                    f"its chunk {name} has {status.st_size:,} bytes, and a chunk holds {self._layout.unpacking.size:,}. "
                    "It is damaged or built to harm, and was not read.",
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


def require_inside(path: Path, root: Path) -> None:
    """Refuse what is a link out of the image's folder, or no file.

    Raises:
        NormfixError: NF121.
    """
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise NormfixError(
            "NF121",
            f"its {path.relative_to(root)} is a link out of the image's folder and was not followed. Copy the image "
            "with what its links lead to (cp -rL).",
            where=str(root),
        )
    if not real.is_file():
        raise NormfixError("NF121", f"its {path.relative_to(root)} is no file.", where=str(root))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _listing(folder: Path, layout: _Layout) -> dict[str, tuple[int, int, int] | None]:
    """Return the stamps of all chunk files that are there."""
    grid = [-(-n // c) for n, c in zip(layout.shape, layout.outer, strict=True)]
    head = [layout.prefix] if layout.prefix else []
    found: dict[str, tuple[int, int, int] | None] = {}
    pending: list[tuple[Path, list[str]]] = [(folder, [])]
    while pending:
        directory, parts = pending.pop()
        try:
            entries = list(os.scandir(directory))
        except OSError:
            continue
        for entry in entries:
            names = [*parts, *([entry.name] if layout.separator == "/" else entry.name.split("."))]
            numbers = names[len(head) :]
            if names[: len(head)] != head[: len(names)] or not all(n.isdecimal() for n in numbers):
                continue
            if len(numbers) < len(grid) and layout.separator == "/":
                if len(names) < len(head) + len(grid):
                    pending.append((Path(entry.path), names))
            elif len(numbers) == len(grid) and all(int(n) < m for n, m in zip(numbers, grid, strict=True)):
                found[layout.separator.join(names)] = _stamp(Path(entry.path))
    return found


def _shape(values: Any, what: str, least: int) -> tuple[int, ...]:
    """Return extents, if they are."""
    if not isinstance(values, list) or not 0 < len(values) <= 32:
        raise ValueError(f"its {what} is no list of extents")
    if not all(type(n) is int and least <= n < 2**62 for n in values):
        raise ValueError(f"its {what} has an extent that is no number of pixels")
    return tuple(values)


def _dtype(name: Any, where: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(name) if isinstance(name, str) and len(name) < 32 else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in "biufc":
        shown = name if isinstance(name, str) else "records"
        raise NormfixError(
            "NF106", f"its values are {shown}; networks take real numbers. Convert it first.", where=where
        )
    return dtype


def _unpacking(
    shape: Sequence[int],
    chunk: Sequence[int],
    dtype: np.dtype[Any],
    codecs: tuple[Codec, ...],
    where: str,
    *,
    exact: bool,
) -> Unpacking:
    size, whole = (math.prod(extents) * dtype.itemsize for extents in (chunk, shape))
    if len(chunk) != len(shape):
        raise ValueError(f"its chunks have {len(chunk)} axes and it has {len(shape)}")
    if size > max(_CHUNK, 4 * whole):
        raise NormfixError(
            "NF121",
            f"its chunks of {'x'.join(map(str, chunk))} have {size:,} bytes, and all of the image has {whole:,}. It is "
            "damaged or built to harm.",
            where=where,
        )
    if not exact:  # what filters made of the numbers may have up to 16 bytes each
        size = math.prod(chunk) * 16
    return Unpacking(codecs, size, exact, where)


def _second(metadata: Metadata, where: str) -> _Layout:
    """Read the metadata of Zarr 2: filters in the order of encoding, then a compressor."""
    shape, chunk = _shape(metadata.get("shape"), "shape", 0), _shape(metadata.get("chunks"), "chunks", 1)
    dtype = _dtype(metadata.get("dtype"), where)
    entries = [*(metadata.get("filters") or ()), *filter(None, [metadata.get("compressor")])]
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError("its compressor or filters are no codecs")
    count = 0
    while count < len(entries) and is_filter(str(entries[count].get("id"))):
        count += 1
    codecs = tuple(codec_of(entry, where) for entry in entries[count:])
    separator = metadata.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise ValueError(f"its chunks are separated by {separator!r}")
    shown = {**metadata, "compressor": None, "filters": entries[:count] or None, "dimension_separator": "."}
    return _Layout(
        version=2,
        shown=shown,
        shape=shape,
        inner=chunk,
        outer=chunk,
        prefix="",
        separator=separator,
        unpacking=_unpacking(shape, chunk, dtype, codecs, where, exact=not count),
    )


@dataclass(frozen=True, slots=True)
class _Named:
    """A codec as Zarr 3 names it."""

    name: str
    settings: Metadata = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Any) -> _Named:
        if isinstance(entry, str):
            return cls(entry)
        settings = entry.get("configuration") or {} if isinstance(entry, Mapping) else None
        if not isinstance(settings, Mapping) or not isinstance(entry.get("name"), str):
            raise ValueError("its codecs are no codecs")
        return cls(entry["name"], dict(settings))

    @property
    def plain(self) -> str:
        """Return the name that numcodecs gives it."""
        return self.name.removeprefix("numcodecs.")


def _third(metadata: Metadata, where: str) -> _Layout:
    """Read the metadata of Zarr 3: codecs of arrays, one to bytes or shards, codecs of bytes."""
    shape = _shape(metadata.get("shape"), "shape", 0)
    dtype = _dtype(metadata.get("data_type"), where)
    grid, keys = _Named.of(metadata.get("chunk_grid")), _Named.of(metadata.get("chunk_key_encoding"))
    if grid.name != "regular" or metadata.get("storage_transformers"):
        raise _unread(f"its chunks lie in a grid {grid.name!r}", where)
    outer = _shape(grid.settings.get("chunk_shape"), "chunk_shape", 1)
    if keys.name not in ("default", "v2"):
        raise _unread(f"its chunks are named by {keys.name!r}", where)
    separator = keys.settings.get("separator", "/" if keys.name == "default" else ".")
    if separator not in (".", "/"):
        raise ValueError(f"its chunks are separated by {separator!r}")
    entries = metadata.get("codecs")
    codecs = [_Named.of(entry) for entry in entries] if isinstance(entries, list) else []
    inner, index, index_last = outer, None, True
    if codecs and codecs[0].name == "sharding_indexed":
        if len(codecs) > 1:
            raise _unread("its shards are compressed as a whole", where)
        settings = codecs[0].settings
        inner = _shape(settings.get("chunk_shape"), "chunk_shape", 1)
        if len(inner) != len(outer) or any(o % i for o, i in zip(outer, inner, strict=True)):
            raise ValueError("its shards are no whole number of chunks")
        codecs = [_Named.of(entry) for entry in settings.get("codecs") or ()]
        index_last = settings.get("index_location", "end") == "end"
        index = _index(settings, outer, inner, where)
    arrays, of_bytes = _split(codecs, where)
    shown = {
        **metadata,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(inner)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": one.name, "configuration": one.settings} for one in arrays],
    }
    return _Layout(
        version=3,
        shown=shown,
        shape=shape,
        inner=inner,
        outer=outer,
        prefix="c" if keys.name == "default" else "",
        separator=separator,
        unpacking=_unpacking(
            shape, inner, dtype, of_bytes, where, exact=not any(is_filter(one.plain) for one in arrays)
        ),
        index_last=index_last,
        index=index,
    )


def _split(codecs: Sequence[_Named], where: str) -> tuple[list[_Named], tuple[Codec, ...]]:
    """Return the codecs that Zarr runs, and those of bytes."""
    count = 0
    while count < len(codecs) and (codecs[count].name == "transpose" or is_filter(codecs[count].plain)):
        count += 1
    if count == len(codecs) or codecs[count].name not in ("bytes", "endian"):
        name = codecs[count].name if count < len(codecs) else "nothing"
        raise _unread(f"its values become bytes by {name!r}", where)
    of_bytes = tuple(codec_of({"id": one.plain, **one.settings}, where) for one in codecs[count + 1 :])
    return list(codecs[: count + 1]), of_bytes


def _index(settings: Metadata, outer: Sequence[int], inner: Sequence[int], where: str) -> Unpacking:
    """Return how the index of a shard is read: plain, or with a checksum after it."""
    entries = settings.get("index_codecs") or ()
    arrays, of_bytes = _split([_Named.of(entry) for entry in entries], where)
    little = arrays[-1].settings.get("endian", "little") == "little"
    if len(arrays) > 1 or not little or any(codec.added is None for codec in of_bytes):
        raise _unread("the index of its shards is compressed", where)
    size = 16 * math.prod(o // i for o, i in zip(outer, inner, strict=True))
    if size > _CHUNK:
        raise NormfixError(
            "NF121", f"the index of a shard of it has {size:,} bytes. It is damaged or built to harm.", where=where
        )
    return Unpacking(of_bytes, size, True, where)


def _unread(what: str, where: str) -> NormfixError:
    return NormfixError(
        "NF150",
        f"{what}, which is not read. Write the image again with chunks of one size, compressed by zstd or blosc.",
        where=where,
    )
