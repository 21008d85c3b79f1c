"""Scale an image as the network expects it, over the whole image and never per tile.

Scaling is part of the statistic: constants measured on an image scaled 255 times too large reproduce the
original on that image and are wrong on every other. So integer images need a stated scaling, and it is stored
with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from normfix.errors import NormfixError, reason_of
from normfix.networks.calling import failures
from normfix.networks.naming import named
from normfix.records.saved import Scaling
from normfix.records.scalings import two_of

__all__ = ["Distribution", "not_finite", "overflown", "scaled", "scaling_numbers"]

Array = NDArray[Any]


class Distribution(Protocol):
    """The values of a whole image, wherever they are."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of the values as they are stored."""
        ...

    @property
    def where(self) -> str:
        """Return what the image is called."""
        ...

    def moments(self) -> tuple[float, float, float]:
        """Return mean, standard deviation and the difference of the largest and the smallest value."""
        ...

    def percentiles(self, wanted: Sequence[float]) -> Sequence[float]:
        """Return percentiles by numpy's linear rule."""
        ...


@dataclass(frozen=True, slots=True)
class _Values:
    """The distribution of an array."""

    array: Array
    dtype: np.dtype[Any]
    where: str

    def moments(self) -> tuple[float, float, float]:
        return self.array.mean(), self.array.std(), self.array.max() - self.array.min()

    def percentiles(self, wanted: Sequence[float]) -> Sequence[float]:
        return cast("Sequence[float]", np.percentile(self.array, wanted))


def scaling_numbers(values: Distribution, scaling: Scaling | None) -> tuple[float, float]:
    """Return (offset, divisor) such that (x - offset) / divisor is the image scaled; None means: not stated.

    Raises:
        NormfixError: NF107 if the scaling does not fit the image, is not stated for an integer image, or is a
            function, which takes the image itself.
    """
    dtype, where = values.dtype, values.where
    if scaling is None and dtype.kind != "f":
        raise NormfixError(
            "NF107",
            f"the image is {dtype}, and what the network takes is not known. State it: --scale unit, "
            "zscore, percentile:1,99.8, MEAN,STD or none, as it was trained with (in Python scaling= of "
            "normfix.read_images).",
            where=where,
        )
    scaling = scaling or Scaling()
    match scaling.kind:
        case "none":
            return 0.0, 1.0
        case "unit":
            if dtype.kind not in "iu":
                raise NormfixError(
                    "NF107", f"'unit' is for integer images; this one is {dtype}.", where=where
                )
            return 0.0, float(np.iinfo(dtype).max)
        case "zscore":
            mean, sd, extent = values.moments()
            _positive(extent, where)  # the deviation of a constant can round to more than 0
            return mean, _positive(sd, where)
        case "percentile":
            low, high = values.percentiles(two_of(scaling))
            return low, _positive(high - low, where)
        case "fixed":
            return two_of(scaling)
        case "preprocess":
            raise NormfixError(
                "NF107",
                f"{scaling.function} takes the whole image, which is read by window here. State --scale instead.",
                where=where,
            )


def scaled(array: Array, scaling: Scaling | None, where: str = "image") -> Array:
    """Return a whole image (C, *space) as float32 or float64, scaled; None means: not stated.

    Raises:
        NormfixError: NF104 for NaN or infinity, NF107 if the scaling does not fit the image, or is not stated
            for an integer image.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise not_finite(where)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        if scaling is not None and scaling.kind == "preprocess":
            result = _preprocessed(array, scaling.function, where)
        else:
            wide = array.astype(np.float64)
            offset, divisor = scaling_numbers(_Values(wide, array.dtype, where), scaling)
            result = (wide - offset) / divisor
        kept = result.astype(np.float64 if array.dtype == np.float64 else np.float32)
    if not np.isfinite(kept).all():
        raise overflown(where, str(kept.dtype))
    return kept


def not_finite(where: str) -> NormfixError:
    """Return the error (NF104) for an image with NaN or infinity."""
    return NormfixError(
        "NF104",
        "the image has NaN or infinite values, which would spread through every statistic. Replace them first; a mask "
        "does not help, since the network still reads what it ignores.",
        where=where,
    )


def overflown(where: str, dtype: str) -> NormfixError:
    """Return the error (NF104) for an image that is finite and no longer is as the network takes it."""
    return NormfixError(
        "NF104",
        f"the image's values are finite, but not all of them are once they are scaled and in {dtype}. State a scaling "
        "that fits them (--scale), or compute in a wider dtype.",
        where=where,
    )


def _positive(spread: float, where: str) -> float:
    if not 0 < spread < math.inf:
        raise NormfixError(
            "NF107",
            f"the image's spread is {spread:g} (0: constant), so it cannot be scaled by it. Leave it out if it is "
            "empty, or state a scaling that is not measured on it: --scale MEAN,STD, unit or none.",
            where=where,
        )
    return spread


def _preprocessed(array: Array, name: str, where: str) -> Array:
    function = _function(name)
    try:
        result = np.asarray(function(array.copy()))
    except failures() as error:
        reason = reason_of(error)
        raise NormfixError(
            "NF107", f"{name} failed on an array {array.shape} of {array.dtype}: {reason}.", where=where
        ) from error
    if result.shape != array.shape or result.dtype.kind not in "biuf":
        raise NormfixError(
            "NF107",
            f"{name} made {result.dtype} {result.shape} of {array.shape}; it must keep (C, *space) and give "
            "real numbers.",
            where=where,
        )
    return result


def _function(name: str) -> Callable[[Array], Array]:
    try:
        return cast(Callable[[Array], Array], named(name))
    except failures() as error:
        reason = error.message if isinstance(error, NormfixError) else f"{type(error).__name__}: {error}."
        raise NormfixError(
            "NF107",
            f"cannot import it: {reason} Give pkg.mod:function or file.py:function.",
            where=f"--preprocess {name}",
        ) from error
