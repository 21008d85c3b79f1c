"""Chunks of Zarr images, decompressed within bounds: a list of codecs, each told how much may come out.

A file names its codecs itself, some run what they read (pickle), and a few kilobytes can unpack to gigabytes. So bytes
are decompressed here, by codecs of a list and never to more than the chunk holds; Zarr itself is given plain bytes.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normfix.errors import NormfixError

__all__ = ["Codec", "Unpacking", "codec_of", "is_filter"]

_FILTERS = frozenset({"delta", "fixedscaleoffset", "quantize", "bitround", "astype"})
"""Codecs from array to array that compute with numbers alone: Zarr runs them."""

_SLACK = 1 << 16
"""Bytes that what is compressed twice may be larger than what it holds."""

_DICTIONARY = 1 << 28
"""Bytes that an xz stream may ask for as its dictionary."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A codec from bytes to bytes.

    `decode(data, limit, exact)` returns at most `limit` bytes, or raises _TooMuchError; `exact` is how many there
    must be, where that is known. `added` is by how many bytes the encoded form is longer, None where that is not fixed.
    """

    name: str
    decode: Callable[[bytes, int, int | None], bytes]
    added: int | None = None


class _TooMuchError(Exception):
    """More comes out than may."""


@dataclass(frozen=True, slots=True)
class Unpacking:
    """How a chunk becomes plain bytes.

    Args:
        codecs: in the order of encoding, as Zarr 3 lists them.
        size: bytes of a chunk, at most these where filters of arrays follow.
        exact: whether it is that many.
        where: the image.
    """

    codecs: tuple[Codec, ...]
    size: int
    exact: bool
    where: str

    @property
    def most(self) -> int:
        """Return the most bytes that a chunk may have as it is stored."""
        return self.size + self.size // 4 + _SLACK

    def __call__(self, data: bytes, chunk: str) -> bytes:
        """Return a chunk's plain bytes.

        Raises:
            NormfixError: NF121 if it unpacks to more than a chunk holds.
        """
        if not self.codecs:
            return data
        sizes: list[int | None] = [self.size if self.exact else None]
        for codec in self.codecs[:-1]:
            inner = sizes[-1]
            sizes.append(None if inner is None or codec.added is None else inner + codec.added)
        for codec, size in zip(reversed(self.codecs), reversed(sizes), strict=True):
            try:
                data = codec.decode(data, self.most if size is None else size, size)
            except _TooMuchError as error:
                raise NormfixError(
                    "NF121",
                    f"its chunk {chunk} ({codec.name}) unpacks to more than the {self.size:,} bytes that a chunk "
                    "holds. It is damaged or built to harm, and was not unpacked.",
                    where=self.where,
                ) from error
        return data


def is_filter(name: str) -> bool:
    """Tell whether a codec computes with numbers alone and may be left to Zarr."""
    return name in _FILTERS


def codec_of(settings: Mapping[str, Any], where: str) -> Codec:
    """Return a codec from bytes to bytes by what numcodecs calls it, with its settings.

    Raises:
        NormfixError: NF150 for one that is not on the list.
    """
    name = str(settings.get("id"))
    if name in _READERS:
        return Codec(name, _READERS[name])
    if name in _CHECKED:
        return Codec(name, _by_numcodecs(settings), _CHECKED[name])
    known = ", ".join(sorted({*_READERS, *_CHECKED, *_FILTERS}))
    raise NormfixError(
        "NF150",
        f"it is compressed or filtered by {name!r}, and only these are read: {known}. Others may run code or unpack "
        "without bound. Write the image again with one of them, zstd or blosc for instance.",
        where=where,
    )


def _within(found: bytes, limit: int) -> bytes:
    if len(found) > limit:
        raise _TooMuchError
    return found


def _zlib(data: bytes, limit: int, exact: int | None) -> bytes:
    stream = zlib.decompressobj()
    found = _within(stream.decompress(data, limit + 1), limit)
    if not stream.eof:
        raise ValueError("a compressed chunk is cut short")
    return found


def _gzip(data: bytes, limit: int, exact: int | None) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        return _within(file.read(limit + 1), limit)


def _bz2(data: bytes, limit: int, exact: int | None) -> bytes:
    with bz2.BZ2File(io.BytesIO(data)) as file:
        return _within(file.read(limit + 1), limit)


def _lzma(data: bytes, limit: int, exact: int | None) -> bytes:
    stream = lzma.LZMADecompressor(memlimit=_DICTIONARY)
    return _within(stream.decompress(data, limit + 1), limit)


def _zstd(data: bytes, limit: int, exact: int | None) -> bytes:
    """Decompress into a buffer of the size that the frame states, or that is known otherwise."""
    from numcodecs import zstd

    stated = _zstd_size(data)
    size = exact if stated is None else stated
    if size is None:
        raise ValueError("a frame of zstd does not say how much it holds")
    if size > limit:
        raise _TooMuchError
    room = np.empty(size, np.uint8)
    zstd.decompress(data, room)
    return room.tobytes()


def _zstd_size(data: bytes) -> int | None:
    """Return the content size in the header of a frame (RFC 8878, 3.1.1.1); None if it is not stated."""
    if len(data) < 6 or data[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("a chunk is no frame of zstd")
    descriptor = data[4]
    single = bool(descriptor & 0x20)
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    length = (int(single), 2, 4, 8)[descriptor >> 6]
    if not length:
        return None
    return int.from_bytes(data[start : start + length], "little") + 256 * (length == 2)


def _blosc(data: bytes, limit: int, exact: int | None) -> bytes:
    from numcodecs import blosc

    if len(data) < 16:
        raise ValueError("a chunk is no buffer of blosc")
    size, stored = (int.from_bytes(data[i : i + 4], "little") for i in (4, 12))
    if size > limit:
        raise _TooMuchError
    if stored != len(data):
        raise ValueError("a buffer of blosc is cut short")
    return bytes(blosc.decompress(data))


def _lz4(data: bytes, limit: int, exact: int | None) -> bytes:
    from numcodecs import lz4

    if int.from_bytes(data[:4], "little") > limit:
        raise _TooMuchError
    return bytes(lz4.decompress(data))


_READERS: Mapping[str, Callable[[bytes, int, int | None], bytes]] = {
    "zlib": _zlib,
    "gzip": _gzip,
    "bz2": _bz2,
    "lzma": _lzma,
    "zstd": _zstd,
    "blosc": _blosc,
    "lz4": _lz4,
}

_CHECKED: Mapping[str, int] = {
    "shuffle": 0,
    "crc32": 4,
    "crc32c": 4,
    "adler32": 4,
    "fletcher32": 4,
}
"""Codecs whose result is a few bytes shorter than what they are given, by how many; numcodecs runs them."""


def _by_numcodecs(settings: Mapping[str, Any]) -> Callable[[bytes, int, int | None], bytes]:
    def decode(data: bytes, limit: int, exact: int | None) -> bytes:
        import numcodecs

        codec = numcodecs.get_codec(dict(settings))
        return _within(np.ascontiguousarray(codec.decode(data)).tobytes(), limit)

    return decode
