"""Extents of a graph's values as exact formulas of the image's, on a lattice of sizes.

On images whose extents are N = S n, for a lattice S that every stride and every rounding divides, an extent is
c + b n: rounding is gone. The lattice is found by trying: from 1, it grows by what the crooked formulas round by.
A formula is kept as its numbers at sample sizes with large prime n, so that products of extents can be compared,
divided and told apart by integer arithmetic alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor
from torch.fx import Node

__all__ = ["Growth", "Sizes", "Unsized", "Vector", "divides", "lattice_of", "quotient", "times"]

Vector = tuple[int, ...]
"""An extent at each of the sample sizes."""

_COUNTS = (1009, 1201, 1409)
"""Lattice steps along each axis at the first sample: primes, large against every kernel."""
_OFFSETS = (1, 2, 5, 127, 1021)
"""Lattice steps more along one axis at the further samples: a formula that rounds is no line through all of them, be it
rounding by few pixels or by many."""
_BATCHES = (5, 11)
_LARGEST = 4096
"""Pixels of the coarsest lattice that is tried."""


class Unsized(Exception):  # noqa: N818 - a reason, not a fault
    """An extent is no formula of the image's extents, or the image has one size only."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How an extent follows one axis of the image: `step` positions per lattice step, `rest` more."""

    axis: int
    step: int
    rest: int


class Sizes:
    """Evaluates extents at sample sizes.

    Args:
        shape: of the image (N, C, *space), with the symbols of its free extents.
        lattice: pixels per axis.

    Raises:
        Unsized: a spatial extent of the image is fixed.
    """

    def __init__(self, shape: Sequence[Any], lattice: Sequence[int]) -> None:
        self.lattice = tuple(lattice)
        base = [s * n for s, n in zip(lattice, _COUNTS, strict=False)]
        self.pixels = tuple(base)
        sizes = [(_BATCHES[0], *base)]
        for axis, step in enumerate(lattice):
            for offset in _OFFSETS:
                grown = list(base)
                grown[axis] += step * offset
                sizes.append((_BATCHES[0], *grown))
        sizes.append((_BATCHES[1], *base))
        self._points = [_point(shape, size) for size in sizes]
        self._known: dict[Any, Vector] = {}

    @property
    def ones(self) -> Vector:
        """Return the extent 1."""
        return (1,) * len(self._points)

    def __call__(self, extent: Any) -> Vector:
        """Return an int, a SymInt or a node that stands for one at every sample.

        Raises:
            Unsized: it depends on more than the image's extents.
        """
        if isinstance(extent, Node):
            extent = extent.meta.get("val")
        if isinstance(extent, int):
            return (int(extent),) * len(self._points)
        if not hasattr(extent, "node"):
            raise Unsized(f"{extent} is no extent")
        return self.formula(extent.node.expr)

    def formula(self, expr: Any) -> Vector:
        """Return a formula of the image's symbols at every sample."""
        if expr not in self._known:
            numbers = [expr.xreplace(point) for point in self._points]
            if not all(number.is_Integer for number in numbers):
                raise Unsized(f"{expr} is no formula of the image's extents")
            self._known[expr] = tuple(map(int, numbers))
        return self._known[expr]

    def shape(self, value: Tensor) -> tuple[Vector, ...]:
        """Return the extents of a tensor."""
        return tuple(self(n) for n in value.shape)

    def is_constant(self, vector: Vector) -> bool:
        """Tell whether an extent is the same at every size of the image (of any batch)."""
        return len(set(vector[:-1])) == 1

    def growth(self, vector: Vector) -> Growth | None:
        """Return how an extent follows one axis alone, None where it follows several, or no line."""
        if vector[-1] != vector[0]:
            return None
        moved = [axis for axis in range(len(self.lattice)) if set(self._along(vector, axis)) != {vector[0]}]
        if len(moved) != 1:
            return None
        axis = moved[0]
        grown = [n - vector[0] for n in self._along(vector, axis)]
        step = grown[0]
        if step <= 0 or grown != [step * k for k in _OFFSETS]:
            return None
        return Growth(axis, step, vector[0] - step * _COUNTS[axis])

    def crooked(self, vector: Vector) -> int | None:
        """Return an axis along which an extent is no line, None if there is none."""
        for axis in range(len(self.lattice)):
            grown = [n - vector[0] for n in self._along(vector, axis)]
            if grown != [grown[0] * k for k in _OFFSETS]:
                return axis
        return None

    def _along(self, vector: Vector, axis: int) -> Vector:
        first = 1 + axis * len(_OFFSETS)
        return vector[first : first + len(_OFFSETS)]


