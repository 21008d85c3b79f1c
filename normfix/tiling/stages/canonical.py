"""One form for what is written in several: softmax by hand, einsum by ellipsis, attention to shared keys, filled masks.

    exp(x - m) / sum exp(x - m),  exp(x - log-sum-exp x),  exp(log-softmax x),  softmax(x - m)    ->  softmax(x)
    (exp(x) v) / sum exp(x)                                                                       ->  softmax(x) v

where m is the same along the dimension, such as the largest value. What is found in a graph (attention, softmax over
space, products over all positions) need then be known in one form. A graph that was changed is held against its
network where it is captured.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normfix.tiling.stages.products import keeps, product_of, rank_of
from normfix.tiling.stages.program import Program
from normfix.tiling.stages.spaces import called, extents_of, filled, prune_, shape_of

__all__ = ["unshifted", "with_canonical_forms"]

_aten = torch.ops.aten
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default)
_LOGARITHM = (_aten.log_softmax.int, _aten._log_softmax.default)
_EXPANDED = (_aten.expand.default, _aten.expand_as.default)
_SHIFTS = (_aten.add.Tensor, _aten.add.Scalar, _aten.sub.Tensor, _aten.sub.Scalar)


def with_canonical_forms(program: Program) -> Program:
    """Return a program in which the forms above are written in one way.

    Args:
        program: its graph is changed in place where there are any.

    Returns:
        The program; itself where there are none.
    """
    _drop_unused_(program.body.graph)
    is_changed = False
    for node in list(program.body.graph.nodes):
        rule = _RULES.get(node.target)
        if rule is None:
            continue
        with node.graph.inserting_before(node):
            given = rule(node)
        if given is not None:
            given.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
            node.replace_all_uses_with(given)
            prune_(node)
            is_changed = True
    for node in [n for n in program.body.graph.nodes if n.target in _SOFTMAX]:
        is_changed = _set_apart_(node) or is_changed
    return program.recompiled() if is_changed else program


def _drop_unused_(graph: Graph) -> None:
    """Erase what nothing uses, such as the mean of weights that `nn.MultiheadAttention` returns beside its result."""
    for node in reversed(graph.nodes):
        known = getattr(node.target, "namespace", "") == "aten" or node.target is operator.getitem
        if not node.users and known and not node.is_impure():
            graph.erase_node(node)


def _set_apart_(softmax: Node) -> bool:
    """Compute weights once for each of several products that use them, which are attentions of their own."""
    users = list(softmax.users)
    if len(users) < 2 or any(user.target not in _PRODUCTS for user in users):
        return False
    for user in users[1:]:
        with softmax.graph.inserting_before(user):
            user.replace_input_with(softmax, called(softmax.graph, softmax.target, *softmax.args))
    return True


def unshifted(value: Node, dim: int) -> Node:
    """Return what a value is a sum or difference of with something that is the same along a dimension."""
    while value.target in _SHIFTS:
        a, b = value.args[:2]
        if _is_level(b, value, dim) and isinstance(a, Node) and shape_of(a) == shape_of(value):
            value = a
        elif (
            value.target is _aten.add.Tensor
            and not value.kwargs
            and isinstance(b, Node)
            and _is_level(a, value, dim)
            and shape_of(b) == shape_of(value)
        ):
            value = b
        else:
            break
    return value


def _is_level(operand: Any, value: Node, dim: int) -> bool:
    """Tell whether an operand of a value is the same along one of the value's dimensions."""
    if not isinstance(operand, Node) or not isinstance(operand.meta.get("val"), Tensor):
        return True  # a number
    while keeps(operand) or operand.target in _EXPANDED:
        operand = operand.args[0]
    shape, back = shape_of(operand), rank_of(value) - dim % rank_of(value)
    return back > len(shape) or shape[-back] == 1


def _softmax(value: Node, dim: int) -> Node:
    return called(value.graph, _aten.softmax.int, unshifted(value, dim), dim)


