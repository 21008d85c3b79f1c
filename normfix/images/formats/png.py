"""PNG through Pillow: its header is looked at first, since Pillow opens a file as whatever it holds, and whole.

Of a file that says .png Pillow would make a picture by Ghostscript if it holds PostScript, keep 8 of 16 bits of a
colour, unpack a few kilobytes to gigabytes, take the last of several headers, and give black for rows that are missing.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from normfix.errors import NormfixError
from normfix.images.formats.opened import Opened
from normfix.images.formats.placement import Placement

__all__ = ["open_png"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">I4sIIBBBBB")
"""Length and name of the first chunk, width, height, bits of a sample, kind of colour, and how rows are stored."""

_SAMPLES = {0: 1, 2: 3, 3: 4, 4: 2, 6: 4}
"""Samples of a pixel by the kind of colour; a palette may become four."""

_PALETTE = 3
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps, of the passes of an interlaced picture (PNG, 8.2)."""

_GREY = 0

_LARGE, _RATIO = 1 << 28, 500
"""Bytes of a picture from which it is asked whether its file can hold it, and how many each of its bytes may give."""


def open_png(path: Path) -> Opened:
    """Read a picture; see `normfix.images.formats.open_file`.

    Raises:
        NormfixError: NF101 for an animation or for colours of 16 bits, NF121 for one that its file cannot hold.
    """
    import imageio.v3 as iio
    from PIL import Image

    data = path.read_bytes()
    if not data.startswith(_SIGNATURE):
        raise ValueError("it is no PNG, whatever its name says")
    _require_plain(data, path)
    _require_whole(data)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        raise NormfixError(
            "NF101",
            f"it is an animation of {frames} pictures. Write the one that is meant, or all of them as a TIFF.",
            where=str(path),
        )
    array = np.asarray(iio.imread(data, plugin="pillow", extension=".png"))
    flat = array.ndim == 2
    return Opened(array, "YX" if flat else "YXC", Placement(channels_last=not flat))


def _require_plain(data: bytes, path: Path) -> None:
    """Refuse by its header what would be read with a loss, or is far larger than its file."""
    _, name, width, height, bits, kind, *_ = _HEADER.unpack_from(data, len(_SIGNATURE))
    if name != b"IHDR" or kind not in _SAMPLES:
        raise ValueError("its header is broken")
    if bits > 8 and kind != _GREY:
        raise NormfixError(
            "NF101",
            "its colours have 16 bits, of which 8 would be read. Write it as TIFF or .npy.",
            where=str(path),
        )
    size = width * height * _SAMPLES[kind] * -(-bits // 8)
    if size > _LARGE and size > _RATIO * len(data):
        raise NormfixError(
            "NF121",
            f"its {len(data):,} bytes would be {size:,} in memory ({width}x{height}): it is damaged, built to harm, "
            "or nearly empty. It was not unpacked; write it as TIFF if it is right.",
            where=str(path),
        )


def _require_whole(data: bytes) -> None:
    """Refuse what Pillow would read all the same: a second header, a wrong checksum, fewer rows than the header says.

    Raises:
        ValueError: naming what is wrong.
    """
    _, _, width, height, bits, kind, _, _, interlaced = _HEADER.unpack_from(data, len(_SIGNATURE))
    depth = bits * (1 if kind == _PALETTE else _SAMPLES[kind])
    left = _stored(width, height, depth, _PASSES if interlaced else ((0, 0, 1, 1),))
    stream = zlib.decompressobj()
    for number, (name, content) in enumerate(_chunks(data)):
        if number and name == b"IHDR":
            raise ValueError("it has two headers, of which programs take different ones")
        given = content if name == b"IDAT" else b""
        while given and left and not stream.eof:
            left -= len(stream.decompress(given, min(left, _PIECE)))
            given = stream.unconsumed_tail
    if left:
        raise ValueError("it holds fewer rows than its header says")


_PIECE = 1 << 20


def _stored(width: int, height: int, depth: int, passes: tuple[tuple[int, int, int, int], ...]) -> int:
    """Return the bytes of all rows as they are packed, each after the number of its filter."""
    total = 0
    for first_column, first_row, across, down in passes:
        columns, rows = -(-(width - first_column) // across), -(-(height - first_row) // down)
        total += rows * (1 + -(-columns * depth // 8)) if columns > 0 and rows > 0 else 0
    return total


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of each chunk up to the last, whose checksums are right."""
    place, name = len(_SIGNATURE), b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, place + 8 + length)
        if zlib.crc32(content, zlib.crc32(name)) != checksum:
            raise ValueError(f"the checksum of its chunk {name!r} is wrong")
        yield name, content
        place += 12 + length
