"""The functions that compute statistics, under one name each however they are called.

A TorchFunctionMode sees `x.mean()` and `torch.mean(x)`, `x / n` and `torch.div(x, n)` as different objects, and a
compiler sees the operators instead. Census, rules and interception count calls by the names given here, so
that a call has the same number for all of them. Composites (`F.normalize`, `F.adaptive_avg_pool2d`) count as one
call, as a mode sees them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ATTENTION",
    "BLANK",
    "CONTRACTING",
    "COUNTED",
    "DIRECT",
    "FILLED",
    "LIKE",
    "NEW",
    "NORMS",
    "arguments_of",
    "axes_of_pool",
    "bound",
    "by_position",
    "operand_of",
    "reduced_by",
    "taken_by",
    "tokens_of",
    "with_operand",
]

NORMS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "batch_norm": F.batch_norm,
        "instance_norm": F.instance_norm,
        "group_norm": F.group_norm,
        "layer_norm": F.layer_norm,
        "rms_norm": F.rms_norm,
        "local_response_norm": F.local_response_norm,
    }
)
"""The normalising functions whose arguments are bound by name, so that rules can read them."""

DIRECT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "torch.batch_norm": (
            "input",
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "training",
            "momentum",
            "eps",
            "cudnn_enabled",
        ),
        "torch.instance_norm": (
            "input",
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "use_input_stats",
            "momentum",
            "eps",
            "cudnn_enabled",
        ),
        "torch.group_norm": ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
        "torch.layer_norm": ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    }
)
"""Their counterparts in the torch namespace, which carry no signature of their own."""

LIKE = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
"""What takes of its second tensor nothing but its shape, or its dtype and place."""

NEW = frozenset({"new_zeros", "new_ones", "new_full", "new_empty"})
"""What takes dtype and place of its tensor, and none of its values."""

_FILLED_LIKE = frozenset({"zeros_like", "ones_like", "full_like", "empty_like"})

BLANK = NEW | _FILLED_LIKE | {"rand_like", "randn_like", "randint_like"}
"""What takes nothing of its tensor's values, but perhaps its shape."""

FILLED = NEW | _FILLED_LIKE | {"zeros", "ones", "full", "empty", "scalar_tensor"}
"""What makes a tensor of one number throughout, or of whatever was there."""

_SIGNATURES = {name: inspect.signature(function) for name, function in NORMS.items()}


# a plain dict: Dynamo before torch 2.8 does not look into a mapping proxy
_REDUCING: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("mean", "nanmean", "sum", "nansum", "prod", "amax", "amin", "logsumexp", "any", "all"),
        ("input", "dim", "keepdim"),
    ),
    **dict.fromkeys(("max", "min", "median", "nanmedian", "count_nonzero"), ("input", "dim", "keepdim")),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), ("input", "dim", "unbiased", "keepdim")),
    **dict.fromkeys(("norm", "linalg_norm", "linalg_vector_norm"), ("input", "p", "dim", "keepdim")),
    **dict.fromkeys(("quantile", "nanquantile"), ("input", "q", "dim", "keepdim")),
    "aminmax": ("input",),
    "normalize": ("input", "p", "dim", "eps"),
    **dict.fromkeys(("softmax", "log_softmax"), ("input", "dim")),
}
_ATTENDING: Mapping[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    "multi_head_attention_forward": (
        *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias"),
        *("bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training"),
        *("key_padding_mask", "need_weights", "attn_mask"),
    ),
}
_NAMED: Mapping[str, tuple[str, ...]] = {**_REDUCING, **_ATTENDING, "einsum": ("equation",)}
_POOLING = tuple(
    f"{kind}_pool{n}d" for kind in ("adaptive_avg", "adaptive_max", "avg", "max") for n in (1, 2, 3)
)
CONTRACTING = ("matmul", "mm", "mv", "bmm", "baddbmm", "einsum", "tensordot")
_SCALING = ("div", "mul")
_ALIASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "div": ("div", "true_divide", "divide", "__truediv__", "__div__"),
        "mul": ("mul", "multiply", "__mul__", "__rmul__"),
        "matmul": ("matmul", "__matmul__"),
        "linalg_norm": ("norm",),
        "linalg_vector_norm": ("vector_norm",),
    }
)
_OPERATORS: Mapping[Callable[..., Any], str] = MappingProxyType(
    {operator.truediv: "div", operator.mul: "mul", operator.matmul: "matmul"}
)


