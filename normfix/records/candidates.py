"""What a comparison of constants found: one row per candidate, and which of them to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from normfix.records.encoding import Record
from normfix.records.sites import Finding
from normfix.records.statistics import Statistics
from normfix.records.tables import Shown, Table, counted, number

__all__ = ["Candidate", "ChoiceRecord", "fold_means", "mean_of", "spread_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Record):
    """What one kind of constants, or the original in parts, gives for images that it was not measured on.

    `statistics` is None for the original, which is there to compare with. `seams` is the largest difference of its
    tiles from its whole image, in sd; `scores` and `agreements` have one value per image that was held out: the measure
    by which is chosen, and, where there are labels as well, the agreement with the original's own windows. None is a
    prediction that has no such measure. `better` counts the images on which it scores above whole images' constants.
    """

    name: str
    statistics: Statistics | None
    to: Literal["frozen", "batchrenorm"] = "frozen"
    seams: float | None
    scores: tuple[float, ...]
    agreements: tuple[float, ...]
    better: int
    note: str = ""

    @property
    def mean(self) -> float:
        """Return the mean score."""
        return mean_of(self.scores)

    @property
    def spread(self) -> float | None:
        """Return the standard deviation of scores between images."""
        return spread_of(self.scores)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ChoiceRecord(Shown, Record):
    """Candidates, the best first, and the recommended one.

    `measure` is what scores are; `parts` what was held out in turn: images, halves of the only one, or parts of larger
    ones; `folds` how many of them together, in their order; `window` the size of the original's windows. `margin` is
    the mean difference of the recommended score to that of whole images' constants (of those, where they are
    recommended, to the best other), over the same held-out images, and `error` its standard error, over folds. `sure`
    is "sure" if it is above two standard errors and on every one of at least four images, "likely" if it is better on
    all of fewer or on most, else "open": then constants of whole images are recommended, with which the network equals
    the original on one image. `fix` is what to run.
    """

    model: str
    images: tuple[tuple[int, ...], ...]
    parts: tuple[str, ...]
    measure: str
    window: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    references: tuple[Candidate, ...]
    recommended: str
    margin: float
    error: float | None
    sure: Literal["sure", "likely", "open"]
    fix: str
    folds: tuple[int, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def best(self) -> Candidate:
        """Return the recommended candidate."""
        return next(c for c in self.candidates if c.name == self.recommended)

    @property
    def headline(self) -> str:
        """Return the recommendation, its margin and how sure it is."""
        score = f"{self.measure} {self.best.mean:.3f}"
        return f"take {self.recommended} ({score}): {self.reason}"

    @property
    def reason(self) -> str:
        """Return by how much, on what, and how sure."""
        held_out = counted(len(self.parts), self._part).replace("halfs", "halves")
        error = "" if self.error is None else f" ± {self.error:.3f}"
        if self.sure == "open":
            return (
                f"no other is better beyond doubt on {held_out} (the best other by {-self.margin:+.3f}{error}), and "
                "with it the network equals the original on one image"
            )
        if self.recommended == "whole":
            return f"{self.margin:+.3f}{error} to the best other on {held_out}, {self.sure}"
        return f"{self.margin:+.3f}{error} to whole, better on {self.best.better} of {held_out}, {self.sure}"

    @property
    def _shares(self) -> bool:
        """Tell whether several parts are held out together."""
        return any(size > 1 for size in self.folds)

    @property
    def _part(self) -> str:
        first = self.parts[0]
        if " at " in first:
            return "held-out part"
        return "half" if "half" in first else "held-out image"

    def table(self) -> Table:
        """Return candidates and references."""
        agrees = any(c.agreements for c in self.candidates)
        spreads = ["spread", *(["of folds"] * self._shares)]
        heads = ["constants", "seams (sd)", self.measure, *spreads, "better than whole"]
        rows = [self._row(c, agrees) for c in (*self.candidates, *self.references)]
        return Table((*heads, *(["own windows"] * agrees), "note"), rows)

    def _row(self, c: Candidate, agrees: bool) -> Sequence[str]:
        mark = f"> {c.name}" if c.name == self.recommended else c.name
        spreads = [c.spread, *([spread_of(fold_means(c.scores, self.folds))] * self._shares)]
        shown = ["" if spread is None else f"{spread:.3f}" for spread in spreads]
        better = "" if c.name == "whole" else f"{c.better} of {len(c.scores)}"
        own = [f"{mean_of(c.agreements):.3f}" if c.agreements else ""] if agrees else []
        return (mark, number(c.seams), f"{c.mean:.3f}", *shown, better, *own, c.note)


def mean_of(values: Sequence[float]) -> float:
    """Return the mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def fold_means(scores: Sequence[float], folds: Sequence[int]) -> list[float]:
    """Return the mean of each fold's scores; without folds each score is one.

    >>> fold_means([1.0, 3.0, 5.0], (2, 1)), fold_means([1.0, 3.0], ())
    ([2.0, 5.0], [1.0, 3.0])
    """
    rest, means = list(scores), []
    for size in folds or (1,) * len(rest):
        means.append(mean_of(rest[:size]))
        rest = rest[size:]
    return means


def spread_of(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None of fewer than two values.

    >>> spread_of([1.0, 3.0]), spread_of([1.0])
    (1.4142135623730951, None)
    """
    if len(values) < 2:
        return None
    mean = mean_of(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
