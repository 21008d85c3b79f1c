"""The table of sites: each statistic on the whole image, and how far the tiles' own stray from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from normfix.diagnosis.intervention import Watched
from normfix.networks.numerics import BOUNDLESS
from normfix.records.diagnoses import SiteReport
from normfix.records.sites import Site

__all__ = ["site_reports"]

Norms = Mapping[str, tuple[Tensor, Tensor]]


def site_reports(
    sites: Sequence[Site],
    whole: Norms,
    tiles: Sequence[Watched],
    alone: Mapping[str, tuple[float, float | None]],
) -> tuple[SiteReport, ...]:
    """Describe every site; `alone` holds (introduced, removed) where that was measured."""
    return tuple(_report(site, whole, tiles, alone.get(site.id, (None, None))) for site in sites)


def _report(
    site: Site, whole: Norms, tiles: Sequence[Watched], alone: tuple[float | None, float | None]
) -> SiteReport:
    mean = sd = ratio = None
    spread = None
    if site.id in whole:
        centre, variance = (t.double().cpu() for t in whole[site.id])
        mean, sd = _range(centre), _range(variance.sqrt())
        spread, ratio = _strays(centre, variance, [t.norms[site.id] for t in tiles if site.id in t.norms])
    return SiteReport(
        site=site.id,
        family=str(site.family),
        live=site.live,
        mean=mean,
        sd=sd,
        spread=spread,
        ratio=ratio,
        introduced=alone[0],
        removed=alone[1],
    )


def _strays(
    mean: Tensor, var: Tensor, tiles: Sequence[tuple[Tensor, Tensor]]
) -> tuple[float | None, tuple[float, float] | None]:
    """Return the largest |tile mean - mean| / sd, and the (smallest, largest) tile variance / variance."""
    if not tiles:
        return None, None
    safe = var.clamp_min(torch.finfo(torch.float64).tiny)
    means, variances = (torch.stack([t[i].double().cpu() for t in tiles]) for i in (0, 1))
    spread = float(((means - mean).abs() / safe.sqrt()).max())
    low, high = _range(variances / safe)
    return min(spread, BOUNDLESS), (min(low, BOUNDLESS), min(high, BOUNDLESS))


def _range(values: Tensor) -> tuple[float, float]:
    return float(values.min()), float(values.max())
