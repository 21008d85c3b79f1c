r"""Constants from windows: each window has moments of its own, and a law makes one pair of numbers of them.

With mean m_w and variance v_w of k windows w, and the norm's eps:

    arithmetic  m = sum m_w / k,    v = sum v_w / k
    geometric   m = sum m_w / k,    v = (prod (v_w + eps))^(1/k) - eps
    median      the medians of m_w and of v_w
    total       that of the windows' union (normfix.layers.moments)

A norm divides by sqrt(v + eps): the geometric mean makes its logarithm the average of the windows', and a window
without any spread pulls it no further than to eps. As with whole images, a site is measured while all before it use
their constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normfix.conversion.targets import NormTarget, Target, TargetAround
from normfix.errors import NormfixError
from normfix.images.sources import Image, TensorImage, whole
from normfix.layers.moments import Moments
from normfix.records.measurements import SiteStatistics
from normfix.records.plans import Action, Plan
from normfix.records.statistics import Law, Statistics
from normfix.tiling.grid import Geometry
from normfix.tiling.stitching import tile_extents

__all__ = ["only_in_memory", "pooled_targets", "require_poolable", "windows_of"]


def windows_of(image: Image, statistics: Statistics, geometry: Geometry | None) -> list[Image]:
    """Return windows that cover an image in memory, as evenly as they can, each starting on the stride grid.

    Neighbours overlap by as much as the image is no multiple of the window; one longer than the image is the image.

    Raises:
        NormfixError: NF402 for a size that is off the stride grid, NF588 for an image that is read by window.
    """
    if not isinstance(image, TensorImage):
        raise only_in_memory(statistics)
    pixels = whole(image)
    space = pixels.shape[2:]
    sizes = statistics.size if len(statistics.size) == len(space) else statistics.size * len(space)
    strides = (1,) * len(space)
    if geometry is not None:
        strides, sizes = geometry.stride, tile_extents(sizes, geometry)
    found = [pixels]
    for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True), start=2):
        found = [
            x.narrow(axis, start, min(size, x.shape[axis]))
            for x in found
            for start in _starts(x.shape[axis], size, stride)
        ]
    return [TensorImage(x) for x in found]


def _starts(extent: int, size: int, stride: int) -> list[int]:
    """Return evenly spread starts, multiples of the stride; the image itself ends on the grid."""
    count = max(1, -(-extent // size))
    last = max(0, extent - size)
    return [round(last * n / max(1, count - 1)) // stride * stride for n in range(count)]


def only_in_memory(statistics: Statistics) -> NormfixError:
    """Return the refusal of windows of what is read by window itself, or of only a part of it."""
    return NormfixError(
        "NF588",
        "windows are measured in images that are in memory, without blocks, masks and samples. Give parts of the "
        "images as tensors.",
        where=f"statistics={statistics.words}",
    )


def require_poolable(plan: Plan, statistics: Statistics) -> None:
    """Refuse a law for what has no constants to pool.

    Raises:
        NormfixError: NF588 for a GroupNorm that becomes BatchRenorm, whose channels and groups must fit together.
    """
    if statistics.kind == "whole" or statistics.law == "total":
        return
    for decision in plan.converted:
        layer = decision.site.layer
        if layer is not None and decision.action is Action.BATCHRENORM and layer.groups < layer.features:
            raise NormfixError(
                "NF588",
                f"statistics of groups are re-expressed per channel here, which holds for {statistics.words} no more. "
                "Convert to frozen, or measure whole images.",
                where=decision.site.id,
            )


def pooled_targets(targets: Sequence[Target], law: Law) -> list[Target]:
    """Return targets that store what the law makes of the parts; what is no norm keeps the law of its own."""
    if law == "total":
        return [*targets]
    return [_Pooled(target, law) if isinstance(target, NormTarget) else target for target in targets]


@dataclass(frozen=True, slots=True)
class _Pooled(TargetAround):
    """A norm whose parts become one by a law."""

    law: Law

    def store(self, parts: Sequence[Moments]) -> None:
        self.target.store([self._pooled(parts)])

    def compare(self, parts: Sequence[Moments]) -> SiteStatistics:
        joint = self.target.compare([self._pooled(parts)])
        spread = self.target.compare(parts).spread
        return replace(joint, spread=spread, flat=self.target.flat(parts))

    def _pooled(self, parts: Sequence[Moments]) -> Moments:
        norm = self.target
        assert isinstance(norm, NormTarget)
        own = [norm.expected(part) for part in parts]
        count = sum(part.count for part in own)
        means, variances = (torch.stack([getattr(part, name) for part in own]) for name in ("mean", "var"))
        eps = norm.holder.eps
        assert isinstance(eps, float)
        mean, variance = _one(self.law, means, variances, eps)
        return Moments(count, mean, variance * count)


def _one(law: Law, means: Tensor, variances: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and variance (c,) of windows' (k, c)."""
    if law == "median":
        return means.quantile(0.5, 0), variances.quantile(0.5, 0)
    if law == "arithmetic":
        return means.mean(0), variances.mean(0)
    assert law == "geometric", law
    return means.mean(0), ((variances + eps).log().mean(0).exp() - eps).clamp_min(0)
