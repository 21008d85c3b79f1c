"""Refuse, or name, statistics without spread: constants that the next image would be divided by.

A channel that was dead, an empty field or blank padding has variance 0 on the image it is measured on, and the frozen
norm multiplies whatever comes there later by 1 / sqrt(eps). The proof of a conversion cannot see that, since it
is exact on that image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from normfix.conversion.targets import NormTarget, StatisticTarget, Target
from normfix.errors import NormfixError
from normfix.images.sources import Image, is_constant
from normfix.networks.calling import Caller, buffers_kept, evaluating
from normfix.networks.divisors import following
from normfix.records.measurements import CalibrationSummary, SiteStatistics
from normfix.records.sites import Finding

__all__ = ["FLAT", "all_empty", "flat_before", "judged", "spread_in_groups"]

FLAT = "NF231"
_NAMED = 8
_DEAD = 0.1
"""Share of eps below which a variance decides nothing: what is divided by is eps to 5 %. Between this and eps the
channel is named and kept: trained networks have such channels on ordinary images (the demo's first block: 0.9 to 2
times eps), and there the constant is of the image, not of eps alone."""


_LARGEST_EPS = 1e-2
"""A larger eps is no guard against zero but a part of the norm: it multiplies nothing by more than 10."""


def flat_before(targets: Sequence[Target]) -> dict[str, frozenset[int]]:
    """Return the channels whose stored variance is at or below eps: running statistics of training, for instance."""
    found = {}
    for target in targets:
        if isinstance(target, NormTarget):
            stored, eps = target.holder.running_var, target.holder.eps
            assert isinstance(stored, Tensor)
            assert isinstance(eps, float)
            found[target.name] = frozenset((stored <= eps).nonzero().flatten().tolist())
    return found


def spread_in_groups(target: Target, groups: int) -> frozenset[int]:
    """Return the channels of a norm over groups whose group has a spread, by the stored statistics per channel.

    Re-expressed per channel (w' = w sd_c / sd_g), such a channel is divided by its group's deviation, not its own.
    """
    if not isinstance(target, NormTarget):
        return frozenset()
    mean, var, eps = _stored(target)
    means = mean.double().reshape(groups, -1)  # (c,) -> (g, c/g)
    pooled = var.double().reshape(groups, -1).mean(1) + means.var(1, correction=0)
    spread = (pooled > eps).repeat_interleave(means.shape[1])
    return frozenset(spread.nonzero().flatten().tolist())


def all_empty(images: Iterable[Image]) -> bool:
    """Tell whether every image is one constant per channel; reads no further than the first that is not."""
    return all(map(is_constant, images))


def judged(
    model: nn.Module,
    targets: Sequence[Target],
    summary: CalibrationSummary,
    caller: Caller,
    image: Tensor,
    *,
    allow: bool | None,
    classes: Mapping[str, str],
    known: Mapping[str, frozenset[int]] | None = None,
    empty: bool = False,
) -> CalibrationSummary:
    """Return the summary with a finding for every site that is flat on all images.

    Args:
        model: holds the targets' modules with the statistics of the summary.
        targets: that were measured.
        summary: of the measurement.
        caller: calls the model.
        image: any that the network runs on, to see by which statistics it divides.
        allow: name what is flat, and do not refuse it; None refuses only what is flat altogether. A channel of a norm
            whose variance is at or below its eps, but not far below, is named and never refused.
        classes: of the sites' owners, for the message.
        known: channels by site that are flat without being news, as a trained network has them.
        empty: every image is constant, so that what spread there is comes from the network's own padding.

    Raises:
        NormfixError: NF231 for a flat site or channel, unless allowed.
    """
    divided = _divided(model, targets, caller, image)
    sites = []
    for site in summary.sites:
        places = {*site.flat, *divided.get(site.site, ())} - (known or {}).get(site.site, frozenset())
        sites.append(replace(site, flat=tuple(sorted(places))))
    by_name = {target.name: target for target in targets}
    found: list[tuple[Finding, bool]] = [(_EMPTY_IMAGES, True)] if empty else []
    refused = _is_dead if allow is False else _is_all_flat
    for site in sites:
        if site.flat:
            where = f"{site.site} ({classes.get(site.site, '')})"
            finding = Finding(code=FLAT, where=where, message=_message(by_name[site.site], site))
            found.append((finding, refused(by_name[site.site], site)))
    worst = [finding for finding, refusal in found if refusal]
    if worst and not allow:
        others = f" {len(found) - 1} more sites are flat." if found[1:] else ""
        raise NormfixError(FLAT, f"{worst[0].message} {_NEXT}{others}", where=worst[0].where)
    return replace(summary, sites=tuple(sites), findings=tuple(finding for finding, _ in found))


_EMPTY_IMAGES = Finding(
    code=FLAT,
    where="images",
    message="every calibration image is constant, so no statistic is of anything but the network's own padding at the "
    "border: on an image with structure the constants are arbitrary.",
)
_NEXT = (
    "Calibrate on an image that has such structure, or --allow-flat (allow_flat=True) to keep it as it is."
)


def _stored(target: NormTarget) -> tuple[Tensor, Tensor, float]:
    """Return the mean and variance that a norm holds, and its eps."""
    mean, var, eps = target.holder.running_mean, target.holder.running_var, target.holder.eps
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    assert isinstance(eps, float)
    return mean, var, eps


def _is_dead(target: Target, site: SiteStatistics) -> bool:
    """Tell whether eps alone decides what a flat channel, or anything a flat value, is divided by."""
    if not isinstance(target, NormTarget):
        return True
    mean, var, eps = _stored(target)
    rounding = (torch.finfo(var.dtype).eps / 2 * mean.double()).square()
    dead = var.double() <= rounding.clamp_min(_DEAD * eps)
    return eps <= _LARGEST_EPS and bool(dead[list(site.flat)].any())


def _is_all_flat(target: Target, site: SiteStatistics) -> bool:
    """Tell whether a site has no channel or value with a spread."""
    if isinstance(target, NormTarget):
        _, var, eps = _stored(target)
        return eps <= _LARGEST_EPS and len(site.flat) == var.numel()
    return isinstance(target, StatisticTarget) and len(site.flat) >= target.module.value.numel()


def _message(target: Target, site: SiteStatistics) -> str:
    if isinstance(target, NormTarget):
        return (
            f"the variance of {_places('channel', site.flat)} is at or below its eps ({target.holder.eps:g}) on every "
            "calibration image, so where another image has structure there, it is multiplied by up to "
            f"{_gain(target.holder.eps)}."
        )
    return (
        f"the network divides by what it makes of it, and there {_places('value', site.flat)} vanish on the "
        "calibration images (zero, or no larger than the eps beside it), so where another image has structure, it is "
        "divided by next to nothing."
    )


def _gain(eps: object) -> str:
    return f"{eps**-0.5:.0f}" if isinstance(eps, float) and eps > 0 else "any number"


def _places(noun: str, places: Sequence[int]) -> str:
    named = ", ".join(map(str, places[:_NAMED]))
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return f"{noun}{'s' if places[1:] else ''} {named}{more}"


def _divided(
    model: nn.Module, targets: Sequence[Target], caller: Caller, image: Tensor
) -> dict[str, set[int]]:
    """Return the flat values that the network divides by, by the site of the statistic they come from."""
    sites = {t.name: (t.module, t.spec.law) for t in targets if isinstance(t, StatisticTarget)}
    if not sites:
        return {}
    with evaluating(model), buffers_kept(model), torch.no_grad(), following(model, sites) as divisors:
        caller(model, image)
    return divisors.found