def _of_shifted(softmax: Node) -> Node | None:
    """Return the softmax of what is not shifted, nor taken away from something that is the same along its dimension."""
    value, dim = softmax.args[:2]
    assert isinstance(value, Node)
    assert isinstance(dim, int)
    level = unshifted(value, dim)
    if level.target is _aten.sub.Tensor and not level.kwargs:
        a, b = level.args[:2]
        if isinstance(b, Node) and _is_level(a, level, dim) and shape_of(b) == shape_of(level):
            level = called(softmax.graph, _aten.neg.default, unshifted(b, dim))
    return None if level is value else called(softmax.graph, softmax.target, level, *softmax.args[1:])


def _exponential(node: Node) -> Node | None:
    logarithm = node.args[0]
    if not isinstance(logarithm, Node) or logarithm.target not in _LOGARITHM:
        return None
    # its dtype is that of the logarithm, if one is stated
    target = _SOFTMAX[_LOGARITHM.index(logarithm.target)]
    return called(node.graph, target, *logarithm.args)


def _less_log_sum(node: Node) -> Node | None:
    """Return the log-softmax for x - log-sum-exp x."""
    value, subtracted = node.args[:2]
    reduced = _kept(subtracted, _aten.logsumexp.default)
    if node.kwargs or reduced is None or reduced[0] is not value:
        return None
    return called(node.graph, _aten.log_softmax.int, *reduced)


def _quotient(node: Node) -> Node | None:
    """Return the softmax for exp(x) / sum exp(x), or its product for a product with exp(x) over that."""
    value, divisor = node.args[:2]
    return None if node.kwargs else _normalized(value, divisor)


def _multiple(node: Node) -> Node | None:
    """Return the softmax for exp(x) times the reciprocal of its sum."""
    for value, factor in (node.args[:2], node.args[1::-1]):
        if isinstance(factor, Node) and factor.target is _aten.mul.Tensor and factor.args[1] == 1:
            factor = factor.args[0]
        if isinstance(factor, Node) and factor.target is _aten.reciprocal.default:
            return _normalized(value, factor.args[0])
    return None


def _normalized(value: Any, divisor: Any) -> Node | None:
    summed = _kept(divisor, _aten.sum.dim_IntList)
    if summed is None or not isinstance(value, Node):
        return None
    raised, dim = summed
    if raised.target is not _aten.exp.default:
        return None
    weights: Any = raised.args[0]
    if value is raised:
        return _softmax(weights, dim)
    product = product_of(value) if value.target in _PRODUCTS else None
    if product is None or product.left.node is product.right.node:
        return None
    for side in (product.left, product.right):
        # the sums are aligned with what the product gives, but for the dimension that is summed
        aligned = [d for d in range(rank_of(raised)) if d != dim]
        if side.node is raised and side.labels[dim] not in product.result:
            if len(product.result) != len(side.labels) or any(
                product.result[d] != side.labels[d] for d in aligned
            ):
                return None
            instead = {raised: _softmax(weights, dim)}
            args: Any = map_arg(value.args, lambda n: instead.get(n, n))  # noqa: B023 - called at once
            target: Any = value.target
            given = value.graph.call_function(target, args)
            # computed again, torch 2.6 would take its extents for fixed ones
            given.meta["val"] = value.meta["val"]
            return given
    return None


_PRODUCTS = (_aten.matmul.default, _aten.bmm.default, _aten.einsum.default)


def _kept(node: Any, target: Any) -> tuple[Node, int] | None:
    """Return what a reduction is of and along which one dimension, which is kept or was put back."""
    while isinstance(node, Node) and (keeps(node) or node.target in _EXPANDED):
        node = node.args[0]
    back = None
    if isinstance(node, Node) and node.target is _aten.unsqueeze.default:
        back = node.args[1]
        node = node.args[0]
    if not isinstance(node, Node) or node.target is not target or node.kwargs or len(node.args) < 2:
        return None
    value, dims = node.args[:2]
    if not isinstance(value, Node) or not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    rank = rank_of(value)
    dim = int(dims[0]) % rank  # type: ignore[arg-type]
    is_kept = len(node.args) > 2 and node.args[2] is True
    is_put_back = isinstance(back, int) and not is_kept and back % rank == dim
    return (value, dim) if is_put_back or (is_kept and back is None) else None


