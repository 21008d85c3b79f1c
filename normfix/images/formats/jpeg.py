"""JPEG through Pillow, of which libjpeg's complaints are not heard: what is damaged is found by decoding it twice more.

A file has no checksums. Where a scan ends too early libjpeg goes on with zeros, and where its bits went out of step
it leaves the rest: both give a picture, in part grey or noise. So a scan that is whole does not change if bytes are put
behind it, which are read only where others are missing, and does change if its last bytes are others, which are always
read. Only what makes the picture is handed on: no profiles, no further pictures.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfix.errors import NormfixError
from normfix.images.formats.opened import Opened
from normfix.images.formats.placement import Placement

__all__ = ["open_jpeg"]

_START, _END, _SCAN, _EXIF, _RESTARTS = 0xD8, 0xD9, 0xDA, 0xE1, 0xDD
_FRAMES = {0xC0, 0xC1, 0xC2}
"""Baseline, extended and progressive frames, Huffman coded."""

_OTHER_FRAMES = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
"""Lossless, hierarchical and arithmetically coded frames."""

_KEPT = {*_FRAMES, 0xC4, 0xDB, _RESTARTS, 0xE0, 0xEE}
"""Frame, tables, restarts, and the two applications' segments that say what the colours are (JFIF, Adobe)."""

_STOP = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_FILLING = bytes((37 * n + 11) % 251 for n in range(64))
_TAIL = 16
"""Bytes at the end of a scan that its last blocks are in; a few behind them are left by some encoders."""

_ORIENTATION = 0x0112

_LARGE, _RATIO = 1 << 28, 500
"""Bytes of a picture from which it is asked whether its file can hold it, and how many each of its bytes may give."""

_SCANS = 64
"""Passes over the picture that a progressive file may make; encoders make 10, and each costs as much as decoding it."""

_FEW, _MODERATE = 16, 1 << 26
"""Scans, and bytes of a picture, up to which each scan is tried by itself: some seconds at most."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """A picture cut at its scans: what stands before each, their bytes, height, width, samples and EXIF."""

    before: Sequence[bytes]
    scans: Sequence[bytes]
    shape: tuple[int, int, int]
    exif: bytes

    def joined(self, scans: Sequence[bytes]) -> bytes:
        """Return a file with other scans."""
        pieces = (part for pair in zip(self.before, scans, strict=True) for part in pair)
        return b"\xff\xd8" + b"".join(pieces) + b"\xff\xd9"


def open_jpeg(path: Path) -> Opened:
    """Read a picture; see `normfix.images.formats.open_file`.

    Raises:
        NormfixError: NF101 for colours that are neither grey nor RGB, NF121 for one that its file cannot hold.
        ValueError: it is damaged.
    """
    data = path.read_bytes()
    parts = _parts(data, path)
    _require_proportion(parts, len(data), path)
    array = _decoded(parts.joined(parts.scans))
    _require_whole(parts, array)
    flat = array.ndim == 2
    return Opened(array, "YX" if flat else "YXC", Placement(channels_last=not flat), notes=_notes(parts.exif))


def _parts(data: bytes, path: Path) -> _Parts:
    """Read the segments up to the end of the first picture.

    Raises:
        NormfixError: NF101 for kinds of JPEG that are not read.
        ValueError: it is damaged.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("it is no JPEG, whatever its name says")
    before, scans, kept, shape, exif, place = [], [], b"", None, b"", 2
    while True:
        kind, start, place = _segment(data, place)
        if kind == _END:
            break
        segment = data[start:place]
        if kind in _OTHER_FRAMES:
            raise NormfixError(
                "NF101",
                "it is lossless, hierarchical or arithmetically coded JPEG. Write it as PNG or TIFF.",
                where=str(path),
            )
        if kind in _FRAMES:
            if shape is not None:
                raise ValueError("it has two headers, of which programs take different ones")
            shape = _shape(segment, path)
        if kind == _EXIF:
            exif = exif or segment[4:]
        if kind in _KEPT:
            kept += segment
        if kind == _SCAN:
            stop = _STOP.search(data, place)
            if stop is None or shape is None:
                raise ValueError("it ends before its picture does")
            before.append(kept + segment)
            scans.append(data[place : stop.start()])
            kept, place = b"", stop.start()
    if shape is None or not scans:
        raise ValueError("it holds no picture")
    return _Parts(before, scans, shape, exif)


