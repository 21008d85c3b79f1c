"""Attention over all positions in a captured program: found however it is written, and made a barrier.

Queries, keys and values are tokens: positions of the image in one dimension. Keys and values get their space back and
are kept of the whole image; the queries of a block then attend to all of them. What is found is

    scaled_dot_product_attention(q, k, v)
    softmax(s (q k^T) + b) v    products by matmul, bmm, baddbmm or einsum, either factor first, either one transposed

without dropout. A mask, or a bias b, may be anything that is computed pair by pair from positions alone (`biases`), not
from the image. Attention over windows, channels or a fixed number of tokens is none of it: its keys do
not grow with the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from normfix.tiling.stages.biases import Bias, NotByPairs
from normfix.tiling.stages.canonical import unshifted
from normfix.tiling.stages.maps import ProgramMaps, maps_of
from normfix.tiling.stages.overviews import overview_of
from normfix.tiling.stages.products import Labelled, Product, keeps, order_of, product_of, rank_of
from normfix.tiling.stages.program import Cut, Program, Shapes, is_tensor_node
from normfix.tiling.stages.spaces import Space, called, extent, filled, prune_, shape_of, space_of, spread
from normfix.tiling.stages.tokens import ATTEND, ATTEND_BIASED, NUMBERS

__all__ = ["with_attention"]

_aten = torch.ops.aten


def with_attention(program: Program, example: Sequence[int]) -> Program:
    """Return a program that attends to stored keys and values where it attends to all positions.

    Sites whose operands are tokens get their space back as well, so that blocks of them can be measured.

    Args:
        program: its graph is changed in place where there are tokens.
        example: a size (N, C, *space) that it takes.

    Returns:
        The program with the new barriers; itself where there are none.
    """
    found = list(_attentions(program.body))
    ndim = len(example) - 2
    maps = (
        maps_of(program, example) if found or any(_is_flat(c.operand, ndim) for c in program.cuts) else None
    )
    if maps is None:
        return program
    shapes = program.shapes(example)
    cuts, flat = _spread_sites(program, maps, shapes)
    whole: list[Node] = []
    biases: list[Node] = []
    numbers: list[Node] = []
    replaced: set[Node] = set()
    for attention in found:
        if replaced.intersection(x.node for x in (attention.query, attention.key, attention.value)):
            continue  # of what another attention gave as it is: it stays, and is refused by name
        space = space_of(*_tokens(attention.key), maps, shapes)
        if space is None or space_of(*_tokens(attention.value), maps, shapes) is None:
            continue
        if any(factor.node in maps.moving for factor in attention.factors):
            continue  # by the image
        rows = None
        if attention.terms:
            rows = space_of(attention.query.node, attention.query.labels.index(_QUERIES), maps, shapes)
            if rows is None or not _are_of_positions(attention, program, maps, shapes):
                continue
        barrier = _barred_(attention, space, rows)
        replaced.add(attention.result.node)
        if attention.terms:
            biases.append(barrier.args[5])  # type: ignore[arg-type]
            numbers += barrier.args[6].all_input_nodes  # type: ignore[union-attr]
        stored = [node for node in barrier.args[1:3] if isinstance(node, Node)]
        whole += stored
        cuts += [Cut(node.name, node, frozenset({barrier})) for node in stored]
    if not whole and not flat:
        return program
    for node in program.body.graph.nodes:  # kernels of attention lay out what they give each in its own way
        if node.target is _aten.view.default:
            node.target = _aten.reshape.default
    return program.recompiled(
        cuts=tuple(cuts),
        whole=frozenset(whole),
        flat=flat,
        biases=frozenset(biases),
        numbers=frozenset(numbers),
    )


def _is_flat(value: Node, ndim: int) -> bool:
    """Tell whether fewer dimensions than space has follow the image's extents; the first may be the batch."""
    return sum(not isinstance(extent, int) for extent in shape_of(value)[1:]) < ndim


