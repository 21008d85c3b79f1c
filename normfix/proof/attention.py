"""Attention to keys that are held, by its formula in float64 and nothing of torch's attention.

softmax(q K^T / sqrt(d) + b) V        of torch.nn.MultiheadAttention between its projections
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from normfix.layers import FrozenKeys, FrozenOperand

__all__ = ["attended", "multiplied", "repeated"]


def attended(held: FrozenKeys, given: Mapping[str, Any]) -> Tensor:
    """Return what an attention gives for its queries with the keys that are held.

    Args:
        held: keys, values and biases.
        given: the call's arguments by name.
    """
    query = given["query"].double()
    keys, values = (repeated(t, query, *held.batch) for t in (held.keys, held.values))
    if "num_heads" in given:
        return _between_projections(query, keys, values, held.bias.double(), given)
    if given.get("enable_gqa"):
        keys, values = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (keys, values))
    return _weighted(query, keys, values, held.bias.double(), given.get("scale"))


def multiplied(
    held: FrozenOperand, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], which: int
) -> Tensor:
    """Return a product in float64 with what is held in place of its operand with that number, in the call's dtype."""
    leaves, structure = tree_flatten((args, dict(kwargs)))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    dtype = leaves[places[which]].dtype
    leaves[places[which]] = repeated(held.operand, leaves[places[which]], *held.batch)
    for place in places:
        leaves[place] = leaves[place].double()
    taken = tree_unflatten(leaves, structure)
    product: Tensor = function(*taken[0], **taken[1])
    return product.to(dtype)


def repeated(value: Tensor, like: Tensor, stacked: int, unit: int) -> Tensor:
    """Return what is held for as many images as an operand has, in its dtype."""
    return torch.cat([value.to(like.dtype)] * (like.shape[stacked] // unit), stacked)


def _weighted(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    products = torch.einsum("...le,...se->...ls", query, keys)
    scores = products * (1 / math.sqrt(query.shape[-1]) if scale is None else scale) + bias
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("...ls,...sv->...lv", weights / weights.sum(-1, keepdim=True), values)


def _between_projections(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, given: Mapping[str, Any]
) -> Tensor:
    """Return (L, N, E) of tokens (L, N, E) and (S, N, E)."""
    if given.get("use_separate_proj_weight"):
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = given["in_proj_weight"].chunk(3)
    offsets = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    heads: list[Tensor] = []
    for tokens, weight, offset in zip((query, keys, values), weights, offsets, strict=True):
        y = tokens @ weight.double().T + (0 if offset is None else offset.double())
        # (L, N, h*d) -> (N, h, L, d)
        heads.append(y.unflatten(-1, (given["num_heads"], -1)).permute(1, 2, 0, 3))
    # (N, h, L, d) -> (L, N, h*d)
    joined = _weighted(heads[0], heads[1], heads[2], bias, None).permute(2, 0, 1, 3).flatten(2)
    offset = given["out_proj_bias"]
    result: Tensor = joined @ given["out_proj_weight"].double().T
    return result if offset is None else result + offset.double()
