"""Stop a capture whose sizes become formulas that nobody can reason about.

Padding computed from the size ("same" as TensorFlow does it) puts the formula of an extent into a maximum at
every stride, several times. From the third maximum within a maximum on, torch.export spends minutes, then hours,
on the bounds of one size. Padding to whole attention windows does the same with remainders: its first formulas of a
hundred terms are reached in seconds, the two hundred terms that follow take minutes. How formulas nest and how long
they are is a property of the network, where time is one of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["LongFormulaError", "ShortSizes"]

_LONGEST = 100
"""Terms of the longest formula; networks whose sizes stay free in reasonable time have up to 60."""


class LongFormulaError(ValueError):
    """A size is a maximum of maxima, or of too many terms; with space free, capturing would not end."""


class ShortSizes(TorchFunctionMode):
    """Lets calls through until one returns a tensor with an extent that is a formula too long or too deep.

    `fault` keeps what was raised: who calls the network may have made another error of it.

    Raises:
        LongFormulaError: there is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fault: LongFormulaError | None = None
        self._short: set[Any] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            for extent in leaf.shape if isinstance(leaf, Tensor) else ():
                if fault := self._fault_of(extent):
                    name = getattr(func, "__name__", str(func))
                    self.fault = LongFormulaError(f"the size of what {name} returns is {fault}")
                    raise self.fault
        return result

    def _fault_of(self, extent: int | torch.SymInt) -> str:
        if isinstance(extent, int) or extent.node.expr in self._short:
            return ""
        if _nests(extent.node.expr):
            return "a maximum of maxima"
        if _is_long(extent.node.expr):
            return f"a formula of more than {_LONGEST} terms"
        self._short.add(extent.node.expr)
        return ""


def _nests(formula: Any) -> bool:
    from torch.utils._sympy.functions import Max  # which imports sympy

    return any(arg.has(Max) for maximum in formula.atoms(Max) for arg in maximum.args)


def _is_long(formula: Any) -> bool:
    terms = [formula]
    for count, term in enumerate(terms, start=1):
        if count > _LONGEST:
            return True
        terms.extend(term.args)
    return False
