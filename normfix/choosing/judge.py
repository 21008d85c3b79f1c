"""The judge: how right a prediction is by labels, and how near to the original's own windows; more is better."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normfix.choosing.bench import Bench, Sample
from normfix.diagnosis.accuracy import Labels, Metric
from normfix.errors import NormfixError
from normfix.proof.indicators import compare, spread_of
from normfix.records.diagnoses import Kind

__all__ = ["Judge"]


@dataclass(frozen=True, slots=True)
class Judge:
    """Scores predictions of samples; `window` are the extents of the original's windows, if they are known."""

    bench: Bench
    window: tuple[int, ...]
    metric: Metric | None
    labelled: bool

    @property
    def measure(self) -> str:
        """Return what scores are called."""
        if not self.labelled:
            return f"agreement with own windows of {','.join(map(str, self.window))}"
        if self.metric is not None:
            return getattr(self.metric, "__name__", "metric")
        return f"Dice, output read as {self.bench.kind}" if self.bench.assumed else "Dice"

    def score(self, sample: Sample, prediction: Tensor) -> float:
        """Return the accuracy where there are labels, else the agreement.

        Raises:
            NormfixError: NF557 for labels that this output has no Dice with and for a metric that gives no number,
                NF604 for labels of another size.
        """
        if not self.labelled:
            return self.agreement(sample, prediction)
        space, kind = sample.pixels.shape[2:], self.bench.kind
        labels = Labels.of(sample.labels, space, kind, self.metric, channels=prediction.shape[1])
        row = labels.row(sample.name, prediction)
        found = row.dice if self.metric is None else row.metric
        if found is None:
            raise NormfixError(
                "NF557",
                f"an output of kind {kind} and shape {tuple(prediction.shape)} has no Dice with labels of shape "
                f"{tuple(sample.labels.shape)}. Say what the output means (--kind), give a metric (more is better), or "
                "leave labels out and give a window.",
                where="labels",
            )
        return found

    def agreement(self, sample: Sample, prediction: Tensor) -> float:
        """Return Dice with the original's own windows; without classes 1 minus the mean difference in sd."""
        return agreement(prediction, self.bench.own_windows(sample, self.window), self.bench.kind)


def agreement(prediction: Tensor, reference: Tensor, kind: Kind) -> float:
    """Return how far two predictions agree, 1 where they are the same."""
    found = compare(prediction, reference, kind, spread_of(reference, kind))
    assert found is not None
    return 1 - (found.mean_sd if found.dice is None else found.dice)
