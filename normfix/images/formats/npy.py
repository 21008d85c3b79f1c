"""NumPy's .npy, read by window from the file.

A map of the file would be read where its values are used, which is after it was looked at for changes
(normfix.images.contents), and ends the process where the file was cut short meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfix.images.formats.opened import Opened

__all__ = ["open_npy"]

_HEADER = 10_000
"""Bytes of a header that numpy reads."""

_GAP, _ROOM = 1 << 12, 1 << 20
"""Bytes between two runs that are read over, since seeking costs more, and how many are read at once with such gaps:
one channel of an interleaved image, a column of a volume.
"""


def open_npy(path: Path) -> Opened:
    """Open an array that numpy.save wrote; no pickle in it is read.

    Raises:
        ValueError: if it is none, or holds objects; OSError if it cannot be read.
    """
    _require_short_header(path)
    # np.load would open archives and pickles of any name too; of the map only what its header says is kept
    mapped = np.lib.format.open_memmap(path, "r")
    values = _Values(path.resolve(), mapped.shape, mapped.dtype, mapped.offset, mapped.flags.f_contiguous)
    behind = path.stat().st_size - mapped.offset - mapped.nbytes
    notes = (f"{behind:,} bytes behind its array are not read.",) if behind > 0 else ()
    return Opened(values, notes=notes)


def _require_short_header(path: Path) -> None:
    """Refuse a header that numpy would read whole before it refuses it: of a sparse file any size costs nothing.

    Raises:
        ValueError: if it is too long.
    """
    with path.open("rb") as file:
        start = file.read(12)
    # the magic and the version, then the length in two bytes, and since version 2 in four
    length = int.from_bytes(start[8:12], "little")
    if start[6:7] > b"\x01" and length > _HEADER:
        raise ValueError(f"its header has {length:,} bytes, where {_HEADER:,} are read")


@dataclass(frozen=True, slots=True)
class _Values:
    """Values behind a header of `offset` bytes, the last axis running fastest, or the first where it is `reversed`."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    reversed: bool

    def __getitem__(self, index: tuple[Any, ...]) -> NDArray[Any]:
        spans = [
            part.indices(extent)[:2] if isinstance(part, slice) else (part, part + 1)
            for part, extent in zip(index, self.shape, strict=True)
        ]
        if self.reversed:
            found = self._read(spans[::-1], self.shape[::-1]).transpose()
        else:
            found = self._read(spans, self.shape)
        return found[tuple(slice(None) if isinstance(part, slice) else 0 for part in index)]

    def _read(self, spans: Sequence[tuple[int, int]], shape: Sequence[int]) -> NDArray[Any]:
        """Read a window run by run: of the innermost axes, all that is whole and a part of the one around them."""
        extents = [max(0, stop - start) for start, stop in spans]
        found = np.empty(extents, self.dtype)
        if not found.size:
            return found
        cut = [axis for axis, extent in enumerate(extents) if extent != shape[axis]]
        last = cut[-1] if cut else 0
        steps = [math.prod(shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(shape))]
        around = _around(last, extents, steps)
        with self.path.open("rb", buffering=0) as file:
            for outer in product(*(range(extent) for extent in extents[:around])):
                place = self.offset + spans[around][0] * steps[around]
                place += sum((spans[axis][0] + n) * steps[axis] for axis, n in enumerate(outer))
                if around == last:
                    file.seek(place)
                    _fill(file, found[outer])
                else:
                    _fill_with_gaps(file, place, found[outer], shape[around + 1 :], spans[around + 1 :])
        return found


def _around(last: int, extents: Sequence[int], steps: Sequence[int]) -> int:
    """Return the axis along which runs follow each other so closely that what lies between them is read too."""
    axis, run = last, extents[last] * steps[last]
    while axis and steps[axis - 1] <= _ROOM and steps[axis - 1] - run <= _GAP:
        axis -= 1
        run += (extents[axis] - 1) * steps[axis]
    return axis


def _fill_with_gaps(
    file: Any,
    place: int,
    values: NDArray[Any],
    shape: Sequence[int],
    spans: Sequence[tuple[int, int]],
) -> None:
    """Read slices of a shape whole, some at a time, and keep a window of each."""
    inner = tuple(slice(*span) for span in spans)
    size = math.prod(shape) * values.itemsize
    file.seek(place)
    for first in range(0, len(values), max(1, _ROOM // size)):
        some = values[first : first + max(1, _ROOM // size)]
        read = np.empty((len(some), *shape), values.dtype)
        _fill(file, read)
        some[...] = read[(slice(None), *inner)]


def _fill(file: Any, values: NDArray[Any]) -> None:
    """Read until an array is full, which lies in one piece.

    Raises:
        EOFError: if the file ends before.
    """
    space = values.reshape(-1).view(np.uint8).data
    while space:
        count = file.readinto(space)
        if not count:
            raise EOFError("it ends before its values do")
        space = space[count:]
