"""Dyed twins of tensors, side by side with the clean ones and never in their memory.

A twin belongs to a storage, not to a tensor object: views of one buffer share one dyed buffer, so a write
through any of them dyes all, and the clean buffer is never touched. Integers cannot hold NaN; for them a twin
is a mask that marks the elements which depend on dyed ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Dye", "Shadows", "holds_nan"]

_SWEEP_EVERY = 64


@dataclass(frozen=True, slots=True)
class Dye:
    """Where the dye is in one tensor.

    `inside` are the dimensions along which it is strictly inside: both ends are clean; `open` those along which
    some positions are clean.
    """

    count: int
    numel: int
    inside: tuple[int, ...] = ()
    open: tuple[int, ...] = ()

    @property
    def partial(self) -> bool:
        """Tell whether some elements are dyed and some are not."""
        return 0 < self.count < self.numel

    @property
    def full(self) -> bool:
        """Tell whether all elements are dyed."""
        return self.count == self.numel > 0


@dataclass(slots=True)
class _Entry:
    owner: StorageWeakRef
    memory: torch.UntypedStorage
    marks: bool
    known: dict[tuple[object, ...], Dye] = field(default_factory=dict)


class Shadows:
    """The twins of all storages that depend on the dye."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._until_sweep = _SWEEP_EVERY

    def of(self, clean: Tensor) -> Tensor | None:
        """Return the twin with the geometry of a clean tensor, or None if it is clean throughout.

        For integers and booleans the twin is a boolean mask.
        """
        entry = self._entry(clean)
        if entry is None or entry.marks == holds_nan(clean):
            return None
        return _like(clean, entry.memory, torch.bool if entry.marks else clean.dtype)

    def dye(self, clean: Tensor) -> Dye:
        """Return where the dye is in a clean tensor's twin."""
        entry = self._entry(clean)
        twin = self.of(clean)
        if entry is None or twin is None:
            return Dye(0, clean.numel())
        key = (tuple(clean.shape), clean.stride(), clean.storage_offset())
        if key not in entry.known:
            entry.known[key] = _dye_of(twin if entry.marks else twin.isnan())
        return entry.known[key]

    def put(self, clean: Tensor, twin: Tensor) -> None:
        """Let `twin`, of the shape of `clean`, be its twin; a boolean twin for integers and booleans."""
        if clean.numel() == 0 or not _has_storage(clean):
            return
        written = self.written(clean, blank=True)
        written.copy_(twin)
        self.touched(clean)

    def written(self, clean: Tensor, *, blank: bool = False) -> Tensor:
        """Return a twin that may be written to, made now if there is none.

        Args:
            clean: the tensor.
            blank: its content will be overwritten, so nothing is copied where there is no twin yet.
        """
        existing = self.of(clean)
        if existing is not None:
            return existing
        storage = clean.untyped_storage()
        marks = not holds_nan(clean)
        if marks:
            memory = torch.zeros(storage.nbytes() // clean.element_size(), dtype=torch.bool).untyped_storage()
        elif blank and clean.numel() * clean.element_size() == storage.nbytes():
            memory = torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage()
        else:
            memory = storage.clone()  # type: ignore[no-untyped-call]
        self._entries[storage._cdata] = _Entry(StorageWeakRef(storage), memory, marks)  # type: ignore[no-untyped-call]
        self._sweep()
        return _like(clean, memory, torch.bool if marks else clean.dtype)

    def touched(self, clean: Tensor) -> None:
        """Forget what was known of a twin that was written to."""
        entry = self._entry(clean)
        if entry is not None:
            entry.known.clear()

    def _entry(self, clean: Tensor) -> _Entry | None:
        if not self._entries or not _has_storage(clean):
            return None
        return self._entries.get(clean.untyped_storage()._cdata)

    def _sweep(self) -> None:
        """Let go of twins whose storage is gone; a weak reference keeps its number from being reused till then."""
        self._until_sweep -= 1
        if self._until_sweep == 0:
            self._until_sweep = _SWEEP_EVERY
            self._entries = {key: e for key, e in self._entries.items() if not e.owner.expired()}  # type: ignore[no-untyped-call]


def holds_nan(tensor: Tensor) -> bool:
    """Tell whether the tensor's dtype has a NaN."""
    return tensor.is_floating_point() or tensor.is_complex()


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized


def _like(clean: Tensor, memory: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    """Return a tensor in `memory` with the geometry of `clean`."""
    twin = torch.empty(0, dtype=dtype)
    twin.set_(memory, clean.storage_offset(), clean.shape, clean.stride())
    twin = twin.conj() if clean.is_conj() else twin
    return torch._neg_view(twin) if clean.is_neg() else twin


def _dye_of(mask: Tensor) -> Dye:
    count, numel = int(mask.count_nonzero()), mask.numel()
    if count in (0, numel):
        return Dye(count, numel)
    rank = range(mask.dim())
    reached = [mask.any(dim=[d for d in rank if d != dim]) if mask.dim() > 1 else mask for dim in rank]
    inside = tuple(d for d, at in enumerate(reached) if not at[0] and not at[-1])
    return Dye(count, numel, inside, tuple(d for d, at in enumerate(reached) if not at.all()))
