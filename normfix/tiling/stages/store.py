"""Where values are kept between stages: in memory within a budget, and on disk where a run is to outlive its process.

What is read may be a view of what is stored; programs are functional, so nothing writes into it. A store with a
folder keeps every value on disk (normfix.tiling.stages.chunks) and, within the budget, in memory as well.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from normfix.errors import NormfixError
from normfix.networks.devices import CPU, Landing, room
from normfix.tiling.stages.budget import Budget
from normfix.tiling.stages.chunks import Chunked, Seals

__all__ = ["Kept", "Store"]

Index = tuple[slice, ...]


class Kept(Protocol):
    """One stored array."""

    def read(self, index: Index) -> Tensor:
        """Return a window, which the caller must not change."""

    def write(self, index: Index, value: Tensor) -> Seals | None:
        """Write a window; return the seals of what is on disk."""


class Store:
    """Creates stored arrays and forgets them.

    Args:
        budget: bytes of memory; None is no limit.
        folder: where values are kept on disk; what is there already under a value's name is continued.
        device: where values are kept while they fit there; the others are in the host's memory, and come from there.
        aside: bytes of the device to leave free for the blocks that are computed.
        shared: other processes write too, so nothing is read from this one's memory.
        run: what is computed, as a digest; a chunk of another run is no value of this one.
    """

    def __init__(
        self,
        budget: int | None = None,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        *,
        aside: int = 0,
        shared: bool = False,
        run: str = "",
    ) -> None:
        self._run = run
        self._folder, self._device = folder, torch.device(device)
        self._there = Budget(_most_there(self._device, budget, aside))
        self._on_device: dict[str, int] = {}
        self._limit = 0 if shared else budget
        self._sizes: dict[str, tuple[bool, int]] = {}
        self._kept: dict[str, Kept] = {}
        self.budget = self.fresh_budget()

    def fresh_budget(self) -> Budget:
        """Return a budget like this store's with nothing taken."""
        return Budget(self._limit, lasting=self._folder is not None)

    def require(self, on_disk: int) -> None:
        """Refuse before anything is computed what the folder has no room for.

        Raises:
            NormfixError: NF326 if there is no folder, or it has less room than `on_disk` bytes.
        """
        if not on_disk:
            return
        if self._folder is None:
            raise self._too_small(on_disk)
        free = shutil.disk_usage(self._folder).free + _bytes_in(self._folder)
        if free < on_disk:
            raise NormfixError(
                "NF326",
                f"{on_disk:,} bytes between stages go to disk, and the folder has {free:,} free. "
                "Name a folder with more room.",
                where=str(self._folder),
            )

    def create(self, name: str, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[int]) -> Kept:
        """Make room for an array, or open it as an earlier process left it.

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
        self._kept[name] = kept = self._created(name, shape, dtype, chunks, fits)
        return kept

    def __getitem__(self, name: str) -> Kept:
        return self._kept[name]

    def free(self, name: str) -> None:
        """Forget an array and give its room back."""
        kept = self._kept.pop(name)
        fits, size = self._sizes.pop(name)
        self.budget.give(size, fits)
        if name in self._on_device:
            self._there.give(self._on_device.pop(name), in_memory=True)
        if not isinstance(kept, _InMemory | _OnHost):
            _on_disk(kept).delete()

    def seal(self, seals: Mapping[str, str]) -> None:
        """Take over the seals of chunks that were written elsewhere or before; see Chunked."""
        for place, seal in seals.items():
            kept = self._kept.get(place.partition("/")[0])
            if kept is not None and not isinstance(kept, _InMemory | _OnHost):
                _on_disk(kept).seal({place: seal})

    def whole(self, name: str, index: Index) -> bool:
        """Tell whether all of a window is there that an earlier process wrote."""
        kept = self._kept[name]
        return not isinstance(kept, _InMemory | _OnHost) and _on_disk(kept).whole(index)

    def _created(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[int], fits: bool
    ) -> Kept:
        if self._folder is None:
            if not fits:
                raise self._too_small(self._sizes[name][1])
            return self._in_memory(name, shape, dtype)
        lasting = Chunked(self._folder / name, shape, dtype, chunks, CPU, self._run)
        if lasting.create() and fits:
            return _InBoth(self._in_memory(name, shape, dtype), lasting)
        return lasting

    def _in_memory(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> _InMemory | _OnHost:
        """Make room on the device, else in the host's memory."""
        size = self._sizes[name][1]
        if self._device.type == "cpu":
            return _InMemory(shape, dtype, CPU)
        if not self._there.fits(size):
            return _OnHost(shape, dtype)
        self._there.take(size)
        self._on_device[name] = size
        return _InMemory(shape, dtype, self._device)

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


class _OnHost:
    """Is in the host's memory, and written by a device."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._landing = Landing(_large(shape, dtype))

    def read(self, index: Index) -> Tensor:
        return self._landing.read(index)

    def write(self, index: Index, value: Tensor) -> None:
        self._landing.write(index, value)


def _large(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an array without values; NumPy asks for large pages, whose first touch takes a tenth of the time."""
    count = math.prod(shape)
    pages = np.empty(max(1, count) * torch.empty((), dtype=dtype).element_size(), np.uint8)
    return torch.from_numpy(pages).view(dtype)[:count].reshape(tuple(shape))


class _InBoth:
    """Is written to disk and to memory, and read from memory."""

    def __init__(self, memory: _InMemory | _OnHost, disk: Chunked) -> None:
        self._memory, self.disk = memory, disk

    def read(self, index: Index) -> Tensor:
        return self._memory.read(index)

    def write(self, index: Index, value: Tensor) -> Seals:
        self._memory.write(index, value)
        return self.disk.write(index, value)


def _on_disk(kept: Kept) -> Chunked:
    found = kept.disk if isinstance(kept, _InBoth) else kept
    assert isinstance(found, Chunked)
    return found


_SHARE = 0.8
"""Of what a device has free, the part that values between stages may take: other programs are there too."""


def _most_there(device: torch.device, budget: int | None, aside: int) -> int | None:
    """Return how many bytes of a device hold values between stages: within the budget, and beside the blocks."""
    free = room(device)
    limits = [n for n in (budget, None if free is None else int(free * _SHARE)) if n is not None]
    return max(0, min(limits) - aside) if limits else None


def _bytes_in(folder: Path) -> int:
    """Return what an earlier process left in the folder, which this run counts as its own."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
