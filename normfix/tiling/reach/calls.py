"""One operator call of a graph, with its arguments by name and the extents of what it takes and gives."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from normfix.tiling.reach.extents import Sizes, Unsized, Vector

__all__ = ["Call", "call_of", "tensor_of"]

_KNOWN = frozenset({"aten", "normfix", "natten"})
"""Namespaces of operators that rules know, by their names."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call whose result is one tensor.

    `node` stands for the result: the call itself, or what is taken as number `item` out of what it returns. `name` is
    the operator's name without namespace and overload, "" where rules know none of its namespace.
    """

    node: Node
    origin: Node
    name: str
    item: int
    arguments: dict[str, Any]
    sizes: Sizes

    @property
    def shape(self) -> tuple[Vector, ...]:
        """Return the extents of the result."""
        return self.extents(self.node)

    @property
    def operands(self) -> tuple[Node, ...]:
        """Return what the call reads, tensors and numbers."""
        return tuple(self.origin.all_input_nodes)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or the default where it was left out or is None."""
        value = self.arguments.get(name)
        return default if value is None else value

    def tensor(self, name: str) -> Node:
        """Return an argument that is a tensor."""
        value = self.arguments[name]
        if not isinstance(value, Node):
            raise Unsized(f"{name} of {self.name} is no tensor")
        return value

    def first(self) -> Node:
        """Return the first tensor that the call takes."""
        return next(node for node in self.origin.all_input_nodes if tensor_of(node) is not None)

    def extents(self, node: Node) -> tuple[Vector, ...]:
        """Return the extents of a tensor."""
        value = tensor_of(node)
        if value is None:
            return ()
        return self.sizes.shape(value)

    def constant(self, value: Any) -> int:
        """Return a number that is the same at every size of the image.

        Raises:
            Unsized: it is not.
        """
        return self.fixed(self.sizes(value))

    def fixed(self, extent: Vector) -> int:
        """Return an extent that is the same at every size of the image.

        Raises:
            Unsized: it is not.
        """
        if not self.sizes.is_constant(extent):
            raise Unsized(f"an extent that {self.name} takes follows the image's size")
        return extent[0]

    def numbers(self, name: str, count: int, default: int | None = None) -> tuple[int, ...]:
        """Return an argument of one number per axis; one number, or one in a list, stands for all."""
        value = self.get(name, default)
        listed = list(value) if isinstance(value, Sequence) else [value]
        if not listed and default is not None:
            listed = [default]
        numbers = tuple(self.constant(v) for v in listed)
        return numbers * count if len(numbers) == 1 else numbers

    def dim(self, value: Any, rank: int) -> int:
        """Return a dimension counted from 0."""
        return int(value) % max(rank, 1)


def call_of(node: Node, sizes: Sizes) -> Call:
    """Read a node that stands for one tensor, or for a number that leaves tensors."""
    origin, item = node, 0
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        origin, item = node.args[0], int(node.args[1])  # type: ignore[arg-type]
    target = origin.target
    if not isinstance(target, OpOverload) or target.namespace not in _KNOWN:
        return Call(node, origin, "", item, {}, sizes)
    name = target._schema.name.partition("::")[2]
    return Call(node, origin, name, item, dict(_named(origin, target)), sizes)


def tensor_of(node: Node) -> Tensor | None:
    """Return the tensor that a node stands for, without data; None where it stands for something else."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def nodes_in(value: Any) -> list[Node]:
    """Return the nodes in an argument, lists and all."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Node)]


def _named(node: Node, target: OpOverload) -> Iterator[tuple[str, Any]]:
    arguments = target._schema.arguments
    for argument in arguments:
        if argument.default_value is not None:
            yield argument.name, argument.default_value
    yield from zip((argument.name for argument in arguments), node.args, strict=False)
    yield from node.kwargs.items()