def _spread_sites(
    program: Program, maps: ProgramMaps, shapes: Shapes
) -> tuple[list[Cut], dict[str, tuple[int, int]]]:
    """Return the cuts with operands over space, and where that is of those that are tokens to the network."""
    cuts, flat = [], {}
    for cut in program.cuts:
        operand = cut.operand
        spaces = (
            [(d, space_of(operand, d, maps, shapes)) for d in range(len(shapes[operand]))]
            if operand in maps.scales and operand not in maps.maps
            else []
        )
        known = [(d, space) for d, space in spaces if space is not None]
        if len(known) == 1:
            ((dim, space),) = known
            with program.body.graph.inserting_before(operand.next):
                extents = [extent(space.map, d) for d in space.dims]
                operand = spread(operand, dim, extents)
            flat[cut.site] = dim, dim + len(extents) - 1
            cut = replace(cut, operand=operand)
        cuts.append(cut)
    return cuts, flat


class _Term(NamedTuple):
    """What scores (*batch, L, K) are changed by: `added`, times a number; `kept` where true; `dropped` where true.

    Scores that are dropped are set to the factor.
    """

    kind: Literal["added", "kept", "dropped", "causal"]
    node: Node | None
    factor: float = 1.0


class _Factor(NamedTuple):
    """What scores are multiplied by, or divided by: one value for all pairs of queries and keys."""

    operation: Any
    node: Node


class _Attention(NamedTuple):
    """softmax(scale query key^T) value: (*batch, L, E), (*batch, K, E) and (*batch, K, V), by the names of dimensions.

    `result` names the dimensions of what it gives. `factors` multiply the scores as well, one for all pairs of an entry
    of the batch, such as a temperature that was learned for each head.
    """

    query: Labelled
    key: Labelled
    value: Labelled
    result: Labelled
    batch: tuple[str, ...]
    scale: float
    terms: tuple[_Term, ...] = ()
    factors: tuple[_Factor, ...] = ()


_QUERIES, _KEYS, _FEATURES, _VALUES = "queries", "keys", "features", "values"


def _attentions(body: GraphModule) -> Iterator[_Attention]:
    for node in body.graph.nodes:
        if node.target is _aten.scaled_dot_product_attention.default:
            found = _fused(node)
        elif node.target in (_aten.softmax.int, _aten._softmax.default):
            found = _written_out(node)
        else:
            continue
        if found is not None:
            yield found


def _fused(node: Node) -> _Attention | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    unsupported = ("dropout_p", "enable_gqa")
    query, key, value = (given[name] for name in names[:3])
    ranks = {rank_of(x) for x in (query, key, value)}
    if any(given.get(name) for name in unsupported) or len(ranks) > 1:
        return None
    batch = tuple(f"batch{d}" for d in range(ranks.pop() - 2))
    scale = given.get("scale")
    mask = given.get("attn_mask")
    terms = [_Term("causal", None)] if given.get("is_causal") else []
    if mask is not None:
        terms.append(_Term("kept" if mask.meta["val"].dtype == torch.bool else "added", mask))
    return _Attention(
        terms=tuple(terms),
        query=Labelled(query, (*batch, _QUERIES, _FEATURES)),
        key=Labelled(key, (*batch, _KEYS, _FEATURES)),
        value=Labelled(value, (*batch, _KEYS, _VALUES)),
        result=Labelled(node, (*batch, _QUERIES, _VALUES)),
        batch=batch,
        scale=1 / math.sqrt(shape_of(query)[-1]) if scale is None else float(scale),
    )