def _of_shared_heads(node: Node) -> Node | None:
    """Return attention with as many heads of keys as of queries (Ainslie et al., arXiv 2305.13245)."""
    if not node.kwargs.get("enable_gqa"):
        return None
    query, *shared = node.args[:3]
    assert isinstance(query, Node)
    heads = shape_of(query)[-3]
    full = []
    for tokens in shared:
        assert isinstance(tokens, Node)
        rank = rank_of(tokens)
        sizes = [-1] * (rank + 1)
        sizes[-3] = heads // shape_of(tokens)[-3]
        spread = called(node.graph, _aten.unsqueeze.default, tokens, -3)
        spread = called(node.graph, _aten.expand.default, spread, sizes)
        full.append(called(node.graph, _aten.flatten.using_ints, spread, rank - 3, rank - 2))
    others = {name: value for name, value in node.kwargs.items() if name != "enable_gqa"}
    return called(node.graph, node.target, query, *full, *node.args[3:], **others)


def _product_and_sum(node: Node) -> Node | None:
    """Return alpha a b + beta x for baddbmm(x, a, b)."""
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    if beta == 0:
        return None
    added, left, right = node.args
    product = called(node.graph, _aten.bmm.default, left, right)
    if alpha != 1:
        product = called(node.graph, _aten.mul.Tensor, product, alpha)
    if beta != 1:
        added = called(node.graph, _aten.mul.Tensor, added, beta)
    return called(node.graph, _aten.add.Tensor, product, added)


def _spelt_out(node: Node) -> Node | None:
    """Return an einsum without ellipsis, and with what it gives."""
    equation, operands = str(node.args[0]).replace(" ", ""), cast(Any, node.args[1])
    if ("." not in equation and "->" in equation) or not isinstance(operands, list | tuple):
        return None
    inputs, arrow, result = equation.partition("->")
    sides = inputs.split(",")
    counts = [
        rank_of(x) - len(side.replace("...", "")) if "..." in side else 0
        for x, side in zip(operands, sides, strict=True)
    ]
    most = max(counts)
    names = "".join([c for c in string.ascii_letters if c not in equation][:most])
    sides = [side.replace("...", names[most - n :]) for side, n in zip(sides, counts, strict=True)]
    if arrow:
        result = result.replace("...", names)
    else:
        letters = inputs.replace(",", "").replace("...", "")
        result = names + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return called(node.graph, node.target, f"{','.join(sides)}->{result}", list(operands))


def _filled_like(node: Node) -> Node | None:
    """Return a tensor of one number, as large as products of all pairs of positions are, without these."""
    like: Any = node.args[0]
    sources = [_source_of(like, d) for d in range(rank_of(like))]
    if all(of is like for of, _ in sources):
        return None
    sizes = [extents_of(of, [d])[0] for of, d in sources]
    value: Any = node.args[1] if node.target is _aten.full_like.default else _FILL[node.target]
    return filled(sizes, value, like, node.meta["val"].dtype)


def _filled_new(node: Node) -> Node | None:
    """Return a tensor of one number, of a stated size that follows the image's."""
    like, sizes, *given = cast(Any, node.args)
    if not any(isinstance(n, Node) for n in sizes):
        return None
    value = given[0] if given else _FILL[node.target]
    return filled(sizes, value, like, node.meta["val"].dtype)


