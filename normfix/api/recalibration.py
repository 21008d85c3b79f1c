"""calibrate: measure a network's statistics anew on whole images, in a copy or in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from normfix.conversion.flatness import all_empty, flat_before, judged
from normfix.conversion.masks import Mask, ignored_pixels, masked
from normfix.conversion.measuring import measure_sites_
from normfix.conversion.results import Calibration
from normfix.conversion.sampling import measure_sampled_
from normfix.conversion.staged import measure_streamed_
from normfix.conversion.targets import NormTarget, Target, planned_targets
from normfix.errors import NormfixError
from normfix.images.collections import Items
from normfix.images.opening import Wholes, sources_of
from normfix.images.sources import Image, TensorImage
from normfix.layers.moments import Moments
from normfix.networks.calling import Caller, home_of
from normfix.networks.copying import copy_of, twin_of
from normfix.networks.examples import fitting_example
from normfix.networks.provenance import provenance_of
from normfix.networks.surroundings import undisturbed
from normfix.proof.subject import middle_of
from normfix.records.measurements import CalibrationSummary
from normfix.records.saved import Provenance
from normfix.records.sites import Family
from normfix.scanning.known import ForwardFn
from normfix.scanning.renewal import renew_
from normfix.scanning.scan import look
from normfix.scanning.sites import survey
from normfix.tiling.geometry import geometry_of
from normfix.tiling.grid import Geometry
from normfix.tiling.stages.options import engine_of
from normfix.tiling.stages.outlook import Watch
from normfix.tiling.stages.resources import BLOCK_EXTENTS, Resources
from normfix.tiling.stitching import padded

__all__ = ["calibrate", "calibrate_"]

Progress = Callable[[int, int], None]


@undisturbed()
def calibrate(
    model: nn.Module,
    images: Tensor | Iterable[Tensor] | Image | Sequence[Image],
    tile: int | Sequence[int] | None = None,
    *,
    mask: Mask | Sequence[Mask] | None = None,
    sample: float | None = None,
    seed: int = 0,
    allow_flat: bool | None = None,
    budget: int | None = None,
    store: Path | None = None,
    workers: int = 1,
    engine: Literal["local", "dask"] = "local",
    scheduler: str | None = None,
    watch: Watch | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """Return a copy of a network whose statistics are measured anew on whole images.

    Args:
        model: converted by normfix, or any network with batch norms on running statistics; not modified.
        images: re-iterable of (N, C, *space) tensors, one tensor, or images that are read by window
            (normfix.open_image) and measured in stages.
        tile: extents of blocks in pixels; given, the network runs once, stage by stage over such blocks, and what
            it needs between stages fits a budget. The statistics are those of whole images either way; a
            network that cannot run in stages takes passes over whole images, and the summary says why.
        mask: for each image an array or file of its extents, without channels; pixels where it is nonzero are
            ignored. The network still reads them; they are no part of any statistic. Where a map is coarser than
            the image, a position counts if none of the pixels it stands for is ignored.
        sample: measure a random sample of blocks of `tile` instead of all, and stop when no standard error of a mean
            or deviation is above this many sd. The statistics are estimates then, and the summary says so.
        seed: of the sample.
        allow_flat: what becomes of a statistic that is divided by and that is at or below eps on every image. False
            refuses it; True keeps it and names it in the summary's findings; by default single channels are
            kept and named, and a site without any other channel, or images that are all constant, are refused.
        budget: bytes of memory for values between stages; None is no limit. Needs `tile`.
        store: folder where values are kept on disk and the run can be continued from, after whatever stopped it.
        workers: blocks computed at a time.
        engine: "dask" computes blocks on a cluster; needs `scheduler` and a `store` that all of it sees.
        scheduler: address of a dask scheduler.
        watch: is told what a run in stages will take, and of each block.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        progress: called with (passes or stages done, passes or stages in all).

    Raises:
        NormfixError: NF302 if the network has live statistics, or none at all; NF301 and codes of the images; NF326
            to NF332 of the store; NF333 to NF336 of the cluster; NF137, NF138 and NF139 of the masks; NF140 of
            the sample; NF231 for a statistic without spread.
    """
    twin = twin_of(model)  # of the network itself, whose capture is kept
    done = _calibrated_(
        twin,
        images,
        tile,
        mask=mask,
        sample=sample,
        seed=seed,
        allow_flat=allow_flat,
        budget=budget,
        store=store,
        workers=workers,
        engine=engine,
        scheduler=scheduler,
        watch=watch,
        forward_fn=forward_fn,
        output=output,
        progress=progress,
    )
    copied = copy_of(model)
    _take_over_(copied, twin, done.targets)
    renew_(copied, done.first, done.caller)
    return Calibration(copied, done.summary)


@undisturbed()
def calibrate_(
    model: nn.Module,
    images: Tensor | Iterable[Tensor] | Image | Sequence[Image],
    tile: int | Sequence[int] | None = None,
    *,
    mask: Mask | Sequence[Mask] | None = None,
    sample: float | None = None,
    seed: int = 0,
    allow_flat: bool | None = None,
    budget: int | None = None,
    store: Path | None = None,
    workers: int = 1,
    engine: Literal["local", "dask"] = "local",
    scheduler: str | None = None,
    watch: Watch | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    progress: Progress = lambda done, total: None,
) -> CalibrationSummary:
    """Measure a network's statistics anew in place, on the same module objects; see `calibrate`.

    Optimizers, compiled and distributed wrappers keep their model. Nothing changes before all is measured, and nothing
    on any error; whoever runs the model meanwhile runs it with the old statistics and in its own mode.
    """
    twin = twin_of(model)
    done = _calibrated_(
        twin,
        images,
        tile,
        mask=mask,
        sample=sample,
        seed=seed,
        allow_flat=allow_flat,
        budget=budget,
        store=store,
        workers=workers,
        engine=engine,
        scheduler=scheduler,
        watch=watch,
        forward_fn=forward_fn,
        output=output,
        progress=progress,
    )
    _take_over_(model, twin, done.targets)
    renew_(model, done.first, done.caller)
    return done.summary


def _calibrated_(
    model: nn.Module,
    images: Tensor | Iterable[Tensor] | Image | Sequence[Image],
    tile: int | Sequence[int] | None,
    *,
    mask: Mask | Sequence[Mask] | None,
    sample: float | None,
    seed: int,
    allow_flat: bool | None,
    budget: int | None,
    store: Path | None,
    workers: int,
    engine: Literal["local", "dask"],
    scheduler: str | None,
    watch: Watch | None,
    forward_fn: ForwardFn | None,
    output: str | int | None,
    progress: Progress,
) -> _Done:
    """Measure in place."""
    crew = engine_of(engine, scheduler, store, workers)
    known = provenance_of(model)
    sources, items = sources_of(images), None
    if sources is None:
        tensors = cast("Tensor | Iterable[Tensor]", images)
        items = Items.of(tensors, *home_of(model), like=known.scan.example if known else None)
    caller = Caller(forward_fn, output if output is not None else known.output if known else None)
    geometry = geometry_of(known.scan) if known is not None else None
    targets: Sequence[Target]
    if known is not None:
        targets = planned_targets(model, known.plan)
        if not targets:
            raise NormfixError(
                "NF302",
                "there is nothing to calibrate: its plan converts no site, so no statistic of it is normfix's. Batch "
                "norms on running statistics that a plan kept are measured anew in the network it was made of.",
                where=type(model).__name__,
            )
    else:
        targets = _batch_norms(
            model, fitting_example(model, next(iter(items or Wholes(sources or ()))), caller), caller
        )
    work = _Work(model, targets, caller, geometry, progress)
    # what is flat in the running statistics of a trained network is no news
    trained = flat_before([t for t in targets if _is_trained(known, t.name)])
    passes = tile is None and items is not None and not crew.shared and sample is None
    if passes and items is not None and mask is None:
        summary = work.in_passes(items)
    else:
        sources = sources or [TensorImage(image) for image in items or ()]
        tile = tile or BLOCK_EXTENTS[len(sources[0].shape) - 2]
        resources = Resources(tile=tile, budget=budget, store=store, engine=crew, watch=watch)
        summary = work.of_sources(sources, mask, None if passes else resources, sample, seed)
    first = next(iter(items if items is not None else (middle_of(source) for source in sources or ())))
    judgement = judged(
        model,
        targets,
        summary,
        caller,
        first[:1] if geometry is None else padded(first[:1], geometry),
        allow=allow_flat,
        classes=_classes(known, model, targets),
        known=trained,
        empty=all_empty(items if items is not None else sources or ()),
    )
    return _Done(judgement, targets, first[:1], caller)


@dataclass(frozen=True, slots=True)
class _Done:
    """What was measured and where, the first image or its middle, and how the network is called."""

    summary: CalibrationSummary
    targets: Sequence[Target]
    first: Tensor
    caller: Caller


@dataclass(frozen=True, slots=True)
class _Work:
    """Sites to measure anew, and how the network is called."""

    model: nn.Module
    targets: Sequence[Target]
    caller: Caller
    geometry: Geometry | None
    progress: Progress

    def in_passes(self, items: Items) -> CalibrationSummary:
        """Measure in passes over whole images."""
        if self.geometry is not None:
            items = replace(items, prepare=partial(padded, geometry=self.geometry))
        return measure_sites_(self.model, self.targets, items, self.caller, self.progress)

    def of_sources(
        self,
        sources: Sequence[Image],
        mask: Mask | Sequence[Mask] | None,
        resources: Resources | None,
        sample: float | None,
        seed: int,
    ) -> CalibrationSummary:
        """Measure in stages, on a sample or without what masks ignore; without resources in passes."""
        with ExitStack() as opened:  # mask files
            ignored: tuple[int, ...] = ()
            if mask is not None:
                sources = list[Image](masked(sources, mask, opened))
                ignored = tuple(map(ignored_pixels, sources))
            if sample is not None and resources is not None:
                summary = measure_sampled_(
                    self.model,
                    self.targets,
                    sources,
                    self.caller,
                    resources,
                    geometry=self.geometry,
                    tolerance=sample,
                    seed=seed,
                )
            else:
                summary = measure_streamed_(
                    self.model,
                    self.targets,
                    sources,
                    self.caller,
                    resources,
                    geometry=self.geometry,
                    progress=self.progress,
                )
            return replace(summary, ignored=ignored)


def _is_trained(known: Provenance | None, site: str) -> bool:
    """Tell whether a site's statistics began as running statistics of training."""
    return known is None or any(d.site.id == site and not d.measured for d in known.plan.converted)


