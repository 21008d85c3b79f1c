"""Stop a capture whose sizes become formulas that nobody can reason about.

Padding computed from the size ("same" as TensorFlow does it) puts the formula of an extent into a maximum at
every stride, several times. From the third maximum within a maximum on, torch.export spends minutes, then hours,
on the bounds of one size. How maxima nest is a property of the network, where time is one of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["LongFormulaError", "ShortSizes"]


class LongFormulaError(ValueError):
    """A size is a maximum of maxima; with space free, capturing the network would not end."""


class ShortSizes(TorchFunctionMode):
    """Lets calls through until one returns a tensor with an extent that is a maximum within a maximum.

    Raises:
        LongFormulaError: there is one.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and any(map(_nests, leaf.shape)):
                name = getattr(func, "__name__", str(func))
                raise LongFormulaError(f"the size of what {name} returns is a maximum of maxima")
        return result


def _nests(extent: int | torch.SymInt) -> bool:
    if isinstance(extent, int):
        return False
    from torch.utils._sympy.functions import Max  # which imports sympy

    return any(arg.has(Max) for maximum in extent.node.expr.atoms(Max) for arg in maximum.args)
