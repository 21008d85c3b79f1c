"""Scale an image by what all of it is, in one or a few walks over it: never by window.

Mean and deviation come from exact moments. Percentiles are exact for every dtype: values are mapped to integers
in the same order, and histograms of 16 bits at a time find the order statistics that numpy's linear rule asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from normfix.images.windows import Unread
from normfix.layers.moments import Moments, measure, merge

__all__ = ["Spread"]


@dataclass(frozen=True, slots=True)
class Spread:
    """How the values of an image that is read by window are distributed; see normfix.images.scaling."""

    window: Unread

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of the values."""
        dtype: np.dtype[Any] = np.dtype(self.window.array.dtype)
        return dtype

    @property
    def where(self) -> str:
        """Return what the image is called."""
        return self.window.where

    def moments(self) -> tuple[float, float, float]:
        """Return mean, standard deviation and the difference of the largest and the smallest value."""
        parts: list[Moments] = []
        least, most = math.inf, -math.inf
        for piece in self.window.pieces():
            wide = piece.astype(np.float64).reshape(1, 1, -1)
            parts.append(measure(torch.from_numpy(wide)))
            least, most = min(least, float(wide.min())), max(most, float(wide.max()))
        moments = merge(*parts)
        return float(moments.mean[0]), math.sqrt(float(moments.var[0])), most - least

    def percentiles(self, wanted: Sequence[float]) -> list[float]:
        """Return percentiles as np.percentile gives them for the whole image, all channels together."""
        count = math.prod(self.window.shape)
        places = [(count - 1) * q / 100 for q in wanted]
        ranks = sorted({f(p) for p in places for f in (math.floor, math.ceil)})
        values = dict(zip(ranks, _order_statistics(self.window, ranks), strict=True))
        found = []
        for place in places:
            low, high = values[math.floor(place)], values[math.ceil(place)]
            found.append(
                float(np.float64(low) + (np.float64(high) - np.float64(low)) * (place - math.floor(place)))
            )
        return found


def _order_statistics(window: Unread, ranks: Sequence[int]) -> list[float]:
    """Return the values at these places of the sorted image: 16 bits of each per walk over the image."""
    dtype = _native(np.dtype(window.array.dtype))
    bits = 8 * dtype.itemsize
    known = [0] * len(ranks)  # the leading bits found so far
    below = list(ranks)  # the place among the values that share them
    for shift in range(max(0, bits - 16), -1, -16):
        width = min(16, bits)
        histograms = {prefix: np.zeros(1 << width, np.int64) for prefix in known}
        for piece in window.pieces():
            keys = _keys(piece).ravel()
            prefixes = keys >> np.uint64(shift + width) if shift + width < 64 else np.zeros_like(keys)
            for prefix, histogram in histograms.items():
                digits = (keys[prefixes == prefix] >> np.uint64(shift)) & np.uint64((1 << width) - 1)
                histogram += np.bincount(digits.astype(np.int64), minlength=1 << width)
        for i, prefix in enumerate(known):
            ends = np.cumsum(histograms[prefix])
            digit = int(np.searchsorted(ends, below[i], side="right"))
            below[i] -= int(ends[digit - 1]) if digit else 0
            known[i] = (prefix << width) | digit
    return [float(_value(key, dtype)) for key in known]


def _keys(values: NDArray[Any]) -> NDArray[np.uint64]:
    """Map values to unsigned integers in the same order."""
    values = values.astype(_native(values.dtype), copy=False)
    dtype = values.dtype
    unsigned = np.dtype(f"u{dtype.itemsize}")
    raw = np.ascontiguousarray(values).view(unsigned)
    top = unsigned.type(1 << (8 * dtype.itemsize - 1))
    if dtype.kind == "f":
        raw = np.where(raw & top, ~raw, raw | top)
    elif dtype.kind == "i":
        raw = raw ^ top
    return raw.astype(np.uint64)


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return a dtype in this machine's byte order; booleans as bytes."""
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")


def _value(key: int, dtype: np.dtype[Any]) -> Any:
    """Undo `_keys`."""
    bits = 8 * dtype.itemsize
    top, every = 1 << (bits - 1), (1 << bits) - 1
    if dtype.kind == "f":
        key = key ^ top if key & top else key ^ every
    elif dtype.kind == "i":
        key ^= top
    return np.array([key], np.dtype(f"u{dtype.itemsize}")).view(dtype)[0]
