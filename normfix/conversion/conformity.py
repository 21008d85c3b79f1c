"""Say which calibration images are unlike what the network expects, or unlike each other.

Constants of an image that is scaled otherwise than the network's are proved like any other: the proof is of that image.
Moments give it away: those of an image against stored statistics, which are of training, and against other images'. As
single channels of trained networks differ much between ordinary images, the median over a norm's channels is judged:

    shift = median_c |m_c - m'_c| / sqrt(v'_c + eps),    ratio = median_c sqrt((v_c + eps) / (v'_c + eps))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, nn

from normfix.conversion.measuring import observed
from normfix.conversion.targets import NormTarget, Target
from normfix.images.sources import Image, whole
from normfix.layers.moments import Moments
from normfix.networks.calling import evaluating
from normfix.records.sites import Finding

__all__ = ["UNLIKE", "Stored", "moved", "stored_moments", "unlike"]

UNLIKE = "NF589"

_SHIFT, _RATIO = 6.0, 8.0
"""In deviations. Eight crops of 256 pixels of one picture of nuclei differ by at most 2.9 and 3.3 at any of the demo
network's norms; one that is scaled by 255 or by a tenth by that factor."""

_MOST = 8
"""Images that are looked at."""

Stored = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and variance (c,) by site."""


def unlike(
    model: nn.Module,
    measured: Sequence[Target],
    carried: Sequence[Target],
    images: Iterable[Image],
    run: Callable[[nn.Module, Tensor], Tensor],
) -> tuple[Finding, ...]:
    """Return what images are unlike, by the first norm at which it is seen.

    Args:
        model: with its constants.
        measured: sites whose constants are of the images: these are compared with each other.
        carried: sites whose constants are of training: each image is compared with these.
        images: in memory; the first eight are looked at.
        run: calls the model.
    """
    parts: dict[str, list[Moments]] = {}

    def observe(target: Target, part: Any) -> None:
        parts.setdefault(target.name, []).append(part)

    norms = [t for t in (*carried, *measured) if isinstance(t, NormTarget)]
    with torch.no_grad(), evaluating(model), observed(norms, observe):
        for image in islice(images, _MOST):
            run(model, whole(image))
    return (*_against_stored(norms[: len(norms) - len(measured)], parts), *_between(measured, parts))


def stored_moments(targets: Sequence[Target]) -> Stored:
    """Return what norms hold now."""
    norms = [t for t in targets if isinstance(t, NormTarget)]
    return {t.name: tuple(v.detach().clone() for v in _held(t)) for t in norms}  # type: ignore[misc]


def moved(targets: Sequence[Target], before: Stored) -> tuple[Finding, ...]:
    """Return what images are unlike, if constants of training were measured anew on them."""
    for target in targets:
        if isinstance(target, NormTarget) and target.name in before:
            words = _apart(*_held(target), *before[target.name], _eps(target))
            if words:
                return (
                    _finding(
                        target.name, f"the calibration images are {words} than the stored statistics say"
                    ),
                )
    return ()


def _against_stored(carried: Sequence[NormTarget], parts: Mapping[str, list[Moments]]) -> tuple[Finding, ...]:
    for target in carried:
        for number, part in enumerate(map(target.expected, parts.get(target.name, ()))):
            if words := _apart(part.mean, part.var, *_held(target), _eps(target)):
                return (_finding(target.name, f"image {number} is {words} than the stored statistics say"),)
    return ()


def _between(measured: Sequence[Target], parts: Mapping[str, list[Moments]]) -> tuple[Finding, ...]:
    for target in measured:
        if not isinstance(target, NormTarget):
            continue
        own = [*enumerate(map(target.expected, parts.get(target.name, ())))]
        for (one, a), (other, b) in combinations(own, 2):
            if words := _apart(b.mean, b.var, a.mean, a.var, _eps(target)):
                return (_finding(target.name, f"image {other} is {words} than image {one}"),)
    return ()


def _apart(mean: Tensor, var: Tensor, as_mean: Tensor, as_var: Tensor, eps: float) -> str:
    """Say how far moments are from others, nothing where they are not."""
    mean, var, as_mean, as_var = (v.double().cpu() for v in (mean, var, as_mean, as_var))
    sd = (as_var + eps).sqrt()
    ratio = float(((var + eps).sqrt() / sd).median())
    shift = float(((mean - as_mean).abs() / sd).median())
    if not 1 / _RATIO < ratio < _RATIO:
        return f"{max(ratio, 1 / ratio):.2g} times {'stronger' if ratio > 1 else 'weaker'}"
    return f"{shift:.2g} sd further off" if shift > _SHIFT else ""


def _finding(site: str, what: str) -> Finding:
    return Finding(
        code=UNLIKE,
        where=site,
        message=f"there {what} (median over channels). Constants of images that are scaled otherwise, or of another "
        "kind, are proved all the same, and are wrong for the others: look at how each is scaled (--scale).",
    )


def _held(target: NormTarget) -> tuple[Tensor, Tensor]:
    mean, var = target.holder.running_mean, target.holder.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return mean, var


def _eps(target: NormTarget) -> float:
    assert isinstance(target.holder.eps, float)
    return target.holder.eps
