"""Attention to keys that are stored: exact, in bounded memory, block of keys by block of keys.

softmax(q k^T s) v over all keys is put together from blocks of them: each gives its own attention and the logarithm of
its sum of exponentials, and these merge as (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135)

    l = log(sum_b exp(l_b))        o = sum_b exp(l_b - l) o_b

The weights of the blocks and the sum are float64, so that the number of blocks does not show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from normfix.networks.devices import moved
from normfix.tiling.stages.store import Kept

__all__ = ["ATTEND", "Tokens", "attend", "attend_to_stored"]

_SCORES = 1 << 23
"""Products of a query and a key at a time, all heads together."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Keys or values of a whole image: a stored array (..., *space, E), `space` dimensions of it being positions."""

    kept: Kept
    shape: tuple[int, ...]
    space: int
    device: torch.device

    def bands(self, most: int) -> Iterator[Tensor]:
        """Yield (..., n, E), of about `most` tokens or one row, in order."""
        row = math.prod(self.shape[-self.space : -1])
        rows = max(1, most // max(1, row))
        first = len(self.shape) - 1 - self.space
        for start in range(0, self.shape[first], rows):
            index = [slice(None)] * len(self.shape)
            index[first] = slice(start, min(self.shape[first], start + rows))
            yield _flat(moved(self.kept.read(tuple(index)), self.device), self.space)


@torch.library.custom_op("normfix::attend", mutates_args=())
def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, space: int) -> Tensor:
    """Attend to keys and values that still have their positions in `space` dimensions.

    Args:
        query: (..., L, E).
        keys: (..., *space, E).
        values: (..., *space, V).
        scale: of the products of queries and keys.
        space: number of spatial dimensions.

    Returns:
        (..., L, V).
    """
    found = _Merged(query, scale)
    found.add(_flat(keys, space), _flat(values, space))
    return found.result()


@attend.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, scale: float, space: int) -> Tensor:
    return query.new_empty((*query.shape[:-1], values.shape[-1]))


ATTEND = torch.ops.normfix.attend.default


def attend_to_stored(
    query: Tensor, keys: Tokens | Tensor, values: Tokens | Tensor, scale: float, space: int
) -> Tensor:
    """Attend to what the store holds of the whole image; see `attend`."""
    if isinstance(keys, Tensor) or isinstance(values, Tensor):
        whole: Tensor = attend(query, keys, values, scale, space)
        return whole
    found = _Merged(query, scale)
    most = found.keys_at_a_time
    for k, v in zip(keys.bands(most), values.bands(most), strict=True):
        found.add(k, v)
    return found.result()


class _Merged:
    """The attention of some queries, of the keys so far."""

    def __init__(self, query: Tensor, scale: float) -> None:
        # half floats as torch's own kernels: products in single precision
        self._dtype = query.dtype
        self._query = query if query.dtype == torch.float64 else query.float()
        self._scale = scale
        self._sum: Tensor | None = None
        self._log: Tensor | None = None

    @property
    def keys_at_a_time(self) -> int:
        """Return how many keys make a block."""
        return max(1, _SCORES // max(1, math.prod(self._query.shape[:-1])))

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Take a block of keys (..., n, E) and their values (..., n, V)."""
        most = self.keys_at_a_time
        for k, v in zip(torch.split(keys, most, -2), torch.split(values, most, -2), strict=True):
            scores = self._query @ k.to(self._query.dtype).transpose(-1, -2) * self._scale
            largest = scores.amax(-1, keepdim=True)
            weights = torch.exp(scores - largest)
            total = weights.sum(-1, keepdim=True).double()
            part = weights @ v.to(self._query.dtype)
            self._merge(part.double() / total, largest.double() + total.log())

    def result(self) -> Tensor:
        """Return (..., L, V)."""
        assert self._sum is not None
        return self._sum.to(self._dtype)

    def _merge(self, part: Tensor, log: Tensor) -> None:
        if self._sum is None or self._log is None:
            self._sum, self._log = part, log
            return
        total = torch.logaddexp(self._log, log)
        self._sum = self._sum * torch.exp(self._log - total) + part * torch.exp(log - total)
        self._log = total


def _flat(x: Tensor, space: int) -> Tensor:
    return x.flatten(-1 - space, -2)
