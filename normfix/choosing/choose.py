"""choose: constants of a network compared on images that they were not measured on, and one of them recommended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from normfix.choosing.bench import Bench, Sample
from normfix.choosing.judge import Judge
from normfix.choosing.recommendation import recommend
from normfix.choosing.samples import Fold, folds_of, samples_of
from normfix.choosing.ways import Prediction, Way, ways_of
from normfix.conversion.pooling import on_grid
from normfix.diagnosis.accuracy import Metric
from normfix.errors import NormfixError
from normfix.images.given import GivenImages, images_of
from normfix.images.parts import Measured
from normfix.networks.calling import Caller
from normfix.networks.graph.program import require_free
from normfix.networks.numerics import deviation, exact_arithmetic
from normfix.networks.provenance import declared_window
from normfix.networks.surroundings import undisturbed
from normfix.proof.indicators import spread_of as sd_of
from normfix.records.candidates import Candidate, ChoiceRecord
from normfix.records.diagnoses import Kind
from normfix.records.progress import Progress, logged
from normfix.records.spans import per_axis
from normfix.records.statistics import Statistics
from normfix.records.tables import Shown, Table
from normfix.reporting.places import Places
from normfix.scanning.known import ForwardFn
from normfix.tiling.stitching import tile_extents

__all__ = ["Choice", "choose"]


@dataclass(frozen=True, slots=True, repr=False)
class Choice(Shown):
    """What was compared, and what to convert with; `places` are what a report draws."""

    record: ChoiceRecord
    images: GivenImages
    places: Places

    @property
    def statistics(self) -> Statistics:
        """Return the recommended statistics; where that is BatchRenorm, those of the best frozen network."""
        frozen = [c for c in self.record.candidates if c.to == "frozen"]
        best = self.record.best if self.record.best in frozen else frozen[0]
        assert best.statistics is not None
        return best.statistics

    @property
    def given(self) -> Measured:
        """Return the images as `convert` takes them to measure the recommended constants on all of them."""
        return Measured(self.images, self.statistics.words)

    @property
    def headline(self) -> str:
        """Return the recommendation."""
        return self.record.headline

    def table(self) -> Table:
        """Return the candidates."""
        return self.record.table()


@undisturbed()
def choose(
    model: nn.Module,
    images: GivenImages,
    *,
    labels: Any = None,
    window: int | Sequence[int] | None = None,
    metric: Metric | None = None,
    kind: Kind | None = None,
    keep: Sequence[str] = (),
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    as_trained: bool = False,
    distilled: bool = False,
    progress: Progress = logged,
) -> Choice:
    """Compare the constants that a network could be frozen at, on images that they were not measured on.

    Every candidate gives exactly the same in tiles; what it gives is not equally good. Constants are measured on all
    images but some, and judged on these, in turn; of one image on one half and judged on the other. With labels, by
    accuracy; else by how far predictions agree with the original's in windows of its training size, blended. The
    network is scanned and rewritten once.

    Args:
        model: not modified.
        images: as for normfix.convert; of images that are read by window and do not fit, parts are compared, which
            are drawn at random.
        labels: class numbers (*space) or masks (C, *space); of several images one for each.
        window: pixels of the windows in training, one number or one per axis, multiples of the stride; default: as
            the network's file states them. Without, no constants of windows are tried, and labels are needed.
        metric: `metric(prediction, labels)` of arrays (C, *space), more is better, instead of Dice.
        kind: what the output means; default: told by its values.
        keep: as for `convert`.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        as_trained: as for `convert`; stored statistics are then tried as well, in a blend with those of the images.
        distilled: try constants that are fitted to the original in windows as well, up to 400 steps of gradient
            descent for each part that is held out.
        progress: called with (stage, done, total).

    Returns:
        The choice: `.record` with a row per candidate, `.given` for `convert`.

    Raises:
        NormfixError: NF555 if nothing is measured; NF556 for images that cannot be held out and without labels and
            window, NF557 for labels and outputs that do not fit, NF402 for a window off the stride grid; codes of
            `scan` and of the images.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> found = normfix.choose(net.eval(), torch.rand(1, 1, 64, 96), window=32)
        >>> found.record.parts, normfix.convert(net, found.given).proof.passed
        (('image 0, half 1', 'image 0, half 0'), True)
    """
    require_free(model)
    caller = Caller(forward_fn, output)
    declared = declared_window(model) if window is None else None
    window = declared or window
    asked = () if window is None else _sizes(window)
    samples = samples_of(images_of(images, model, caller=caller), labels, asked)
    if labels is None and window is None:
        raise NormfixError(
            "NF556",
            "there is nothing to judge by. Give labels (--labels), or the size of the windows in training (--window), "
            "which the network's file does not state: predictions are compared with the original's in such windows.",
            where="choose",
        )
    if labels is None and metric is not None:
        raise NormfixError(
            "NF557",
            "it judges predictions by labels, and none were given. Give labels (--labels), or leave it out.",
            where="metric",
        )
    if distilled and window is None:
        raise NormfixError(
            "NF556",
            "constants are distilled in windows of the training size: give window (--window).",
            where="choose",
        )
    progress("scan", 0, 1)
    bench = Bench.of(model, samples[0].pixels, caller, keep=keep, as_trained=as_trained)
    progress("scan", 1, 1)
    extents = (
        () if window is None else _extents(on_grid(declared, bench.geometry) if declared else asked, bench)
    )
    folds = folds_of(samples, bench.geometry)
    if labels is None and not any(_is_cut(s, extents) for fold in folds for s in fold.judged):
        raise NormfixError(
            "NF556",
            f"windows of {','.join(map(str, extents))} cover every held-out image, so the original's own windows are "
            "the whole image. Give the size of the windows in training, larger images, or labels.",
            where="choose",
        )
    if window is not None and not declared and not any(_is_cut(sample, extents) for sample in samples):
        raise NormfixError(
            "NF556",
            f"windows of {','.join(map(str, extents))} cover every image, so constants of windows would be those of "
            "whole images. Give the size of the windows in training, larger images, or leave it out.",
            where="window",
        )
    with exact_arithmetic():
        bench.understand(kind, samples[0], masks=labels is not None and metric is None)
        judge = Judge(bench, extents, metric, labels is not None)
        comparison = _Comparison(bench, judge, folds, progress)
        candidates = comparison.candidates(ways_of(bench, judge, samples, extents, distilled=distilled))
        references = comparison.references(candidates[0])
        places = comparison.places(candidates)
    sizes = tuple(len(fold.judged) for fold in folds)
    found = recommend(candidates, sizes)
    best = next(c for c in candidates if c.name == found.name)
    record = ChoiceRecord(
        model=bench.model,
        images=tuple(tuple(s.pixels.shape) for s in samples),
        parts=tuple(sample.name for fold in folds for sample in fold.judged),
        measure=judge.measure,
        window=extents,
        candidates=tuple(sorted(candidates, key=lambda c: -c.mean)),
        references=tuple(references),
        recommended=found.name,
        margin=found.margin,
        error=found.error,
        sure=found.sure,
        fix=_python(best),
        folds=sizes,
    )
    return Choice(record, images, places)


def _sizes(window: int | Sequence[int]) -> tuple[int, ...]:
    """Return one number, or as many as were given; NF402 for what are no whole numbers."""
    sizes = per_axis(window, len(window) if isinstance(window, Sequence) else 1)
    if sizes is None:
        raise NormfixError("NF402", f"give whole numbers of pixels, not {window!r}.", where="window")
    return sizes


def _extents(sizes: Sequence[int], bench: Bench) -> tuple[int, ...]:
    """Return the extents of windows, one number where they are the same on all axes."""
    extents = tile_extents(sizes[0] if len(sizes) == 1 else sizes, bench.geometry)
    return extents[:1] if len(set(extents)) == 1 else extents


def _is_cut(sample: Sample, window: Sequence[int]) -> bool:
    space = sample.pixels.shape[2:]
    sizes = window if len(window) == len(space) else tuple(window) * len(space)
    return any(n > size for n, size in zip(space, sizes, strict=True))


def _python(best: Candidate) -> str:
    """Return what to run in Python."""
    assert best.statistics is not None
    if best.to == "batchrenorm":
        return (
            "done = normfix.convert(model, images[:1], 'batchrenorm'); normfix.calibrate_(done.model, images)"
        )
    return f"done = normfix.convert(model, normfix.Measured(images, {best.statistics.words!r}))"


class _Comparison:
    """Runs every candidate on every fold; what the first sample gives is kept to be drawn."""

    def __init__(self, bench: Bench, judge: Judge, folds: Sequence[Fold], progress: Progress) -> None:
        self._bench, self._judge, self._folds, self._progress = bench, judge, folds, progress
        self._shown: dict[str, Tensor] = {}
        self._first = folds[0].judged[0]
        live = bench.live(self._first.pixels)
        self._sd = sd_of(live, bench.kind) or 1.0

    def candidates(self, ways: Sequence[Way]) -> list[Candidate]:
        """Return a row for each, the first of whole images."""
        rows: list[Candidate] = []
        for number, way in enumerate(ways):
            row = self._candidate(way)
            rows.append(_counted(row, rows[0]) if rows else row)
            self._progress("choose", number + 1, len(ways))
        return rows

    def references(self, whole: Candidate) -> list[Candidate]:
        """Return rows of the original in parts: tiles side by side, and its own windows."""
        size = self._judge.window
        if not size:
            return []
        words = ",".join(map(str, size))
        ways: dict[str, Callable[[Sample], Tensor]] = {
            f"live, tiles of {words}": lambda s: self._bench.live_tiles(s.pixels, size),
            f"live, own windows of {words}": lambda s: self._bench.own_windows(s, size),
        }
        rows = []
        for name, predict in ways.items():
            scored = [self._scored(s, predict(s)) for fold in self._folds for s in fold.judged]
            self._shown[name] = predict(self._first)
            seams = None
            if "tiles" in name:
                seams = deviation(self._shown[name], self._bench.live(self._first.pixels), self._sd)[0]
            row = _row(name, None, seams, scored, "the original, to compare with")
            rows.append(_counted(row, whole))
        return rows

    def places(self, candidates: Sequence[Candidate]) -> Places:
        """Return the first sample with all predictions of it, the best candidate first."""
        named = [c.name for c in sorted(candidates, key=lambda c: -c.mean)]
        named += [name for name in self._shown if name not in named]
        labels = self._first.labels
        return Places(
            name=self._first.name,
            image=self._first.pixels[0].float().cpu().numpy(),
            labels=None if labels is None else np.asarray(labels),
            predictions=tuple((name, self._shown[name][0].float().cpu().numpy()) for name in named),
            kind=self._bench.kind,
            compared=len(candidates),
        )

    def _candidate(self, way: Way) -> Candidate:
        seams: float | None = None
        first: Tensor | None = None
        scored: list[tuple[float, float | None]] = []
        for prediction in self._predictions(way):
            values = prediction.values
            scored.append(self._scored(prediction.sample, values))
            if first is None:
                first = values
                seams = self._bench.seams(prediction.network, prediction.sample.pixels, values, self._sd)
        assert first is not None
        # asked for at the end alone: a blend finds its weight then, in the network that is judged here
        statistics = way.statistics
        name = statistics.words if way.name == "blend" else way.name
        row = _row(name, statistics, seams, scored, way.note)
        self._shown[row.name] = first
        return replace(row, to="batchrenorm") if row.name == "batchrenorm" else row

    def _predictions(self, way: Way) -> Iterable[Prediction]:
        return (prediction for fold in self._folds for prediction in way.predictions(fold))

    def _scored(self, sample: Sample, values: Tensor) -> tuple[float, float | None]:
        """Return the score, and the agreement where scores are of labels and windows are known."""
        judge = self._judge
        agrees = judge.labelled and judge.window
        return judge.score(sample, values), judge.agreement(sample, values) if agrees else None


def _counted(row: Candidate, whole: Candidate) -> Candidate:
    """Return a row with the number of images on which it is better than whole images' constants."""
    return replace(row, better=sum(a > b for a, b in zip(row.scores, whole.scores, strict=True)))


def _row(
    name: str,
    statistics: Statistics | None,
    seams: float | None,
    scored: Sequence[tuple[float, float | None]],
    note: str,
) -> Candidate:
    return Candidate(
        name=name,
        statistics=statistics,
        seams=seams,
        scores=tuple(score for score, _ in scored),
        agreements=tuple(own for _, own in scored if own is not None),
        better=0,
        note=note,
    )