def _written_out(softmax: Node) -> _Attention | None:
    """Return the attention around a softmax, None where there is none."""
    scores = _scores_of(softmax)
    if scores is None:
        return None
    first, terms, factors = scores
    keys = first.result[int(softmax.args[1])]  # type: ignore[arg-type]
    key, query = (first.left, first.right) if keys in first.left.labels else (first.right, first.left)
    weights = _followed(Labelled(softmax, first.result))
    second = None if weights is None else product_of(*weights.node.users)
    if weights is None or second is None or second.scale != 1 or keys in query.labels:
        return None
    sides = {second.left.node: second.left, second.right.node: second.right}
    mine = sides.pop(weights.node, None)
    if mine is None or len(sides) != 1:
        return None
    names = dict(zip(mine.labels, weights.labels, strict=True))
    ((value, labels),) = sides.values()
    features = [label for label in labels if label not in names]
    if len(features) != 1:
        return None
    names[features[0]] = _VALUES
    queries = [label for label in query.labels if label in first.result and label not in key.labels]
    if len(queries) > 1:  # heads that share their keys are of the batch
        queries = [label for label in queries if not isinstance(query.extent(label), int)]
    batch = tuple(label for label in first.result if label not in (keys, *queries))
    result = tuple(names[label] for label in second.result)
    features = [label for label in query.labels if label not in first.result]
    if (
        len(queries) != 1
        or keys in result
        or not {*batch} <= {*query.labels}
        or sorted(result) != sorted((*batch, *queries, _VALUES))
    ):
        return None
    if (terms or factors) and first.result != (*batch, *queries, keys):
        return None
    renamed = {keys: _KEYS, queries[0]: _QUERIES, features[0]: _FEATURES}
    return _Attention(
        query=_renamed(query, renamed),
        key=_renamed(key, renamed),
        value=_renamed(Labelled(value, tuple(names[label] for label in labels)), renamed),
        result=_renamed(Labelled(next(iter(weights.node.users)), result), renamed),
        batch=batch,
        scale=first.scale,
        terms=terms,
        factors=factors,
    )


def _renamed(value: Labelled, names: dict[str, str]) -> Labelled:
    return Labelled(value.node, tuple(names.get(label, label) for label in value.labels))


def _scores_of(softmax: Node) -> tuple[Product, tuple[_Term, ...], tuple[_Factor, ...]] | None:
    """Return the product that a softmax is taken of, with what it is changed by and multiplied by on the way."""
    node, factor, dim = softmax.args[0], 1.0, int(softmax.args[1])  # type: ignore[arg-type]
    terms: list[_Term] = []
    factors: list[_Factor] = []
    while isinstance(node, Node):
        product = product_of(node)
        if product is not None:
            return product._replace(scale=product.scale * factor), tuple(terms), tuple(factors)
        number = node.args[1] if len(node.args) > 1 else None
        if node.target in (_aten.mul.Tensor, _aten.mul.Scalar) and isinstance(number, int | float):
            factor *= number
        elif node.target in (_aten.div.Tensor, _aten.div.Scalar) and isinstance(number, int | float):
            factor /= number
        elif node.target is _aten.neg.default:
            factor = -factor
        elif (shifted := _shifted(node)) is not None:
            sign, shift = shifted
            # what is the same for all keys changes no softmax; scores are lower than the floor of a mask by it
            terms = [
                t._replace(factor=t.factor - shift * factor) if t.kind == "dropped" else t for t in terms
            ]
            factor *= sign
        elif not any(t.kind == "dropped" for t in terms) and unshifted(node, dim) is not node:
            node = unshifted(node, dim)
            continue
        elif (multiplied := _multiplied(node)) is not None:
            found, node = multiplied
            factors.append(found)
            continue
        elif (changed := _changed(node, factor)) is not None:
            if factors:
                return None  # what is added before is multiplied as well
            term, node = changed
            terms.append(term)
            continue
        elif not keeps(node):
            return None
        node = node.args[0]
    return None


def _shifted(node: Node) -> tuple[int, float] | None:
    """Return the sign of scores, and the number that is added to them."""
    number = node.args[1] if len(node.args) > 1 else None
    if not isinstance(number, int | float) or node.kwargs:
        return None
    if node.target in (_aten.add.Tensor, _aten.add.Scalar):
        return 1, number
    if node.target in (_aten.sub.Tensor, _aten.sub.Scalar):
        return 1, -number
    return (-1, number) if node.target is _aten.rsub.Scalar else None


