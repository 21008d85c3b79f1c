"""One diagnosis under way: the pipeline as it is, its overlaps, the experiments, and what is made of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from normfix.api.prediction import predict
from normfix.diagnosis.accuracy import Labels
from normfix.diagnosis.curve import curve_of, halo_count
from normfix.diagnosis.disparity import disparity, patches
from normfix.diagnosis.experiments import Experiments, Trial, culprits
from normfix.diagnosis.intervention import Watched, record
from normfix.diagnosis.overlaps import Overlaps, PredictedWindow, meeting, overlaps
from normfix.diagnosis.reception import gradient, receptive_field
from normfix.diagnosis.setting import Setting
from normfix.diagnosis.statistics import site_reports
from normfix.diagnosis.windows import Window, paste, take, windows
from normfix.networks.calling import home_of
from normfix.networks.copying import copy_of
from normfix.networks.numerics import IDENTITY, deviation, settings
from normfix.proof.indicators import compare, differences, profile, spread_of
from normfix.records.diagnoses import (
    AccuracyRow,
    Cost,
    Culprit,
    DiagnosisRecord,
    SiteReport,
    TileMismatch,
    TrainEval,
)
from normfix.records.progress import Progress
from normfix.records.sites import Finding
from normfix.reporting.maps import Maps
from normfix.tiling.grid import Geometry
from normfix.tiling.stitching import cropped, padded

__all__ = ["Examination"]


@dataclass(frozen=True, slots=True)
class _Seen:
    """The pipeline as it is, in the tested precision."""

    first: list[PredictedWindow]
    watched: list[Watched]
    stitched: Tensor
    whole: Tensor
    sd: float
    missing: int


@dataclass(slots=True)
class Examination:
    """One diagnosis under way."""

    setting: Setting
    bench: Experiments
    truth: Labels | None
    batches: tuple[int, ...]
    per_site: bool
    halo_curve: bool
    progress: Progress

    def cost(self) -> Cost:
        """State what will run; seconds are extrapolated from one window of each kind of run, and one pair of them."""
        present, setting = self._present(), self.setting
        here = self.bench.tiles(present)
        shifted, window = self._shifted(present), here[len(here) // 2]
        middle, size = self._window(window, present), self._whole_image(present).shape[2:]
        live = setting.live[False]
        seconds = _seconds(lambda: self._tested(middle))
        watched = _seconds(lambda: record(self._model(), setting.caller, middle, live))
        double = _seconds(lambda: record(self._bench_model(), self.bench.run, middle.double(), live))
        output = self._tested(middle)
        one = [PredictedWindow(window, output)]
        pair = _seconds(
            lambda: overlaps(one, [window], lambda _: output, size, setting.geometry, setting.kind, 1.0)
        )
        pairs = sum(map(len, meeting(here, shifted, size)))
        experiments = self._experiments()
        ratio = setting.image[0, 0].numel() / middle[0, 0].numel()
        count = len(here) + len(shifted)
        total = seconds * (len(shifted) + ratio) + watched * len(here) + pair * pairs
        total += double * (experiments * len(here) + 2 * ratio)
        return Cost(windows=count + experiments * len(here), wholes=3, experiments=experiments, seconds=total)

    def measured(
        self, cost: Cost, converted: nn.Module | None, tile: int | Sequence[int]
    ) -> tuple[DiagnosisRecord, Maps]:
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
        accuracy = self._accuracy(seen, fixed, converted, tile)
        train_eval, without_batches = self._train_eval(seen.sd)
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
            halo_curve=curve_of(self.bench, self.progress) if self.halo_curve else None,
            train_eval=train_eval,
            culprits=found,
            sites=self._sites(seen, found),
            receptive_field=receptive_field(slope, centre, setting.geometry, bounded=True),
            accuracy=accuracy,
            cost=cost,
            findings=(
                *setting.findings,
                *_findings(seen, any(cuts), pairs, setting.geometry),
                *_unused(accuracy, setting),
                *without_batches,
            ),
            settings=(*settings(*home_of(setting.model)), ("experiments", "float64")),
        )
        return record_, _maps(setting, seen, fixed, difference, slope, cuts)

    def _present(self) -> frozenset[str]:
        return self.bench.everything()

    def _experiments(self) -> int:
        sites = len(self.setting.live[False]) if self.per_site else 0
        halos = halo_count(self.bench) if self.halo_curve else 0
        return len(self.bench.planned()) + 2 * sites + halos

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
        stitched, first, watched, missing = torch.zeros_like(whole), [], [], 0
        tiles = self.bench.tiles(present)
        for done, window in enumerate(tiles, start=1):
            pixels = self._window(window, present)
            output, kept = record(self._model(), self.setting.caller, pixels, self.setting.live[False])
            watched.append(Watched(kept.norms))
            first.append(PredictedWindow(window, output))
            missing += paste(stitched, output, window, geometry)
            self.progress("tiles", done, len(tiles))
        size = self.setting.image.shape[2:]
        stitched, whole = (cropped(t, size, geometry.scale) for t in (stitched, whole))
        return _Seen(first, watched, stitched, whole, spread_of(whole, self.setting.kind), missing)

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

    def _train_eval(self, sd: float) -> tuple[tuple[TrainEval, ...], list[Finding]]:
        """Return both modes beside each other, and of which batches there are no statistics to use."""
        setting, left_out = self.setting, list[Finding]()
        places = patches(setting.image.shape[2:], setting.tiling.tile, setting.geometry.multiple)
        truth, scales = self.truth, setting.geometry.scale

        def leave_out(batch: int, why: str) -> None:
            message = (
                f"train mode was not looked at in batches of {batch}, of which it takes no statistics: {why}"
            )
            left_out.append(Finding(code="NF571", where="train mode", message=message))

        with torch.no_grad():
            found = disparity(
                lambda x: setting.caller(setting.model, x),
                lambda x: setting.caller(setting.trained, x),
                setting.scale(setting.image),
                places,
                self.batches,
                setting.kind,
                sd,
                lambda out, chosen: None if truth is None else truth.dice_of_patches(out, chosen, scales),
                leave_out,
            )
        return found, left_out

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
            rows.append(
                ("converted, tiled", predict(converted, image, tile, output=output, allow_nonfinite=True))
            )
        return tuple(self.truth.row(name, prediction) for name, prediction in rows)


def _status(found: Sequence[Culprit], cut: bool, sd: float) -> Literal["passed", "failed", "inconclusive"]:
    if not cut or not sd > 0:
        return "inconclusive"
    return "failed" if found else "passed"


def _findings(seen: _Seen, cut: bool, pairs: Overlaps, geometry: Geometry) -> tuple[Finding, ...]:
    found = []
    if seen.missing:
        message = (
            f"{seen.missing} pixels of the prediction come from no window: the network rounds its output to its stride "
            f"({'x'.join(map(str, geometry.stride))}), and windows are no multiple of it. They count as 0 here. Use a "
            "tile and a halo that are multiples of the stride."
        )
        found.append(Finding(code="NF255", where="tile", message=message))
    if not seen.sd > 0:
        message = "it is constant or not finite on this image, so differences have no unit."
        found.append(Finding(code="NF606", where="output", message=message))
    if not cut:
        message = "one window covers the whole image, so nothing was compared. Use a smaller tile."
        found.append(Finding(code="NF407", where="tile", message=message))
    elif pairs.beyond is None:
        message = "no two windows overlap further than the halo from their cuts; use larger tiles."
        found.append(Finding(code="NF607", where="overlap", message=message))
    return tuple(found)


def _unused(accuracy: Sequence[AccuracyRow], setting: Setting) -> list[Finding]:
    """Say that labels were given and judge nothing."""
    if not accuracy or any(row.dice is not None or row.metric is not None for row in accuracy):
        return []
    if setting.kind == "regression":
        why = (
            "the output is taken for regression, which has no Dice. If it holds masks or classes, say which (--kind, "
            "kind=)"
        )
    else:
        why = "the output has other extents than the image, on which labels lie. Leave them out"
    message = f"they are used for nothing: {why}, or give a metric (--metric, metric=)."
    return [Finding(code="NF557", where="labels", message=message)]


def _maps(
    setting: Setting,
    seen: _Seen,
    fixed: Trial,
    difference: Tensor,
    slope: Tensor,
    cuts: tuple[tuple[int, ...], ...],
) -> Maps:
    parts = (setting.scale(setting.image), seen.whole, seen.stitched, fixed.stitched, difference)
    image_, whole, stitched, repaired, apart = (p[0].float().cpu().numpy() for p in parts)
    return Maps(
        image_, whole, stitched, repaired, apart, slope.numpy().astype(np.float32), cuts, setting.kind
    )


_BRIEF = 0.1
"""Seconds after which a run is not timed again."""


def _seconds(run: Callable[[], object]) -> float:
    run()
    times = list[float]()
    with torch.no_grad():
        while len(times) < 3 and sum(times) < _BRIEF:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return min(times)
