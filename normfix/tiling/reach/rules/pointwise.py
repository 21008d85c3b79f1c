"""What computes each position from the same position of its operands: `where`, masks and comparisons join both sides.

Torch tags most such operators itself; these are the ones that it does not.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from normfix.tiling.reach.calls import Call, tensor_of
from normfix.tiling.reach.links import NOTHING, ByDimension, Reading, Unread
from normfix.tiling.reach.rules.rule import aligned, kept

__all__ = ["is_pointwise", "keeps_place", "pointwise"]

_UNTAGGED = frozenset(
    {
        *("to", "_to_copy", "clone", "contiguous", "alias", "detach", "detach_", "lift"),
        *(
            "lift_fresh",
            "lift_fresh_copy",
            "dropout",
            "feature_dropout",
            "alpha_dropout",
            "feature_alpha_dropout",
            "native_dropout",
            "data",
        ),
        *("cpu", "cuda", "where", "masked_fill", "copy_", "fill", "absolute", "arccos"),
        *("arccosh", "arcsin", "arcsinh", "arctan", "arctan2", "arctanh", "divide", "multiply"),
        *("subtract", "true_divide", "floor_divide", "fix", "negative", "greater", "greater_equal", "less"),
        *("less_equal", "not_equal", "hardswish", "log_sigmoid", "rrelu", "isclose", "isreal", "real"),
        *("imag", "conj", "_conj", "resolve_conj", "resolve_neg", "complex", "polar", "square"),
        *("_prelu_kernel", "prelu", "clip", "hardtanh", "relu6", "selu", "celu", "silu"),
        *("mish", "gelu", "addcmul", "float_power", "logaddexp", "nan_to_num", "operand", "special_expit"),
        *(
            "mvlgamma",
            "isfinite",
            "isinf",
            "fake_quantize_per_tensor_affine",
            "fake_quantize_per_tensor_affine_cachemask",
            "frexp",
        ),
    }
)
_OF_SHAPE_ALONE = frozenset({"type_as", "expand_as", "view_as"})


def is_pointwise(call: Call) -> bool:
    """Tell whether each position of the result is computed from the same of the operands."""
    target = call.origin.target
    return bool(call.name) and isinstance(target, OpOverload) and keeps_place(target)


def keeps_place(target: OpOverload) -> bool:
    """Tell the same of an operator, also of one that writes in place."""
    name = target._schema.name.partition("::")[2]
    return (
        torch.Tag.pointwise in target.tags or name.removesuffix("_") in _UNTAGGED or name in _OF_SHAPE_ALONE
    )


def pointwise(call: Call) -> list[Reading]:
    """Read every operand at the place of the result."""
    if call.name == "type_as":
        return [kept(call, call.tensor("self")), Unread(call.tensor("other"))]
    if call.name == "prelu":
        x, weight = call.first(), call.tensor("weight")
        return [kept(call, x), ByDimension(weight, (NOTHING,) * len(call.extents(weight)))]
    return [aligned(call, node) for node in call.operands if tensor_of(node) is not None]
