"""Where predictions are written block by block: npy, TIFF and NIfTI by memory map, Zarr as OME-Zarr in whole shards.

Everything goes to a draft beside the target, which takes the target's name when the last block is written: a
file of that name is whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfix.errors import NormfixError
from normfix.images.axes import KEEPING, laid_out, require_new_image
from normfix.images.drafts import cannot_write, drafting, reserve
from normfix.images.endings import suffix_of
from normfix.images.formats import create, finish
from normfix.images.formats.placement import Placement
from normfix.images.rendering import Rendering
from normfix.networks.numerics import require_finite

__all__ = ["OutputFile"]


class OutputFile:
    """A new file (C, *space) that blocks (1, C, *block) are written to; a context manager.

    Leaving the context without an error gives the file its name, with an error removes the draft. Blocks with NaN or
    infinite values are refused (NF149) unless they are allowed. With a stack, the letter and extent of one axis more,
    blocks go to `plane` of it, each of which may be created anew. What is written of the values is a Rendering.
    """

    def __init__(
        self,
        path: Path,
        *,
        allow_nonfinite: bool = True,
        stack: tuple[str, int] | None = None,
        rendering: Rendering | None = None,
    ) -> None:
        self._path, self._allow_nonfinite = path, allow_nonfinite
        self._making = drafting(path)
        self._draft = path
        self._array: Any = None
        self._axes = ""
        self._keeps = suffix_of(path) in KEEPING  # the axis of a single channel
        self._space: tuple[int, ...] = ()
        self.written: tuple[tuple[int, ...], str] = (), ""  # shape and dtype
        self._placement = Placement()
        self._stack = stack
        self._rendering = rendering or Rendering()
        self._range = math.inf, -math.inf
        self.plane = 0
        require_new_image(path)

    def place(self, placement: Placement) -> None:
        """Say where the pixels will lie, before `create`; the file holds what its format can."""
        plain = self._rendering.kind == "raw"
        self._placement = placement if plain else replace(placement, channels_last=False, channels=())

    def create(self, shape: Sequence[int], dtype: torch.dtype, blocks: Sequence[int]) -> None:
        """Make room for (C, *space), to be written in blocks of these extents per axis of space.

        Raises:
            NormfixError: NF114 if it cannot be written, NF534 if so many channels do not mean what it is written as.
        """
        shown = self._rendering.shown(shape[0])
        channels, dtype = self._rendering.channels(shape[0]), self._rendering.dtype(shape[0], dtype)
        shape = (channels, *shape[1:])
        numpy_dtype = np.dtype(str(dtype).removeprefix("torch.").replace("bfloat16", "float32"))
        if self._array is not None:  # planes of a stack have one shape
            return
        self._space = tuple(shape[1:])
        self.written = tuple(shape), str(numpy_dtype)
        room, axes = laid_out(np.broadcast_to(np.zeros(1), tuple(shape)), self._placement, keep=self._keeps)
        extents = dict(zip(axes, room.shape, strict=True))
        edges = dict(zip("ZYX"[-len(blocks) :], blocks, strict=True), C=shape[0])
        if self._stack is not None:
            letter, planes = self._stack
            axes, extents[letter], edges[letter] = self._stacked(axes, letter), planes, 1
            self.written = (planes, *shape), str(numpy_dtype)
        self._axes = axes
        sizes = [extents[a] for a in axes]
        try:
            self._array = create(
                self._draft,
                sizes,
                numpy_dtype,
                axes,
                self._placement,
                [edges[a] for a in axes],
                shown=shown,
            )
            reserve(self._draft)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def write(self, index: tuple[slice, ...], value: Tensor) -> None:
        """Write a block; what lies beyond the file's extents is cut off."""
        stops = [min(s.stop, n) for s, n in zip(index[2:], self._space, strict=True)]
        spans = tuple(slice(s.start, stop) for s, stop in zip(index[2:], stops, strict=True))
        if any(s.start >= s.stop for s in spans):
            return
        block = value[0][(slice(None), *(slice(0, s.stop - s.start) for s in spans))]
        if not self._allow_nonfinite:
            require_finite(block, str(self._path))
        if self._rendering.is_of_probabilities:
            self._range = min(self._range[0], float(block.min())), max(self._range[1], float(block.max()))
        block = self._rendering.of(block[None])[0]
        block = block.float() if block.dtype == torch.bfloat16 else block
        array, _ = laid_out(block.cpu().numpy(), self._placement, keep="C" in self._axes)
        known: dict[str, slice | int] = dict(zip("ZYX"[-len(spans) :], spans, strict=True))
        known["C"] = slice(None)
        if self._stack is not None:
            known[self._stack[0]] = self.plane
        try:
            self._array[tuple(known[a] for a in self._axes)] = array
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def _stacked(self, axes: str, letter: str) -> str:
        """Return the axes with that of the stack: T and Z first as Fiji has them, in OME-Zarr Z behind channels."""
        if letter == "Z" and axes.startswith("C") and suffix_of(self._path) == ".zarr":
            return f"C{letter}{axes[1:]}"
        return letter + axes

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """Refuse: outputs are only written."""
        raise NotImplementedError

    def __enter__(self) -> OutputFile:
        self._draft = self._making.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        array, self._array = self._array, None
        if kind is None:
            try:
                self._rendering.require_logits(*self._range)
            except NormfixError as error:
                del array
                self._making.__exit__(type(error), error, error.__traceback__)
                raise
        try:
            if kind is None and isinstance(array, np.memmap):
                array.flush()  # also of a view
            del array
            if kind is None:
                finish(self._draft)
        except OSError as error:
            failed = cannot_write(self._path, error)
            self._making.__exit__(type(failed), failed, error.__traceback__)
            raise failed from error
        self._making.__exit__(kind, value, trace)
