"""What operators of torch take for granted and do not check: given otherwise, they read beyond tensors and may crash.

torch's own functions look at their arguments and then call these operators; a program from a file calls them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from normfix.networks.functions import by_position

__all__ = ["require_sound"]


def require_sound(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call with which an operator would read beyond its tensors.

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
    if not holds({**by_position(names, args), **kwargs}):
        raise ValueError(f"{func} is called with what it does not take")


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


def _transforms(given: Mapping[str, Any]) -> bool:
    """Tell whether a Fourier transform runs along axes that are there, each once."""
    source: Tensor = given["self"]
    rank = source.dim()
    axes = [axis % rank for axis in given["dim"] if -rank <= axis < rank]
    return len(set(axes)) == len(given["dim"]) and source.numel() > 0 and given["normalization"] in range(3)


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
    **dict.fromkeys(("_fft_c2c", "_fft_c2r", "_fft_r2c"), _transforms),
}
