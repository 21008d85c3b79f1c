"""convert: scan, plan, rewrite, calibrate and prove, on a copy of the caller's network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from normfix.conversion.flatness import all_empty, judged, spread_in_groups
from normfix.conversion.measuring import measure_sites_
from normfix.conversion.planning import decide, replay
from normfix.conversion.results import Calibration, Conversion
from normfix.conversion.rewriting import rewrite
from normfix.conversion.staged import StoredTarget, measure_streamed_
from normfix.conversion.targets import site_target
from normfix.errors import NormfixError
from normfix.images.collections import Items
from normfix.images.opening import sources_of
from normfix.images.sources import Image, TensorImage
from normfix.networks.calling import Caller, buffers_kept, evaluating, home_of
from normfix.networks.examples import default_example, fitting_example
from normfix.networks.graph.program import require_free
from normfix.networks.numerics import HALF, exact_arithmetic
from normfix.networks.provenance import attach_
from normfix.networks.surroundings import undisturbed
from normfix.proof.rounding import repeated_in_double
from normfix.proof.steps import identity, residual, shift, tile_exactness, untouched
from normfix.proof.subject import Subject, middle_of
from normfix.records.measurements import CalibrationSummary
from normfix.records.plans import Action, Plan
from normfix.records.saved import Provenance, Scaling, Source
from normfix.records.sites import Scan, Site
from normfix.records.verdicts import ImageShift, Proof, ProofStep
from normfix.scanning.base import base_of
from normfix.scanning.durations import Announce, Durations, announce_notable, announced_nowhere
from normfix.scanning.scan import Scanned, look
from normfix.scanning.sites import survey
from normfix.tiling.grid import Geometry
from normfix.tiling.stages.options import engine_of
from normfix.tiling.stages.outlook import Watch
from normfix.tiling.stages.resources import BLOCK_EXTENTS, Resources
from normfix.tiling.stages.resuming import resumable
from normfix.tiling.stitching import padded

__all__ = ["convert"]

Progress = Callable[[str, int, int], None]
_Tensors = Tensor | Iterable[Tensor]


@undisturbed()
def convert(
    model: nn.Module,
    images: Tensor | Iterable[Tensor] | Image | Sequence[Image] | None = None,
    to: Literal["frozen", "batchrenorm"] = "frozen",
    *,
    plan: Plan | None = None,
    keep: Sequence[str] = (),
    example: Tensor | None = None,
    scaling: Scaling | None = None,
    source: Source | None = None,
    forward_fn: Callable[[nn.Module, Tensor], Any] | None = None,
    output: str | int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    as_trained: bool = False,
    allow_flat: bool = False,
    tile: int | None = None,
    budget: int | None = None,
    store: Path | None = None,
    workers: int = 1,
    engine: Literal["local", "dask"] = "local",
    scheduler: str | None = None,
    watch: Watch | None = None,
    progress: Progress = lambda stage, done, total: None,
    announce: Announce = announced_nowhere,
) -> Conversion:
    """Convert a network's live statistics to constants measured on whole images, and prove the result.

    Args:
        model: not modified.
        images: re-iterable of (N, C, *space) tensors, one tensor, or images that are read by window
            (normfix.open_image); may be left out if every norm has running statistics to carry over.
        to: "frozen" (constants) or "batchrenorm" (constants in eval, trainable at small batches).
        plan: a reviewed plan to replay, instead of `to` and `keep`.
        keep: shell-style patterns of owner paths to leave alone.
        example: what to scan with; default: the middle of the first image.
        scaling: how the images were scaled, to travel with the model.
        source: where the architecture comes from, to travel with the model.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        device: where to compute; default: where the model is.
        dtype: what to compute in; default: the model's own.
        as_trained: treat batch and instance norms as in train mode, where they are live.
        allow_flat: keep a statistic that is divided by and that is at or below eps on every image; it is named in the
            calibration. Without, it is refused.
        tile: size of the tiles to prove with; default: a quarter of the image, at most 256.
        budget: bytes of memory for values between stages. With it, a store, or images read by window, statistics are
            measured in stages over all of every image and then re-measured in other blocks; what needs whole
            forward passes is proved on the middle of the first image.
        store: folder where values between stages are kept on disk and stages that were stopped are continued from.
        workers: blocks computed at a time in stages.
        engine: "dask" computes blocks on a cluster; needs `scheduler` and a `store` that all of it sees.
        scheduler: address of a dask scheduler.
        watch: is told what stages will take, and of each block.
        progress: called with (stage, done, total).
        announce: called with (stage, seconds) before a stage that will take long (normfix.scanning.durations).

    Returns:
        The conversion; `.proof.passed` tells whether it may be relied on, `.proof.partial` that all but refused
        sites were converted and proved.

    Raises:
        NormfixError: NF203 if live statistics are to be frozen and no image was given; NF205 if a given plan
            is not of this network; NF231 for a statistic without spread; codes of `scan` and of the images.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> done = normfix.convert(net, torch.rand(1, 1, 128, 128))
        >>> done.proof.passed, type(done.model[1]).__name__
        (True, 'FrozenNorm2d')
    """
    require_free(model)
    caller = Caller(forward_fn, output)
    home = _home(model, device, dtype)
    sources = sources_of(images)
    crew = engine_of(engine, scheduler, store, workers)
    staged = budget is not None or store is not None or crew.shared
    if staged and images is not None and sources is None:
        sources = [TensorImage(image) for image in Items.of(cast(_Tensors, images), *home)]
    if sources is not None:
        images = [middle_of(sources[0])]
    items = None if images is None else Items.of(cast(_Tensors, images), *home)
    first = None if items is None else next(iter(items))
    if example is None:
        example = default_example(model, caller) if first is None else fitting_example(model, first, caller)
    ready = base_of(model, example, caller, device=device, dtype=dtype, as_trained=as_trained)
    base, caller = ready.network, ready.caller
    durations = None
    if announce is not announced_nowhere:
        durations = Durations.of(base, example, caller)
        announce_notable(announce, "scan", durations.scan(graph=False))
    progress("scan", 0, 1)
    seen = look(base, example, caller)
    progress("scan", 1, 1)
    if plan is None:
        plan = decide(seen.scan.sites, model=seen.scan.model, to=to, keep=keep)
    else:
        plan = replay(plan, seen.scan.sites, model=seen.scan.model)
    if items is not None:
        items = replace(items, like=tuple(example.shape))
    if items is not None and seen.geometry is not None:
        items = replace(items, prepare=partial(padded, geometry=seen.geometry))
    converted = rewrite(base, plan).to(device=device, dtype=dtype)
    report = partial(progress, "calibrate")
    sizes: list[tuple[int, ...]] = []
    if durations is not None:
        sizes = [tuple(image.shape[2:]) for image in items or [example]]
        if sources is None:  # stages say themselves what they will take
            count = sum(d.measured for d in plan.converted)
            announce_notable(announce, "calibrate", durations.calibration(sizes, count))
    if sources is None:
        summary = _calibrate_(converted, plan, items, caller, report)
    else:
        resources = Resources(
            tile=tile or BLOCK_EXTENTS[example.dim() - 2],
            budget=budget,
            store=store,
            engine=crew,
            watch=watch,
        )
        with resumable(store):
            summary = _calibrate_in_stages_(
                converted, plan, sources, caller, resources, seen.geometry, report
            )
    if summary is not None:
        measured = [d for d in plan.converted if d.measured]
        sites = {d.site.id: site_target(converted, d, express=False) for d in measured}
        summary = judged(
            converted,
            list(sites.values()),
            summary,
            caller,
            example.to(*home),
            allow=allow_flat,
            classes={d.site.id: d.site.owner_class.rpartition(".")[2] for d in measured},
            known={
                d.site.id: spread_in_groups(sites[d.site.id], d.site.layer.groups)
                for d in measured
                if d.action is Action.BATCHRENORM
                and d.site.layer
                and d.site.layer.groups < d.site.layer.features
            },
            empty=all_empty(sources if sources is not None else items or ()),
        )
    work = _Work(
        base, converted, plan, seen, items, example.to(*home), caller, summary, tile, sources is None
    )
    if durations is not None:
        announce_notable(announce, "prove", durations.proof(sizes, seen.geometry, tile))
    progress("prove", 0, 1)
    proof = work.prove()
    progress("prove", 1, 1)
    found = _proved(seen.scan, proof, work.first.shape[2:])
    attach_(
        converted,
        Provenance(
            plan=plan,
            scan=found,
            scaling=scaling or Scaling(),
            source=source
            or Source(kind="object", spec=found.model.rpartition(".")[0] + ":" + type(model).__qualname__),
            output=None if output is None else str(output),
        ),
    )
    calibration = None if summary is None else Calibration(converted, summary)
    return Conversion(converted, plan, found, calibration, proof, caller, base)


def _proved(scan: Scan, proof: Proof, size: Sequence[int]) -> Scan:
    """Return a scan that speaks for the size of the image as well whose tiles equalled the whole."""
    if scan.sizes is None or proof.verdict is None or not proof.verdict.passed:
        return scan
    return replace(scan, sizes=scan.sizes.including(size))


def _home(
    model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    own_device, own_dtype = home_of(model)
    return torch.device(device) if device is not None else own_device, dtype or own_dtype


def _calibrate_(
    model: nn.Module,
    plan: Plan,
    items: Items | None,
    caller: Caller,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationSummary | None:
    """Measure what no original statistic can be carried over for."""
    fresh = [d for d in plan.converted if d.measured]
    if not fresh:
        return None
    if items is None:
        site = fresh[0].site
        raise NormfixError(
            "NF203",
            "no running statistics, so there is nothing to freeze without measuring. Give at least one "
            f"image, or --keep '{site.owner or '*'}'.",
            where=f"{site.owner or '(root)'} ({site.owner_class})",
        )
    targets = [site_target(model, d, express=True) for d in fresh]
    with buffers_kept(model, but=[d.target for d in fresh]):
        return measure_sites_(model, targets, items, caller.exactly, progress)


def _calibrate_in_stages_(
    model: nn.Module,
    plan: Plan,
    images: Sequence[Image],
    caller: Caller,
    resources: Resources,
    geometry: Geometry | None,
    progress: Callable[[int, int], None],
) -> CalibrationSummary | None:
    """Measure in stages, and once more in other blocks under the stored statistics: the residual is of the latter."""
    fresh = [d for d in plan.converted if d.measured]
    if not fresh:
        return None
    targets = [site_target(model, d, express=True) for d in fresh]
    with buffers_kept(model, but=[d.target for d in fresh]):
        summary = measure_streamed_(
            model, targets, images, caller, resources, geometry=geometry, progress=progress
        )
    if summary.engine == "passes":  # which re-measure anyway
        return summary
    tile = tuple(n - n // 4 for n in resources.extents(len(images[0].shape) - 2))
    return measure_streamed_(
        model,
        [StoredTarget(target) for target in targets],
        images,
        caller,
        replace(resources, tile=tile),
        geometry=geometry,
        progress=progress,
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """A finished conversion on the bench: what the proof needs."""

    original: nn.Module
    converted: nn.Module
    plan: Plan
    seen: Scanned
    items: Items | None
    example: Tensor
    caller: Caller
    summary: CalibrationSummary | None
    tile: int | None
    whole: bool

    @property
    def first(self) -> Tensor:
        """Return the image that whole forward passes are made on."""
        return self.example if self.items is None else next(iter(self.items))[:1]

    def prove(self) -> Proof:
        with (
            evaluating(self.original),
            evaluating(self.converted),
            buffers_kept(self.original),
            buffers_kept(self.converted),
            exact_arithmetic(),
        ):
            first = self.first
            dtype = home_of(self.converted)[1]
            subject = Subject(
                self.converted,
                self.caller,
                self.plan,
                self.seen.geometry,
                tuple(self.example.shape[2:]),
                self.tile,
                self.original,
                self.seen.scan.sizes,
            )
            verdict = subject.verdict(first)
            pair = self.caller.exactly(self.converted, first), self.caller.exactly(self.original, first)
            steps = (
                self._identity(first, pair),
                residual(self.summary, dtype),
                tile_exactness(
                    verdict,
                    self.plan,
                    [f.message for f in self.seen.scan.findings],
                    subject.mismatch(first, pair[0]) if self.plan.left_live else None,
                ),
                subject.used(first, self._judged),
            )
            shifts = self._shifts(first, pair)
        last = untouched(self.original, self.converted, self.plan)
        return Proof(steps=(*steps, last), shifts=shifts, verdict=verdict)

    def _identity(self, image: Tensor, pair: tuple[Tensor, Tensor]) -> ProofStep:
        converted, original = pair
        if self.summary is not None and self.summary.images != (tuple(image.shape),):
            converted = self.caller.exactly(self._calibrated(self.original, image).eval(), image)
        step = identity(converted, original)
        if step.status not in ("passed", "failed") or original.dtype == torch.float64:
            return step
        if step.status == "passed" and original.dtype not in HALF:
            return step
        outputs = converted, original
        return repeated_in_double(step, self.original, image, self.caller, outputs, self._calibrated)

    def _calibrated(self, original: nn.Module, image: Tensor) -> nn.Module:
        """Convert a network as planned, calibrated on one image alone."""
        one = rewrite(original, self.plan)
        _calibrate_(one, self.plan, Items([image], image.device, image.dtype), self.caller)
        return one

    def _judged(self, image: Tensor, sites: Sequence[Site]) -> list[Site]:
        """Return the sites that the census alone calls live in the original and the scan, seeing more, does not.

        A network that takes one size shows the census no growth, so it suspects every norm over tokens.
        """
        quiet = {site.id for site in self.seen.scan.sites if not site.live}
        before = survey(self.original, self.caller, image).sites
        return [site for site in before if site.live and site.id in quiet]

    def _shifts(self, first: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[ImageShift, ...]:
        if self.items is None or not self.whole:
            return ()
        return tuple(
            shift(number, *pair)
            if number == 0 and image.shape == first.shape
            else shift(number, self.caller(self.converted, image), self.caller(self.original, image))
            for number, image in enumerate(self.items)
        )
