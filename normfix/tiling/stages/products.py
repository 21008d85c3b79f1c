"""Products of two values summed along one dimension, however they are written: matmul, bmm, baddbmm, einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

__all__ = ["Labelled", "Product", "keeps", "order_of", "product_of", "rank_of"]

_aten = torch.ops.aten


class Labelled(NamedTuple):
    """A value and a name for each of its dimensions."""

    node: Node
    labels: tuple[str, ...]

    def extent(self, label: str) -> Any:
        """Return the extent of the dimension with a name."""
        return self.node.meta["val"].shape[self.labels.index(label)]


class Product(NamedTuple):
    """Two values whose product is summed over the one name that only they have, times a number."""

    left: Labelled
    right: Labelled
    result: tuple[str, ...]
    scale: float


def product_of(node: Node) -> Product | None:
    """Return a node as a product of two values with one dimension summed, None if it is none."""
    if node.target is _aten.einsum.default:
        return _einsum(node)
    if node.target in (_aten.matmul.default, _aten.bmm.default, _aten.mm.default):
        left, right, scale = *node.args[:2], 1.0
    elif node.target is _aten.baddbmm.default and node.kwargs.get("beta", 1) == 0:
        left, right, scale = *node.args[1:3], float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    else:
        return None
    rank = rank_of(node)
    if not (isinstance(left, Node) and isinstance(right, Node)) or rank < 2:
        return None
    if rank_of(left) != rank or rank_of(right) != rank:
        return None
    batch = tuple(f"batch{d}" for d in range(rank - 2))
    return Product(
        Labelled(left, (*batch, "rows", "summed")),
        Labelled(right, (*batch, "summed", "columns")),
        (*batch, "rows", "columns"),
        scale,
    )


def _einsum(node: Node) -> Product | None:
    operands = node.args[1]
    inputs, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    if not arrow or "." in inputs or not isinstance(operands, list | tuple) or len(operands) != 2:
        return None
    a, b = inputs.split(",")
    summed = set(a + b) - set(result)
    every = [len(set(labels)) == len(labels) for labels in (a, b, result)]
    if len(summed) != 1 or not summed <= set(a) & set(b) or not all(every):
        return None
    left, right = operands
    return Product(Labelled(left, tuple(a)), Labelled(right, tuple(b)), tuple(result), 1.0)  # type: ignore[arg-type]


def rank_of(node: Node) -> int:
    """Return the number of dimensions of a tensor, 0 for anything else."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def keeps(node: Node) -> bool:
    """Tell whether a node gives its operand as it is, or in another dtype."""
    if node.target in (_aten.dropout.default, _aten.feature_dropout.default):
        return node.args[2] is False
    return node.target in (
        _aten.clone.default,
        _aten.alias.default,
        _aten.contiguous.default,
        _aten.detach.default,
        _aten.to.dtype,
        _aten._to_copy.default,
        _aten.type_as.default,
    )


def order_of(node: Node) -> Sequence[int] | None:
    """Return the order in which a node puts dimensions, None if it does something else."""
    order = list(range(rank_of(node)))
    if node.target is _aten.permute.default:
        return [order[int(d)] for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    if node.target is _aten.transpose.int:
        a, b = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
    elif node.target in (_aten.mT.default, _aten.t.default) and len(order) > 1:
        a, b = -2, -1
    else:
        return None
    order[a], order[b] = order[b], order[a]
    return order
