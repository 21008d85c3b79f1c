"""Formulas of torch.export's sizes as text that normfix.records.sizes reads: "W//8 == 2*(W//16)".

They are sympy's, of which torch has its own functions for what Python does to integers. A function that is not listed
has no text, rather than a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NoText", "text_of"]


class NoText(ValueError):  # noqa: N818 - a finding, not a fault
    """A formula has a function in it that no text stands for."""


_SUM, _PRODUCT, _ATOM = range(3)
"""How strongly a text holds together."""

_RELATIONS = {
    "Equality": "==",
    "Unequality": "!=",
    "LessThan": "<=",
    "StrictLessThan": "<",
    "GreaterThan": ">=",
    "StrictGreaterThan": ">",
}
_BETWEEN = {
    "Mod": "%",
    "PythonMod": "%",
    "FloorDiv": "//",
    "CleanDiv": "//",
    "IntTrueDiv": "/",
    "FloatTrueDiv": "/",
    "FloatPow": "**",
    "PowByNatural": "**",
    "Pow": "**",
}
_CALLS = {
    "Max": "max",
    "Min": "min",
    "Abs": "abs",
    "TruncToInt": "trunc",
    "TruncToFloat": "trunc",
    "FloorToInt": "floor",
    "floor": "floor",
    "CeilToInt": "ceil",
    "ceiling": "ceil",
    "RoundToInt": "round",
    "OpaqueUnaryFn_sqrt": "sqrt",
}
_NOTHING = frozenset({"ToFloat", "Identity"})


def text_of(formula: Any, names: Mapping[Any, str]) -> str:
    """Return a formula as text.

    Args:
        formula: of sympy.
        names: of its symbols.

    Raises:
        NoText: a function in it has none.
    """
    return _text(formula, names)[0]


def _text(formula: Any, names: Mapping[Any, str]) -> tuple[str, int]:
    kind, args = type(formula).__name__, formula.args
    if formula in names:
        return names[formula], _ATOM
    if formula.is_number and not args:
        number = int(formula) if formula.is_integer else float(formula)
        return str(number), _ATOM if number >= 0 else _SUM
    if kind in _NOTHING:
        return _text(args[0], names)
    if kind == "Add":
        return _sum(args, names), _SUM
    if kind == "Mul":
        return _product(args, names), _PRODUCT
    if kind in _RELATIONS:
        return f" {_RELATIONS[kind]} ".join(_text(arg, names)[0] for arg in args), _SUM
    if kind in _BETWEEN and len(args) == 2:
        left, right = (_held(arg, names, _ATOM) for arg in args)
        spaced = _BETWEEN[kind] in ("%", "/")
        return f"{left} {_BETWEEN[kind]} {right}" if spaced else f"{left}{_BETWEEN[kind]}{right}", _PRODUCT
    if kind in _CALLS:
        return f"{_CALLS[kind]}({', '.join(sorted(_text(arg, names)[0] for arg in args))})", _ATOM
    raise NoText(f"{kind} has no text")


def _held(formula: Any, names: Mapping[Any, str], strength: int) -> str:
    text, own = _text(formula, names)
    return text if own >= strength else f"({text})"


def _sum(terms: Sequence[Any], names: Mapping[Any, str]) -> str:
    """Write positive terms first, numbers last."""
    signed = [(term.could_extract_minus_sign(), bool(term.is_number), term) for term in terms]
    parts = [
        (minus, number, _held(-term if minus else term, names, _PRODUCT)) for minus, number, term in signed
    ]
    first, *rest = sorted(parts)
    begin = f"-{first[2]}" if first[0] else first[2]
    return begin + "".join(f" - {text}" if minus else f" + {text}" for minus, _, text in rest)


def _product(factors: Sequence[Any], names: Mapping[Any, str]) -> str:
    """Write numbers first, a fraction as a division."""
    above: list[str] = []
    below: list[str] = []
    numbers = [factor for factor in factors if factor.is_number]
    others = sorted(_held(factor, names, _ATOM) for factor in factors if not factor.is_number)
    for number in numbers:
        top, bottom = (int(number.p), int(number.q)) if number.is_Rational else (float(number), 1)
        above += [str(top)] * (top != 1)
        below += [str(bottom)] * (bottom != 1)
    text = "*".join([*above, *others])
    return " / ".join([text, *below])
