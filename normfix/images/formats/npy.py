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


def open_npy(path: Path) -> Opened:
    """Open an array that numpy.save wrote; no pickle in it is read.

    Raises:
        ValueError: if it is none, or holds objects; OSError if it cannot be read.
    """
    # np.load would open archives and pickles of any name too; of the map only what its header says is kept
    mapped = np.lib.format.open_memmap(path, "r")
    return Opened(
        _Values(path.resolve(), mapped.shape, mapped.dtype, mapped.offset, mapped.flags.f_contiguous)
    )


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
        cut = [axis for axis, extent in enumerate(extents) if extent != shape[axis]]
        last = cut[-1] if cut else 0
        length = math.prod(extents[last:]) * self.dtype.itemsize
        if not found.size:
            return found
        steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        space = found.reshape(-1).view(np.uint8).data
        starts = product(*(range(start, stop) for start, stop in spans[:last]))
        with self.path.open("rb", buffering=0) as file:
            for number, outer in enumerate(starts):
                place = sum(
                    n * step for n, step in zip((*outer, spans[last][0]), steps[: last + 1], strict=True)
                )
                file.seek(self.offset + place * self.dtype.itemsize)
                _fill(file, space[number * length : (number + 1) * length])
        return found


def _fill(file: Any, space: memoryview) -> None:
    """Read until a piece of memory is full.

    Raises:
        EOFError: if the file ends before.
    """
    while space:
        count = file.readinto(space)
        if not count:
            raise EOFError("it ends before its values do")
        space = space[count:]