def _table() -> dict[Callable[..., Any], str]:
    found = dict(_OPERATORS)
    for name in (*_REDUCING, *_POOLING, *CONTRACTING, *_SCALING, *_ATTENDING):
        places: tuple[object, ...] = (torch, Tensor, F)
        if name.startswith("linalg"):
            places = (torch.linalg,)
        for place in places:
            for alias in _ALIASES.get(name, (name,)):
                function = getattr(place, alias, None)
                if function is not None:
                    found.setdefault(function, name)
    return found


ATTENTION = frozenset(_ATTENDING)
"""The functions that attend to keys and values, by their one name."""


COUNTED: Mapping[Callable[..., Any], str] = MappingProxyType(_table())
"""Every function that is counted, with its one name."""


def arguments_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a function that reduces or attends by name; for others, only those given by keyword.

    Written for compiled forwards: dictionaries and loops only.
    """
    given = by_position(_NAMED.get(name, ()), args)
    given.update(kwargs)
    if "ord" in given:
        given["p"] = given.pop("ord")
    if isinstance(given.get("dim"), bool):  # var(input, unbiased)
        given["unbiased"] = given.pop("dim")
    return given


def by_position(names: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments that have a name."""
    # cut to one length: Dynamo before torch 2.8 takes any zip for strict
    return dict(zip(names[: len(args)], args[: len(names)], strict=True))


def taken_by(name: str, operands: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the tensors whose values a call may use: `kernel.to(x)` takes from x its type and place alone."""
    return operands[:1] if name in LIKE else operands


def operand_of(args: Sequence[Any], kwargs: Mapping[str, Any], which: int = 0) -> Tensor:
    """Return the tensor with that number among those a call was given, lists of tensors included.

    Raises:
        ValueError: it was given fewer.
    """
    for value in (*args, *kwargs.values()):
        # a tuple of classes: Dynamo before torch 2.8 knows no union of them
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, Tensor):
                if which == 0:
                    return tensor
                which -= 1
    raise ValueError("the call has fewer tensors among its arguments")


def with_operand(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], which: int, value: Tensor
) -> Any:
    """Call a function with another tensor in place of the one with that number; see operand_of."""
    seen = 0

    def replaced(given: Any) -> Any:
        nonlocal seen
        if isinstance(given, (list, tuple)):
            return [replaced(item) for item in given]
        if not isinstance(given, Tensor):
            return given
        seen += 1
        return value if seen == which + 1 else given

    taken = [replaced(given) for given in args]
    return function(*taken, **{name: replaced(given) for name, given in kwargs.items()})


def tokens_of(name: str, rank: int) -> int:
    """Return the dimension of an attention's operands that its tokens are in: the first of nn.MultiheadAttention's."""
    return 0 if name == "multi_head_attention_forward" else rank - 2


def axes_of_pool(name: str) -> int:
    """Return over how many axes a pool is taken, by the name of the function: of places too, or of values alone."""
    return next(n for n in (1, 2, 3) if f"_pool{n}d" in name)


def reduced_by(name: str, given: Mapping[str, Any], rank: int) -> tuple[int, ...] | None:
    """Return the dimensions that a call reduces, counted from the front; None if its arguments do not say.

    Args:
        name: of the function.
        given: its arguments by name.
        rank: of the operand.
    """
    if name in _POOLING:
        return tuple(range(rank - axes_of_pool(name), rank))
    if name not in _REDUCING:
        return None
    dim = given.get("dim")
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return tuple(range(rank))
    if isinstance(dim, int):
        return (dim % rank,)
    return tuple(sorted([d % rank for d in dim]))


def bound(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of a normalising call by name; `name` is a key of NORMS or DIRECT."""
    if name in DIRECT:
        defaults = {"weight": None, "bias": None, "eps": 1e-5}
        return {**defaults, **dict(zip(DIRECT[name], args, strict=False)), **kwargs}
    bound = _SIGNATURES[name].bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
