"""Maps that are resized by their place in the whole image, read window by window.

An interpolation weighs a few positions of its source for each position i of its result, axis by axis. Where corners are
aligned, or a map of a fixed size is stretched over the image, which ones and by how much depends on i in the whole and
on both extents, so no block can compute it from itself. Here a window of the result reads the positions that it weighs,
at their place in the whole. What they are torch itself says, by its own arithmetic: it resizes

    combs    c_r(j) = 1 where j = r (mod K), else 0     the weight of the position j = r (mod K) that i weighs
    line     l(j) = j                                    near which j it lies

for a K of more positions than are weighed, so that no two of them fall on one comb.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from normfix.images.sources import Image, Span
from normfix.networks.devices import moved
from normfix.tiling.stages.store import Kept

__all__ = ["RESIZED", "Resizing", "Stretched"]

_TAPS = {"nearest": 1, "linear": 2, "cubic": 4}
_SLACK = 4
"""Positions by which the line may be off: it is rounded, and bent where a cubic meets the border."""

_PLANE = 2

_NEIGHBOURS = 2
"""Positions that are read beyond those that are weighed in float64."""

RESIZED = frozenset(
    {f"upsample_nearest{n}d" for n in (1, 2, 3)}
    | {f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)}
    | {"upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"}
    | {"_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"}
)
"""Operators of torch that resize axis by axis."""


@dataclass(frozen=True, slots=True)
class Resizing:
    """An interpolation: torch's name for it, whether corners are aligned, and stated factors per axis."""

    name: str
    aligned: bool | None
    factors: tuple[float | None, ...]

    def taps(self, axis: int, given: int, taken: int, dtype: torch.dtype, device: torch.device) -> Taps:
        """Return what each of `taken` positions weighs of `given` ones along an axis."""
        return _taps(self, axis, given, taken, dtype, device)

    def along(self, values: Tensor, axis: int, taken: int) -> Tensor:
        """(k, given) -> (k, taken), by torch; k > 1."""
        rank = len(self.factors)
        given, output = [1] * rank, [1] * rank
        given[axis], output[axis] = values.shape[1], taken
        if rank == _PLANE:
            # as rows or columns: torch's kernels with antialias take an image one pixel wide for another
            given[1 - axis] = output[1 - axis] = len(values)
            values = values if axis else values.T
            given = [1, *given]
        factors = [self.factors[a] if a == axis else None for a in range(rank)]
        corners = () if self.aligned is None else (self.aligned,)
        operator = getattr(torch.ops.aten, self.name).default
        result: Tensor = operator(values.reshape(1, -1, *given[-rank:]), output, *corners, *factors)
        return result[0, 0].T if rank == _PLANE and not axis else result.reshape(-1, taken)

    def most(self, given: int, taken: int) -> int:
        """Return how many positions are weighed at most."""
        kind = next((n for word, n in _TAPS.items() if word in self.name), 2)
        if self.name.endswith("_aa"):
            kind = kind * math.ceil(max(1.0, given / taken)) + 1
        return kind


class Taps(NamedTuple):
    """Per position of a result (n, k): the positions that it weighs, and their weights."""

    places: Tensor
    weights: Tensor


@lru_cache(maxsize=64)
def _taps(
    resizing: Resizing, axis: int, given: int, taken: int, dtype: torch.dtype, device: torch.device
) -> Taps:
    teeth = resizing.most(given, taken) + 2 * _SLACK
    line = torch.arange(given, dtype=torch.float64, device=device)
    residues = torch.arange(teeth, device=device)
    combs = (line.long() % teeth == residues[:, None]).to(dtype)
    weight = resizing.along(combs, axis, taken).T
    near = resizing.along(line.expand(2, given), axis, taken)[0]
    steps = torch.round((near[:, None] - residues) / teeth).long() * int(given > teeth)
    index = (residues + teeth * steps).clamp(0, given - 1)
    # those that are weighed come first
    order = torch.argsort((weight == 0).to(torch.uint8), dim=1, stable=True)
    count = max(1, int((weight != 0).sum(1).max()))
    return Taps(*(x.gather(1, order)[:, :count].contiguous() for x in (index, weight)))


@dataclass(frozen=True, slots=True)
class Stretched:
    """A resized map as something that is kept: a window of it is computed from what its source has there.

    `source` is a stored map or a value of a fixed size, None where it is the image, `pixels`; `given` and `taken` are
    the shapes of source and result (N, C, *space).
    """

    source: Kept | Tensor | None
    resizing: Resizing
    given: tuple[int, ...]
    taken: tuple[int, ...]
    device: torch.device
    pixels: Image | None = None

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """Return a window."""
        lead = len(self.taken) - len(self.resizing.factors)
        windows = [s.indices(n)[:2] for s, n in zip(index[lead:], self.taken[lead:], strict=True)]
        # which dtype the source is kept in shows when it is read: rounded otherwise it may weigh a neighbour
        reach = [
            (max(0, int(t.places.min()) - _NEIGHBOURS), min(n, int(t.places.max()) + 1 + _NEIGHBOURS))
            for t, n in zip(self._taps(windows, torch.float64), self.given[lead:], strict=True)
        ]
        x = self._window(reach)[index[:lead]]
        dtype = x.dtype
        x = x if dtype == torch.float64 else x.float()
        for axis, (taps, (first, _)) in enumerate(zip(self._taps(windows, x.dtype), reach, strict=True)):
            x = _weighed(x, lead + axis, Taps(taps.places - first, taps.weights))
        return x.to(dtype)

    def write(self, index: tuple[slice, ...], value: Tensor) -> None:
        """Refuse: it is computed."""
        raise TypeError("a map that is computed is not written to")

    def _taps(self, windows: Sequence[Span], dtype: torch.dtype) -> list[Taps]:
        """Return what each position of a window weighs, per axis."""
        lead = len(self.taken) - len(windows)
        extents = zip(self.given[lead:], self.taken[lead:], strict=True)
        every = [self.resizing.taps(a, m, n, dtype, self.device) for a, (m, n) in enumerate(extents)]
        return [Taps(*(x[a:b] for x in taps)) for taps, (a, b) in zip(every, windows, strict=True)]

    def _window(self, space: Sequence[Span]) -> Tensor:
        """Return what the source has in a window of space."""
        if self.pixels is not None:
            return moved(self.pixels.read(space), self.device)
        lead = (slice(0, n) for n in self.given[: -len(space)])
        index = (*lead, *(slice(a, b) for a, b in space))
        if isinstance(self.source, Tensor):
            return self.source[index]
        assert self.source is not None
        return moved(self.source.read(index), self.device)


def _weighed(x: Tensor, dim: int, taps: Taps) -> Tensor:
    """Return the sum of what is weighed along a dimension."""
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    total: Tensor | None = None
    for index, weight in zip(taps.places.unbind(1), taps.weights.unbind(1), strict=True):
        part = x.index_select(dim, index)
        if taps.places.shape[1] > 1 or bool((weight != 1).any()):
            part = part * weight.reshape(shape)
        total = part if total is None else total + part
    assert total is not None
    return total
