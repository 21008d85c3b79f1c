"""Where values are kept between stages: memory within a budget, Zarr on disk beyond it.

What is read may be a view of what is stored; programs are functional, so nothing writes into it. On disk each
block of the stage that writes is a whole number of chunks, so two writers never share one; chunks are not
compressed: they are read once or twice and then deleted.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from normfix.errors import NormfixError

__all__ = ["Budget", "Kept", "Store", "chunk_edge"]

Index = tuple[slice, ...]


class Kept(Protocol):
    """One stored array."""

    def read(self, index: Index) -> Tensor:
        """Return a window, which the caller must not change."""

    def write(self, index: Index, value: Tensor) -> None:
        """Write a window."""


class Budget:
    """Bytes that may be held in memory; None means no limit."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.used, self.most, self.most_on_disk, self.on_disk = limit, 0, 0, 0, 0

    def take(self, size: int) -> bool:
        """Reserve memory if it fits, else count the bytes as on disk."""
        if self.limit is not None and self.used + size > self.limit:
            self.on_disk += size
            self.most_on_disk = max(self.most_on_disk, self.on_disk)
            return False
        self.used += size
        self.most = max(self.most, self.used)
        return True

    def give(self, size: int, in_memory: bool) -> None:
        """Return what was taken."""
        if in_memory:
            self.used -= size
        else:
            self.on_disk -= size


class Store:
    """Creates stored arrays and forgets them."""

    def __init__(
        self, budget: int | None = None, folder: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.budget = Budget(budget)
        self._folder = folder
        self._device = torch.device(device)
        self._sizes: dict[str, tuple[bool, int]] = {}
        self._kept: dict[str, Kept] = {}

    def require(self, on_disk: int) -> None:
        """Refuse before anything is computed what the folder has no room for.

        Raises:
            NormfixError: NF326 if there is no folder, or it has less room than `on_disk` bytes.
        """
        if not on_disk:
            return
        if self._folder is None:
            raise self._too_small(on_disk)
        free = shutil.disk_usage(self._folder).free
        if free < on_disk:
            raise NormfixError(
                "NF326",
                f"{on_disk:,} bytes between stages go beyond the memory budget, and the folder has {free:,} free. "
                "Raise the budget or name a folder with more room.",
                where=str(self._folder),
            )

    def create(self, name: str, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[int]) -> Kept:
        """Make room for an array.

        Args:
            name: of the array, unique while it is kept.
            shape: of the array.
            dtype: of the array.
            chunks: extents that blocks are written in, per dimension.

        Raises:
            NormfixError: NF326 if it does not fit the budget and there is no folder, or no Zarr.
        """
        size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        fits = self.budget.take(size)
        self._sizes[name] = fits, size
        kept: Kept = (
            _InMemory(shape, dtype, self._device) if fits else self._on_disk(name, shape, dtype, chunks, size)
        )
        self._kept[name] = kept
        return kept

    def __getitem__(self, name: str) -> Kept:
        return self._kept[name]

    def free(self, name: str) -> None:
        """Forget an array and give its room back."""
        kept = self._kept.pop(name)
        fits, size = self._sizes.pop(name)
        self.budget.give(size, fits)
        if isinstance(kept, _OnDisk):
            kept.delete()

    def clear(self) -> None:
        """Forget everything."""
        for name in list(self._kept):
            self.free(name)

    def _on_disk(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[int], size: int
    ) -> Kept:
        if self._folder is None:
            raise self._too_small(size)
        return _OnDisk(self._folder / name, shape, dtype, chunks, self._device)

    def _too_small(self, size: int) -> NormfixError:
        return NormfixError(
            "NF326",
            f"{size:,} bytes do not fit the budget of {self.budget.limit or 0:,} and no folder was given for them. "
            "Raise the budget, or name a folder with room: --store FOLDER (store= in Python).",
            where="store",
        )


class _InMemory:
    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._array = torch.empty(tuple(shape), dtype=dtype, device=device)

    def read(self, index: Index) -> Tensor:
        return self._array[index]

    def write(self, index: Index, value: Tensor) -> None:
        self._array[index] = value


_CHUNK = 128
"""Largest edge of a chunk: a window with a halo of a few pixels then reads little more than it needs."""


class _OnDisk:
    """An array in Zarr format 3, bfloat16 as its bits."""

    def __init__(
        self,
        path: Path,
        shape: Sequence[int],
        dtype: torch.dtype,
        chunks: Sequence[int],
        device: torch.device,
    ) -> None:
        zarr = _zarr()
        self._path, self._dtype, self._device = path, dtype, device
        self._stored_as = torch.int16 if dtype == torch.bfloat16 else dtype
        try:
            self._array: Any = zarr.create_array(
                store=str(path),
                shape=tuple(shape),
                chunks=tuple(chunk_edge(c, n) for c, n in zip(chunks, shape, strict=True)),
                dtype=_NUMPY[self._stored_as],
                compressors=None,
                overwrite=True,
            )
        except OSError as error:
            raise _disk(path, error) from error

    def read(self, index: Index) -> Tensor:
        try:
            array = np.asarray(self._array[index])
        except (OSError, ValueError) as error:
            raise _disk(self._path, error) from error
        return torch.from_numpy(np.ascontiguousarray(array)).view(self._dtype).to(self._device)

    def write(self, index: Index, value: Tensor) -> None:
        array = value.detach().cpu().contiguous().view(self._stored_as).numpy()
        try:
            self._array[index] = array
        except OSError as error:
            raise _disk(self._path, error) from error

    def delete(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


_NUMPY: dict[torch.dtype, str] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.bool: "bool",
}


def chunk_edge(block: int, extent: int) -> int:
    """Return an edge that divides the block (if the block is smaller than the extent) and is no longer than a chunk."""
    if block >= extent:
        block = extent
        return max(1, min(block, _CHUNK))
    for parts in range(1, block + 1):
        if block % parts == 0 and block // parts <= _CHUNK:
            return block // parts
    return 1


def _disk(path: Path, error: Exception) -> NormfixError:
    reason = " ".join(str(error).split())[:160]
    return NormfixError(
        "NF327",
        f"the store on disk failed: {reason}. Check that the disk has room and is still there; nothing that was "
        "half written is used.",
        where=str(path),
    )


def _zarr() -> Any:
    with _IMPORT:
        try:
            import zarr
        except ImportError as error:
            raise NormfixError(
                "NF326",
                'beyond the memory budget values are kept with zarr: pip install "normfix[stream]".',
                where="store",
            ) from error
    return zarr


_IMPORT = threading.Lock()
