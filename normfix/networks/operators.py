"""What is known of ATen operators by name: which are local, which only move values, which must not see NaN.

The dye observes; these tables only say where observing is needless (a convolution is local by definition),
misleading (a gather computes nothing, wherever it takes its values from) or dangerous (a NaN used as a
coordinate is an arbitrary address in some kernels). Whatever stands in no table is judged by what it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from normfix.networks.functions import BLANK

__all__ = [
    "NEIGHBOURHOODS",
    "RESIZING_POOLS",
    "at_risk",
    "chooses",
    "compares",
    "is_blank",
    "is_convolution_like",
    "is_foreign",
    "is_move",
    "is_pointwise",
    "is_pool",
    "is_resizing_pool",
    "is_shuffle",
    "is_unpooling",
    "is_view",
    "looked_up",
    "name_of",
    "reorders",
    "takes_coordinates",
    "writes_unsaid",
    "written",
]

_LOCAL = frozenset(
    {
        "aten::convolution",
        "aten::mkldnn_convolution",
        "aten::_slow_conv2d_forward",
        "aten::upsample_nearest1d",
        "aten::upsample_nearest2d",
        "aten::upsample_nearest3d",
        "aten::_upsample_nearest_exact1d",
        "aten::_upsample_nearest_exact2d",
        "aten::_upsample_nearest_exact3d",
        "aten::upsample_linear1d",
        "aten::upsample_bilinear2d",
        "aten::upsample_trilinear3d",
        "aten::upsample_bicubic2d",
        "aten::_upsample_bilinear2d_aa",
        "aten::_upsample_bicubic2d_aa",
    }
)
NEIGHBOURHOODS = frozenset(
    f"natten::{backend}na{axes}d_forward" for backend in ("", "reference_") for axes in (1, 2, 3)
)
"""Neighbourhood attention of NATTEN: each position attends to a window around it."""
_POOLS = frozenset(
    {
        "aten::avg_pool2d",
        "aten::avg_pool3d",
        "aten::max_pool2d_with_indices",
        "aten::max_pool3d_with_indices",
        "aten::mkldnn_max_pool2d",
        "aten::mkldnn_max_pool3d",
        "aten::fractional_max_pool2d",
    }
)
RESIZING_POOLS = frozenset(
    {
        "aten::_adaptive_avg_pool2d",
        "aten::_adaptive_avg_pool3d",
        "aten::adaptive_max_pool2d",
        "aten::adaptive_max_pool3d",
        # of one dimension, where they are not brought to two
        "aten::adaptive_avg_pool1d",
        "aten::adaptive_max_pool1d",
    }
)
"""Pools to a given extent."""

_POINTWISE = frozenset(
    {"aten::_to_copy", "aten::clone", "aten::copy_", "aten::masked_fill", "aten::where"}
) | {
    "aten::fake_quantize_per_tensor_affine_cachemask",
    "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
}
_MOVES = frozenset(
    {
        "aten::cat",
        "aten::stack",
        "aten::_unsafe_view",
        "aten::repeat",
        "aten::repeat_interleave",
        "aten::roll",
        "aten::flip",
        "aten::rot90",
        "aten::constant_pad_nd",
        "aten::reflection_pad1d",
        "aten::reflection_pad2d",
        "aten::reflection_pad3d",
        "aten::replication_pad1d",
        "aten::replication_pad2d",
        "aten::replication_pad3d",
        "aten::pixel_shuffle",
        "aten::pixel_unshuffle",
        "aten::channel_shuffle",
        "aten::native_channel_shuffle",
        "aten::im2col",
        "aten::col2im",
        "aten::index",
        "aten::_unsafe_index",
        "aten::index_select",
        "aten::index_put",
        "aten::index_put_",
        "aten::index_copy",
        "aten::index_copy_",
        "aten::gather",
        "aten::scatter",
        "aten::scatter_",
        "aten::slice_scatter",
        "aten::select_scatter",
        "aten::take",
        "aten::tril",
        "aten::triu",
        "aten::max_unpool2d",
        "aten::max_unpool3d",
    }
)
_SHUFFLES = frozenset(
    {
        "aten::cat",
        "aten::stack",
        "aten::_unsafe_view",
        "aten::repeat",
        "aten::roll",
        "aten::flip",
        "aten::rot90",
        "aten::constant_pad_nd",
    }
)
_REORDERS = frozenset(
    {
        "aten::sort",
        "aten::argsort",
        "aten::topk",
        "aten::kthvalue",
        "aten::mode",
        "aten::median",
        "aten::nanmedian",
        "aten::nansum",
        "aten::_unique",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
        "aten::unique_dim_consecutive",
    }
)
_COMPARES = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "sign", "sgn", "signbit", "heaviside"}) | {
    "fmax",
    "fmin",
    "nan_to_num",
    "isfinite",
    "argmax",
    "argmin",
    "logical_not",
    "nonzero",
}
_LOOKUPS = {"aten::embedding": 1, "aten::bucketize": 0, "aten::searchsorted": 1, "aten::take": 1}
_BLANKS = frozenset(f"aten::{name}" for name in BLANK)
_DANGEROUS = frozenset(
    {
        "aten::_grid_sampler_2d_cpu_fallback",
        "aten::bincount",
        "aten::histc",
        "aten::histogram",
        "aten::multinomial",
        "aten::bernoulli",
        "aten::bernoulli_",
        "aten::searchsorted",
        "aten::bucketize",
        "aten::embedding_bag",
        "aten::_ctc_loss",
    }
)
_DANGEROUS_PREFIXES = ("aten::linalg_", "aten::_linalg_", "aten::cholesky", "aten::geqrf", "aten::lu_")
_HARMLESS = ("aten::linalg_vector_norm",)
_COORDINATES = {
    "aten::grid_sampler_2d": (1,),
    "aten::grid_sampler_3d": (1,),
    "torchvision::deform_conv2d": (2,),
    "torchvision::roi_align": (1,),
    "torchvision::roi_pool": (1,),
    "torchvision::ps_roi_align": (1,),
    "torchvision::ps_roi_pool": (1,),
}


def name_of(op: OpOverload) -> str:
    """Return the operator's qualified name without its overload, such as "aten::mean"."""
    return op._schema.name


