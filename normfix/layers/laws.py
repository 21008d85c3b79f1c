"""Population laws: how the statistics of several parts become the statistic of their union.

With n values in a part, sum s, mean m, sum of squared deviations M2 and mean p-th power q:

    mean        m                                  parts weighted by n
    total       s / k                              the mean sum per image, for k images; of whole numbers exact
    variance    M2 / (n - correction)              M2 merged by the law of total variance (normfix.layers.moments)
    deviation   sqrt(variance)
    norm        (n q / k)^(1/p)                    for p = 2 the root mean square of the images' norms
    maximum, minimum, extremes                     of the parts
    none        the value of one image; there is no union

What depends on the number of values itself (total, norm) is stated for the mean image, n / k values. For one
image each law gives what the function gave. `observe`, `merge` and `finalise` are pure and compute in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from normfix.errors import NormfixError

__all__ = ["Observed", "Part", "finalise", "merge", "observe"]

_SPREAD = frozenset({"variance", "deviation", "variance_mean", "deviation_mean"})


@dataclass(frozen=True, slots=True)
class Part:
    """What is kept of some values: how many per statistic, and one or two float64 tensors, by law."""

    count: float
    values: tuple[Tensor, ...]


def observe(law: str, x: Tensor, dims: Sequence[int], *, power: float = 2.0) -> Part:
    """Reduce values to what their law needs.

    Args:
        law: a name of the table above; "none" has nothing to reduce.
        x: any floating dtype.
        dims: dimensions of x that the statistic runs over; they are kept with extent 1.
        power: p of a norm.

    Example:
        >>> part = observe("mean", torch.tensor([1.0, 3.0]), (0,))
        >>> part.count, part.values[0].item()
        (2, 2.0)
    """
    dims = tuple(dims)
    count = math.prod(x.shape[d] for d in dims)
    if not count:  # nothing counts (normfix.tiling.stages.masks); the values are no part of any union
        x = x.new_zeros([1 if d in dims else n for d, n in enumerate(x.shape)])
    wide = x.detach().to(torch.float64)
    if law == "total":
        return Part(count, (wide.sum(dims, keepdim=True).cpu(),))
    if law == "mean":
        return Part(count, (wide.mean(dims, keepdim=True).cpu(),))
    if law == "norm":
        return Part(count, (wide.abs().pow(power).mean(dims, keepdim=True).cpu(),))
    if law in _SPREAD:
        mean = wide.mean(dims, keepdim=True)
        return Part(count, (mean.cpu(), (wide - mean).square().sum(dims, keepdim=True).cpu()))
    if law == "extremes":
        return Part(count, (wide.amin(dims, keepdim=True).cpu(), wide.amax(dims, keepdim=True).cpu()))
    if law == "maximum":
        return Part(count, (wide.amax(dims, keepdim=True).cpu(),))
    assert law == "minimum", law
    return Part(count, (wide.amin(dims, keepdim=True).cpu(),))


def merge(law: str, parts: Sequence[Part]) -> Part:
    """Return what one look at the union would have kept, merged in the order given.

    Raises:
        NormfixError: NF230 for several parts of a statistic without a law.
    """
    if law == "none" and len(parts) > 1:
        raise NormfixError(
            "NF230",
            "this statistic has no population law: its value on one image can be frozen, its values on several "
            "cannot become one. Give one image.",
        )
    return reduce(lambda a, b: _merged(law, a, b), parts)


def finalise(
    law: str, part: Part, *, images: int = 1, correction: float = 0.0, power: float = 2.0
) -> tuple[Tensor, ...]:
    """Return the statistic's values in the order in which its function returns them, dimensions kept.

    Args:
        law: of the part.
        part: of all images.
        images: how many they are.
        correction: taken off the count of a variance (torch's `correction`; 1 for unbiased).
        power: p of a norm.
    """
    if law == "total":
        return (part.values[0] / images,)
    if law == "norm":
        return ((part.values[0] * (part.count / images)).pow(1 / power),)
    if law in _SPREAD:
        mean, m2 = part.values
        spread = m2 / max(0.0, part.count - correction)
        spread = spread.sqrt() if law.startswith("deviation") else spread
        return (spread, mean) if law.endswith("mean") else (spread,)
    return part.values


def _merged(law: str, a: Part, b: Part) -> Part:
    if not a.count or not b.count:
        return a if not b.count else b
    n = a.count + b.count
    if law in ("maximum", "minimum", "extremes"):
        least, most = torch.minimum(a.values[0], b.values[0]), torch.maximum(a.values[-1], b.values[-1])
        return Part(n, {"maximum": (most,), "minimum": (least,), "extremes": (least, most)}[law])
    if law == "total":
        return Part(n, (a.values[0] + b.values[0],))
    delta = b.values[0] - a.values[0]
    mean = a.values[0] + delta * (b.count / n)
    if law not in _SPREAD:
        return Part(n, (mean,))
    return Part(n, (mean, a.values[1] + b.values[1] + delta.square() * (a.count * b.count / n)))


@dataclass(frozen=True, slots=True)
class Observed:
    """What one call of a statistic gave: its own results where it saw one image, and the part its law needs."""

    images: int
    results: tuple[Tensor, ...]
    part: Part
