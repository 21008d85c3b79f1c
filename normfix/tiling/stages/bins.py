"""Pools to a fixed number of bins, of a whole image: put together from blocks, wherever these are cut.

Bin i of n over an extent S covers floor(i S / n) ... ceil((i + 1) S / n) - 1. Neighbours overlap where n does not
divide S, so each block adds to every bin that it touches what of the bin lies in it:

    mean       sum_b sum_{p in bin, b} x_p  /  positions of the bin        sums in float64
    maximum    max_b max_{p in bin, b} x_p

How many positions of each bin were seen is counted too: a block that is missing leaves a bin short.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from normfix.images.sources import Span
from normfix.tiling.stages.refusals import NotInStages

__all__ = ["Bins", "Merging", "Partial"]

Partial = dict[str, Any]
"""What a block gives: `value`, positions `seen`, `dtype`, and of bins the `first` per axis that it touches."""


class Merging(Protocol):
    """Something of a fixed size that blocks of a map are put together to: `counts` are its extents over space."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Return its extents over space."""

    def partial(self, block: Tensor, spans: Sequence[Span], extents: Sequence[int]) -> Partial:
        """Return what a block (..., *space) gives, which lies at `spans` of a map of these extents."""

    def join_(self, parts: list[Partial], part: Partial) -> None:
        """Add what a block gives, to what is there already if that is as large together."""

    def merged(self, parts: Sequence[Partial], extents: Sequence[int], where: str) -> Tensor:
        """Return what blocks give that cover the map; NF325 if they do not, each position once."""


@dataclass(frozen=True, slots=True)
class Bins:
    """A pool of the last dimensions of a map to `counts` bins."""

    kind: Literal["mean", "maximum"]
    counts: tuple[int, ...]

    def partial(self, block: Tensor, spans: Sequence[Span], extents: Sequence[int]) -> Partial:
        """Return what a block gives.

        Args:
            block: (..., *space).
            spans: where it lies in the map, per dimension of space.
            extents: of the whole map.
        """
        axes = [self._touched(axis, span, extents[axis]) for axis, span in enumerate(spans)]
        shape = block.shape[: -len(axes)]
        wide = torch.float64 if self.kind == "mean" else block.dtype
        value = block.new_empty((*shape, *(len(axis) for axis in axes)), dtype=wide)
        seen = torch.empty([len(axis) for axis in axes], dtype=torch.int64)
        for place in itertools.product(*(range(len(axis)) for axis in axes)):
            cut = [axis[i][1] for axis, i in zip(axes, place, strict=True)]
            window: Any = (..., *(slice(a, b) for a, b in cut))
            part = block[window].flatten(len(shape))
            there: Any = (..., *place)
            value[there] = part.sum(-1, dtype=wide) if self.kind == "mean" else part.amax(-1)
            seen[place] = math.prod(b - a for a, b in cut)
        first = [axis[0][0] for axis in axes]
        return {
            "first": first,
            "value": value,
            "seen": seen,
            "dtype": str(block.dtype).removeprefix("torch."),
        }

    def _touched(self, axis: int, span: Span, extent: int) -> list[tuple[int, Span]]:
        """Return the bins that a span meets, and what of the span is in them, counted from its start."""
        start, stop = span
        found = []
        for i in range(self.counts[axis]):
            first, last = self._covers(axis, i, extent)
            if first < stop and start < last:
                found.append((i, (max(first, start) - start, min(last, stop) - start)))
        return found

    def _covers(self, axis: int, i: int, extent: int) -> Span:
        """Return what bin i covers, end excluded."""
        count = self.counts[axis]
        return i * extent // count, -(-(i + 1) * extent // count)

    def join_(self, parts: list[Partial], part: Partial) -> None:
        """Add what a block gives; see Merging."""
        parts.append(part)

    def merged(self, parts: Sequence[Partial], extents: Sequence[int], where: str) -> Tensor:
        """Return the bins of the whole map, (..., *counts).

        Args:
            parts: of blocks that cover the map, each position once.
            extents: of the whole map.
            where: names the pool.

        Raises:
            NotInStages: NF325 if the blocks do not cover it so.
        """
        one: Tensor = parts[0]["value"]
        start = 0 if self.kind == "mean" else -torch.inf
        whole = one.new_full((*one.shape[: -len(self.counts)], *self.counts), start)
        seen = torch.zeros(self.counts, dtype=torch.int64)
        for part in parts:
            value = part["value"].to(whole.device)
            places = zip(part["first"], part["seen"].shape, strict=True)
            index = tuple(slice(a, a + n) for a, n in places)
            there: Any = (..., *index)
            known = whole[there]
            whole[there] = known + value if self.kind == "mean" else torch.maximum(known, value)
            seen[index] += part["seen"]
        sizes = self._sizes(extents)
        if not torch.equal(seen, sizes):
            raise NotInStages("NF325", "blocks do not cover each of its bins once.", where=where)
        mean = whole / sizes.to(whole.device) if self.kind == "mean" else whole
        return mean.to(getattr(torch, parts[0]["dtype"]))

    def _sizes(self, extents: Sequence[int]) -> Tensor:
        """Return how many positions each bin has."""
        sizes = torch.ones(self.counts, dtype=torch.int64)
        for axis, (count, extent) in enumerate(zip(self.counts, extents, strict=True)):
            covers = [self._covers(axis, i, extent) for i in range(count)]
            shape = [-1 if a == axis else 1 for a in range(len(self.counts))]
            sizes = sizes * torch.tensor([b - a for a, b in covers]).reshape(shape)
        return sizes
