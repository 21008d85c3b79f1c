"""What is known of ATen operators: norms under all their names, what is local, what is not, what is unknown.

A norm is one call before decomposition (`aten.instance_norm`) and another after it
(`aten._native_batch_norm_legit.no_stats`); `read_norm` brings both to one form, by the argument names of the
operator's own schema. What is neither a norm nor listed as local is unknown, and unknown is never local.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from normfix.networks import operators
from normfix.networks.functions import BLANK, FILLED, LIKE

__all__ = [
    "Normalisation",
    "along",
    "is_local",
    "name_of",
    "read_norm",
    "taken_by",
    "viewed_by",
    "written_by",
]

_NORMS = {
    "batch_norm": "batch_norm",
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_native_batch_norm_legit_functional": "batch_norm",
    "_batch_norm_no_update": "batch_norm",
    "_batch_norm_with_update": "batch_norm",
    "_batch_norm_with_update_functional": "batch_norm",
    "_batch_norm_impl_index": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "miopen_batch_norm": "batch_norm",
    "instance_norm": "instance_norm",
    "group_norm": "group_norm",
    "native_group_norm": "group_norm",
    "layer_norm": "layer_norm",
    "native_layer_norm": "layer_norm",
    "rms_norm": "rms_norm",
    "_fused_rms_norm": "rms_norm",
}
_NEVER_TRAINING = frozenset({"_native_batch_norm_legit_no_training", "_batch_norm_no_update"})
_ALWAYS_TRAINING = frozenset({"_batch_norm_with_update", "_batch_norm_with_update_functional"})

# fmt: off
_LOCAL = frozenset(
    {
        # shapes and copies
        "view", "reshape", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "movedim",
        "moveaxis", "swapaxes", "unsqueeze", "squeeze", "expand", "expand_as", "flatten", "unflatten",
        "contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy", "to", "_to_copy", "type_as",
        "_assert_tensor_metadata", "slice", "select", "narrow", "chunk", "split", "split_with_sizes",
        "unbind", "cat", "concat", "stack", "constant_pad_nd", "pad", "reflection_pad1d",
        "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
        "replication_pad3d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
        "native_channel_shuffle", "unfold", "im2col", "repeat", "repeat_interleave", "tile", "meshgrid",
        "broadcast_tensors", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
        "native_dropout", "view_as", "reshape_as", "broadcast_to", "adjoint", "numpy_T", "mT", "mH", "swapdims",
        "atleast_1d", "atleast_2d", "atleast_3d", "ravel", "unsafe_chunk", "unsafe_split",
        "unsafe_split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "hstack", "vstack", "dstack",
        "column_stack", "row_stack", "concatenate", "_stack", "view_as_complex", "view_as_real", "real", "imag",
        "complex", "polar", "conj", "_conj", "resolve_conj", "resolve_neg", "lift", "lift_fresh", "data", "cpu",
        "cuda", "pin_memory", "chalf", "copy", "fill", "zero", "slice_scatter", "select_scatter", "numel", "size",
        "_functional_assert_async", "_assert_async", "_assert_scalar", "is_floating_point", "is_complex",
        # pixel by pixel, but without the tag
        "absolute", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2", "arctanh", "divide",
        "multiply", "subtract", "true_divide", "floor_divide", "fix", "negative", "greater", "greater_equal",
        "less", "less_equal", "not_equal", "hardswish", "log_sigmoid", "log_sigmoid_forward", "rrelu",
        "rrelu_with_noise", "isclose", "isreal", "bucketize", "one_hot", "cross", "cosine_similarity",
        "pairwise_distance", "bernoulli", "uniform", "normal",
        "exponential",
        # made from sizes alone
        *FILLED, *BLANK, "sym_size", "sym_numel", "arange", "linspace", "eye", "tril", "triu", "empty_strided",
        "new_empty_strided", "rand", "randn",
        # convolutions, pools over windows, resampling, channels
        "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d", "conv_transpose2d",
        "conv_transpose3d", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices",
        "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_unpool2d", "max_unpool3d",
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d",
        "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa", "linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "einsum", "glu",
        "prelu", "_prelu_kernel", "leaky_relu", "ldexp", "embedding",  # pointwise, which torch 2.6 does not say
        "softmax", "_softmax", "log_softmax", "_log_softmax",
        "logsumexp", "sum", "mean", "amax", "amin", "max", "min", "any", "all", "prod", "var", "std",
        "var_mean", "std_mean", "linalg_vector_norm", "norm", "argmax", "argmin", "cumsum", "cumprod",
        "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "adaptive_avg_pool1d",
        "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
        "scaled_dot_product_attention", "flip", "roll", "median", "_adaptive_avg_pool3d",
        "adaptive_max_pool1d", "adaptive_max_pool3d", "max_pool1d_with_indices", "_convolution_mode",
        "_conv_depthwise2d", "conv_depthwise3d", "thnn_conv2d", "conv_tbc", "col2im", "bilinear", "_trilinear",
        "_addmm_activation", "addbmm", "addmv", "mv", "dot", "inner", "outer", "tensordot", "chain_matmul",
        "cdist", "_safe_softmax", "nanmean", "nansum", "aminmax", "count_nonzero", "frobenius_norm", "diff",
        "where", "rot90", "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine",
    }
)
"""Local unless `along` says that they run along space, or their output grows otherwise than their input."""

_ALONG = frozenset(
    {
        "softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "cumsum", "cumprod", "cummax",
        "cummin", "logcumsumexp", "sort", "argsort", "flip", "topk", "median", "glu", "_safe_softmax",
    }
)
_VALUELESS = BLANK | {"sym_size", "sym_numel"}
_PICKING = frozenset({"index", "_unsafe_index", "index_put", "_unsafe_index_put"})
_PICKING_DIM = frozenset(
    {
        "index_select", "gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "index_add",
        "index_copy", "index_fill",
    }
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Normalisation:
    """A normalising node in one form, whatever its operator is called.

    `computes` tells that it uses statistics of its operand. `first` tells that the node returns several
    tensors of which the first is the result.
    """

    function: str
    operand: Node
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    computes: bool
    groups: int
    normalized_shape: tuple[Any, ...]
    eps: float
    momentum: float
    first: bool


def name_of(node: Node) -> str:
    """Return the operator's name without its overload, or '' for what is no operator."""
    return str(node.target._schema.name.partition("::")[2]) if isinstance(node.target, OpOverload) else ""


