"""Masks and biases of attention that are computed from positions alone, for the queries of a block and a band of keys.

A bias of every pair of positions is larger than any map. Where it is made pair by pair (distances, a table looked up by
the offset, a comparison of numbers), the rows and columns that are asked for are enough of everything on the way: what
holds a row and a column for each pair is narrowed to them, what holds one position per row or column is computed whole.

    b[R, C] = f(x, y)[R, C] = f(x[R], y[C])        for f that works pair by pair
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from normfix.networks.functions import NEW
from normfix.networks.graph.operators import name_of

__all__ = ["Bias", "NotByPairs", "Numbers"]

_aten = torch.ops.aten
_SAME = frozenset({"clone", "alias", "contiguous", "detach", "to", "_to_copy", "type_as", "lift_fresh_copy"})
_LOGICAL = frozenset({"__and__", "__or__", "__xor__", "rsub"})
_UNTAGGED = frozenset(
    {"where", "masked_fill", "floor_divide", "less", "greater", "subtract", "multiply", "divide"}
    | {"zeros_like", "ones_like", "full_like"}
)
"""Work pair by pair, without torch's tag for it in every version or overload."""

_FILLED = NEW | {"zeros", "ones", "full", "empty"}
"""Made of a stated size."""


class NotByPairs(Exception):  # noqa: N818 - a reason, not a fault
    """A bias is made by an operator that does not work pair by pair."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of the positions of a map in the order of its tokens, as something that is kept."""

    shape: tuple[int, ...]
    device: torch.device

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """Return a window."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for cut, extent in zip(index, self.shape, strict=True):
            total = total[..., None] * extent + torch.arange(extent, device=self.device)[cut]
        return total

    def write(self, index: tuple[slice, ...], value: Tensor) -> None:
        """Refuse: they are computed."""
        raise TypeError("numbers that are computed are not written to")


class _Name:
    """The name of a node, in place of it."""

    def __init__(self, node: Node) -> None:
        self.name = node.name


class _Operator(NamedTuple):
    """The name of an operator of torch, which cannot be sent itself."""

    name: str
    overload: str


def _written(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return _Operator(target._schema.name, target._overloadname)
    return target


def _read(target: Any) -> Any:
    if not isinstance(target, _Operator):
        return target
    space, _, name = target.name.partition("::")
    return getattr(getattr(getattr(torch.ops, space), name), target.overload)


@dataclass(slots=True)
class Bias:
    """The last value of a graph that takes extents: (..., queries, keys), by rows and columns of it."""

    run: GraphModule
    told: tuple[int, ...]
    _whole: dict[Node, Any] = field(default_factory=dict)

    def part(self, rows: Tensor, columns: slice) -> Tensor:
        """Return the bias of some queries, by their numbers, to a band of keys.

        Raises:
            NotByPairs: it is not made pair by pair.
        """
        returned: Any = self.run.graph.output_node().args[0]
        (value,) = returned
        rank = value.meta["val"].dim()
        result = _Narrowed(self, rows, columns).of(value, rank - 2, rank - 1)
        assert isinstance(result, Tensor)
        return result

    def __getstate__(self) -> Any:
        # node by node: a graph that is written down as code loses what its values stand for
        graph, named = self.run.graph, cast(Any, _Name)
        nodes = [
            (n.name, n.op, _written(n.target), *map_arg((n.args, n.kwargs), named), _like(n.meta.get("val")))
            for n in graph.nodes
        ]
        held = {str(n.target): attrgetter(str(n.target))(self.run) for n in graph.nodes if n.op == "get_attr"}
        return nodes, held, self.told

    def __setstate__(self, state: Any) -> None:
        nodes, held, self.told = state
        self._whole = {}
        graph, known = Graph(), dict[str, Node]()

        def there(value: Any) -> Any:
            return known[value.name] if isinstance(value, _Name) else value

        for name, op, target, args, kwargs, like in nodes:
            given: Any = map_aggregate((args, kwargs), there)
            known[name] = graph.create_node(op, _read(target), given[0], given[1], name)
            known[name].meta["val"] = like
        self.run = GraphModule(held, graph)

    def whole(self, node: Node) -> Any:
        """Return a value of the graph, whole."""
        if node not in self._whole:
            self._whole[node] = self._computed(node)
        return self._whole[node]

    def _computed(self, node: Node) -> Any:
        if node.op == "placeholder":
            places = [n for n in self.run.graph.nodes if n.op == "placeholder"]
            return self.told[places.index(node)]
        if node.op == "get_attr":
            return attrgetter(str(node.target))(self.run)
        given: Any = map_arg((node.args, node.kwargs), self.whole)
        target: Any = node.target
        return target(*given[0], **given[1])


def _like(value: Any) -> Any:
    """Return what a node stands for with 2 in place of each extent that follows the image's."""
    if not isinstance(value, Tensor):
        return None
    return torch.empty(
        [n if isinstance(n, int) else 2 for n in value.shape], dtype=value.dtype, device="meta"
    )