def _chosen(node: Node) -> Node | None:
    """Return scores that are masked for scores where a mask is true, or is not, and one number elsewhere."""
    mask, *sides = node.args
    assert isinstance(mask, Node)
    for place, (scores, other) in enumerate((sides, sides[::-1])):
        number = _number(other)
        if number is None or not _is_of_pairs(scores) or shape_of(scores) != shape_of(node):  # type: ignore[arg-type]
            continue
        if place == 0:
            mask = called(node.graph, _aten.logical_not.default, mask)
        return called(node.graph, _aten.masked_fill.Scalar, scores, mask, number)
    return None


def _masked(node: Node) -> Node | None:
    """Return scores masked by a number, for such that are masked by a tensor of it."""
    scores, mask, value = node.args
    number = _number(value)
    if number is None or not _is_of_pairs(scores):
        return None
    return called(node.graph, _aten.masked_fill.Scalar, scores, mask, number)


def _number(value: Any) -> float | None:
    """Return the one number that a value is, whatever the weights are."""
    if isinstance(value, int | float):
        return value
    while isinstance(value, Node) and (keeps(value) or value.target is _aten.lift_fresh_copy.default):
        value = value.args[0]
    if isinstance(value, Node) and value.target in (_aten.full.default, _aten.scalar_tensor.default):
        number = value.args[-1]
        return number if isinstance(number, int | float) else None
    if isinstance(value, Node) and value.op == "get_attr":
        owner = value.graph.owning_module
        held = operator.attrgetter(str(value.target))(owner)
        if isinstance(held, Tensor) and held.numel() == 1 and not isinstance(held, FakeTensor):
            states = owner.state_dict(keep_vars=True).values()  # type: ignore[union-attr]
            return None if any(held is state for state in states) else float(held)
    return None


def _is_of_pairs(value: Any) -> bool:
    """Tell whether a value is a product, scaled or masked perhaps."""
    return isinstance(value, Node) and _source_of(value, rank_of(value) - 1)[0] is not value


def _source_of(value: Node, dim: int) -> tuple[Node, int]:
    """Return what has the same extent along a dimension and is not made of pairs of positions, as far as is seen."""
    while True:
        product = product_of(value)
        if product is not None:
            label = product.result[dim]
            sides = [
                (side.node, side.labels.index(label))
                for side in (product.left, product.right)
                if label in side.labels
            ]
            extent = shape_of(value)[dim]
            same = [(of, d) for of, d in sides if shape_of(of)[d] == extent]
            return same[0] if same else (value, dim)
        source = value.args[0] if value.args else None
        is_same = keeps(value) or value.target in _ELEMENTWISE
        if not is_same or not isinstance(source, Node) or shape_of(source) != shape_of(value):
            return value, dim
        value = source


_ELEMENTWISE = (
    *_SHIFTS,
    *(_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar),
    *(_aten.masked_fill.Scalar, _aten.neg.default),
)

_FILL: Mapping[Any, int] = MappingProxyType(
    {
        _aten.zeros_like.default: 0,
        _aten.ones_like.default: 1,
        _aten.new_zeros.default: 0,
        _aten.new_ones.default: 1,
    }
)

_RULES: Mapping[Any, Callable[[Node], Node | None]] = MappingProxyType(
    {
        **dict.fromkeys((*_SOFTMAX, *_LOGARITHM), _of_shifted),
        _aten.exp.default: _exponential,
        _aten.sub.Tensor: _less_log_sum,
        _aten.div.Tensor: _quotient,
        _aten.mul.Tensor: _multiple,
        _aten.scaled_dot_product_attention.default: _of_shared_heads,
        **dict.fromkeys((_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf), _chosen),
        _aten.masked_fill.Tensor: _masked,
        _aten.baddbmm.default: _product_and_sum,
        _aten.einsum.default: _spelt_out,
        **dict.fromkeys((_aten.zeros_like.default, _aten.ones_like.default), _filled_like),
        _aten.full_like.default: _filled_like,
        **dict.fromkeys(
            (_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default), _filled_new
        ),
    }
)
