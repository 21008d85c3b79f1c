"""Calibrate on a random sample of blocks, with the error of every statistic, until the errors are small enough.

A block is read with the halo of the whole network, and its halo is ignored as pixels under a mask are: what is left of
every map is what the whole image has there. So a sample of all blocks is the exact calibration. Blocks are drawn
without replacement; n of N are measured, then twice as many, all of them anew, since a statistic is measured under
those before it.

Pixels of a block resemble each other, so blocks are what is counted. With n_b values in block b, of mean m_b and
variance v_b, and m and v those of the sample, the errors of m and v are those of ratios of totals (Cochran 1977, 6.3
and 9A.1), f = n / N:

    SE(m)^2 = (1 - f) n / (n - 1)  sum_b (n_b (m_b - m))^2 / (sum_b n_b)^2
    SE(v)^2 = (1 - f) n / (n - 1)  sum_b (n_b (v_b + (m_b - m)^2 - v))^2 / (sum_b n_b)^2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normfix.conversion.keys import KeysTarget
from normfix.conversion.masks import ESTIMATED
from normfix.conversion.staged import measure_in_stages_
from normfix.conversion.targets import NormTarget, StatisticTarget, Target, TargetAround
from normfix.errors import NormfixError
from normfix.images.sources import Image, Span, values_digest
from normfix.layers.moments import Moments, merge
from normfix.networks.calling import Caller
from normfix.records.measurements import CalibrationSummary, Sampled, SiteStatistics
from normfix.records.spans import round_up
from normfix.tiling.grid import Geometry, grid
from normfix.tiling.stages.masks import Masked, mask_of
from normfix.tiling.stages.options import Blocks

__all__ = ["Sample", "measure_sampled_"]

_FIRST = 16
"""Blocks of the first sample: fewer say little of how much blocks differ."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A random sample of blocks, which doubles until no standard error is above `tolerance`, in sd.

    `seed` is of the order in which blocks are drawn.
    """

    tolerance: float
    seed: int = 0


def measure_sampled_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Sequence[Image],
    caller: Caller,
    blocks: Blocks,
    geometry: Geometry | None,
    sample: Sample,
    *,
    stored: bool = False,
) -> CalibrationSummary:
    """Calibrate the targets in place on a random sample of blocks.

    Args:
        model: holds the targets' modules.
        targets: norms, or means and variances.
        images: of sizes that the network is exact at.
        caller: calls the model.
        blocks: how to run in stages; those of the sample are of their size.
        geometry: of the network.
        sample: how large it must be.
        stored: measure the targets under the statistics they have, and change none.

    Raises:
        NormfixError: NF140 for a tolerance that is none or a network without halo, NF139 for a statistic that a
            sample says nothing of.
    """
    if geometry is None or not _is_tolerance(sample.tolerance):
        raise NormfixError(
            "NF140",
            "blocks can be drawn only from the image of a converted network whose halo is known."
            if geometry is None
            else "give the largest standard error to stop at, in sd, such as 0.01.",
            where=f"sample={sample.tolerance!r}",
        )
    if type(sample.seed) is not int or not -(1 << 63) <= sample.seed < 1 << 63:
        raise NormfixError(
            "NF140", "a seed is an integer of 64 bits, such as 0.", where=f"seed={str(sample.seed)[:80]}"
        )
    for target in targets:
        if isinstance(target, KeysTarget | StatisticTarget) and target.spec.law not in ESTIMATED:
            raise NormfixError(
                "NF139",
                f"a sample of blocks says nothing of its {target.spec.law}. Calibrate on all of the images.",
                where=target.name,
            )
    tile = [
        round_up(n, s) for n, s in zip(blocks.extents(len(geometry.stride)), geometry.stride, strict=True)
    ]
    population = _blocks(images, tile, geometry)
    generator = torch.Generator().manual_seed(sample.seed)
    order = torch.randperm(len(population), generator=generator).tolist()
    count = min(_FIRST, len(population))
    while True:
        chosen = [population[i] for i in sorted(order[:count])]
        whole = replace(blocks, tile=[max(b.shape[2 + a] for b in chosen) for a in range(len(tile))])
        estimating = [_Estimating(target, len(population)) for target in targets]
        summary = measure_in_stages_(
            model, estimating, chosen, caller, whole, stride=geometry.stride, stored=stored
        )
        worst = max(max(s.mean_error or 0.0, s.sd_error or 0.0) for s in summary.sites)
        if count == len(population) or worst <= sample.tolerance:
            break
        count = min(2 * count, len(population))
    drawn = Sampled(
        blocks=count, of=len(population), tolerance=sample.tolerance, error=worst, seed=sample.seed
    )
    return replace(summary, images=tuple(image.shape for image in images), sample=drawn)


def _is_tolerance(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _blocks(images: Sequence[Image], tile: Sequence[int], geometry: Geometry) -> list[Masked]:
    """Return the blocks of all images, each with its halo, which is ignored."""
    ones = replace(geometry, scale=(1,) * len(tile))  # type: ignore[arg-type]
    found = []
    for image in images:
        size = image.shape[2:]
        for one in grid(size, tile, ones):
            window = [(s.start, s.stop) for s in one.read]
            interior = [(s.start, s.stop or n) for s, n in zip(one.write, size, strict=True)]
            found.append(Masked(_Crop(image, window), _Outside(mask_of(image), window, interior)))
    return found


@dataclass(frozen=True, slots=True)
class _Crop:
    """A window of a source as a source of its own."""

    image: Image
    window: Sequence[Span]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.image.shape[:2], *(stop - start for start, stop in self.window))

    def read(self, window: Sequence[Span]) -> Tensor:
        pairs = zip(window, self.window, strict=True)
        return self.image.read([(first + start, first + stop) for (start, stop), (first, _) in pairs])

    def padded(self, padding: Sequence[int]) -> _Crop:
        assert not any(padding)
        return self

    def fingerprint(self) -> str:
        return values_digest(self)


@dataclass(frozen=True, slots=True)
class _Outside:
    """The mask of a window: what is outside of the interior, and what the image's own mask ignores."""

    mask: Image | None
    window: Sequence[Span]
    interior: Sequence[Span]

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 1, *(stop - start for start, stop in self.window))

    def read(self, window: Sequence[Span]) -> Tensor:
        spans = [(a + first, b + first) for (a, b), (first, _) in zip(window, self.window, strict=True)]
        if self.mask is None:
            ignored = torch.zeros((1, 1, *(b - a for a, b in spans)), dtype=torch.bool)
        else:
            ignored = self.mask.read(spans) != 0
        for axis, ((a, b), (first, last)) in enumerate(zip(spans, self.interior, strict=True), start=2):
            pixels = torch.arange(a, b)
            outside = (pixels < first) | (pixels >= last)
            ignored = ignored | outside.reshape([-1 if d == axis else 1 for d in range(ignored.dim())])
        return ignored

    def padded(self, padding: Sequence[int]) -> _Outside:
        assert not any(padding)
        return self

    def fingerprint(self) -> str:
        return values_digest(self)