class _Narrowed:
    """Values of a graph at some rows and columns."""

    def __init__(self, bias: Bias, rows: Tensor, columns: slice) -> None:
        self._bias, self._rows = bias, rows
        self._columns = torch.arange(columns.start, columns.stop, device=rows.device)

    def of(self, node: Any, row: int | None, column: int | None) -> Any:
        """Return a value whose dimensions `row` and `column` are narrowed; None is one that it does not have."""
        if not isinstance(node, Node) or node.meta.get("val") is None:
            return map_arg(node, self._bias.whole)
        if row is None or column is None:
            whole = self._bias.whole(node)
            if row is not None:
                return whole.index_select(row, self._rows)
            return whole if column is None else whole.index_select(column, self._columns)
        rule = self._rule(node)
        return rule(node, row, column)

    def _rule(self, node: Node) -> Callable[[Node, int, int], Any]:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise NotByPairs(str(target))
        name = name_of(node)
        if torch.Tag.pointwise in target.tags or name in (*_SAME, *_LOGICAL, *_UNTAGGED, "expand"):
            return self._broadcast
        found = getattr(self, f"_{name}", None)
        if name in _FILLED:
            return self._filled
        if found is None:
            raise NotByPairs(name)
        rule: Callable[[Node, int, int], Any] = found
        return rule

    def _broadcast(self, node: Node, row: int, column: int) -> Any:
        """Operands are aligned at their last dimension."""
        rank = node.meta["val"].dim()

        def narrowed(operand: Node) -> Any:
            value = operand.meta.get("val")
            if not isinstance(value, Tensor):
                return self._bias.whole(operand)
            return self._aligned(operand, rank, (row, column))

        target: Any = node.target
        if target._schema.name == "aten::expand":
            return self._expanded(node, narrowed(node.args[0]), row, column)  # type: ignore[arg-type]
        given: Any = map_arg((node.args, node.kwargs), narrowed)
        return target(*given[0], **given[1])

    def _expanded(self, node: Node, value: Tensor, row: int, column: int) -> Tensor:
        given: Any = map_arg(node.args[1], self._bias.whole)
        sizes = list(given)
        sizes[row], sizes[column] = len(self._rows), len(self._columns)
        return value.expand(sizes)

    def _filled(self, node: Node, row: int, column: int) -> Any:
        place = 1 if str(node.target).startswith("aten.new_") else 0
        given: Any = map_arg((node.args, node.kwargs), self._bias.whole)
        args, kwargs = given
        sizes = list(args[place])
        sizes[row], sizes[column] = len(self._rows), len(self._columns)
        target: Any = node.target
        return target(*args[:place], sizes, *args[place + 1 :], **kwargs)

    def _eye(self, node: Node, row: int, column: int) -> Any:
        one, off = torch.ones((), dtype=node.meta["val"].dtype, device=self._rows.device), row > column
        rows, columns = (self._columns, self._rows) if off else (self._rows, self._columns)
        return torch.where(rows[:, None] == columns, one, torch.zeros_like(one))

    def _permute(self, node: Node, row: int, column: int) -> Any:
        dims: Any = node.args[1]
        order = [int(d) % node.meta["val"].dim() for d in dims]
        return self.of(node.args[0], order[row], order[column]).permute(order)

    def _transpose(self, node: Node, row: int, column: int) -> Any:
        rank = node.meta["val"].dim()
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        turned = {a: b, b: a}
        return self.of(node.args[0], turned.get(row, row), turned.get(column, column)).transpose(a, b)

    def _unsqueeze(self, node: Node, row: int, column: int) -> Any:
        place = int(node.args[1]) % node.meta["val"].dim()  # type: ignore[arg-type]
        return self.of(node.args[0], row - (row > place), column - (column > place)).unsqueeze(place)

    def _squeeze(self, node: Node, row: int, column: int) -> Any:
        source: Any = node.args[0]
        if len(node.args) < 2 or not isinstance(node.args[1], int):
            raise NotByPairs("squeeze")
        place = node.args[1] % source.meta["val"].dim()
        if source.meta["val"].dim() == node.meta["val"].dim():
            return self.of(source, row, column)
        return self.of(source, row + (row >= place), column + (column >= place)).squeeze(place)

    def _select(self, node: Node, row: int, column: int) -> Any:
        source: Any = node.args[0]
        place, index = int(node.args[1]) % source.meta["val"].dim(), int(node.args[2])  # type: ignore[arg-type]
        return self.of(source, row + (row >= place), column + (column >= place)).select(place, index)

    def _index(self, node: Node, row: int, column: int) -> Any:
        """Look a table up by indices in a row of dimensions, one for each, beside dimensions that are kept whole."""
        arguments: Any = node.args
        source, indices = arguments[0], list(arguments[1])
        given = [d for d, index in enumerate(indices) if index is not None]
        place = given[0]
        if given != list(range(place, place + len(given))):
            raise NotByPairs("index of dimensions apart")
        rank = max(indices[d].meta["val"].dim() for d in given)
        lead = row - place, column - place
        if min(lead) < 0 or max(lead) >= rank:
            raise NotByPairs("index of what has pairs")
        narrowed = [self._aligned(indices[d], rank, lead) for d in given]
        found = self._bias.whole(source)[(*[slice(None)] * place, *narrowed)]
        assert isinstance(found, Tensor)
        return found

    def _aligned(self, operand: Node, rank: int, wanted: Sequence[int]) -> Any:
        """Return what is aligned with a value of this rank at its last dimension, narrowed along two of that."""
        value = operand.meta["val"]
        shift = rank - value.dim()
        dims = (d - shift if d >= shift and not _is_one(value, d - shift) else None for d in wanted)
        return self.of(operand, *dims)

    def _embedding(self, node: Node, row: int, column: int) -> Any:
        table, index = node.args[:2]
        target: Any = node.target
        return target(self._bias.whole(table), self.of(index, row, column))  # type: ignore[arg-type]

    def _tril(self, node: Node, row: int, column: int) -> Any:
        return self._triangle(node, row, column, lower=True)

    def _triu(self, node: Node, row: int, column: int) -> Any:
        return self._triangle(node, row, column, lower=False)

    def _triangle(self, node: Node, row: int, column: int, *, lower: bool) -> Any:
        rank = node.meta["val"].dim()
        if (row, column) != (rank - 2, rank - 1):
            raise NotByPairs("a triangle of other dimensions")
        value = self.of(node.args[0], row, column)
        diagonal = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        offset = self._columns - self._rows[:, None]
        held = offset <= diagonal if lower else offset >= diagonal
        return torch.where(held, value, torch.zeros((), dtype=value.dtype, device=value.device))


def _is_one(value: Tensor, dim: int) -> bool:
    extent = value.shape[dim]
    return isinstance(extent, int) and extent == 1
