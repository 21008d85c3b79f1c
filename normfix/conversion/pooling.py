r"""Constants from parts: each part has moments of its own, and a law makes one pair of numbers of them.

Parts are windows of one size, or whole images. With mean m_w and variance v_w of k parts w, and the norm's eps:

    arithmetic  m = sum m_w / k,    v = sum v_w / k
    geometric   m = sum m_w / k,    v = (prod (v_w + eps))^(1/k) - eps
    median      the medians of m_w and of v_w
    total       that of the parts' union (normfix.layers.moments)
    blend       (1 - a) times what the original has stored, and a times that of the union (Singh and Shrivastava,
                EvalNorm, ICCV 2019, eq. 8)

A norm divides by sqrt(v + eps): the geometric mean makes its logarithm the average of the parts', and a part
without any spread pulls it no further than to eps. As with whole images, a site is measured while all before it use
their constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from normfix.conversion.targets import NormTarget, Target, TargetAround
from normfix.errors import NormfixError
from normfix.images.sources import Cut, Image, each_of
from normfix.layers.moments import Moments, merge
from normfix.records.measurements import SiteStatistics
from normfix.records.plans import Action, Plan
from normfix.records.statistics import Law, Statistics
from normfix.tiling.grid import Geometry
from normfix.tiling.stitching import tile_extents

__all__ = ["blended_targets", "on_grid", "parts_of", "pooled_targets", "require_poolable", "windows_of"]

Stored = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and variance (c,) that the original has stored, by site."""


def parts_of(image: Image, statistics: Statistics, geometry: Geometry | None) -> list[Image]:
    """Return what has statistics of its own: the windows of an image, or all of it, of each of a batch."""
    return windows_of(image, statistics.size, geometry) if statistics.kind == "windows" else each_of(image)


def windows_of(image: Image, size: Sequence[int], geometry: Geometry | None) -> list[Image]:
    """Return windows that cover an image as evenly as they can, each starting on the stride grid.

    Neighbours overlap by as much as the image is no multiple of the window; one longer than the image is the image.

    Args:
        image: of any size, in memory or read by window; of a batch each is cut by itself.
        size: pixels, one number for all axes or one per axis.
        geometry: of the network, where it is known.

    Raises:
        NormfixError: NF402 for a size that is off the stride grid.
    """
    space = image.shape[2:]
    sizes = tuple(size) if len(size) == len(space) else tuple(size) * len(space)
    strides = (1,) * len(space)
    if geometry is not None:
        strides, sizes = geometry.stride, tile_extents(sizes, geometry)
    spans = [_spans(*axis) for axis in zip(space, sizes, strides, strict=True)]
    return [Cut(one, corner) for one in each_of(image) for corner in product(*spans)]


def on_grid(size: Sequence[int], geometry: Geometry | None) -> tuple[int, ...]:
    """Return the nearest windows on the stride grid that are no larger: training takes patches of any size.

    Raises:
        NormfixError: NF402 if they are for another number of axes.
    """
    if geometry is None:
        return tuple(size)
    if len(size) not in (1, len(geometry.stride)):
        raise NormfixError(
            "NF402",
            f"the network's file states windows of {str(tuple(size))[:80]}, and it has {len(geometry.stride)} spatial "
            "axes. Give their size: --window, or --statistics windows:SIZE.",
            where="window",
        )
    sizes = tuple(size) if len(size) == len(geometry.stride) else tuple(size) * len(geometry.stride)
    fitting = [max(s, n // s * s) for n, s in zip(sizes, geometry.stride, strict=True)]
    return tuple(fitting[:1] if len(set(fitting)) == 1 else fitting)


def _spans(extent: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Return evenly spread windows that start on multiples of the stride.

    The last is longer by what the axis has beyond the grid.
    """
    count = max(1, -(-extent // size))
    last = max(0, extent - size)
    starts = [round(last * n / max(1, count - 1)) // stride * stride for n in range(count)]
    return [*((start, start + size) for start in starts[:-1]), (starts[-1], extent)]


def require_poolable(plan: Plan, statistics: Statistics) -> None:
    """Refuse a law for what has no constants to pool.

    Raises:
        NormfixError: NF588 for a GroupNorm that becomes BatchRenorm, whose channels and groups must fit together, and
            for keys that are held, which are those of whole images.
    """
    if statistics.kind in ("whole", "per-image"):
        return
    for decision in plan.converted:
        layer, statistic = decision.site.layer, decision.site.statistic
        if statistic is not None and statistic.law == "keys":
            raise NormfixError(
                "NF588",
                f"keys that are held are those of whole images, and no law makes them those of {statistics.words}. "
                "Leave --statistics or --keys out.",
                where=decision.site.id,
            )
        if not (statistics.pools or statistics.needs_original):
            continue
        if layer is not None and decision.action is Action.BATCHRENORM and layer.groups < layer.features:
            raise NormfixError(
                "NF588",
                f"statistics of groups are re-expressed per channel here, which holds for {statistics.words} no more. "
                "Convert to frozen, or measure whole images.",
                where=decision.site.id,
            )


def blended_targets(targets: Sequence[Target], stored: Stored, weight: float) -> list[Target]:
    """Return targets that store a blend of what was stored and what is measured, where anything was stored."""
    return [
        _Blended(target, *stored[target.name], weight)
        if isinstance(target, NormTarget) and target.name in stored
        else target
        for target in targets
    ]


def pooled_targets(targets: Sequence[Target], law: Law) -> list[Target]:
    """Return targets that store what the law makes of the parts; what is no norm keeps the law of its own."""
    if law == "total":
        return [*targets]
    return [_Pooled(target, law) if isinstance(target, NormTarget) else target for target in targets]


@dataclass(frozen=True, slots=True)
class _Reduced(TargetAround):
    """A norm whose parts become one by a rule; subclasses say by which."""

    def store(self, parts: Sequence[Moments]) -> None:
        self.target.store([self._one(parts)])

    def compare(self, parts: Sequence[Moments]) -> SiteStatistics:
        joint = self.target.compare([self._one(parts)])
        spread = self.target.compare(parts).spread
        return replace(joint, spread=spread, flat=self.target.flat(parts))

    def _one(self, parts: Sequence[Moments]) -> Moments:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Pooled(_Reduced):
    """By a law of their means and variances."""

    law: Law

    def _one(self, parts: Sequence[Moments]) -> Moments:
        norm = self.target
        assert isinstance(norm, NormTarget)
        own = [norm.expected(part) for part in parts]
        count = sum(part.count for part in own)
        means, variances = (torch.stack([getattr(part, name) for part in own]) for name in ("mean", "var"))
        eps = norm.holder.eps
        assert isinstance(eps, float)
        mean, variance = _one(self.law, means, variances, eps)
        return Moments(count, mean, variance * count)


@dataclass(frozen=True, slots=True)
class _Blended(_Reduced):
    """By their union, of which the original's own are a share."""

    mean: Tensor
    var: Tensor
    weight: float

    def _one(self, parts: Sequence[Moments]) -> Moments:
        union, a = merge(*parts), self.weight
        mean = (1 - a) * self.mean.double().cpu() + a * union.mean
        var = (1 - a) * self.var.double().cpu() + a * union.var
        return Moments(union.count, mean, var * union.count)


def _one(law: Law, means: Tensor, variances: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and variance (c,) of windows' (k, c)."""
    if law == "median":
        return means.quantile(0.5, 0), variances.quantile(0.5, 0)
    if law == "arithmetic":
        return means.mean(0), variances.mean(0)
    assert law == "geometric", law
    return means.mean(0), ((variances + eps).log().mean(0).exp() - eps).clamp_min(0)