@dataclass(frozen=True, slots=True)
class _Estimating(TargetAround):
    """A target that is measured on some of the blocks, and tells its error."""

    blocks: int

    def compare(self, parts: Sequence[Any]) -> SiteStatistics:
        """Compare with what is stored, and add the errors."""
        found = self.target.compare(parts)
        blocks = [self._moments(part) for part in parts]
        mean, variance = errors(blocks, self.blocks)
        union = merge(*blocks)
        if isinstance(self.target, NormTarget):
            square = union.var + self.target.holder.eps  # type: ignore[operator]
        else:  # in the root mean square of what is stored, as its other numbers are
            stored = torch.cat([value.double().cpu().flatten() for value in self.target.module.values()])  # type: ignore[operator]
            square = stored.square().mean().expand_as(mean)
        spreads = isinstance(self.target, NormTarget) or self.target.spec.law != "mean"  # type: ignore[attr-defined]
        deviation = variance / union.var.sqrt().clamp_min(1e-300) / 2 / square.sqrt() if spreads else None
        return replace(
            found,
            flat=self.target.flat([self.join(parts)]) if isinstance(self.target, NormTarget) else found.flat,
            mean_error=float((mean / square.sqrt()).max()),
            sd_error=None if deviation is None else float(deviation.max()),
        )

    def _moments(self, part: Any) -> Moments:
        """Return the moments of a block, pooled as they are stored; of a mean without the spread."""
        if isinstance(self.target, NormTarget):
            return self.target.expected(part)
        mean, *spread = (value.flatten() for value in part.part.values)
        return Moments(int(part.part.count), mean, spread[0] if spread else torch.zeros_like(mean))


def errors(parts: Sequence[Moments], blocks: int) -> tuple[Tensor, Tensor]:
    """Return the standard errors of mean and variance of a sample of blocks, per channel.

    Args:
        parts: moments of each block of the sample; empty ones count as blocks.
        blocks: in the population.
    """
    n, union = len(parts), merge(*parts)
    if n >= blocks:
        return torch.zeros_like(union.mean), torch.zeros_like(union.mean)
    full = [part for part in parts if part.count]
    means = [part.count * (part.mean - union.mean) for part in full]
    spreads = [part.count * (part.var + (part.mean - union.mean).square() - union.var) for part in full]
    factor = (1 - n / blocks) * n / (n - 1)
    mean, variance = (
        (factor * torch.stack(found).square().sum(0)).sqrt() / union.count for found in (means, spreads)
    )
    return mean, variance
