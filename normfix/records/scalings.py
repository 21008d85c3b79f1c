"""Scalings as text, as options and settings have them."""

from __future__ import annotations

import math
from typing import Literal, cast

from normfix.errors import NormfixError
from normfix.records.saved import Scaling

__all__ = ["parse_scaling", "two_of"]


def parse_scaling(text: str) -> Scaling:
    """Read `none`, `unit`, `zscore`, `percentile:LOW,HIGH` or `MEAN,STD`.

    Raises:
        NormfixError: NF107 for anything else.
    """
    if text in ("none", "unit", "zscore"):
        return Scaling(kind=cast(Literal["none", "unit", "zscore"], text))
    kind, numbers = (
        ("percentile", text.removeprefix("percentile:"))
        if text.startswith("percentile:")
        else ("fixed", text)
    )
    try:
        low, high = (float(n) for n in numbers.split(","))
    except ValueError as error:
        raise NormfixError(
            "NF107", "give none, unit, zscore, percentile:LOW,HIGH or MEAN,STD.", where=f"--scale {text}"
        ) from error
    scaling = Scaling(kind=cast(Literal["percentile", "fixed"], kind), values=(low, high))
    two_of(scaling)
    return scaling


def two_of(scaling: Scaling) -> tuple[float, float]:
    """Return the two numbers of a percentile or fixed scaling."""
    low, high = scaling.values if len(scaling.values) == 2 else (math.nan, math.nan)
    sane = (
        0 <= low < high <= 100 if scaling.kind == "percentile" else math.isfinite(low) and 0 < high < math.inf
    )
    if not sane:
        raise NormfixError(
            "NF107",
            "percentiles run from 0 to 100, low before high; a mean is finite and a deviation positive.",
            where=f"--scale {scaling.kind} {','.join(map(str, scaling.values))}",
        )
    return low, high
