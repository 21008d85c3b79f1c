"""What a rule is: a function that reads a call and returns what it reads of each operand.

Operands that a rule leaves out are read whole, so that nothing is forgotten by silence.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from normfix.tiling.reach.calls import Call
from normfix.tiling.reach.links import NOTHING, Along, ByDimension, Link, Reading

__all__ = ["Rule", "aligned", "kept"]

Rule = Callable[[Call], list[Reading]]


def kept(call: Call, operand: Node, changed: dict[int, Link] | None = None) -> Reading:
    """Return a reading at the same positions along all dimensions but some, of an operand of the result's rank."""
    rank = len(call.extents(operand))
    changed = changed or {}
    return ByDimension(operand, tuple(changed.get(dim, Along(dim)) for dim in range(rank)))


def aligned(call: Call, operand: Node, *, trailing: int = 0) -> Reading:
    """Return a reading as broadcasting aligns it with the result: from the right, an extent of 1 stands for all.

    Args:
        call: that reads it.
        operand: a tensor.
        trailing: dimensions of the result that are not among what is aligned.
    """
    shape, ones = call.shape, call.sizes.ones
    extents = call.extents(operand)
    shift = len(shape) - trailing - len(extents)
    links: list[Link] = []
    for dim, extent in enumerate(extents):
        broadcast = extent == ones and shape[dim + shift] != ones
        links.append(NOTHING if broadcast else Along(dim + shift))
    return ByDimension(operand, tuple(links))
