"""The candidates: each gives constants from the measured images of a fold, and predicts the judged ones with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from normfix.choosing.bench import Bench, Sample
from normfix.choosing.judge import Judge
from normfix.choosing.samples import Fold, tensors_of
from normfix.records.candidates import mean_of
from normfix.records.statistics import Law, Statistics

__all__ = ["Blend", "Constants", "Fitted", "PerImage", "Prediction", "Renorm", "Way", "ways_of"]

_LAWS: tuple[Law, ...] = ("geometric", "arithmetic", "median", "total")
_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Tried of a blend: accuracy changes slowly with the weight."""

_SEVERAL = 3
"""Images from which a law over images is tried beside all their pixels."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a network gives for a sample, with its constants of now."""

    sample: Sample
    network: nn.Module
    values: Tensor


@dataclass(frozen=True, slots=True)
class Way(ABC):
    """One kind of constants."""

    bench: Bench

    @property
    @abstractmethod
    def statistics(self) -> Statistics:
        """Return what --statistics takes for it."""

    @property
    def name(self) -> str:
        """Return what it is called."""
        return self.statistics.words

    @property
    def note(self) -> str:
        """Return what should be known of it."""
        return ""

    @abstractmethod
    def predictions(self, fold: Fold) -> Iterator[Prediction]:
        """Measure constants and yield predictions; each is to be looked at before the next."""

    def _predicted(self, samples: Sequence[Sample]) -> Iterator[Prediction]:
        for sample in samples:
            yield Prediction(sample, self.bench.converted, self.bench.frozen(sample.pixels))


@dataclass(frozen=True, slots=True)
class Constants(Way):
    """Of whole images or windows."""

    of: Statistics

    @property
    def statistics(self) -> Statistics:
        """Return them."""
        return self.of

    def predictions(self, fold: Fold) -> Iterator[Prediction]:
        """See Way."""
        self.bench.settle_(self.of, tensors_of(fold.measured))
        yield from self._predicted(fold.judged)


@dataclass(frozen=True, slots=True)
class Fitted(Way):
    """Distilled from the original in windows of the measured images."""

    size: tuple[int, ...]

    @property
    def statistics(self) -> Statistics:
        """Return them."""
        return Statistics(kind="distilled", size=self.size)

    def predictions(self, fold: Fold) -> Iterator[Prediction]:
        """See Way."""
        self.bench.distil_(self.statistics, tensors_of(fold.measured))
        yield from self._predicted(fold.judged)


@dataclass(frozen=True, slots=True)
class PerImage(Way):
    """Of the image that is predicted, all of it: what the original gives for the whole image."""

    @property
    def statistics(self) -> Statistics:
        """Return them."""
        return Statistics(kind="per-image")

    @property
    def note(self) -> str:
        """See Way."""
        return "the original's output on each whole image; one pass more for each"

    def predictions(self, fold: Fold) -> Iterator[Prediction]:
        """See Way."""
        for sample in fold.judged:
            self.bench.settle_(Statistics(), [sample.pixels])
            yield from self._predicted([sample])


@dataclass(frozen=True, slots=True)
class Blend(Way):
    """Of what the original has stored and whole images, at the weight that is best on the measured images."""

    judge: Judge
    everything: tuple[Sample, ...]
    weights: list[float]
    """Found for each fold."""

    @property
    def statistics(self) -> Statistics:
        """Return the blend whose weight is best on all images: it changes the network."""
        return Statistics(kind="blend", weight=self._best(self.everything))

    @property
    def name(self) -> str:
        """Return what it is called before its weight is known."""
        return "blend"

    @property
    def note(self) -> str:
        """See Way."""
        return f"weights found on the measured images alone: {', '.join(f'{w:g}' for w in self.weights)}"

    def predictions(self, fold: Fold) -> Iterator[Prediction]:
        """See Way."""
        self.weights.append(self._best(fold.measured))
        self._settle_(self.weights[-1], fold.measured)
        yield from self._predicted(fold.judged)

    def _best(self, samples: Sequence[Sample]) -> float:
        return max(_WEIGHTS, key=lambda weight: self._score(weight, samples))

    def _score(self, weight: float, samples: Sequence[Sample]) -> float:
        self._settle_(weight, samples)
        return mean_of([self.judge.score(p.sample, p.values) for p in self._predicted(samples)])

    def _settle_(self, weight: float, samples: Sequence[Sample]) -> None:
        self.bench.settle_(Statistics(kind="blend", weight=weight), tensors_of(samples))


@dataclass(frozen=True, slots=True)
class Renorm(Way):
    """BatchRenorm, converted on the first image and recalibrated on all."""

    @property
    def statistics(self) -> Statistics:
        """Return what both are measured on."""
        return Statistics()

    @property
    def name(self) -> str:
        """Return what it is called."""
        return "batchrenorm"

    @property
    def note(self) -> str:
        """See Way."""
        if self.bench.regroups:
            return "convert --to batchrenorm on the first image, then calibrate on all"
        return "the constants of whole until it is trained"

    def predictions(self, fold: Fold) -> Iterator[Prediction]:
        """See Way."""
        if not self.bench.regroups:
            yield from Constants(self.bench, Statistics()).predictions(fold)
            return
        network = self.bench.recalibrated(tensors_of(fold.measured))
        for sample in fold.judged:
            yield Prediction(sample, network, self.bench.predicted(network, sample.pixels))


def ways_of(
    bench: Bench,
    judge: Judge,
    samples: Sequence[Sample],
    window: tuple[int, ...],
    *,
    distilled: bool = False,
) -> list[Way]:
    """Return the candidates of a network: windows where their size is known, a blend where anything is stored.

    Parts of larger images say nothing of what an image as a whole has.
    """
    entire = not any(sample.part for sample in samples)
    found: list[Way] = [Constants(bench, Statistics())]
    if entire and len(samples) >= _SEVERAL:
        found.append(Constants(bench, Statistics(kind="images", law="geometric")))
    if window:
        found += [Constants(bench, Statistics(kind="windows", size=window, law=law)) for law in _LAWS]
        if distilled:
            found.append(Fitted(bench, window))
    if entire:
        found.append(PerImage(bench))
    if bench.stored:
        found.append(Blend(bench, judge, tuple(samples), []))
    return [*found, Renorm(bench)]