def _multiplied(node: Node) -> tuple[_Factor, Node] | None:
    """Return what scores are multiplied by at a node, one value for all pairs, and the scores."""
    if node.target not in (_aten.mul.Tensor, _aten.div.Tensor) or node.kwargs:
        return None
    a, b = node.args
    if not (isinstance(a, Node) and isinstance(b, Node) and is_tensor_node(a) and is_tensor_node(b)):
        return None  # a size as a number is a block's own there
    scores, other = (b, a) if node.target is _aten.mul.Tensor and _leads_to_product(b) else (a, b)
    if (
        not _leads_to_product(scores)
        or rank_of(other) > rank_of(scores)
        or any(n != 1 for n in shape_of(other)[-2:])
    ):
        return None
    return _Factor(node.target, other), scores


def _changed(node: Node, factor: float) -> tuple[_Term, Node] | None:
    """Return what scores are changed by at a node, and the scores."""
    if node.target is _aten.masked_fill.Scalar:
        scores, mask, value = node.args
        # so low that nothing of it is left after exponentials, which is held against the scores where it runs
        if isinstance(value, int | float) and value * factor <= _NOUGHT:
            return _Term("dropped", mask, value * factor), scores  # type: ignore[arg-type, return-value]
        return None
    if node.target is not _aten.add.Tensor or node.kwargs or not all(isinstance(n, Node) for n in node.args):
        return None
    a, b = node.args
    scores, other = (a, b) if _leads_to_product(a) else (b, a)  # type: ignore[arg-type]
    return (_Term("added", other, factor), scores) if _leads_to_product(scores) else None  # type: ignore[arg-type, return-value]


_NOUGHT = -1e4
"""What scores are set to by masks, at most."""


def _leads_to_product(node: Node) -> bool:
    """Tell whether a value is a product, scaled or changed perhaps."""
    pending: list[Any] = [node]
    for candidate in pending:
        if not isinstance(candidate, Node):
            continue
        if product_of(candidate) is not None:
            return True
        scaled = candidate.target in (
            _aten.mul.Tensor,
            _aten.div.Tensor,
            _aten.add.Tensor,
            _aten.sub.Tensor,
            _aten.rsub.Scalar,
            _aten.neg.default,
            _aten.masked_fill.Scalar,
        )
        if scaled or keeps(candidate):
            pending += candidate.args[:2]
    return False


def _followed(weights: Labelled) -> Labelled | None:
    """Follow weights to the one product that uses them, through what only puts their dimensions in another order."""
    while len(weights.node.users) == 1:
        (user,) = weights.node.users
        if product_of(user) is not None:
            return weights
        order = range(len(weights.labels)) if keeps(user) else order_of(user)
        if order is None:
            return None
        weights = Labelled(user, tuple(weights.labels[d] for d in order))
    return None


def _tokens(value: Labelled) -> tuple[Node, int]:
    """Return keys or values, and the dimension of their tokens."""
    return value.node, value.labels.index(_KEYS)


