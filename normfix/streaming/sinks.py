"""Where predictions are written block by block: npy and TIFF by memory map, Zarr as OME-Zarr in whole chunks.

Everything goes to a draft beside the target, which takes the target's name when the last block is written: a
file of that name is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfix.errors import NormfixError
from normfix.streaming.chunks import chunk_edge

__all__ = ["OutputFile"]


class OutputFile:
    """A new file (C, *space) that blocks (1, C, *block) are written to; a context manager.

    Leaving the context without an error gives the file its name, with an error removes the draft.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.stem}-draft{path.suffix}")
        self._array: Any = None
        self._squeezed = False
        self._space: tuple[int, ...] = ()
        self.written: tuple[tuple[int, ...], str] = (), ""  # shape and dtype
        if path.suffix.lower() not in (".npy", ".tif", ".tiff", ".zarr") or path.exists():
            raise NormfixError(
                "NF114",
                "give a new name ending in .npy, .tif or .zarr; nothing is overwritten.",
                where=str(path),
            )
        if not path.parent.is_dir():
            raise NormfixError("NF114", f"there is no folder {path.parent} to write it to.", where=str(path))

    def create(self, shape: Sequence[int], dtype: torch.dtype, blocks: Sequence[int]) -> None:
        """Make room for (C, *space), to be written in blocks of these extents per axis of space.

        Raises:
            NormfixError: NF114 if it cannot be written.
        """
        numpy_dtype = np.dtype(str(dtype).removeprefix("torch.").replace("bfloat16", "float32"))
        self._space = tuple(shape[1:])
        self.written = tuple(shape), str(numpy_dtype)
        suffix = self._path.suffix.lower()
        try:
            self._remove()  # what a killed process left
            if suffix == ".zarr":
                self._array = _ome_zarr(self._draft, shape, numpy_dtype, blocks)
            elif suffix == ".npy":
                self._array = np.lib.format.open_memmap(self._draft, "w+", numpy_dtype, tuple(shape))
            else:
                self._squeezed = shape[0] == 1
                axes = "ZYX"[-(len(shape) - 1) :]
                axes, extents = (axes, shape[1:]) if self._squeezed else (f"C{axes}", shape)
                self._array = _tiff(self._draft, extents, axes, numpy_dtype)
            _reserve(self._draft)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, index: tuple[slice, ...], value: Tensor) -> None:
        """Write a block; what lies beyond the file's extents is cut off."""
        stops = [min(s.stop, n) for s, n in zip(index[2:], self._space, strict=True)]
        spans = tuple(slice(s.start, stop) for s, stop in zip(index[2:], stops, strict=True))
        if any(s.start >= s.stop for s in spans):
            return
        block = value[0][(slice(None), *(slice(0, s.stop - s.start) for s in spans))]
        block = block.float() if block.dtype == torch.bfloat16 else block
        array = block.cpu().numpy()
        try:
            if self._squeezed:
                self._array[spans] = array[0]
            else:
                self._array[(slice(None), *spans)] = array
        except OSError as error:
            raise self._failed(error) from error

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """Refuse: outputs are only written."""
        raise NotImplementedError

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._array, np.memmap):
            self._array.flush()
        self._array = None
        if kind is None:
            self._draft.rename(self._path)
        else:
            self._remove()

    def _remove(self) -> None:
        if self._draft.is_dir():
            shutil.rmtree(self._draft, ignore_errors=True)
        else:
            self._draft.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> NormfixError:
        return NormfixError("NF114", f"cannot write it: {error.strerror or error}.", where=str(self._path))


def _reserve(path: Path) -> None:
    """Take a mapped file's room now: on a disk that fills up later, writing to it would end the process."""
    if path.is_file() and hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _tiff(path: Path, shape: Sequence[int], axes: str, dtype: np.dtype[Any]) -> Any:
    import tifffile

    return tifffile.memmap(
        path, shape=tuple(shape), dtype=dtype, bigtiff=True, photometric="minisblack", metadata={"axes": axes}
    )


def _ome_zarr(path: Path, shape: Sequence[int], dtype: np.dtype[Any], blocks: Sequence[int]) -> Any:
    import zarr

    space = "zyx"[-(len(shape) - 1) :]
    group: Any = zarr.create_group(store=str(path), overwrite=True)
    axes = [{"name": "c", "type": "channel"}, *({"name": letter, "type": "space"} for letter in space)]
    scale = [{"type": "scale", "scale": [1.0] * len(shape)}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    edges = (chunk_edge(b, n) for b, n in zip(blocks, shape[1:], strict=True))
    return group.create_array("0", shape=tuple(shape), chunks=(shape[0], *edges), dtype=dtype)
