"""Attention to keys that are stored: exact, in bounded memory, block of keys by block of keys.

softmax(q k^T s) v over all keys is put together from blocks of them: each gives its own attention o, its largest
score m and the sum t of exponentials of its scores less m. These merge as (Milakov and Gimelshein, arXiv 1805.02867;
Dao et al., arXiv 2205.14135)

    m = max_b m_b        t = sum_b exp(m_b - m) t_b        o = sum_b exp(m_b - m) t_b / t  o_b

The weights of the blocks and the sums are float64, so that the number of blocks does not show. One number m + log(t)
would not do: where a mask sets all scores of a query to -1e9 or lower, the logarithm is lost in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normfix.networks.devices import moved
from normfix.tiling.stages.biases import Bias
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.store import Kept

__all__ = [
    "ATTEND",
    "ATTEND_BIASED",
    "NUMBERS",
    "Tokens",
    "attend",
    "attend_to_stored",
    "attend_to_stored_biased",
]

_SCORES = 1 << 23
"""Products of a query and a key at a time, all heads together."""

_LEVELLED = 64
"""Keys whose largest product with a query tells about how large those of others are."""


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


def _attended(query: Tensor, keys: Tensor, values: Tensor, *others: object) -> Tensor:
    """Return what stands for an attention while a graph is captured, with a bias or without."""
    return query.new_empty((*query.shape[:-1], values.shape[-1]))


attend.register_fake(_attended)
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


@torch.library.custom_op("normfix::numbers", mutates_args=())
def _numbers(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Return the numbers of the positions of a map, in the order of its tokens: of the extents of `dims`."""
    extents = [x.shape[d] for d in dims]
    return torch.arange(math.prod(extents), device=x.device).reshape(extents)


