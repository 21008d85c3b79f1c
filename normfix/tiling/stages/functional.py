"""Make a captured graph functional where that takes renaming alone: no operation writes into what another reads.

    y = relu_(x)  ->  y = relu(x), and whoever reads x later reads y

That is the same function if nothing else is x by another name (a view, or what returns its operand) when somebody
reads it later. Tracing a graph again, which torch does for all the others, takes longer than capturing it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from normfix.tiling.stages.reuse import FRESH, IN_PLACE

__all__ = ["make_functional_"]

_aten = torch.ops.aten
_ACTIVATIONS = {in_place: functional for functional, in_place in IN_PLACE.items()}
_SUMS = {
    _aten.add_.Tensor: _aten.add.Tensor,
    _aten.sub_.Tensor: _aten.sub.Tensor,
    _aten.mul_.Tensor: _aten.mul.Tensor,
    _aten.div_.Tensor: _aten.div.Tensor,
}
_DROPOUTS = frozenset({_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default})
_WRITING = {_aten.batch_norm.default: 5, _aten.instance_norm.default: 5}
"""What writes into running statistics although its schema does not say so, and which argument tells whether it does."""


def make_functional_(graph: Graph) -> bool:
    """Rewrite a graph in place; False, and a graph that is no use any more, where renaming is not enough."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    names = _Names(order)
    for node in list(graph.nodes):
        target = node.target
        if node.op in ("placeholder", "get_attr"):
            names.hold(node)
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor | tuple | list):
            continue  # sizes, and asserts on them
        if target in _DROPOUTS and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif target in _ACTIVATIONS or (target in _SUMS and _stays_what_it_is(node)):
            if not names.is_free(node.args[0], node):
                return False
            node.target = _ACTIVATIONS.get(target) or _SUMS[target]
            later = [user for user in node.args[0].users if order[user] > order[node]]
            for user in later:
                user.replace_input_with(node.args[0], node)
        elif _writes(node):
            return False
        elif not _is_fresh(target):
            names.join(node, node.all_input_nodes)
    return True


class _Names:
    """Which nodes may be one tensor, or parts of one."""

    def __init__(self, order: dict[Node, int]) -> None:
        self._order = order
        self._groups: dict[Node, set[Node]] = {}
        self._held: set[Node] = set()

    def hold(self, node: Node) -> None:
        """Note what is not the graph's own: its input and the network's state."""
        self._held.add(node)

    def join(self, node: Node, others: Iterable[Node]) -> None:
        """Note that a node may be one with each of others."""
        group = {node}.union(*(self._groups.get(other, {other}) for other in others))
        for member in group:
            self._groups[member] = group

    def is_free(self, node: Node, writer: Node) -> bool:
        """Tell whether a node may be written to: only it, by this name, is read after that."""
        group = self._groups.get(node, {node})
        late = (user for other in group - {node} for user in other.users)
        return not group & self._held and not any(self._order[user] > self._order[writer] for user in late)


def _is_fresh(target: Any) -> bool:
    """Tell whether an operator never returns its operand or a view of it."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target in FRESH:
        return True
    schema = target._schema
    name = ".".join(filter(None, (schema.name, schema.overload_name)))
    # what torch composes of other operators may return anything, whatever its schema says
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return not composed and not any(result.alias_info for result in schema.returns)


def _writes(node: Node) -> bool:
    """Tell whether a call may write into what it is given; what is no operator may do anything."""
    if node.target is operator.getitem:
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    switch = _WRITING.get(node.target)
    return node.target._schema.is_mutable or (switch is not None and node.args[switch] is not False)


def _stays_what_it_is(node: Node) -> bool:
    """Tell whether the sum of two tensors has the shape and dtype of the first, as writing into it would have."""
    other = node.args[1]
    if not isinstance(other, Node):
        return isinstance(other, int | float) and node.meta["val"].dtype.is_floating_point
    added, value = other.meta.get("val"), node.meta["val"]
    return isinstance(added, Tensor) and added.dtype == value.dtype and added.shape == value.shape
