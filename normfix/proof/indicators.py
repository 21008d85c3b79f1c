"""Compare two predictions of the same pixels: 1 - Dice after thresholding, and differences in sd.

    Dice = 2 |A and B| / (|A| + |B|),   1 - Dice = 0 where A and B are both empty

A and B are the foregrounds, all channels pooled: above 0.5 for probabilities, above 0 for logits; for classes
(softmax, scores, labels) class by class and summed over every class but the first, which is background. sd
is that of the prediction compared with; where it is constant any difference at all is boundless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from normfix.networks.numerics import BOUNDLESS
from normfix.records.diagnoses import Kind, Mismatch, Profile

__all__ = ["Accumulator", "compare", "differences", "foregrounds", "profile", "recognise", "spread_of"]

_COMB = 0.5


def recognise(output: Tensor) -> Kind:
    """Tell what an output means from its values; logits and scores look like regression and must be declared.

    Example:
        >>> recognise(torch.tensor([[[[0.1, 0.9]]]]))
        'probability'
    """
    if not output.is_floating_point():
        return "labels"
    low, high = float(output.min()), float(output.max())
    if not 0 <= low <= high <= 1:
        return "regression"
    sums = output.double().sum(1)
    if output.shape[1] > 1 and bool(((sums - 1).abs() < 1e-2).all()):
        return "softmax"
    return "probability"


def spread_of(output: Tensor, kind: Kind) -> float:
    """Return the unit of differences: the sd of an output, 1 for labels, 0 where it is not finite."""
    return 1.0 if kind == "labels" else float(output.double().std().nan_to_num(0, 0, 0))


def compare(a: Tensor, b: Tensor, kind: Kind, sd: float) -> Mismatch | None:
    """Compare two predictions (N, C, *space) of the same pixels; None where there is none."""
    gathered = Accumulator(kind, sd)
    gathered.add(a, b)
    return gathered.result()


class Accumulator:
    """Gathers differences over several regions, so that they are pooled exactly."""

    def __init__(self, kind: Kind, sd: float) -> None:
        self._kind, self._sd = kind, sd
        self._differences: list[Tensor] = []
        self._both = self._total = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add one region, predicted twice."""
        if not a.numel():
            return
        self._differences.append(differences(a, b, self._kind, self._sd).flatten())
        both, total = _overlap(foregrounds(a, self._kind), foregrounds(b, self._kind))
        self._both, self._total = self._both + both, self._total + total

    def result(self) -> Mismatch | None:
        """Return the pooled mismatch, or None if nothing was added."""
        if not self._differences:
            return None
        pooled = torch.cat(self._differences)
        rank = max(1, -(-99 * len(pooled) // 100))
        dice = 1 - 2 * self._both / self._total if self._total else 0.0
        return Mismatch(
            dice=None if self._kind == "regression" else dice,
            mean_sd=min(float(pooled.mean()), BOUNDLESS),
            p99_sd=float(pooled.kthvalue(rank).values),
            max_sd=float(pooled.max()),
            pixels=len(pooled),
        )


def differences(a: Tensor, b: Tensor, kind: Kind, sd: float) -> Tensor:
    """Return |a - b| in sd, in float64; NaN, and any difference from a constant, counts as BOUNDLESS."""
    if kind == "labels":
        return (a != b).double()
    found = (a.double() - b.double()).abs()
    scaled = found / sd if sd > 0 else (found > 0).double() * BOUNDLESS
    return scaled.nan_to_num(nan=BOUNDLESS).clamp_max(BOUNDLESS)


def profile(
    difference: Tensor, cuts: Sequence[Sequence[int]], stride: int, floor: float = 0.0
) -> Profile | None:
    """Sort differences (N, C, *space) by the distance of their pixel from the nearest cut.

    Args:
        difference: in sd.
        cuts: per axis, the positions in the output where a new tile starts.
        stride: of the network in output pixels, the period of a comb.
        floor: up to which a mean difference is none.

    Returns:
        None if nothing is cut.
    """
    if not any(cuts):
        return None
    away = _distance(difference.shape[2:], cuts)
    values = difference.double().amax((0, 1)).flatten().cpu()
    mean = difference.double().mean((0, 1)).flatten().cpu()
    bins = int(away.max()) + 1
    counts = torch.bincount(away.flatten(), minlength=bins).clamp_min(1)
    means = torch.bincount(away.flatten(), weights=mean, minlength=bins) / counts
    largest = torch.zeros(bins, dtype=torch.float64).scatter_reduce(0, away.flatten(), values, "amax")
    return Profile(
        mean_sd=tuple(means.clamp_max(BOUNDLESS).tolist()),
        max_sd=tuple(largest.tolist()),
        shape=_shape(means, stride, floor),
    )


def foregrounds(output: Tensor, kind: Kind) -> Tensor | None:
    """Return (N, C, *space) of 0 and 1, or (N, 1, *space) of class numbers; None for regression."""
    match kind:
        case "regression":
            return None
        case "softmax" | "scores":
            return output.argmax(1, keepdim=True)
        case "labels":
            return output
        case "probability":
            return output > 0.5
        case "logits":
            return output > 0


def _overlap(a: Tensor | None, b: Tensor | None) -> tuple[int, int]:
    """Return |A and B| and |A| + |B| of two foregrounds, class by class."""
    if a is None or b is None:
        return 0, 0
    return int(((a == b) & (a > 0)).sum()), int((a > 0).sum()) + int((b > 0).sum())


def _distance(size: Sequence[int], cuts: Sequence[Sequence[int]]) -> Tensor:
    """Return for each pixel how many pixels lie between it and the nearest cut on any axis."""
    far = max(size)
    away = torch.full(tuple(size), far)
    for axis, (n, positions) in enumerate(zip(size, cuts, strict=True)):
        if not positions:
            continue
        pixels = torch.arange(n)[:, None]
        cut = torch.tensor(list(positions))[None]
        nearest = torch.where(pixels >= cut, pixels - cut, cut - 1 - pixels).amin(1)
        shape = [1] * len(size)
        shape[axis] = n
        away = torch.minimum(away, nearest.view(shape))
    return away


def _shape(means: Tensor, stride: int, floor: float) -> Literal["flat zero", "plateau", "decay", "comb"]:
    """Name the course of the mean difference: far from the cuts a plateau, near them a decay, or periodic."""
    if float(means.max()) <= floor:
        return "flat zero"
    far, near = means[len(means) // 2 :], means[: max(1, len(means) // 8)]
    if float(far.mean()) > 0.05 * float(near.mean()):
        rest = means[: len(means) // stride * stride]
        if stride > 1 and len(rest) >= 2 * stride:
            phases = rest.view(-1, stride).mean(0)
            if float(phases.std()) > _COMB * float(phases.mean()):
                return "comb"
        return "plateau"
    return "decay"
