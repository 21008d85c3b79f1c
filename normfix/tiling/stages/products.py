"""Products of two values summed along one dimension, however they are written: matmul, bmm, baddbmm, einsum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

__all__ = ["Labelled", "Product", "product_of", "rank_of"]

_aten = torch.ops.aten


class Labelled(NamedTuple):
    """A value and a name for each of its dimensions."""

    node: Node
    labels: tuple[str, ...]


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
