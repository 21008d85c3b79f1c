"""What operators of torch take for granted and do not check: given otherwise, they read beyond tensors or crash.

torch's own functions look at their arguments and then call these operators; a program from a file calls them itself,
with what fits at one size of the image and may not at another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Interpreter

from normfix.networks.functions import by_position

__all__ = ["SoundInterpreter", "require_sound"]


def require_sound(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call with which an operator would read beyond its tensors, or divide by no heads or groups.

    Raises:
        ValueError: naming the operator.

    Example:
        >>> import torch
        >>> require_sound(torch.ops.aten._fft_c2c.default, (torch.zeros(4), [1], 0, True), {})
        Traceback (most recent call last):
        ...
        ValueError: aten._fft_c2c.default is called with what it does not take
    """
    holds = _RULES.get(func._schema.name.partition("::")[2])
    if holds is None:
        return
    names = [argument.name for argument in func._schema.arguments]
    given = {**by_position(names, args), **kwargs}
    # where a graph is captured, extents are symbols, and nothing is read
    if not _is_symbolic(given) and not holds(given):
        raise ValueError(f"{func} is called with what it does not take")


class SoundInterpreter(Interpreter):
    """Runs a graph, and no call in it with which an operator would read beyond its tensors: ValueError."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, unless it is an operator that does not take this."""
        if isinstance(target, OpOverload):
            require_sound(target, args, kwargs)
        return super().call_function(target, args, kwargs)


def _is_symbolic(given: Mapping[str, Any]) -> bool:
    extents = (n for value in given.values() if isinstance(value, Tensor) for n in value.shape)
    return any(not isinstance(n, int) for n in extents)


def _normalises(given: Mapping[str, Any]) -> bool:
    """Tell whether statistics and factors have a value for each channel, and statistics are there if they are used."""
    source = given["input"]
    if source.dim() < 2:
        return False
    factors = [given.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    used = not given.get("training", "running_mean" not in given)
    if used and any(statistic is None for statistic in factors[2:]):
        return False
    return all(factor is None or tuple(factor.shape) == (source.shape[1],) for factor in factors)


def _groups(given: Mapping[str, Any]) -> bool:
    """Tell whether the extents that are given beside a tensor are its own."""
    source, channels = given["input"], given["C"]
    factors = (given.get("weight"), given.get("bias"))
    whole = given["N"] * channels * given["HxW"] == source.numel() and source.dim() > 1
    fits = whole and source.shape[1] == channels and given["group"] > 0 and channels % given["group"] == 0
    return fits and all(factor is None or factor.numel() == channels for factor in factors)


def _remembers(given: Mapping[str, Any]) -> bool:
    """Tell whether a layer of recurrence is one of LSTM, whose weights and states fit its input."""
    source, size = given["input"], given["hidden_size"]
    if source.dim() != 3 or given["mode"] != _LSTM or given["num_layers"] != 1 or given["batch_sizes"]:
        return False
    steps, batch, width = source.shape
    expected = ((4 * size, width), (4 * size, size), (4 * size,), (4 * size,))
    weights = [given[f"weight{number}"] for number in range(4)]
    states = (given["hx_"], given["cx_"])
    alike = {tensor.dtype for tensor in (*weights, *states)} == {source.dtype}
    fits = all(tuple(w.shape) == shape for w, shape in zip(weights, expected, strict=True))
    return alike and fits and steps > 0 and all(state.numel() == batch * size for state in states)


_LSTM = 2
"""How torch numbers the kinds of recurrence."""


def _has_states(given: Mapping[str, Any]) -> bool:
    """Tell whether an LSTM has a state and a memory for each of its layers."""
    states = given["hx"]
    return len(states) == 2 and states[0].dim() == 3 and states[0].shape[:2] == states[1].shape[:2]


def _transforms(given: Mapping[str, Any]) -> bool:
    """Tell whether a Fourier transform runs along axes that are there, each once."""
    source: Tensor = given["self"]
    rank = source.dim()
    # torch's own functions count them from the front
    axes = [axis for axis in given["dim"] if 0 <= axis < rank]
    once = len(set(axes)) == len(given["dim"]) and source.numel() > 0 and given["normalization"] in range(3)
    size = given.get("last_dim_size")
    return once and (size is None or (bool(axes) and source.shape[axes[-1]] == size // 2 + 1))


def _weighs(given: Mapping[str, Any]) -> bool:
    """Tell whether the norms that a weight is divided into have one for each of its slices along an axis at an end."""
    weight, norms, axis = given["v"], given["g"], given.get("dim", 0)
    if weight.dim() == 0 or axis not in (0, weight.dim() - 1) or weight.dtype != norms.dtype:
        return False
    expected = tuple(n if place == axis else 1 for place, n in enumerate(weight.shape))
    return weight.numel() > 0 and tuple(norms.shape) == expected


def _attends(given: Mapping[str, Any]) -> bool:
    """Tell whether there is a key and a value of each token, and a bias fits them."""
    # (images, heads, tokens, channels)
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if {query.dim(), key.dim(), value.dim()} != {4} or not query.numel() * key.numel():
        return False
    images, heads, tokens, channels = query.shape
    if any(tensor.stride(3) != 1 for tensor in (query, key, value)):
        return False
    fits = key.shape == value.shape and heads % key.shape[1] == 0
    fits = fits and (key.shape[0], key.shape[3]) == (images, channels)
    if mask is None or not fits:
        return fits
    expected = (images, heads, tokens, key.shape[2])[4 - mask.dim() :]
    return mask.dim() in (2, 4) and all(n in (1, m) for n, m in zip(mask.shape, expected, strict=True))


def _shares(given: Mapping[str, Any]) -> bool:
    """Tell whether there are heads of keys and values among which those of queries are shared, if they are."""
    keys = (given["key"], given["value"])
    return not given.get("enable_gqa") or all(t.dim() > 2 and t.shape[-3] > 0 for t in keys)


def _deforms(given: Mapping[str, Any]) -> bool:
    """Tell whether a deformable convolution has an image, a kernel, groups and steps to divide by."""
    numbers = [given[f"{name}_{axis}"] for name in ("stride", "dilation") for axis in "hw"]
    numbers += [given["groups"], given["offset_groups"]]
    maps = (given["input"], given["weight"])
    return all(t.dim() == 4 and t.numel() > 0 for t in maps) and all(number > 0 for number in numbers)


def _pairs(given: Mapping[str, Any]) -> bool:
    """Tell whether distances are asked for between the rows of one matrix."""
    return bool(given["self"].dim() == 2)


_RULES: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    **dict.fromkeys(
        (
            *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional"),
            *("_native_batch_norm_legit_no_training", "_batch_norm_impl_index", "_batch_norm_with_update"),
            "_batch_norm_no_update",
        ),
        _normalises,
    ),
    "native_group_norm": _groups,
    "mkldnn_rnn_layer": _remembers,
    "lstm": _has_states,
    "_weight_norm_interface": _weighs,
    "_scaled_dot_product_flash_attention_for_cpu": _attends,
    **dict.fromkeys(("scaled_dot_product_attention", "_scaled_dot_product_attention_math"), _shares),
    "deform_conv2d": _deforms,
    "_pdist_forward": _pairs,
    **dict.fromkeys(("_fft_c2c", "_fft_c2r", "_fft_r2c"), _transforms),
}