@_numbers.register_fake
def _(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.new_empty([x.shape[d] for d in dims], dtype=torch.int64)


NUMBERS = torch.ops.normfix.numbers.default


@torch.library.custom_op("normfix::attend_biased", mutates_args=())
def _attend_biased(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    space: int,
    bias: Tensor,
    numbers: Tensor,
    floor: float,
) -> Tensor:
    """Attend as `attend` does, with a bias (..., L, K) that is added, or a mask that is true where a key counts.

    `numbers` (L,) are those of the queries among the ones that the bias has; `floor` is what a mask sets scores to.
    """
    found = _Merged(query, scale)
    found.add(_flat(keys, space), _flat(values, space), bias.index_select(-2, numbers))
    return found.result()


_attend_biased.register_fake(_attended)
ATTEND_BIASED = torch.ops.normfix.attend_biased.default


def attend_to_stored_biased(
    query: Tensor,
    keys: Tokens | Tensor,
    values: Tokens | Tensor,
    scale: float,
    space: int,
    bias: Bias | None,
    numbers: Tensor,
    floor: float,
) -> Tensor:
    """Attend to what the store holds of the whole image; without a bias, which moves no reach, where there is none.

    Raises:
        NotInStages: NF324 where a query scores so low that keys which a mask sets to the floor count as well.
    """
    if isinstance(keys, Tensor) or isinstance(values, Tensor) or bias is None:
        return attend_to_stored(query, keys, values, scale, space)
    found = _Merged(query, scale)
    start = 0
    most = found.keys_at_a_time
    for k, v in zip(keys.bands(most), values.bands(most), strict=True):
        found.add(k, v, bias.part(numbers, slice(start, start + k.shape[-2])))
        start += k.shape[-2]
    found.require_above(floor)
    return found.result()


class _Merged:
    """The attention of some queries, of the keys so far."""

    def __init__(self, query: Tensor, scale: float) -> None:
        # half floats as torch's own kernels: products in single precision
        self._dtype = query.dtype
        self._query = query if query.dtype == torch.float64 else query.float()
        self._scale = scale
        self._sum: Tensor | None = None
        self._largest: Tensor | None = None
        self._total: Tensor | None = None
        self._level: Tensor | None = None

    @property
    def keys_at_a_time(self) -> int:
        """Return how many keys make a block."""
        return max(1, _SCORES // max(1, math.prod(self._query.shape[:-1])))

    def add(self, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
        """Take a block of keys (..., n, E) and their values (..., n, V), with a bias or mask (..., L, n) of theirs."""
        if bias is None and _is_fused(self._query, keys, values):
            part, log = self._fused(keys.to(self._query.dtype), values.to(self._query.dtype))
            self._merge(part.double(), log.double(), torch.ones_like(log, dtype=torch.float64))
            return
        most = self.keys_at_a_time
        start = 0
        for k, v in zip(torch.split(keys, most, -2), torch.split(values, most, -2), strict=True):
            # in place: the products are more than the caches hold
            scores = (self._query @ k.to(self._query.dtype).transpose(-1, -2)).mul_(self._scale)
            if bias is not None:
                scores = _biased(scores, bias[..., start : start + k.shape[-2]])
                start += k.shape[-2]
            # a query that no key of the block counts for has weights of nought
            largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True).double()
            part = weights @ v.to(self._query.dtype)
            self._merge(part.double() / total.clamp_min(_SMALLEST), largest.double(), total)

    def _fused(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention (..., L, V) of a block and the logarithms (..., L, 1) of its sums of exponentials.

        The logarithms are less by the same of each query in every block, which merging takes no notice of.
        """
        # (1, heads, L, E), as the kernel takes them: it reads features as neighbours, wherever they lie
        self._query = self._query.contiguous()  # once, for all blocks of keys
        query, keys, values = (
            x.contiguous().reshape(1, -1, *x.shape[-2:]) for x in (self._query, keys, values)
        )
        if self._level is None:
            # the logarithms are rounded to the dtype: from about their own height on, so that little is lost
            products = query @ keys[..., :_LEVELLED, :].transpose(-1, -2)
            level = products.amax(-1, keepdim=True) * self._scale
            self._level = torch.nan_to_num(level, nan=0.0, posinf=0.0, neginf=0.0)
        part, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=-self._level, scale=self._scale
        )
        shape = self._query.shape
        return part.reshape(shape), log.reshape(*shape[:-1], 1)

    def require_above(self, floor: float) -> None:
        """Refuse scores so low that a key whose score is the floor counts beside them.

        Raises:
            NotInStages: NF324.
        """
        assert self._largest is not None
        assert self._total is not None
        if floor > -math.inf and not bool((self._largest + self._total.log() > floor + _NOTHING).all()):
            raise NotInStages(
                "NF324",
                f"a position scores about as low with all keys as its mask sets keys to that do not count ({floor:g}), "
                "so these count as well. Set them to -inf, or predict the image whole.",
                where="attention",
            )

    def result(self) -> Tensor:
        """Return (..., L, V)."""
        assert self._sum is not None
        return self._sum.to(self._dtype)

    def _merge(self, part: Tensor, largest: Tensor, total: Tensor) -> None:
        if self._sum is None or self._largest is None or self._total is None:
            self._sum, self._largest, self._total = part, largest, total
            return
        level = torch.maximum(self._largest, largest)
        before, now = self._total * torch.exp(self._largest - level), total * torch.exp(largest - level)
        self._largest, self._total = level, before + now
        counted = self._total.clamp_min(_SMALLEST)
        self._sum = self._sum * (before / counted) + part * (now / counted)


def _is_fused(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Tell whether torch's own kernel for attention on a CPU takes these; of others none tells what blocks merge by."""
    return (
        query.device.type == "cpu"
        and query.shape[-1] == values.shape[-1]
        and query.shape[:-2] == keys.shape[:-2] == values.shape[:-2]
        and min(query.numel(), keys.numel()) > 0
    )


def _biased(scores: Tensor, bias: Tensor) -> Tensor:
    if bias.dtype == torch.bool:
        return scores.masked_fill(~bias, -math.inf)
    return scores + bias.to(scores.dtype)


_NOTHING = 60.0
"""Scores lower than others by this count nothing in float64, a million keys of them together: 1e6 exp(-60) is 1e-20."""

_SMALLEST = 1e-300
"""What a sum of exponentials that is nought is divided by."""


def _flat(x: Tensor, space: int) -> Tensor:
    return x.flatten(-1 - space, -2)
