"""What the metadata of a Zarr array says of its chunks: extents, names of files, codecs, shards; checked.

Zarr 2 lists filters and a compressor, Zarr 3 codecs, with chunks inside of shards as one of them. Both become a Layout,
with the metadata that Zarr itself is shown: plain chunks without shards. What is not known is refused by name.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from normfix.errors import NormfixError
from normfix.images.formats.codecs import Codec, Unpacking, codec_of, is_filter
from normfix.records.encoding import once

__all__ = ["Layout", "layout_of", "metadata_of", "require_inside", "require_zarr", "within"]

_JSON = 1 << 24
"""Bytes of metadata that are read."""

_FEW, _SPARSE = 100_000, 8
"""Lists and objects that metadata may always hold, and characters for each one more."""

_CHUNK = 1 << 27
"""Bytes that a chunk may always have; a larger one has to be smaller than a few of its array."""

Metadata = dict[str, Any]


def require_zarr(where: str, what: str = "Zarr is read and written") -> None:
    """Refuse what needs zarr where that is not installed.

    Args:
        where: named in the error.
        what: needs it, the beginning of a sentence.

    Raises:
        NormfixError: NF143.
    """
    try:
        importlib.import_module("zarr")
    except ImportError as error:
        raise NormfixError(
            "NF143",
            f'{what} with zarr 3: pip install "normfix[stream]" (Python 3.11 or newer).',
            where=where,
        ) from error


def layout_of(folder: Path, root: Path) -> Layout:
    """Return the layout of the array in a folder.

    Args:
        folder: of the array.
        root: of the image, which nothing leads out of.

    Raises:
        NormfixError: NF106 for values that are no numbers, NF121 for sizes that no image has, NF150 for a codec
            or layout that is not read; ValueError for metadata that is wrong.
    """
    third = metadata_of(folder, root, "zarr.json")
    if third is not None:
        return _third(third, str(root))
    second = metadata_of(folder, root, ".zarray")
    if second is None:
        raise ValueError(f"there is no array {folder.name}")
    return _second(second, str(root))


def metadata_of(folder: Path, root: Path, name: str) -> Metadata | None:
    """Return what a JSON file of metadata says, or None where there is none.

    Raises:
        NormfixError: NF121 for one that leads out of the folder or is larger than metadata is; ValueError for what is
            no object, or names something twice.
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
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > _FEW + len(text) // _SPARSE:
            raise NormfixError(
                "NF121", "its metadata holds more lists and objects than metadata does.", where=str(path)
            )
        found = json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    if not isinstance(found, dict):
        raise TypeError(f"{name} holds no metadata")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
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
        """Return how many chunks a file has per axis."""
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


_DTYPES = ("dtype", "astype", "encode_dtype", "decode_dtype")
"""Settings of a filter that name a type of values."""


def _require_numbers(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a filter that makes of numbers what is none, such as texts of a million characters each.

    Raises:
        NormfixError: NF106.
    """
    for name in _DTYPES:
        if settings.get(name) is not None:
            _dtype(settings[name], where)


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


def _second(metadata: Metadata, where: str) -> Layout:
    """Read the metadata of Zarr 2: filters in the order of encoding, then a compressor."""
    shape, chunk = _shape(metadata.get("shape"), "shape", 0), _shape(metadata.get("chunks"), "chunks", 1)
    dtype = _dtype(metadata.get("dtype"), where)
    entries = [*(metadata.get("filters") or ()), *filter(None, [metadata.get("compressor")])]
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise TypeError("its compressor or filters are no codecs")
    count = 0
    while count < len(entries) and is_filter(str(entries[count].get("id"))):
        count += 1
    for entry in entries[:count]:
        _require_numbers(entry, where)
    codecs = tuple(codec_of(entry, where) for entry in entries[count:])
    separator = metadata.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise ValueError(f"its chunks are separated by {separator!r}")
    shown = {**metadata, "compressor": None, "filters": entries[:count] or None, "dimension_separator": "."}
    return Layout(
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
            raise TypeError("its codecs are no codecs")
        return cls(entry["name"], dict(settings))

    @property
    def plain(self) -> str:
        """Return the name that numcodecs gives it."""
        return self.name.removeprefix("numcodecs.")


def _third(metadata: Metadata, where: str) -> Layout:
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
    return Layout(
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
    for one in codecs[:count]:
        _require_numbers(one.settings, where)
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
            "NF121",
            f"the index of a shard of it has {size:,} bytes. It is damaged or built to harm.",
            where=where,
        )
    return Unpacking(of_bytes, size, True, where)


def _unread(what: str, where: str) -> NormfixError:
    return NormfixError(
        "NF150",
        f"{what}, which is not read. Write the image again with chunks of one size, compressed by zstd or blosc.",
        where=where,
    )