def is_convolution_like(op: OpOverload) -> bool:
    """Tell whether an output pixel sees a window of fixed size around its place, by definition."""
    return name_of(op) in _LOCAL


def is_pool(op: OpOverload) -> bool:
    """Tell whether it pools windows; a window may be the whole extent, so pools are judged by what they do."""
    return name_of(op) in _POOLS


def is_resizing_pool(op: OpOverload) -> bool:
    """Tell whether it pools to a given extent, in windows that grow with the image."""
    return name_of(op) in RESIZING_POOLS


def is_move(op: OpOverload) -> bool:
    """Tell whether the operator only moves or repeats values."""
    return name_of(op) in _MOVES


def is_shuffle(op: OpOverload) -> bool:
    """Tell whether the operator moves values to places that depend on no values: marks can be moved with them."""
    return name_of(op) in _SHUFFLES


def looked_up(op: OpOverload, args: Sequence[Any]) -> Any:
    """Return the operand whose elements choose, each for itself, what stands in their place; None if there is none."""
    name = name_of(op)
    if name == "aten::index":
        places = args[1]
        alone = len(places) > 0 and places[0] is not None and all(place is None for place in places[1:])
        return places[0] if alone and places[0].dtype is torch.int64 else None
    if name == "aten::searchsorted" and not (isinstance(args[0], torch.Tensor) and args[0].dim() == 1):
        return None
    which = _LOOKUPS.get(name)
    return None if which is None or which >= len(args) else args[which]


def chooses(op: OpOverload) -> bool:
    """Tell whether the operator returns the places of the largest or smallest values along a dimension."""
    return name_of(op) in ("aten::argmax", "aten::argmin")


def compares(op: Any) -> bool:
    """Tell whether the operator compares numbers or looks at their kind, so that it makes no NaN of one."""
    return isinstance(op, OpOverload) and name_of(op).removeprefix("aten::") in _COMPARES


def reorders(op: OpOverload) -> bool:
    """Tell whether a NaN marks less of its output than what depends on it: it is sorted away, or left out."""
    return name_of(op) in _REORDERS


def takes_coordinates(op: OpOverload) -> bool:
    """Tell whether an operator is known to take an operand for places to read at."""
    return name_of(op) in _COORDINATES


def is_blank(op: OpOverload) -> bool:
    """Tell whether the operator makes a tensor of an operand's shape and type, without looking at its values."""
    return name_of(op) in _BLANKS


def is_pointwise(op: OpOverload) -> bool:
    """Tell whether torch itself declares that each output element depends on the input elements at its place."""
    return torch.Tag.pointwise in op.tags or name_of(op) in _POINTWISE


def is_foreign(op: OpOverload) -> bool:
    """Tell whether the operator is neither torch's own nor ours nor known by name: nobody says what it does."""
    name = name_of(op)
    return name.partition("::")[0] not in ("aten", "prims", "normfix") and name not in NEIGHBOURHOODS


def is_unpooling(op: OpOverload) -> bool:
    """Tell whether the operator puts the maxima of windows back to where they were found."""
    return name_of(op) in ("aten::max_unpool2d", "aten::max_unpool3d")


def at_risk(op: OpOverload, args: Sequence[Any]) -> Sequence[Any]:
    """Return the positional arguments in which a NaN could be taken for an address."""
    name = name_of(op)
    if name in _COORDINATES:
        return [args[i] for i in _COORDINATES[name] if i < len(args)]
    listed = name in _DANGEROUS or (name.startswith(_DANGEROUS_PREFIXES) and name not in _HARMLESS)
    return args if is_foreign(op) or listed else ()


def is_view(op: OpOverload) -> bool:
    """Tell whether every result is another view of an argument's memory, unchanged."""
    aliases = [result.alias_info for result in op._schema.returns]
    return bool(aliases) and all(info is not None and not info.is_write for info in aliases)


def writes_unsaid(op: OpOverload) -> bool:
    """Tell whether the operator may write to arguments although its schema does not say so."""
    return "batch_norm" in name_of(op) or "moving_avg" in name_of(op)


def written(op: OpOverload) -> frozenset[str]:
    """Return the names of the arguments that the operator writes to."""
    return frozenset(
        argument.name
        for argument in op._schema.arguments
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or (op._schema.is_mutable and argument.alias_info is None and str(argument.type) == "List[Tensor]")
    )