def _classes(known: Provenance | None, model: nn.Module, targets: Sequence[Target]) -> dict[str, str]:
    if known is not None:
        return {d.site.id: d.site.owner_class.rpartition(".")[2] for d in known.plan.converted}
    return {target.name: type(target.module).__name__ for target in targets}


def _take_over_(model: nn.Module, measured: nn.Module, targets: Sequence[Target]) -> None:
    """Write the statistics that were measured in a twin into the model's own layers."""
    places = {id(module): path for path, module in measured.named_modules()}
    with torch.no_grad():
        for target in targets:
            own = dict(model.get_submodule(places[id(target.module)]).named_buffers())
            for name, value in target.module.named_buffers():
                own[name].copy_(value)


def _batch_norms(model: nn.Module, example: Tensor, caller: Caller) -> list[NormTarget]:
    """Describe the batch norms of a network that normfix did not convert; what no one can convert may stay live."""
    copied = copy_of(model).eval()
    sites = survey(copied, caller, example).sites
    live = [site for site in sites if site.live]
    if live:  # the census alone suspects the token norms of a network that takes one size
        live = [site for site in look(copied, example, caller).scan.sites if site.live and site.convertible]
    batch = [s for s in sites if s.family is Family.BATCH and s.layer is not None and s.layer.carries]
    if live or not batch:
        reason = f"{live[0].id} is live" if live else "it has no normalisation with running statistics"
        raise NormfixError(
            "NF302",
            f"there is nothing to calibrate before it is converted: {reason}.",
            where=type(model).__name__,
        )
    return [_batch_target(site.id, model.get_submodule(site.owner)) for site in batch]


def _batch_target(name: str, norm: nn.Module) -> NormTarget:
    def store(moments: Moments) -> None:
        with torch.no_grad():
            norm.running_mean.copy_(moments.mean)  # type: ignore[operator]
            norm.running_var.copy_(moments.var)  # type: ignore[operator]

    return NormTarget(name, norm, norm, store, lambda moments: moments)
