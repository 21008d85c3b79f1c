"""PNG through Pillow: its header is looked at first, since Pillow opens a file as whatever it holds, and whole.

Of a file that says .png Pillow would make a picture by Ghostscript if it holds PostScript, keep 8 of 16 bits of a
colour, and unpack a few kilobytes to gigabytes.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np

from normfix.errors import NormfixError
from normfix.images.formats.opened import Opened
from normfix.images.formats.placement import Placement

__all__ = ["open_png"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">I4sIIBB")
"""Length and name of the first chunk, width, height, bits of a sample, kind of colour."""

_SAMPLES = {0: 1, 2: 3, 3: 4, 4: 2, 6: 4}
"""Samples of a pixel by the kind of colour; a palette may become four."""

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
    _, name, width, height, bits, kind = _HEADER.unpack_from(data, len(_SIGNATURE))
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
