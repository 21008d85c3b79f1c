"""Where a prediction that comes in blocks goes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.fx import Node

from normfix.images.writing import OutputFile
from normfix.tiling.stages.store import Kept
from normfix.tiling.stitching import cropped

__all__ = ["Destination"]


class Destination:
    """Where a prediction goes: to a file, or into memory; in the end, where it lasts in the store until then.

    Of an image that was extended it is cut back to `space`; of any other it is all that the network gives.
    """

    def __init__(
        self,
        node: Node,
        space: tuple[int, ...] | None,
        scale: tuple[Fraction, ...],
        device: torch.device,
        out: OutputFile | None,
    ) -> None:
        self.node, self._device, self._out = node, device, out
        self._space, self._scale = space, scale
        self._array: Tensor | None = None
        self._layout: tuple[tuple[int, ...], torch.dtype, tuple[int, ...]] | None = None

    def take(
        self, number: int, node: Node, shape: tuple[int, ...], dtype: torch.dtype, blocks: tuple[int, ...]
    ) -> Kept | None:
        """Take the blocks as they come; a sink."""
        return self._begin(shape, dtype, blocks) if node is self.node else None

    def wait(
        self, number: int, node: Node, shape: tuple[int, ...], dtype: torch.dtype, blocks: tuple[int, ...]
    ) -> Kept | None:
        """Take nothing yet; a sink."""
        if node is self.node:
            self._layout = shape, dtype, blocks
        return None

    def copy(self, kept: Kept) -> None:
        """Take the whole, block by block."""
        assert self._layout is not None
        shape, _, blocks = self._layout
        place = self._begin(*self._layout)
        starts = (range(0, n, b) for n, b in zip(shape, blocks, strict=True))
        for corner in itertools.product(*starts):
            index = tuple(
                slice(start, min(n, start + b)) for start, n, b in zip(corner, shape, blocks, strict=True)
            )
            place.write(index, kept.read(index))

    def result(self) -> Tensor | None:
        """Return (N, C', *out), or None if it went to a file."""
        if self._array is None or self._space is None:
            return self._array
        return cropped(self._array, self._space, self._scale)

    def _extents(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return how much of the network's output belongs to the image."""
        if self._space is None:
            return whole
        # what the network gives may be less, rounded down or without padding
        pairs = zip(whole, self._space, self._scale, strict=True)
        return tuple(min(most, -int(-(n * s) // 1)) for most, n, s in pairs)

    def _begin(self, shape: tuple[int, ...], dtype: torch.dtype, blocks: tuple[int, ...]) -> Kept:
        if self._out is not None:
            self._out.create((shape[1], *self._extents(shape[2:])), dtype, blocks[2:])
            return self._out
        self._array = torch.empty(shape, dtype=dtype, device=self._device)
        return _InPlace(self._array)


@dataclass(frozen=True, slots=True)
class _InPlace:
    array: Tensor

    def read(self, index: tuple[slice, ...]) -> Tensor:
        return self.array[index]

    def write(self, index: tuple[slice, ...], value: Tensor) -> None:
        self.array[index] = value
