"""Pre- and postprocessing of bioimage.io descriptions: computed for their tests, and said as a scaling.

The formulas are those of the specification: (x - mean) / (sd + eps), (x - low) / (high - low + eps), gain x + offset.
As a scaling the same runs over the whole image, without eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfix.records.saved import Scaling
from normfix.storage.opening.descriptions import Step, TensorOf

__all__ = ["UnknownStepError", "processed", "scaling_of_steps"]

Array = NDArray[Any]
_EPS = 1e-6
_KEPT = ("ensure_dtype",)
"""Steps that change no value of what a network takes."""


class UnknownStepError(ValueError):
    """A step of processing that is not computed here."""


def processed(array: Array, tensor: TensorOf) -> Array:
    """Return a tensor after its steps, in float64.

    Raises:
        UnknownStepError: for a step that is not known.
    """
    result: Any = array.astype(np.float64)
    for step in tensor.steps:
        result = _applied(result, step, tensor.axes)
    return np.asarray(result)


def _applied(x: Any, step: Step, axes: str) -> Any:
    kwargs = step.kwargs
    over = tuple(axes.index(a) for a in step.axes if a in axes) if step.axes is not None else None
    if step.name in _KEPT:
        return x
    if step.name == "scale_linear":
        return _number(kwargs.get("gain", 1.0)) * x + _number(kwargs.get("offset", 0.0))
    if step.name == "fixed_zero_mean_unit_variance" or _is_fixed(step):
        return (x - _number(kwargs["mean"])) / _number(kwargs["std"])
    if step.name == "zero_mean_unit_variance":
        spread = x.std(over, keepdims=True) + _number(kwargs.get("eps", _EPS))
        return (x - x.mean(over, keepdims=True)) / spread
    if step.name == "scale_range":
        low, high = (
            np.percentile(x, _number(kwargs.get(name, default)), axis=over, keepdims=True)
            for name, default in (("min_percentile", 0.0), ("max_percentile", 100.0))
        )
        return (x - low) / (high - low + _number(kwargs.get("eps", _EPS)))
    if step.name == "sigmoid":
        return 1 / (1 + np.exp(-x))
    if step.name == "clip":
        return np.clip(x, _limit(kwargs.get("min")), _limit(kwargs.get("max")))
    if step.name == "binarize":
        return (x > _number(kwargs["threshold"])).astype(np.float64)
    raise UnknownStepError(step.name)


def scaling_of_steps(tensor: TensorOf, channels: int) -> Scaling | None:
    """Return preprocessing as a scaling over the whole image; None where it is none.

    Args:
        tensor: an input.
        channels: that it has: statistics per channel are those of the image where there is one.
    """
    steps = [step for step in tensor.steps if step.name not in _KEPT]
    if not steps:
        return Scaling(kind="none")
    step = steps[0]
    space = set(tensor.axes) - {"b", "c"}
    whole = step.axes is None or space | ({"c"} if channels > 1 else set()) <= set(step.axes)
    try:
        if len(steps) > 1:
            return None
        if step.name == "scale_linear":
            gain, offset = (_one(step.kwargs.get(n, d)) for n, d in (("gain", 1.0), ("offset", 0.0)))
            return Scaling(kind="fixed", values=(-offset / gain, 1 / gain))
        if step.name == "fixed_zero_mean_unit_variance" or _is_fixed(step):
            return Scaling(kind="fixed", values=(_one(step.kwargs["mean"]), _one(step.kwargs["std"])))
        if step.name == "zero_mean_unit_variance" and whole:
            return Scaling(kind="zscore")
        if step.name == "scale_range" and whole:
            limits = step.kwargs.get("min_percentile", 0.0), step.kwargs.get("max_percentile", 100.0)
            return Scaling(kind="percentile", values=(_one(limits[0]), _one(limits[1])))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return None


def _is_fixed(step: Step) -> bool:
    """Tell whether it is the z-score of 0.4 by stated numbers."""
    return step.name == "zero_mean_unit_variance" and "mean" in step.kwargs


def _limit(value: Any) -> float | None:
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    """Return a number; of a list of one its one. Lists by channel are not computed here."""
    if isinstance(value, Sequence) and len(value) != 1:
        raise UnknownStepError("one number per channel")
    return float(value[0]) if isinstance(value, Sequence) else float(value)


def _one(value: Any) -> float:
    return float(_number(value))