def lattice_of(shape: Sequence[Any], tensors: Iterable[Tensor]) -> Sizes:
    """Return the sample sizes of the finest lattice found on which every extent is a line.

    Args:
        shape: of the image.
        tensors: of the graph.

    Raises:
        Unsized: a spatial extent of the image is fixed, or tied to another.
    """
    symbols = [n.node.expr for n in shape[2:] if not isinstance(n, int) and not n.node.expr.is_number]
    if len(set(symbols)) < len(symbols):
        raise Unsized("its graph holds for images of equal extents only")
    extents: list[Any] = [n for tensor in tensors for n in tensor.shape]
    formulas = {n.node.expr: None for n in extents if not isinstance(n, int)}
    factors = [_factor(n) for n in shape[2:]]
    sizes = Sizes(shape, factors)
    for expr in formulas:
        while (axis := _crooked(sizes, expr)) is not None:
            finer = list(_finer(sizes, shape, expr, axis))
            if not finer:
                break
            sizes = next((s for s in finer if _crooked(s, expr) != axis), finer[0])
    return sizes


def times(vectors: Iterable[Vector], ones: Vector) -> Vector:
    """Return the product of extents."""
    product = ones
    for vector in vectors:
        product = tuple(a * b for a, b in zip(product, vector, strict=True))
    return product


def divides(part: Vector, extent: Vector) -> bool:
    """Tell whether an extent is a multiple of another at every sample."""
    return all(n and m % n == 0 for n, m in zip(part, extent, strict=True))


def quotient(extent: Vector, part: Vector) -> Vector:
    """Return how many times an extent holds another."""
    return tuple(m // n for n, m in zip(part, extent, strict=True))


def _crooked(sizes: Sizes, expr: Any) -> int | None:
    try:
        return sizes.crooked(sizes.formula(expr))
    except Unsized:
        return None


def _finer(sizes: Sizes, shape: Sequence[Any], expr: Any, axis: int) -> Iterator[Sizes]:
    """Yield lattices that a number in the formula makes coarser along an axis, the least first."""
    import sympy

    numbers = {abs(int(n)) for n in expr.atoms(sympy.Integer)}
    numbers |= {int(n.q) for n in expr.atoms(sympy.Rational)}
    # a factor that was given as a number, such as 0.5
    factors = [Fraction(float(n)).limit_denominator(_LARGEST) for n in expr.atoms(sympy.Float)]
    numbers |= {part for factor in factors for part in (factor.denominator, factor.numerator)}
    known = sizes.lattice[axis]
    units = {known * p for n in numbers if n > 1 for p in sympy.primefactors(n)}
    # of a stride such as 50 no prime alone makes a line
    units |= {math.lcm(known, n) for n in numbers if n > 1}
    for unit in sorted(units - {known}):
        if unit <= _LARGEST:
            yield Sizes(shape, [*sizes.lattice[:axis], unit, *sizes.lattice[axis + 1 :]])


def _factor(extent: Any) -> int:
    """Return what an extent of the image is a multiple of: 1, or 8 where it was captured as 8 s."""
    if isinstance(extent, int) or extent.node.expr.is_number:
        raise Unsized("its graph holds for one image size only")
    coefficient, _ = extent.node.expr.as_coeff_Mul()
    return int(coefficient)


def _point(shape: Sequence[Any], size: Sequence[int]) -> dict[Any, Any]:
    """Return what each symbol of the image's shape is at a size (batch, *space)."""
    import sympy

    point = {}
    for extent, n in zip((shape[0], *shape[2:]), size, strict=True):
        if isinstance(extent, int):
            continue
        factor, symbol = extent.node.expr.as_coeff_Mul()
        if symbol.is_Symbol:
            point[symbol] = sympy.Integer(n // int(factor))
    return point