def _are_of_positions(attention: _Attention, program: Program, maps: ProgramMaps, shapes: Shapes) -> bool:
    """Tell whether terms are computed from positions alone, pair by pair; each of queries and keys, in this order."""
    pairs = [
        shapes[x.node][x.labels.index(name)]
        for x, name in ((attention.query, _QUERIES), (attention.key, _KEYS))
    ]
    for term in attention.terms:
        if term.node is None:
            continue
        if term.node in maps.moving or not _aligns(shapes[term.node], pairs):
            return False
        if list(shapes[term.node][-2:]) != pairs:
            continue  # of keys or queries alone: it is computed whole
        seen = overview_of(program, [term.node])
        told = seen.told(shapes)
        bias = Bias(seen.run, told)
        device = program.device
        rows = torch.tensor([0, pairs[0] // 3, pairs[0] - 1], device=device)
        columns = slice(pairs[1] // 2, pairs[1])
        try:
            part = bias.part(rows, columns)
        except NotByPairs:
            return False
        (whole,) = seen.run(*told)
        if not torch.equal(
            part.expand(*whole.shape[:-2], *part.shape[-2:]), whole[..., rows, :][..., columns]
        ):
            return False
    return True


def _aligns(shape: Sequence[int], pairs: Sequence[int]) -> bool:
    """Tell whether the last dimensions are those of pairs, or stand for all of one."""
    return all(n in (1, wanted) for n, wanted in zip(reversed(shape), reversed(pairs), strict=False))


def _barred_(attention: _Attention, space: Space, rows: Space | None) -> Node:
    """Put the attention to stored keys and values in place of one; return it."""
    result = attention.result.node
    graph = result.graph
    with graph.inserting_before(result):
        extents = [extent(space.map, dim) for dim in space.dims]
        query = _ordered(attention.query, (*attention.batch, _QUERIES, _FEATURES))
        for factor in attention.factors:
            query = called(graph, factor.operation, query, factor.node)
        key, value = (
            spread(_ordered(tokens, (*attention.batch, _KEYS, last)), -2, extents)
            for tokens, last in ((attention.key, _FEATURES), (attention.value, _VALUES))
        )
        if rows is None:
            barrier = called(graph, ATTEND, query, key, value, attention.scale, len(extents))
        else:
            numbers = called(
                graph, _aten.reshape.default, called(graph, NUMBERS, rows.map, list(rows.dims)), [-1]
            )
            bias = _bias(graph, attention)
            floor = _floor_of(attention.terms)
            barrier = called(
                graph, ATTEND_BIASED, query, key, value, attention.scale, len(extents), bias, numbers, floor
            )
        given = Labelled(barrier, (*attention.batch, _QUERIES, _VALUES))
        result.replace_all_uses_with(_ordered(given, attention.result.labels))
    prune_(result)
    return barrier


def _floor_of(terms: Sequence[_Term]) -> float:
    """Return what masks set scores to, at most; what is added afterwards may raise them by half."""
    floors = [-math.inf]
    for place, term in enumerate(terms):
        if term.kind == "dropped":
            raised = any(later.kind == "added" for later in terms[:place])
            floors.append(term.factor / 2 if raised else term.factor)
    return max(floors)


def _bias(graph: Graph, attention: _Attention) -> Node:
    """Return what is added to scores, or true where a key counts, (..., L, K)."""
    added: Node | None = None
    kept: Node | None = None
    for term in attention.terms:
        node = term.node
        if node is None:
            full = filled(_pairs(attention), True, attention.query.node, torch.bool)
            node = called(graph, _aten.tril.default, full)
        if term.kind == "added":
            node = node if term.factor == 1 else called(graph, _aten.mul.Tensor, node, term.factor)
            added = node if added is None else called(graph, _aten.add.Tensor, added, node)
        else:
            node = called(graph, _aten.logical_not.default, node) if term.kind == "dropped" else node
            kept = node if kept is None else called(graph, _aten.logical_and.default, kept, node)
    if added is None or kept is None:
        found = added or kept
        assert found is not None
        return _paired(graph, found, attention)
    dropped = called(graph, _aten.logical_not.default, kept)
    return called(graph, _aten.masked_fill.Scalar, _paired(graph, added, attention), dropped, -math.inf)


def _pairs(attention: _Attention) -> list[Node]:
    """Return how many queries and keys there are."""
    sides = ((attention.query, _QUERIES), (attention.key, _KEYS))
    return [extent(side.node, side.labels.index(name)) for side, name in sides]


def _paired(graph: Graph, node: Node, attention: _Attention) -> Node:
    """Return a bias with a dimension of queries and one of keys."""
    shape = list(shape_of(node))
    if len(shape) > 1 and 1 not in shape[-2:]:
        return node
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        true = filled(_pairs(attention), True, attention.query.node, dtype)
        return called(graph, _aten.logical_and.default, node, true)
    zeros = filled(_pairs(attention), 0, attention.query.node, dtype)
    return called(graph, _aten.add.Tensor, node, zeros)


def _ordered(value: Labelled, wanted: tuple[str, ...]) -> Node:
    """Return a value with its dimensions in another order, those that it lacks with an extent of 1."""
    node, labels = value
    for label in wanted:
        if label not in labels:
            node, labels = called(node.graph, _aten.unsqueeze.default, node, 0), (label, *labels)
    if labels == wanted:
        return node
    return called(node.graph, _aten.permute.default, node, [labels.index(label) for label in wanted])
