"""Which candidate to take, by how much it is better than whole images' constants, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from normfix.records.candidates import Candidate, fold_means, mean_of, spread_of

__all__ = ["Recommendation", "recommend"]

_SMALL = 1e-3
"""Differences of scores that nobody sees."""

_MANY = 4
"""Held-out images from which a standard error says something."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The name of a candidate, its margin with its standard error, and how sure it is; see ChoiceRecord."""

    name: str
    margin: float
    error: float | None
    sure: Literal["sure", "likely", "open"]


def recommend(candidates: Sequence[Candidate], folds: Sequence[int] = ()) -> Recommendation:
    """Recommend the best of candidates, whole images' constants unless another is better beyond doubt.

    Args:
        candidates: the first is of whole images; all have scores of the same held-out images.
        folds: how many images are held out together, in the order of scores; default: each by itself. These share
            their constants, so the standard error is of their means.
    """
    whole, *others = candidates
    best = max(others, key=lambda c: c.mean)
    margin, error, sure = _compared(best.scores, whole.scores, folds)
    if margin > 0 and sure != "open":
        return Recommendation(best.name, margin, error, sure)
    back, error, sure = _compared(whole.scores, best.scores, folds)
    return Recommendation(whole.name, back, error, sure)


def _compared(
    scores: Sequence[float], others: Sequence[float], folds: Sequence[int]
) -> tuple[float, float | None, Literal["sure", "likely", "open"]]:
    """Return the mean difference of paired scores, its standard error, and how sure it is above 0."""
    differences = [a - b for a, b in zip(scores, others, strict=True)]
    n, margin, means = len(differences), mean_of(differences), fold_means(differences, folds)
    sd = spread_of(means)
    error = None if sd is None else sd / len(means) ** 0.5
    better = sum(d > 0 for d in differences)
    if margin < _SMALL or error is None:
        return margin, error, "open"
    if n >= _MANY:
        if better == n and margin > 2 * error:
            return margin, error, "sure"
        return margin, error, "likely" if better > n / 2 and margin > error else "open"
    return margin, error, "likely" if better == n else "open"
