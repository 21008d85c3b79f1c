"""Maps that follow the image's extents and not its values, and whether they are the same throughout.

A map of ones is, numbers of positions are not: what they are far from the image's corner, no small image shows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfix.networks.graph.operators import name_of, taken_by, viewed_by

__all__ = ["is_laid", "is_sized", "space_of"]

_EVEN = frozenset(
    {"full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty", "rand", "randn"}
)


def is_laid(node: Node, space: Collection[Any]) -> bool:
    """Tell whether a map of the image's extent varies over it, as numbers of positions do, if what it is of does not.

    Args:
        node: computed from the image's extents alone.
        space: as `space_of` returns it.
    """
    return node.op == "call_function" and is_sized(node, space) and not _is_even(node, space)


def _is_even(node: Node, space: Collection[Any]) -> bool:
    """Tell whether a map of the image's extent has one value throughout, if the maps that it is made of have."""
    name, viewed = name_of(node), viewed_by(node)
    if name == "expand":
        source, shape = taken_by(node)[0].meta["val"].shape, node.meta["val"].shape
        pairs = zip(shape[len(shape) - len(source) :], source, strict=True)
        return all(isinstance(n, int) or not isinstance(m, int) or m == 1 for n, m in pairs)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return (
        pointwise
        or name in _EVEN
        or name.endswith("_like")
        or (viewed is not None and is_sized(viewed, space))
    )


def space_of(image: Node) -> frozenset[Any]:
    """Return the symbols of the image's free extents over space."""
    extents = image.meta["val"].shape[2:]
    return frozenset(s for n in extents if not isinstance(n, int) for s in n.node.expr.free_symbols)


def is_sized(node: Node, space: Collection[Any]) -> bool:
    """Tell whether a tensor follows the image's extent; a batch of vectors does not."""
    value = node.meta.get("val")
    extents: Sequence[Any] = value.shape if isinstance(value, Tensor) else ()
    free = (n.node.expr.free_symbols for n in extents if not isinstance(n, int))
    return any(symbol in space for symbols in free for symbol in symbols)
