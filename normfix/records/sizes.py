"""For which image sizes a scan speaks: conditions of the captured graph, and the largest sizes that were run.

A network that asks `if h * w > 25600` is another network on larger images, and nothing that was measured on the one
holds for the other. A condition is such a question with its answer, in the image's extents: "H*W <= 25600". It is
data from a file like any other: its syntax tree is read, with numbers, extents, arithmetic and comparisons, and
nothing else has a meaning.

What repeats is told from what grows. With P the product of a condition's divisors, both sides gain a fixed amount
when an extent grows by P. "H % 16 == 0" is therefore the same question again at H + P: a lattice condition. Every
remainder is tried by what measures exact sizes, so an image off the lattice is no image outside of what was
proved. One is outside if a condition fails at its size and holds at another size of the same remainders; or if
the remainders were tried, and tiles differed.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from normfix.errors import NormfixError
from normfix.records.encoding import Record

__all__ = ["Condition", "ProvedSizes"]

_LONGEST = 1000
"""Characters of a condition."""
_LARGEST_PERIOD = 4096
_LEAST, _AFAR = 8, (1, 2, 16, 257, 4099)
"""The least extent, and how many periods further on, at which a condition is asked again."""

Extents = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition(Record):
    """One condition on the image's extents, and the source line that asks for it.

    `strict` tells that it counts as well where it fails for a remainder and holds for others.
    """

    text: str
    line: str
    strict: bool = False

    def holds(self, extents: Extents) -> bool:
        """Tell whether it holds; what has no value (a division by zero) does not.

        Raises:
            NormfixError: NF108 if the text is no condition.

        >>> Condition(text="H*W <= 25600", line="").holds({"H": 160, "W": 161})
        False
        """
        return bool(_value(_parsed(self.text), extents, self.text))

    def repeats(self, extents: Extents) -> bool:
        """Tell whether it is a lattice condition, asked near a size: both sides of it move alike.

        >>> Condition(text="W == 2*(W//2)", line="").repeats({"W": 96})
        True
        """
        here, period = self._difference(extents), self._period(extents)
        return period is not None and all(self._difference(size) == here for size in _afar(extents, period))

    def excludes(self, extents: Extents) -> bool:
        """Tell whether an image of a size is outside: it fails there, and holds at a size of the same remainders.

        >>> even = Condition(text="H % 2 == 0", line="")
        >>> small = Condition(text="H//512 == 0", line="")
        >>> even.excludes({"H": 33}), small.excludes({"H": 600})
        (False, True)
        """
        if self.strict or self.holds(extents):
            return not self.holds(extents)
        period = self._period(extents)
        if period is None:
            return True
        return any(self.holds(size) for size in (*_below(extents, period), *_afar(extents, period)))

    def _difference(self, extents: Extents) -> Any:
        """Return what its sides differ by."""
        tree = _parsed(self.text)
        if not isinstance(tree, ast.Compare):
            raise _malformed(self.text)
        left, right = (_value(side, extents, self.text) for side in (tree.left, tree.comparators[0]))
        return left - right

    def _period(self, extents: Extents) -> int | None:
        """Return by how much extents may grow so that its sides' difference grows evenly; None where that is far."""
        common, sure = _periods(_parsed(self.text))
        if common == sure or self._is_even(extents, common):
            return common
        return sure if sure <= _LARGEST_PERIOD else None

    def _is_even(self, extents: Extents, period: int) -> bool:
        """Tell whether the sides' difference grows by the same amount with each period, from many sizes on."""
        for name, start in itertools.product(extents, range(_LEAST, _LEAST + 16 * 37, 37)):
            steps = [self._difference({**extents, name: start + count * period}) for count in range(4)]
            if len({b - a for a, b in itertools.pairwise(steps)}) > 1:
                return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvedSizes(Record):
    """The sizes that a scan, and a proof by its geometry, speak for.

    `axes` names the spatial axes, one letter each. `conditions` hold for the network that was scanned; where one fails,
    the network is another; `crossed` are those on both sides of which tiles were found to equal the whole, at the sizes
    that were tried. `unknown` are the reasons why conditions do not tell everything, () where a graph with free
    sizes does: then only sizes up to those that were run are proved, `extents` by axis and `pixels` in all.
    """

    axes: str
    conditions: tuple[Condition, ...]
    crossed: tuple[Condition, ...]
    unknown: tuple[str, ...]
    extents: tuple[int, ...]
    pixels: int

    def limits(self) -> tuple[str, ...]:
        """Return in words which sizes are proved; () for all.

        >>> small = Condition(text="H*W <= 25600", line="net.py:7")
        >>> known = ProvedSizes(axes="HW", conditions=(small,), crossed=(), unknown=(), extents=(96, 96), pixels=9216)
        >>> known.limits()
        ('where H*W <= 25600 (net.py:7)',)
        """
        places = ((c.text, f" ({c.line})" if c.line else "") for c in self.conditions)
        limits = tuple(f"where {text}{place}" for text, place in places)
        if not self.unknown:
            return limits
        most = "x".join(map(str, self.extents))
        return (
            *limits,
            f"up to {most} along the axes and {self.pixels} pixels, at the sizes that were tried: "
            f"{self.unknown[0].rstrip('.')}",
        )

    def broken(self, size: Sequence[int], batch: int = 1) -> tuple[Condition, ...]:
        """Return the conditions that exclude a batch of images of these spatial extents."""
        return self._failing(self.conditions, size, batch)

    def passed(self, size: Sequence[int], batch: int = 1) -> tuple[Condition, ...]:
        """Return the crossed conditions that exclude a batch of images of these spatial extents."""
        return self._failing(self.crossed, size, batch)

    def exceeded(self, size: Sequence[int]) -> bool:
        """Tell whether only sizes that were run count, and this one is larger."""
        longer = any(n > most for n, most in zip(size, self.extents, strict=True))
        return bool(self.unknown) and (longer or math.prod(size) > self.pixels)

    def including(self, size: Sequence[int]) -> ProvedSizes:
        """Return them with a size that was run as well."""
        extents = tuple(map(max, size, self.extents))
        return replace(self, extents=extents, pixels=max(self.pixels, math.prod(size)))

    def _failing(
        self, conditions: Sequence[Condition], size: Sequence[int], batch: int
    ) -> tuple[Condition, ...]:
        extents = {"N": batch, **dict(zip(self.axes, size, strict=True))}
        return tuple(condition for condition in conditions if condition.excludes(extents))