def is_local(node: Node, space: frozenset[int] = frozenset()) -> bool:
    """Tell whether an operator is known to be local, unless its sizes or dimensions say otherwise.

    Args:
        node: of the graph.
        space: dimensions of its first operand that follow the image's extent.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        return True  # arithmetic on sizes, getitem
    if target.namespace not in ("aten", "prim", "prims"):
        return operators.name_of(target) in operators.NEIGHBOURHOODS
    name = name_of(node).rstrip("_")
    if name in _PICKING | _PICKING_DIM:
        return not set(_picked(node, name)) & space
    in_name_only = getattr(torch.ops.aten, name, None) if name != name_of(node) else None
    twins = () if in_name_only is None else (getattr(in_name_only, o) for o in in_name_only.overloads())
    tags = set(target.tags).union(*(twin.tags for twin in twins))
    attends = name.startswith("_scaled_dot_product")
    return torch.Tag.pointwise in tags or name in _LOCAL or attends


def _picked(node: Node, name: str) -> tuple[int, ...]:
    """Return the dimensions along which an operator takes or puts what an index says."""
    given = _bound(node)
    if name in _PICKING:
        return tuple(d for d, index in enumerate(given["indices"]) if index is not None)
    rank = len(given["self"].meta["val"].shape)
    return tuple(range(rank)) if given.get("dim") is None else (int(given["dim"]) % rank,)


def along(node: Node) -> tuple[int, ...]:
    """Return the dimensions an operator orders, accumulates or normalises along, counted from the front."""
    name = name_of(node)
    if name.rstrip("_") not in _ALONG:
        return ()
    given = _bound(node)
    dims = given.get("dim", given.get("dims", -1))
    rank = len(given["self"].meta["val"].shape)
    if name == "flip" and not dims:
        return tuple(range(rank))
    listed: Sequence[int] = dims if isinstance(dims, (list, tuple)) else [-1 if dims is None else dims]
    return tuple(dim % rank for dim in listed)


def read_norm(node: Node) -> Normalisation | None:
    """Read a normalising node; None for every other."""
    name = name_of(node)
    if node.op != "call_function" or name not in _NORMS:
        return None
    function = _NORMS[name]
    given = _bound(node)
    operand = given.get("input", given.get("self"))
    if not isinstance(operand, Node):
        return None
    return Normalisation(
        function=function,
        operand=operand,
        weight=given.get("weight"),
        bias=given.get("bias"),
        running_mean=given.get("running_mean"),
        running_var=given.get("running_var"),
        computes=_computes(name, function, given),
        groups=int(given.get("num_groups", given.get("group", 1))),
        normalized_shape=tuple(given.get("normalized_shape", ())),
        eps=_eps(given),
        momentum=float(given.get("momentum", 0.1)),
        first=isinstance(node.meta.get("val"), (tuple, list)) or len(node.target._schema.returns) > 1,  # type: ignore[union-attr]
    )


def taken_by(node: Node) -> list[Node]:
    """Return the operands whose values a node may use: `kernel.to(x)` takes from x its type and place alone."""
    name = name_of(node)
    if name in _VALUELESS:
        return []
    return node.all_input_nodes[:1] if name in LIKE else node.all_input_nodes


def viewed_by(node: Node) -> Node | None:
    """Return the node whose memory an operator's result shares, or None."""
    return next(iter(_aliased(node, written=False)), None)


def written_by(node: Node) -> list[Node]:
    """Return the operands that an operator writes to."""
    return _aliased(node, written=True)


def _aliased(node: Node, *, written: bool) -> list[Node]:
    if not isinstance(node.target, OpOverload):
        return []
    return [
        given
        for argument, given in zip(node.target._schema.arguments, node.args, strict=False)
        if argument.alias_info is not None and isinstance(given, Node)
        if argument.alias_info.is_write or not written
    ]


def _computes(name: str, function: str, given: dict[str, Any]) -> bool:
    if function == "instance_norm":
        return bool(given["use_input_stats"])
    if function == "batch_norm":
        if name in _NEVER_TRAINING:
            return False
        return name in _ALWAYS_TRAINING or bool(given.get("training")) or given.get("running_mean") is None
    return True


def _eps(given: dict[str, Any]) -> float:
    value = given.get("eps", given.get("epsilon"))
    return 1e-5 if value is None else float(value)


def _bound(node: Node) -> dict[str, Any]:
    """Return the node's arguments by the names in the operator's schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    bound.update(node.kwargs)
    return bound