def _segment(data: bytes, place: int) -> tuple[int, int, int]:
    """Return kind, start and end of the segment at a place."""
    while data[place : place + 2] == b"\xff\xff":  # filling
        place += 1
    if len(data) < place + 2 or data[place] != 0xFF:
        raise ValueError("it ends before its picture does, or its segments are broken")
    kind = data[place + 1]
    if kind == _END:
        return kind, place, place + 2
    length = int.from_bytes(data[place + 2 : place + 4], "big")
    if length < 2 or place + 2 + length > len(data) or kind in (0, 1, _START):
        raise ValueError("its segments are broken")
    return kind, place, place + 2 + length


def _shape(segment: bytes, path: Path) -> tuple[int, int, int]:
    """Return height, width and samples of a frame."""
    if len(segment) < 10:
        raise ValueError("its header is broken")
    bits, height, width, samples = struct.unpack_from(">BHHB", segment, 4)
    if bits != 8 or samples not in (1, 3):
        raise NormfixError(
            "NF101",
            f"it has {samples} colours of {bits} bits; grey and RGB of 8 bits are read. Write it as PNG or TIFF.",
            where=str(path),
        )
    if not height or not width:
        raise ValueError("its header is broken")
    return height, width, samples


def _require_proportion(parts: _Parts, stored: int, path: Path) -> None:
    """Refuse by its header what is far larger than its file, or makes countless passes over the picture."""
    height, width, samples = parts.shape
    size = height * width * samples
    if (size > _LARGE and size > _RATIO * stored) or len(parts.scans) > _SCANS:
        raise NormfixError(
            "NF121",
            f"its {stored:,} bytes would be {size:,} in memory ({width}x{height}), in {len(parts.scans)} passes: it is "
            "damaged, built to harm, or nearly empty. It was not unpacked; write it as TIFF if it is right.",
            where=str(path),
        )


def _require_whole(parts: _Parts, array: NDArray[Any]) -> None:
    """Refuse what libjpeg completes with zeros, or does not read to its end.

    Raises:
        ValueError: naming what is wrong.
    """
    behind = [_RESTART.sub(lambda mark: _FILLING + mark[0], scan) + _FILLING for scan in parts.scans]
    if not np.array_equal(_decoded(parts.joined(behind)), array):
        raise ValueError("a part of its picture is missing")
    for ends in _altered(parts):
        if np.array_equal(_decoded(parts.joined(ends)), array):
            raise ValueError("its picture ends before its data does: a part of it is damaged")


def _altered(parts: _Parts) -> Iterator[list[bytes]]:
    """Yield the scans with another end of one of them, or of all where so many decodings would take long."""
    scans = list(parts.scans)
    long = [number for number, scan in enumerate(scans) if len(scan) > 2 * _TAIL]
    alone = len(scans) <= _FEW and math.prod(parts.shape) <= _MODERATE
    for numbers in [[number] for number in long] if alone else [long] * bool(long):
        yield [
            scan[:-_TAIL] + _FILLING[:_TAIL] if number in numbers else scan
            for number, scan in enumerate(scans)
        ]


def _decoded(data: bytes) -> NDArray[Any]:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
        return np.asarray(picture)


def _notes(exif: bytes) -> tuple[str, ...]:
    """Say if viewers turn the picture, which is read as it is stored."""
    from PIL import Image

    if not exif.startswith(b"Exif\0\0"):
        return ()
    tags = Image.Exif()
    try:
        tags.load(exif)
        turned = tags.get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - what cannot be read turns nothing
        return ()
    return () if turned == 1 else ("its EXIF says to show it turned; it is read as it is stored.",)
