"""What mixes values along some dimensions: products, softmax, reductions, norms, attention.

Along channels or the inside of a window that has no reach. Along space it reads everything, which is what a site is:
the statistic of one that is frozen is a constant and not in the graph any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from normfix.tiling.reach.calls import Call, tensor_of
from normfix.tiling.reach.links import NOTHING, WHOLE, Along, ByDimension, Link, Reading, Whole
from normfix.tiling.reach.rules.rule import Rule, aligned, kept

__all__ = ["MIXING"]

_STATISTIC = Whole("it computes a statistic of the whole extent")
_TOKENS = Whole("every position looks at every other")


def _linear(call: Call) -> list[Reading]:
    x = call.tensor("input")
    rank = len(call.extents(x))
    return [kept(call, x, {rank - 1: WHOLE})]


def _matmul(call: Call) -> list[Reading]:
    """(..., m, k) times (..., k, n); a vector is a row in front and a column behind."""
    names = [
        n
        for n in ("self", "other", "mat1", "mat2", "vec", "tensor", "batch1", "batch2")
        if n in call.arguments
    ]
    factors = [n for n in names if not (n == "self" and len(names) > 2)]
    a, b = call.tensor(factors[0]), call.tensor(factors[1])
    summand = call.get("self") if len(names) > 2 else None
    ranks = len(call.extents(a)), len(call.extents(b))
    rank = len(call.shape)
    matrix = rank - (ranks[0] > 1) - (ranks[1] > 1)  # where the dimensions that are not of the batch begin
    readings = [
        ByDimension(a, _batched(call, a, matrix, [Along(matrix), WHOLE] if ranks[0] > 1 else [WHOLE])),
        ByDimension(b, _batched(call, b, matrix, [WHOLE, Along(rank - 1)] if ranks[1] > 1 else [WHOLE])),
    ]
    added = [aligned(call, summand)] if isinstance(summand, Node) else []
    return [*readings, *added]


def _batched(call: Call, x: Node, matrix: int, last: list[Link]) -> tuple[Link, ...]:
    extents = call.extents(x)
    lead = len(extents) - len(last)
    links: list[Link] = []
    for dim in range(lead):
        place = matrix - lead + dim
        broadcast = extents[dim] == call.sizes.ones and call.shape[place] != call.sizes.ones
        links.append(NOTHING if broadcast else Along(place))
    return (*links, *last)


def _distances(call: Call) -> list[Reading]:
    """Distances of the rows of one matrix to those of another: (..., m, k) and (..., n, k) give (..., m, n)."""
    rank = len(call.shape)
    return [
        ByDimension(x, _batched(call, x, rank - 2, [Along(rank - 2 + place), WHOLE]))
        for place, x in enumerate(map(call.tensor, ("x1", "x2")))
    ]


def _einsum(call: Call) -> list[Reading]:
    equation = str(call.get("equation")).replace(" ", "")
    inputs, _, result = equation.partition("->")
    if "." in equation or "->" not in equation:
        return []
    readings: list[Reading] = []
    for labels, operand in zip(inputs.split(","), call.get("tensors"), strict=True):
        once = {label for label in labels if labels.count(label) == 1}
        links = tuple(
            Along(result.index(label)) if label in result and label in once else WHOLE for label in labels
        )
        readings.append(ByDimension(operand, links))
    return readings


def _attention(call: Call) -> list[Reading]:
    query, rank = call.tensor("query"), len(call.shape)
    lead = [Along(d) for d in range(rank - 2)]
    readings: list[Reading] = [ByDimension(query, (*lead, Along(rank - 2), WHOLE))]
    for name, last in (("key", WHOLE), ("value", Along(rank - 1))):
        readings.append(ByDimension(call.tensor(name), (*lead, _TOKENS, last)))
    mask = call.get("attn_mask")
    if isinstance(mask, Node):
        extents = call.extents(mask)
        shift = rank - len(extents)
        shape = call.shape
        links: list[Link] = []
        for dim, extent in enumerate(extents[:-1]):
            broadcast = extent == call.sizes.ones and shape[dim + shift] != extent
            links.append(NOTHING if broadcast else Along(dim + shift))
        readings.append(ByDimension(mask, (*links, _TOKENS)))
    return readings


def _stored_attention(call: Call) -> list[Reading]:
    """Attention to keys and values that are held of the whole image, as a statistic is."""
    query, rank = call.tensor("query"), len(call.shape)
    constants = [x for name in ("keys", "values", "bias") if isinstance(x := call.get(name), Node)]
    return [
        ByDimension(query, (*(Along(d) for d in range(rank - 1)), WHOLE)),
        *(ByDimension(x, (NOTHING,) * len(call.extents(x))) for x in constants),
        *(ByDimension(x, (Along(rank - 2),)) for x in [call.get("numbers")] if isinstance(x, Node)),
    ]


def _along(call: Call) -> list[Reading]:
    """Softmax, sorting, cumulation: each position reads all of one dimension."""
    x = call.first()
    rank = len(call.extents(x))
    return [kept(call, x, {call.dim(call.get("dim", -1), rank): _TOKENS})]


def _reduction(call: Call) -> list[Reading]:
    x = call.first()
    rank = len(call.extents(x))
    dims = _dims(call, rank)
    keeps = len(call.shape) == rank
    links: list[Link] = []
    for dim in range(rank):
        gone = sum(d < dim for d in dims) if not keeps else 0
        links.append(_STATISTIC if dim in dims else Along(dim - gone))
    return [ByDimension(x, tuple(links))]


def _dims(call: Call, rank: int) -> set[int]:
    """Return the dimensions that are reduced; all where none are named."""
    given = call.get("dim")
    listed: Sequence[Any] = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return {call.dim(d, rank) for d in listed} or set(range(rank))


def _of_two(call: Call) -> list[Reading]:
    """Cosine similarity and distance along a dimension."""
    given, rank = call.get("dim", 1), len(call.shape) + 1
    dim = call.dim(given, rank)
    links = tuple(WHOLE if d == dim else Along(d - (d > dim)) for d in range(rank))
    return [ByDimension(call.tensor(name), links) for name in ("x1", "x2")]


def _layer_norm(call: Call) -> list[Reading]:
    x = call.first()
    rank, normalised = len(call.extents(x)), len(call.get("normalized_shape"))
    return [kept(call, x, dict.fromkeys(range(rank - normalised, rank), _STATISTIC))]


def _batch_norm(call: Call) -> list[Reading]:
    """By running statistics it is pixel by pixel; by the batch's it is a statistic of space."""
    x = call.first()
    rank = len(call.extents(x))
    never = call.name in ("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
    live = not never and bool(call.get("training", call.get("use_input_stats", True)))
    live = live or not isinstance(call.get("running_mean"), Node)
    readings = [kept(call, x, dict.fromkeys((0, *range(2, rank)), _STATISTIC) if live else {})]
    return [*readings, *_per_channel(call, x)]


def _group_norm(call: Call) -> list[Reading]:
    x = call.first()
    rank = len(call.extents(x))
    return [kept(call, x, dict.fromkeys(range(1, rank), _STATISTIC)), *_per_channel(call, x)]


def _per_channel(call: Call, x: Node) -> list[Reading]:
    return [
        ByDimension(node, (NOTHING,)) for node in call.operands if node is not x and _is_vector(call, node)
    ]


def _is_vector(call: Call, node: Node) -> bool:
    return (
        tensor_of(node) is not None
        and len(call.extents(node)) == 1
        and call.sizes.is_constant(call.extents(node)[0])
    )


def _looked_up(name: str) -> Rule:
    """Return the rule of a table in which each element of an operand is looked up for itself."""

    def rule(call: Call) -> list[Reading]:
        indices = call.tensor(name)
        return [ByDimension(indices, tuple(Along(d) for d in range(len(call.extents(indices)))))]

    return rule


_ALONG = (
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "cummax",
    "cummin",
)
_ALONG_TOO = ("sort", "argsort", "topk", "renorm", "_safe_softmax", "msort")
_REDUCTIONS = (
    "sum",
    "mean",
    "nanmean",
    "nansum",
    "prod",
    "amax",
    "amin",
    "aminmax",
    "max",
    "min",
    "argmax",
    "argmin",
)
_REDUCTIONS_TOO = (
    "var",
    "std",
    "var_mean",
    "std_mean",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "all",
    "any",
    "median",
)
_OTHERS = ("nanmedian", "quantile", "nanquantile", "kthvalue", "mode", "count_nonzero", "frobenius_norm")

MIXING: dict[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot", "addmm", "baddbmm"), _matmul),
    **dict.fromkeys(("cdist", "_cdist_forward"), _distances),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "attend": _stored_attention,
    "attend_biased": _stored_attention,
    **dict.fromkeys((*_ALONG, *_ALONG_TOO), _along),
    **dict.fromkeys((*_REDUCTIONS, *_REDUCTIONS_TOO, *_OTHERS), _reduction),
    "cosine_similarity": _of_two,
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), _layer_norm),
    **dict.fromkeys(
        ("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
        + ("native_batch_norm", "_batch_norm_no_update"),
        _batch_norm,
    ),
    **dict.fromkeys(("group_norm", "native_group_norm"), _group_norm),
    "embedding": _looked_up("indices"),
    "one_hot": _looked_up("self"),
    "bucketize": _looked_up("self"),
}
