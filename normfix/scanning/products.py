"""Attention that is written out: a softmax between two products, of which the first is of queries and keys.

    second(softmax(first(q, k) * number, dim of the keys), v)        products by matmul, bmm, baddbmm or einsum

A constant can take the place of the keys in the first product and of the values in the second; the softmax between them
then runs along keys that are no positions of the tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from normfix.scanning.census import Call
from normfix.scanning.growth import SQUARED, Growth

__all__ = ["Factor", "Products", "written_out"]

Labels = tuple[str, ...]
_MATRICES = frozenset({"matmul", "bmm", "mm", "baddbmm"})
_KEEPING = frozenset(
    {"to", "float", "double", "half", "type", "type_as", "contiguous", "clone", "dropout", "mul", "div"}
)
_ORDERING = frozenset({"permute", "transpose", "swapaxes"})


@dataclass(frozen=True, slots=True)
class Factor:
    """An operand of a product: which of the call's operands on the image it is, and the dimension of its tokens."""

    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Products:
    """The positions of an attention's calls, with the keys of its first product and the values of its second."""

    first: int
    softmax: int
    second: int
    keys: Factor
    values: Factor


def written_out(calls: Sequence[Call], growth: Growth) -> Iterator[Products]:
    """Yield every attention over all positions that is written out.

    Args:
        calls: of one forward pass.
        growth: of these calls.
    """
    for position, call in enumerate(calls):
        if call.function == "softmax" and growth.outputs(position) > SQUARED:
            found = _around(position, calls)
            if found is not None:
                yield found


def _around(softmax: int, calls: Sequence[Call]) -> Products | None:
    first = _before(softmax, calls)
    dim = calls[softmax].arguments.get("dim")
    if first is None or not isinstance(dim, int):
        return None
    operands, result = _labels(calls[first]) or ((), ())
    if not result:
        return None
    along = result[dim]
    sides = [n for n, labels in enumerate(operands) if along in labels]
    after = _after(softmax, result, calls)
    if len(sides) != 1 or after is None:
        return None
    second, number, weights = after
    values = _values(calls[second], number, weights, along)
    keys = Factor(sides[0], operands[sides[0]].index(along))
    return None if values is None else Products(first, softmax, second, keys, values)


def _before(softmax: int, calls: Sequence[Call]) -> int | None:
    """Return the product that a softmax is taken of, through what keeps its dimensions."""
    position = softmax
    while True:
        # what positions alone make is read of no activation
        read = next(iter(calls[position].reads), None)
        made = (p for p in reversed(range(position)) if read in calls[p].writes)
        position = next(made, -1)
        if position < 0:
            return None
        if _labels(calls[position]) is not None:
            return position
        if not _keeps(calls[position]):
            return None


def _after(softmax: int, labels: Labels, calls: Sequence[Call]) -> tuple[int, int, Labels] | None:
    """Return the product that uses a softmax, as which operand, and the names of that operand's dimensions."""
    held = calls[softmax].writes[0]
    for position in range(softmax + 1, len(calls)):
        call = calls[position]
        if held not in call.reads:
            continue
        if _labels(call) is not None:
            return position, call.reads.index(held), labels
        if call.function in _ORDERING and len(call.reads) == 1:
            labels = tuple(labels[d] for d in _order(call))
        elif not _keeps(call):
            return None
        held = call.writes[0]
    return None


def _values(call: Call, weights: int, names: Labels, along: str) -> Factor | None:
    """Return the other operand of a product that sums over the keys, None if it sums over something else."""
    operands, result = _labels(call) or ((), ())
    summed = [i for i, label in enumerate(operands[weights]) if label not in result]
    if len(summed) != 1 or len(names) != len(operands[weights]) or names[summed[0]] != along:
        return None
    label = operands[weights][summed[0]]
    others = [n for n, labels in enumerate(operands) if n != weights and label in labels]
    return Factor(others[0], operands[others[0]].index(label)) if others else None


def _keeps(call: Call) -> bool:
    return call.function in _KEEPING and len(call.reads) == 1 and call.inputs[0] == call.outputs[0]


def _order(call: Call) -> Sequence[int]:
    """Return the order in which a call puts dimensions."""
    rank = len(call.inputs[0])
    given = [int(n) % rank for n in call.numbers]
    if call.function == "permute":
        return given
    order = list(range(rank))
    a, b = given
    order[a], order[b] = order[b], order[a]
    return order


def _labels(call: Call) -> tuple[tuple[Labels, ...], Labels] | None:
    """Return the names of the dimensions of a product's operands and of its result; None if it is no product of two."""
    # what beta 0 leaves out may be made from the image, and empty
    unused: tuple[Labels, ...] = ((),) * (call.function == "baddbmm" and call.arguments.get("beta") == 0)
    unused = unused[: max(0, len(call.reads) - 2)]
    if len(call.reads) != 2 + len(unused):
        return None
    if call.function in _MATRICES:
        if call.function == "baddbmm" and call.arguments.get("beta") != 0:
            return None
        rank = len(call.outputs[0])
        if rank < 2 or any(len(shape) != rank for shape in call.inputs):
            return None
        batch = tuple(f"batch{d}" for d in range(rank - 2))
        factors = (*batch, "rows", "summed"), (*batch, "summed", "columns")
        return (*unused, *factors), (*batch, "rows", "columns")
    equation = call.arguments.get("equation")
    if call.function != "einsum" or not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    once = all(len(set(labels)) == len(labels) for labels in (left, right, result))
    return ((tuple(left), tuple(right)), tuple(result)) if once else None