def _below(extents: Extents, period: int) -> Iterator[dict[str, int]]:
    """Yield sizes of the same remainders that are no larger along some axes: the next one, and the least ones."""

    def smaller(n: int) -> list[int]:
        first = _LEAST + (n - _LEAST) % period
        return sorted({n, *(m for m in (first, first + period, n - period) if _LEAST <= m < n)})

    for values in itertools.product(*map(smaller, extents.values())):
        yield dict(zip(extents, values, strict=True))


def _afar(extents: Extents, period: int) -> Iterator[dict[str, int]]:
    """Yield larger sizes of the same remainders: along each axis alone, and along all."""
    for name, count in itertools.product(extents, _AFAR):
        yield {**extents, name: extents[name] + count * period}
    for count in _AFAR:
        yield {name: n + count * period for name, n in extents.items()}


_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    # of floats: a tower of integers would fill the memory
    ast.Pow: lambda a, b: math.pow(a, b),
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.And: lambda *values: all(values),
    ast.Or: lambda *values: any(values),
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "round": round,
    "sqrt": math.sqrt,
}


@cache
def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise _malformed(text)
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _malformed(text) from error


def _value(tree: ast.AST, extents: Extents, text: str) -> Any:
    try:
        return _computed(tree, extents)
    except (ArithmeticError, ValueError):  # no value at this size
        return math.nan if not isinstance(tree, ast.Compare | ast.BoolOp) else False
    except (KeyError, TypeError, RecursionError) as error:
        raise _malformed(text) from error


def _computed(tree: ast.AST, extents: Extents) -> Any:
    def computed(*trees: ast.AST) -> list[Any]:
        return [_computed(part, extents) for part in trees]

    match tree:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name):
            return extents[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](*computed(left, right))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _OPERATORS[type(op)](*computed(left, right))
        case ast.BoolOp(op=op, values=values):
            return _OPERATORS[type(op)](*computed(*values))
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](*computed(operand))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _FUNCTIONS[name](*computed(*arguments))
    raise TypeError(type(tree).__name__)


@cache
def _periods(tree: ast.AST) -> tuple[int, int]:
    """Return the least common multiple of its divisors, and an extent's growth by which all quotients grow evenly.

    The latter is larger where a quotient is divided again, though the former may do.
    """
    inner = [_periods(child) for child in ast.iter_child_nodes(tree)]
    common, sure = (math.lcm(*numbers) for numbers in zip((1, 1), *inner, strict=True))
    match tree:
        case ast.BinOp(op=ast.FloorDiv() | ast.Mod() | ast.Div(), right=ast.Constant(value=int() as divisor)):
            return math.lcm(common, abs(divisor) or 1), sure * (abs(divisor) or 1)
    return common, sure


def _malformed(text: str) -> NormfixError:
    return NormfixError(
        "NF108",
        f"{text[:80]!r} is no condition on the extents of an image. The file was edited or written by another version; "
        "make it again with this version of normfix.",
        where="sizes",
    )
