"""What knows a place or the size: numbers that follow the image's extents, constants that are another at each place.

A map may be computed from them behind a gate that no image at hand opens (`x + relu(x * ramp - 1000)`), where no
comparison of windows shows it. A constant, which holds nothing of the image, is

    fixed    the same at every size
    even     spread over the image, and the same everywhere: zeros, a bias that was expanded
    placed   anything else: coordinates, a ramp, a stretched table, a mask, a number computed from the size
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from normfix.networks import operators
from normfix.networks.functions import FILLED
from normfix.tiling.reach.calls import Call, call_of, tensor_of
from normfix.tiling.reach.extents import Sizes, Unsized
from normfix.tiling.reach.frames import Layout
from normfix.tiling.reach.rules.pointwise import is_pointwise
from normfix.tiling.reach.rules.shapes import SHAPES

__all__ = ["placed_calls"]

_Kind = Literal["fixed", "even", "placed"]

_PARTS = frozenset({"slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind"})
_SPREAD = frozenset(SHAPES) | _PARTS
"""What leaves a constant even that was."""
_TRIANGLES = frozenset({"tril", "triu"})


def placed_calls(
    nodes: Iterable[Node], layouts: Mapping[Node, Layout], sizes: Sizes, masks: Collection[Node]
) -> Iterator[Node]:
    """Yield the calls that compute with a place or the size.

    Args:
        nodes: of a graph, in order.
        layouts: of those that depend on the image.
        sizes: at which extents are told.
        masks: calls that apply a mask which is known to be one.
    """
    kinds: dict[Node, _Kind] = {}
    for node in nodes:
        if node.op == "output":
            continue
        if isinstance(node.meta.get("val"), list | tuple):
            kinds[node] = _worst(node.all_input_nodes, kinds)
            continue
        if node in layouts:
            if node.op == "call_function" and node not in masks and _is_placed(call_of(node, sizes), kinds):
                yield node
            continue
        try:
            kinds[node] = _kind(node, kinds, sizes)
        except Unsized:
            kinds[node] = "placed"
        if kinds[node] != "fixed" and isinstance(node.target, OpOverload) and operators.written(node.target):
            # every view of what is written part by part
            whole = _origin(node)
            kinds.update({known: "placed" for known in kinds if _origin(known) is whole})


def _is_placed(call: Call, kinds: Mapping[Node, _Kind]) -> bool:
    """Tell whether a call computes what depends on the image with something placed."""
    if call.name in _TRIANGLES or call.get("align_corners"):
        return True
    numbers = is_pointwise(call)
    return any(kinds.get(n) == "placed" and (numbers or tensor_of(n) is not None) for n in call.operands)


def _kind(node: Node, kinds: Mapping[Node, _Kind], sizes: Sizes) -> _Kind:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return "fixed" if _is_fixed(value, sizes) else "placed"
    if node.op != "call_function":
        return "fixed"
    call = call_of(node, sizes)
    of = _worst(call.operands if is_pointwise(call) else _tensors(call), kinds)
    if call.name in FILLED:
        fill = call.get("fill_value", call.get("s"))
        return "even" if _is_fixed(fill, sizes) else "placed"
    sized = any(kinds.get(n) == "placed" for n in call.operands)
    if is_pointwise(call) or call.name in _SPREAD:
        if of == "fixed" and sized and call.name in _PARTS:
            return "placed"
        return of if of == "placed" or _extents_fixed(call) else "even"
    return "fixed" if of == "fixed" and not sized and _extents_fixed(call) else "placed"


def _tensors(call: Call) -> list[Node]:
    return [
        n for n in call.operands if tensor_of(n) is not None or isinstance(n.meta.get("val"), list | tuple)
    ]


def _worst(nodes: Collection[Node], kinds: Mapping[Node, _Kind]) -> _Kind:
    found = {kinds.get(n, "fixed") for n in nodes}
    return "placed" if "placed" in found else "even" if "even" in found else "fixed"


def _extents_fixed(call: Call) -> bool:
    return all(map(call.sizes.is_constant, call.shape))


def _is_fixed(value: Any, sizes: Sizes) -> bool:
    """Tell whether a number is the same at every size of the image."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if not hasattr(value, "node"):
        return True
    try:
        return sizes.is_constant(sizes(value))
    except Unsized:  # a fraction, or computed from what is not known
        return not value.node.expr.free_symbols


def _origin(node: Any) -> Any:
    """Return the tensor whose memory a view shows."""
    while isinstance(node, Node) and isinstance(node.target, OpOverload):
        if not (operators.is_view(node.target) or operators.written(node.target)) or not node.args:
            break
        node = node.args[0]
    return node
