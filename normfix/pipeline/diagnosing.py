"""diagnose: measure the seams of a network under a tiling, name their causes, say what it will cost first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normfix.calling import Caller, home_of
from normfix.diagnosis.accuracy import Labels
from normfix.diagnosis.disparity import disparity, patches
from normfix.diagnosis.experiments import Bench, Trial, culprits
from normfix.diagnosis.indicators import compare, differences, profile, spread_of
from normfix.diagnosis.overlaps import Overlaps, Predicted, overlaps
from normfix.diagnosis.reception import gradient, receptive_field
from normfix.diagnosis.statistics import site_reports
from normfix.diagnosis.windows import Window, take, windows
from normfix.diagnosis_record import (
    AccuracyRow,
    Cost,
    Culprit,
    DiagnosisRecord,
    Kind,
    ReceptiveField,
    SiteReport,
    TileMismatch,
    Tiling,
    TrainEval,
)
from normfix.images import Items
from normfix.intervention import Watched, record
from normfix.numerics import IDENTITY, deviation, exact_arithmetic, settings
from normfix.pipeline.bench import Setting, bench_of, prepare
from normfix.pipeline.pipelines import PipelineDiagnosis, diagnose_pipeline
from normfix.pipeline.predicting import predict
from normfix.provenance import provenance_of
from normfix.records import Finding
from normfix.reporting.maps import Maps
from normfix.rewriting import copy_of
from normfix.stitching import cropped, padded
from normfix.tiles import at

__all__ = ["Diagnosis", "Maps", "diagnose", "diagnose_network"]

ForwardFn = Callable[[nn.Module, Tensor], Any]
Metric = Callable[[NDArray[Any], NDArray[Any]], float]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A diagnosis and the maps behind it."""

    record: DiagnosisRecord
    maps: Maps

    @property
    def status(self) -> Literal["passed", "failed", "inconclusive"]:
        """Return failed if any cause is named, inconclusive if nothing could be compared."""
        return self.record.status

    @property
    def tile_mismatch(self) -> TileMismatch:
        """Return tile against tile and stitched tiles against the whole."""
        return self.record.tile_mismatch

    @property
    def train_eval(self) -> tuple[TrainEval, ...]:
        """Return eval mode against batch statistics in use, one entry per batch size."""
        return self.record.train_eval

    @property
    def culprits(self) -> tuple[Culprit, ...]:
        """Return the causes, the largest first."""
        return self.record.culprits

    @property
    def receptive_field(self) -> ReceptiveField | None:
        """Return how far an output can look, and does."""
        return self.record.receptive_field

    def _repr_html_(self) -> str:
        """Show the verdict and the pictures in a notebook."""
        from normfix.reporting.report import fragment

        return fragment(self.record, self.maps)


@overload
def diagnose(
    model: nn.Module, image: Tensor, tile: int | Sequence[int] = 256, **options: Any
) -> Diagnosis: ...
@overload
def diagnose(
    model: Callable[..., Any], image: Any, tile: int | Sequence[int] = 256, **options: Any
) -> PipelineDiagnosis: ...
def diagnose(
    model: Any, image: Any, tile: int | Sequence[int] = 256, **options: Any
) -> Diagnosis | PipelineDiagnosis:
    """Measure how tiles disagree and why, of a network or of a whole pipeline.

    Args:
        model: an nn.Module (options: those of `diagnose_network`), or a pipeline, `predict(image)` or, with
            `network=`, `predict(image, network)` (options: those of `diagnose_pipeline`).
        image: (1, C, *space); for a pipeline what it takes.
        tile: pixels per axis.
        **options: see there.

    Raises:
        NormfixError: codes of the two.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> found = normfix.diagnose(net.eval(), torch.rand(1, 1, 96, 96), tile=32)
        >>> [culprit.cause for culprit in found.culprits]
        ['instance']
    """
    if isinstance(model, nn.Module):
        return diagnose_network(model, image, tile, **options)
    return diagnose_pipeline(model, image, tile, **options)


