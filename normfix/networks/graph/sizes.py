"""Stop a capture whose sizes become formulas that nobody can reason about.

Padding computed from the size ("same" as TensorFlow does it) puts the formula of an extent into a maximum at
every stride, several times. From the third maximum within a maximum on, torch.export spends minutes, then hours,
on the bounds of one size. Padding to whole attention windows does the same with remainders: its first formulas of a
hundred terms are reached in seconds, the two hundred terms that follow take minutes. How formulas nest and how long
they are is a property of the network, where time is one of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["LARGEST_MULTIPLE", "LongFormulaError", "ShortSizes", "shortening"]

_LONGEST = 100
"""Terms of the longest formula; networks whose sizes stay free in reasonable time have up to 60."""


LARGEST_MULTIPLE = 1024
"""Pixels; of larger steps few images are multiples."""
_DIVIDING = frozenset({"FloorDiv", "CleanDiv", "IntTrueDiv", "Mod", "PythonMod"})
"""torch's functions of a size and a number, which become linear for multiples of the number."""


class LongFormulaError(ValueError):
    """A size is a maximum of maxima, or of too many terms; with space free, capturing would not end.

    Args:
        message: says which.
        formula: of the size, in symbols of the image's extents.
    """

    def __init__(self, message: str, formula: Any) -> None:
        super().__init__(message)
        self.formula = formula


def shortening(formula: Any) -> int | None:
    """Return the least number, in pixels, for whose multiples a formula of a size holds no division.

    Padding to whole windows is a remainder of the extent, and nothing where windows divide it.

    Args:
        formula: in symbols of the image's extents.

    Returns:
        1 where it holds none as it is; None where none is found up to LARGEST_MULTIPLE.
    """
    import sympy

    least = 1
    symbols = {s: sympy.Symbol(f"{s}_", integer=True, positive=True) for s in formula.free_symbols}
    while least <= LARGEST_MULTIPLE:
        found = formula.subs({s: least * multiple for s, multiple in symbols.items()})
        innermost = [division for division in _divisions(found) if not _divisions(division.args[0])]
        if not innermost:
            return least
        lacking = [int(d.args[1]) // math.gcd(int(d.args[1]), _content(d.args[0])) for d in innermost]
        if min(lacking) == 1:  # what remains of a constant does so for any multiples
            return None
        least *= min(sympy.primefactors(min(lacking)))
    return None


def _divisions(formula: Any) -> list[Any]:
    import sympy

    functions = (f for f in formula.atoms(sympy.Function) if type(f).__name__ in _DIVIDING)
    return [f for f in functions if f.args[1].is_Integer and f.args[1] > 1]


def _content(formula: Any) -> int:
    """Return the greatest number that divides all terms of a formula but its constant."""
    import sympy

    terms = sympy.Add.make_args(sympy.expand(formula))
    return math.gcd(*(int(term.as_coeff_Mul()[0]) for term in terms if not term.is_number))


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
            extents: tuple[Any, ...] = tuple(leaf.shape) if isinstance(leaf, Tensor) else ()
            for extent in extents:
                if fault := self._fault_of(extent):
                    name = getattr(func, "__name__", str(func))
                    self.fault = LongFormulaError(
                        f"the size of what {name} returns is {fault}", extent.node.expr
                    )
                    raise self.fault
        return result

    def _fault_of(self, extent: Any) -> str:
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