def diagnose_network(
    model: nn.Module,
    image: Tensor,
    tile: int | Sequence[int] = 256,
    *,
    halo: int | Literal["auto"] = "auto",
    tiling: Tiling | None = None,
    kind: Kind | None = None,
    labels: Any = None,
    metric: Metric | None = None,
    converted: nn.Module | None = None,
    batches: Sequence[int] = (1, 4),
    per_site: bool = False,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    announce: Callable[[Cost], None] = lambda cost: None,
    progress: Progress = lambda stage, done, total: None,
) -> Diagnosis:
    """Measure how tiles of a network disagree and why.

    Args:
        model: in the mode it is used in (train mode is a cause of its own); not modified.
        image: (1, C, *space).
        tile: pixels per axis.
        halo: pixels of context on every side; "auto" is what the network needs.
        tiling: how the user's pipeline cuts, where it differs from normfix's own way; instead of tile and halo.
        kind: what the output means; default: recognised from its values.
        labels: true classes or masks of the image's space, for accuracy.
        metric: `metric(prediction, labels)` on arrays (C, *space), beside Dice.
        converted: the converted network, for accuracy.
        batches: sizes for the train/eval disparity.
        per_site: run the experiments for every site by itself too.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        announce: called once with the cost, before the experiments start.
        progress: called with (stage, done, total).

    Raises:
        NormfixError: NF601 where no geometry can be measured, NF602 for a tiling that does not fit, NF604 for
            labels that do not, and codes of `scan` and of the image.
    """
    known = provenance_of(model)
    caller = Caller(forward_fn, output if output is not None or known is None else known.output)
    (item,) = Items.of(image, *home_of(model))
    progress("scan", 0, 1)
    with exact_arithmetic():
        setting = prepare(model, item[:1], tiling, tile=tile, halo=halo, kind=kind, caller=caller)
        progress("scan", 1, 1)
        truth = None if labels is None else Labels.of(labels, item.shape[2:], setting.kind, metric)
        work = _Work(setting, bench_of(setting, progress), truth, tuple(batches), per_site, progress)
        cost = work.cost()
        announce(cost)
        return work.diagnosis(cost, converted, tile)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The pipeline as it is, in the tested precision."""

    first: list[Predicted]
    watched: list[Watched]
    stitched: Tensor
    whole: Tensor
    sd: float


@dataclass(slots=True)
class _Work:
    """One diagnosis under way."""

    setting: Setting
    bench: Bench
    truth: Labels | None
    batches: tuple[int, ...]
    per_site: bool
    progress: Progress

    def cost(self) -> Cost:
        """State what will run; seconds are extrapolated from one window in both precisions."""
        present = self._present()
        here = self.bench.tiles(present)
        shifted = self._shifted(present)
        middle = self._window(here[len(here) // 2], present)
        seconds = _seconds(lambda: self._tested(middle))
        double = _seconds(lambda: self.bench.run(self._bench_model(), middle.double()))
        experiments = self._experiments()
        ratio = self.setting.image[0, 0].numel() / middle[0, 0].numel()
        count = len(here) + len(shifted)
        total = seconds * (count + ratio) + double * (experiments * len(here) + 2 * ratio)
        return Cost(windows=count + experiments * len(here), wholes=3, experiments=experiments, seconds=total)

    def diagnosis(self, cost: Cost, converted: nn.Module | None, tile: int | Sequence[int]) -> Diagnosis:
        """Measure everything, in the order of the record's fields."""
        setting, present = self.setting, self._present()
        seen = self._seen(present)
        pairs = self._pairs(seen, present)
        found = culprits(self.bench)
        fixed = self.bench.trial(self.bench.unfixable())
        difference = differences(seen.stitched, seen.whole, setting.kind, seen.sd)
        cuts = self._cuts(present)
        noise = self._noise(present, seen.sd)
        course = profile(difference, cuts, setting.geometry.stride[-1], 4 * noise)
        slope, centre = self._gradient()
        record_ = DiagnosisRecord(
            model=setting.scan.model,
            image=tuple(setting.image.shape),
            kind=setting.kind,
            status=_status(found, any(cuts), seen.sd),
            tiling=setting.tiling,
            stride=setting.geometry.stride,
            exact_halo=setting.geometry.halo,
            sd=seen.sd,
            noise=noise,
            tile_mismatch=TileMismatch(
                overlap=pairs.everywhere,
                beyond_halo=pairs.beyond,
                whole=compare(seen.stitched, seen.whole, setting.kind, seen.sd),
                pairs=pairs.pairs,
            ),
            after=fixed.mismatch,
            profile=course,
            train_eval=self._train_eval(seen.sd),
            culprits=found,
            sites=self._sites(seen, found),
            receptive_field=receptive_field(slope, centre, setting.geometry, bounded=True),
            accuracy=self._accuracy(seen, fixed, converted, tile),
            cost=cost,
            findings=setting.findings + _findings(seen.sd, any(cuts), pairs),
            settings=(*settings(*home_of(setting.model)), ("experiments", "float64")),
        )
        return Diagnosis(record_, _maps(setting.scale(setting.image), seen, fixed, difference, slope, cuts))

    def _present(self) -> frozenset[str]:
        return self.bench.everything()

    def _experiments(self) -> int:
        sites = len(self.setting.live[False]) if self.per_site else 0
        return len(self.bench.planned()) + 2 * sites

    def _bench_model(self) -> nn.Module:
        return self.bench.trained if self.setting.tiling.train else self.bench.evaluated

    def _model(self) -> nn.Module:
        return self.setting.trained if self.setting.tiling.train else self.setting.model

    def _tested(self, window: Tensor) -> Tensor:
        with torch.no_grad():
            return self.setting.caller(self._model(), window)

    def _whole_image(self, present: frozenset[str]) -> Tensor:
        image = self.setting.image
        return image if "size" in present else padded(image, self.setting.geometry)

    def _window(self, window: Window, present: frozenset[str]) -> Tensor:
        """Cut a window as the pipeline does: here all faults are present."""
        tiling, scale = self.setting.tiling, self.setting.scale
        image = self._whole_image(present)
        return (
            scale(take(image, window, tiling.context))
            if tiling.scaling
            else take(image, window, tiling.context)
        )

    def _shifted(self, present: frozenset[str]) -> list[Window]:
        """Return the windows of the tiling moved by half a tile, on the stride grid."""
        size = self._whole_image(present).shape[2:]
        pairs = zip(self.setting.tiling.tile, self.setting.geometry.stride, strict=True)
        shift = [max(1, t // 2 // s) * s if t > s else 0 for t, s in pairs]
        if not any(shift):
            return []
        return list(windows(size, self.setting.tiling, self.setting.geometry, present, shift))

    def _seen(self, present: frozenset[str]) -> _Seen:
        image, geometry = self._whole_image(present), self.setting.geometry
        whole = self._tested(self.setting.scale(image))
        stitched, first, watched = torch.zeros_like(whole), [], []
        tiles = self.bench.tiles(present)
        for done, window in enumerate(tiles, start=1):
            pixels = self._window(window, present)
            output, kept = record(self._model(), self.setting.caller, pixels, self.setting.live[False])
            watched.append(Watched(kept.norms))
            first.append(Predicted(window, output))
            target, part = stitched[at(window.write(geometry))], output[at(window.keep(geometry))]
            target.copy_(part[at([slice(0, n) for n in target.shape[2:]])])
            self.progress("tiles", done, len(tiles))
        size = self.setting.image.shape[2:]
        stitched, whole = (cropped(t, size, geometry.scale) for t in (stitched, whole))
        return _Seen(first, watched, stitched, whole, spread_of(whole, self.setting.kind))

    def _pairs(self, seen: _Seen, present: frozenset[str]) -> Overlaps:
        shifted, done = self._shifted(present), 0

        def predicted(window: Window) -> Tensor:
            nonlocal done
            done += 1
            self.progress("shifted tiles", done, len(shifted))
            return self._tested(self._window(window, present))

        return overlaps(
            seen.first,
            shifted,
            predicted,
            self._whole_image(present).shape[2:],
            self.setting.geometry,
            self.setting.kind,
            seen.sd,
        )

    def _cuts(self, present: frozenset[str]) -> tuple[tuple[int, ...], ...]:
        """Return per axis where, in the output, a new tile starts."""
        geometry = self.setting.geometry
        starts = [w.write(geometry) for w in self.bench.tiles(present)]
        return tuple(
            tuple(sorted({w[axis].start for w in starts if w[axis].start > 0}))
            for axis in range(len(geometry.stride))
        )

    def _noise(self, present: frozenset[str], sd: float) -> float:
        """Return the largest |tested - float64| on the middle window, in sd."""
        if home_of(self.setting.model)[1] == torch.float64:
            return IDENTITY[torch.float64] / 4
        tiles = self.bench.tiles(present)
        window = self._window(tiles[len(tiles) // 2], present)
        double = self.bench.run(self._bench_model(), window.double())
        return deviation(self._tested(window), double, sd)[0] if sd > 0 else 0.0

    def _train_eval(self, sd: float) -> tuple[TrainEval, ...]:
        setting = self.setting
        places = patches(setting.image.shape[2:], setting.tiling.tile, setting.geometry.multiple)
        truth, scales = self.truth, setting.geometry.scale
        with torch.no_grad():
            return disparity(
                lambda x: setting.caller(setting.model, x),
                lambda x: setting.caller(setting.trained, x),
                setting.scale(setting.image),
                places,
                self.batches,
                setting.kind,
                sd,
                lambda out, chosen: None if truth is None else truth.dice_of_patches(out, chosen, scales),
            )

    def _sites(self, seen: _Seen, found: Sequence[Culprit]) -> tuple[SiteReport, ...]:
        whole = self.bench.recorded().norms
        alone: dict[str, tuple[float, float | None]] = {}
        if self.per_site:
            alone = self.bench.each_site()
        return site_reports(self.setting.scan.sites, whole, seen.watched, alone)

    def _gradient(self) -> tuple[Tensor, tuple[int, ...]]:
        setting = self.setting
        model = copy_of(setting.model).requires_grad_(False)
        halos = zip(setting.geometry.halo, setting.geometry.stride, strict=True)
        extents = [2 * sum(halo) + 8 * stride for halo, stride in halos]
        image = setting.scale(setting.image)
        return gradient(lambda x: setting.caller(model, x), image, setting.geometry, extents)

    def _accuracy(
        self, seen: _Seen, fixed: Trial, converted: nn.Module | None, tile: int | Sequence[int]
    ) -> tuple[AccuracyRow, ...]:
        if self.truth is None:
            return ()
        rows = [("original, untiled", seen.whole), ("original, tiled", seen.stitched)]
        if converted is None:
            rows.append(("causes fixed, tiled", fixed.stitched))
        else:
            image = self.setting.scale(self.setting.image)
            output = self.setting.caller.output
            rows.append(("converted, tiled", predict(converted, image, tile, output=output)))
        return tuple(self.truth.row(name, prediction) for name, prediction in rows)


def _status(found: Sequence[Culprit], cut: bool, sd: float) -> Literal["passed", "failed", "inconclusive"]:
    if not cut or not sd > 0:
        return "inconclusive"
    return "failed" if found else "passed"


def _findings(sd: float, cut: bool, pairs: Overlaps) -> tuple[Finding, ...]:
    found = []
    if not sd > 0:
        message = "it is constant or not finite on this image, so differences have no unit."
        found.append(Finding(code="NF606", where="output", message=message))
    if not cut:
        message = "one window covers the whole image, so nothing was compared. Use a smaller tile."
        found.append(Finding(code="NF407", where="tile", message=message))
    elif pairs.beyond is None:
        message = "no two windows overlap further than the halo from their cuts; use larger tiles."
        found.append(Finding(code="NF607", where="overlap", message=message))
    return tuple(found)


def _maps(
    image: Tensor,
    seen: _Seen,
    fixed: Trial,
    difference: Tensor,
    slope: Tensor,
    cuts: tuple[tuple[int, ...], ...],
) -> Maps:
    parts = (image, seen.whole, seen.stitched, fixed.stitched, difference)
    image_, whole, stitched, repaired, apart = (p[0].float().cpu().numpy() for p in parts)
    return Maps(image_, whole, stitched, repaired, apart, slope.numpy().astype(np.float32), cuts)


def _seconds(run: Callable[[], object]) -> float:
    run()
    start = time.perf_counter()
    with torch.no_grad():
        run()
    return time.perf_counter() - start
