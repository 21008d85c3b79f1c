"""convert: scan, plan, rewrite, calibrate and prove, on a copy of the caller's network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from normfix.conversion.conformity import unlike
from normfix.conversion.distillation import Distillation, held_out_loss
from normfix.conversion.flatness import all_empty, judged, spread_in_groups
from normfix.conversion.keys import keys_of, require_room, with_all_keys
from normfix.conversion.measurement import measure_
from normfix.conversion.planning import decide, replay
from normfix.conversion.pooling import blended_targets, on_grid, require_poolable, windows_of
from normfix.conversion.results import Calibration, Conversion
from normfix.conversion.rewriting import rewrite, rewrite_
from normfix.conversion.targets import measured_targets, site_target
from normfix.errors import NormfixError
from normfix.images.collections import ImageFiles, Images
from normfix.images.given import GivenImages, images_of
from normfix.images.parts import Measured, Windows
from normfix.images.sources import Image, middle_of, whole
from normfix.networks.calling import Caller, buffers_kept, evaluating, home_of, in_eval_mode
from normfix.networks.copying import double_of
from normfix.networks.graph.program import require_free
from normfix.networks.numerics import HALF, exact_arithmetic
from normfix.networks.provenance import attach_, declared_scaling, declared_window
from normfix.networks.responses import is_as_known
from normfix.networks.surroundings import undisturbed
from normfix.proof.check import with_reach
from normfix.proof.indicators import recognise
from normfix.proof.rounding import repeated_in_double
from normfix.proof.steps import distilled, identity, residual, shift, tile_exactness, untouched
from normfix.proof.subject import Subject
from normfix.records.diagnoses import Kind
from normfix.records.measurements import CalibrationSummary
from normfix.records.plans import Action, Plan
from normfix.records.progress import Progress, logged, silent
from normfix.records.saved import Provenance, Scaling, Source
from normfix.records.sites import Finding, Scan, Site
from normfix.records.statistics import WHOLE, Statistics
from normfix.records.verdicts import ImageShift, Proof, ProofStep
from normfix.scanning.base import Base, base_of
from normfix.scanning.durations import Durations, tell_notable
from normfix.scanning.known import ForwardFn
from normfix.scanning.scan import Scanned, look
from normfix.scanning.sites import survey
from normfix.scanning.witnesses import HaloSource
from normfix.tiling.domain import extension
from normfix.tiling.grid import Geometry
from normfix.tiling.stages.options import Blocks
from normfix.tiling.stages.resuming import resumable
from normfix.tiling.stitching import padded, tile_extents

__all__ = ["ConvertOptions", "convert", "stored_statistics"]

_LOG = logging.getLogger("normfix")


class ConvertOptions(TypedDict, total=False):
    """Options of `convert`."""

    keep: Sequence[str]
    forward_fn: ForwardFn | None
    output: str | int | None
    as_trained: bool
    allow_flat: bool
    halo: HaloSource
    tile: int | Sequence[int] | None
    blocks: Blocks | None
    progress: Progress


@undisturbed()
def convert(
    model: nn.Module,
    images: GivenImages | Windows | Measured | None = None,
    to: Literal["frozen", "batchrenorm"] | Plan = "frozen",
    *,
    keep: Sequence[str] = (),
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    as_trained: bool = False,
    allow_flat: bool = False,
    halo: HaloSource = "graph",
    tile: int | Sequence[int] | None = None,
    blocks: Blocks | None = None,
    progress: Progress = logged,
) -> Conversion:
    """Convert a network's live statistics to constants measured on whole images, and prove the result.

    Args:
        model: not modified.
        images: re-iterable of (N, C, *space) tensors, one tensor, or images that are read by window
            (normfix.open_image). Also arrays, files, folders and patterns: these hold pixel values, floating as the
            network takes them; normfix.read_images states how others are scaled, and what is stated travels with the
            result. normfix.Windows(images, size) measures on windows of them, normfix.Measured(images, "images:median")
            and the like as --statistics does. May be left out if every norm has running statistics to carry over.
        to: "frozen" (constants), "batchrenorm" (constants in eval, trainable at small batches), or a reviewed plan to
            replay.
        keep: shell-style patterns of owner paths to leave alone; a plan says that itself.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        as_trained: treat batch and instance norms as in train mode, where they are live.
        allow_flat: keep a statistic that is divided by and that is at or below eps on every image; it is named in the
            calibration. Without, it is refused.
        halo: "graph" takes the bound that the network's graph gives, where it gives one; "measured" takes what the dye
            shows, which the verdict says.
        tile: size of the tiles to prove with, one number or one per axis; default: a third of the image, at most 256.
        blocks: how to measure in stages. With a size, a budget, a store or a cluster, or for images read by window,
            statistics are measured in stages over all of every image, in blocks of `tile` if they state no size, and
            then re-measured in other blocks; what needs whole forward passes is proved on the middle of the first
            image.
        progress: called with (stage, done, total); default: logged as normfix.progress, at level INFO.

    Returns:
        The conversion, its network in eval mode; `.proof.passed` tells whether it may be relied on, `.proof.partial`
        that all but refused sites were converted and proved.

    Raises:
        NormfixError: NF203 if live statistics are to be frozen and no image was given; NF205 if a given plan
            is not of this network; NF231 for a statistic without spread; NF587 for windows whose size neither the
            caller nor the network's file states; NF598 for keys over 2 GiB; codes of `scan` and of the images.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> done = normfix.convert(net, torch.rand(1, 1, 128, 128))
        >>> done.proof.passed, type(done.model[1]).__name__
        (True, 'FrozenNorm2d')
    """
    require_free(model)
    if isinstance(to, Plan) and keep:
        raise NormfixError(
            "NF205", "a plan says already what to keep. Give one of the two.", where=f"keep={keep!r}"
        )
    statistics, sized = WHOLE, True
    keys = images.keys if isinstance(images, Measured) else None
    if isinstance(images, Windows | Measured):
        sized = not images.statistics.needs_size
        statistics, images = _sized(images.statistics, model), images.images
    caller = Caller(forward_fn, output)
    home = home_of(model)
    blocks = blocks or Blocks()
    taken = None if images is None else images_of(images, model, caller=caller)
    in_stages = taken is not None and (blocks.asked or taken.by_window)
    first, size = (None, None) if taken is None else _first_of(taken, in_stages=in_stages)
    ready = base_of(model, first, caller, as_trained=as_trained)
    base, caller, example = ready.network, ready.caller, ready.example
    durations = cache(partial(Durations.of, base, example, caller))
    tell_notable("scan", lambda: durations().scan(graph=False))
    progress("scan", 0, 1)
    seen = _seen(ready, example, caller, halo, _kept(keys, to))
    progress("scan", 1, 1)
    for finding in () if size is None else extension(size, seen.geometry):
        _LOG.warning(finding.line)
    if not sized:
        statistics = replace(statistics, size=on_grid(statistics.size, seen.geometry))
    if isinstance(to, Plan):
        plan = replay(to, seen.scan.sites, model=seen.scan.model)
    else:
        plan = decide(seen.scan.sites, model=seen.scan.model, to=to, keep=keep)
    require_poolable(plan, statistics)
    stored = stored_statistics(model, plan)
    if statistics.kind == "blend" and not stored:
        raise NormfixError(
            "NF559",
            "none of the norms that are measured has stored statistics, so there is nothing to blend with. Take whole "
            "or windows:SIZE; for batch norms that are used in train mode add --as-trained.",
            where=f"statistics={statistics.words}",
        )
    if taken is not None:
        padding = None if seen.geometry is None else seen.geometry.padding
        taken = replace(taken, like=tuple(example.shape), padding=padding)
    extents = None if tile is None or seen.geometry is None else tile_extents(tile, seen.geometry)
    converted = rewrite_(ready.copy(), plan)
    runs = [example if first is None else first] if in_stages or taken is None else taken
    sizes = cache(lambda: [tuple(image.shape[2:]) for image in runs])
    _tell_room(plan, example, sizes(), home[1])
    if not in_stages:  # stages say themselves what they will take
        count = sum(d.measured for d in plan.converted)
        tell_notable("calibrate", lambda: durations().calibration(sizes(), count))
    if blocks.tile is None and in_stages:
        blocks = blocks.sized(extents or tile)
    with resumable(blocks.store):
        summary = _calibrate_(
            converted, plan, taken, caller, blocks, seen.geometry, progress, statistics.start, stored
        )
    held_out: list[Tensor] = []
    kind: Kind = "regression"
    if statistics.kind == "distilled" and summary is not None and taken is not None:
        assert first is not None
        kind = _kind_of(partial(caller.exactly, base), first[:1], seen.geometry)
        distillation = Distillation(
            converted,
            measured_targets(converted, plan),
            partial(caller.exactly, base),
            partial(caller.exactly, converted),
            kind,
        )
        fitted, held_out = distillation.fit_(_windows_of(taken, statistics, seen.geometry), progress)
        summary = replace(summary, distilled=fitted)
    if summary is not None:
        empty = all_empty(taken or ())
        summary = _judged(converted, plan, summary, caller, example.to(*home), allow_flat, empty)
    if taken is not None and not in_stages:
        found = _unlike(converted, plan, taken, caller, seen.geometry)
        if summary is not None:
            summary = replace(summary, findings=(*summary.findings, *found))
        for finding in found:
            _LOG.warning(finding.line)
    first = example.to(*home) if first is None else first[:1]
    work = _Work(
        original=base,
        converted=converted,
        plan=plan,
        seen=seen,
        first=first if taken is None or seen.geometry is None else padded(first, seen.geometry),
        images=None if in_stages else taken,
        example=example.to(*home),
        caller=caller,
        summary=summary,
        statistics=statistics,
        held_out=held_out,
        kind=kind,
        tile=extents,
    )
    tell_notable("prove", lambda: durations().proof(sizes(), seen.geometry, extents))
    progress("prove", 0, 1)
    proof = work.prove()
    progress("prove", 1, 1)
    scan = _proved(seen.scan, proof, work.first.shape[2:])
    source = Source(kind="object", spec=f"{scan.model.rpartition('.')[0]}:{type(model).__qualname__}")
    stated = None if output is None else str(output)
    attach_(
        converted,
        Provenance(
            plan=plan,
            scan=scan,
            scaling=_stated(images, model),
            source=source,
            output=stated,
            statistics=statistics,
            unproved=proof.open_steps,
        ),
    )
    if model.training:
        _LOG.warning("The network was in train mode; it was converted, and is returned, in eval mode.")
    converted.eval()
    is_as_known(converted, caller, scan.example, scan.sizes)  # what it gives now is known from here on
    calibration = None if summary is None else Calibration(converted, summary)
    return Conversion(converted, plan, scan, calibration, proof, caller, base)


def _sized(statistics: Statistics, model: nn.Module) -> Statistics:
    """Return statistics of windows whose size is known: as it was given, or as the network's file states it.

    Raises:
        NormfixError: NF587 if neither says it.
    """
    if not statistics.needs_size:
        return statistics
    size = declared_window(model)
    if size is None:
        raise NormfixError(
            "NF587",
            "the size of the windows that the network was trained in is not known: a module does not say it, and of "
            f"files nnU-Net's plans and configs of pytorch-3dunet and MONAI do. Give it: {statistics.kind}:SIZE.",
            where=f"statistics={statistics.words}",
        )
    return replace(statistics, size=size)


def _kind_of(run: Callable[[Tensor], Tensor], image: Tensor, geometry: Geometry | None) -> Kind:
    with torch.no_grad():
        return recognise(run(image if geometry is None else padded(image, geometry)))


def _windows_of(images: Images, statistics: Statistics, geometry: Geometry | None) -> list[Image]:
    fitting = images if geometry is None else replace(images, padding=geometry.padding)
    return [window for image in fitting for window in windows_of(image, statistics.size, geometry)]


def stored_statistics(model: nn.Module, plan: Plan) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the running mean and variance that norms have which a plan measures anew, by site."""
    modules = dict(model.named_modules())
    found = {}
    for decision in plan.converted:
        owner = modules.get(decision.site.owner)
        mean, var = (getattr(owner, name, None) for name in ("running_mean", "running_var"))
        if decision.measured and isinstance(mean, Tensor) and isinstance(var, Tensor):
            found[decision.site.id] = (mean.detach().clone(), var.detach().clone())
    return found


def _first_of(taken: Images, *, in_stages: bool) -> tuple[Tensor, Sequence[int]]:
    """Return what whole forward passes are made on, and the size of the image that it is of, which is read once."""
    image = next(iter(taken))
    return (middle_of if in_stages else whole)(image), image.shape[2:]


def _seen(ready: Base, example: Tensor, caller: Caller, halo: HaloSource, keys: int | None) -> Scanned:
    """Scan a network; keys are held only where its tiles then equal the whole, as they do not if it knows its size."""
    seen = look(ready.copy, example, caller, halo=halo, keys=keys)
    held = [
        site.id for site in seen.scan.sites if site.statistic is not None and site.statistic.law == "keys"
    ]
    if seen.geometry is not None or not held:
        return seen
    aside = {*held, *seen.scan.uncalled}
    reasons = "; ".join(f"{f.code} {f.message}" for f in seen.scan.findings if f.where not in aside)
    left = look(ready.copy, example, caller, halo=halo)
    tied = f"with its keys held, tiles would still not equal the whole: {reasons or 'no halo was found'}"
    sites = tuple(replace(s, refusal=tied) if s.id in held and s.refusal else s for s in left.scan.sites)
    return replace(left, scan=replace(left.scan, sites=sites))


def _kept(keys: int | Literal["all"] | None, to: str | Plan) -> int | None:
    """Return how many keys are held, 0 for all and None for none: as asked, or as a reviewed plan says."""
    if keys is None:
        return keys_of(to) if isinstance(to, Plan) else None
    if keys != "all" and (isinstance(keys, bool) or not isinstance(keys, int) or keys < 1):
        raise NormfixError("NF598", "keys are kept all, or a number of them.", where=f"keys={keys!r}")
    if isinstance(to, Plan):
        raise NormfixError(
            "NF205", "a plan says already which keys are held. Give one of the two.", where=f"keys={keys!r}"
        )
    return 0 if keys == "all" else keys


def _tell_room(plan: Plan, example: Tensor, sizes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
    """Say what keys and values will take, or refuse it."""
    if keys_of(plan) is not None:
        room = require_room(plan, example.shape[2:], sizes, dtype.itemsize)
        _LOG.info("Keys and values that are held take %.3g MiB in memory and in the file.", room / 2**20)


def _stated(images: GivenImages | None, model: nn.Module) -> Scaling:
    """Return the scaling that images say they have, or that the network's file gives pixels; of tensors none."""
    if isinstance(images, ImageFiles):
        return images.scaling or Scaling()
    first = next(iter(images), None) if isinstance(images, list | tuple) else images
    pixels = isinstance(first, str | Path | np.ndarray)
    return (pixels and declared_scaling(model)) or Scaling()


def _proved(scan: Scan, proof: Proof, size: Sequence[int]) -> Scan:
    """Return a scan that speaks for the size of the image as well whose tiles equalled the whole."""
    if scan.sizes is None or proof.verdict is None or not proof.verdict.passed:
        return scan
    return replace(scan, sizes=scan.sizes.including(size))


def _calibrate_(
    model: nn.Module,
    plan: Plan,
    images: Images | None,
    caller: Caller,
    blocks: Blocks | None = None,
    geometry: Geometry | None = None,
    progress: Progress = silent,
    statistics: Statistics = WHOLE,
    stored: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> CalibrationSummary | None:
    """Measure what no original statistic can be carried over for.

    What was measured in stages is measured once more in other blocks under the stored statistics: the residual is of
    the latter.
    """
    fresh = [d for d in plan.converted if d.measured]
    if not fresh:
        return None
    if images is None:
        site = fresh[0].site
        raise NormfixError(
            "NF203",
            "no running statistics, so there is nothing to freeze without measuring. Give at least one "
            f"image, or --keep '{site.owner or '*'}'.",
            where=f"{site.owner or '(root)'} ({site.owner_class})",
        )
    targets = measured_targets(model, plan, express=True)
    if statistics.kind == "blend":
        targets = blended_targets(targets, stored or {}, statistics.weight)
    measured = partial(
        measure_, model, targets, images, caller, geometry=geometry, statistics=statistics, progress=progress
    )
    with buffers_kept(model, but=[d.target for d in fresh]):
        summary = measured(blocks)
    if blocks is None or summary.engine == "passes":  # which re-measure anyway
        return summary
    tile = tuple(n - n // 4 for n in blocks.extents(len(summary.images[0]) - 2))
    return measured(replace(blocks, tile=tile), stored=True)


def _unlike(
    model: nn.Module, plan: Plan, images: Images, caller: Caller, geometry: Geometry | None
) -> tuple[Finding, ...]:
    """Return which images are unlike each other, or what the network has stored; one image may be without a run."""
    if len(images) == 1 and all(d.measured for d in plan.converted):
        return ()
    if geometry is not None:
        images = replace(images, padding=geometry.padding)
    carried = [site_target(model, d, express=False) for d in plan.converted if not d.measured]
    return unlike(model, measured_targets(model, plan), carried, images, caller.exactly)


def _judged(
    model: nn.Module,
    plan: Plan,
    summary: CalibrationSummary,
    caller: Caller,
    image: Tensor,
    allow_flat: bool,
    empty: bool,
) -> CalibrationSummary:
    """Return the summary with what is flat on all images, or refuse it."""
    measured = [d for d in plan.converted if d.measured]
    targets = {d.site.id: site_target(model, d, express=False) for d in measured}
    regrouped = {
        d.site.id: spread_in_groups(targets[d.site.id], d.site.layer.groups)
        for d in measured
        if d.action is Action.BATCHRENORM and d.site.layer and d.site.layer.groups < d.site.layer.features
    }
    return judged(
        model,
        [*targets.values()],
        summary,
        caller,
        image,
        allow=allow_flat,
        classes={d.site.id: d.site.owner_class.rpartition(".")[2] for d in measured},
        known=regrouped,
        empty=empty,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A finished conversion on the bench: what the proof needs."""

    original: nn.Module
    converted: nn.Module
    plan: Plan
    seen: Scanned
    first: Tensor
    images: Images | None
    example: Tensor
    caller: Caller
    summary: CalibrationSummary | None
    statistics: Statistics
    held_out: list[Tensor]
    kind: Kind
    tile: tuple[int, ...] | None

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
                self.seen.scan.example[2:],
                self.tile,
                self.original,
                self.seen.cross,
                double_of(self.converted, self.seen.double),
                self.seen.scan.sizes,
            )
            verdict = subject.verdict(first)
            if verdict is not None:
                verdict = with_reach(verdict, self.seen.scan)
            # in float64 without casts on the way, which tiles are compared with
            run = subject.run if dtype != torch.float64 else partial(self.caller.in_double, self.converted)
            pair = run(first), self.caller.exactly(self.original, first)
            steps = (
                self._identity(first, pair),
                self._measured(dtype),
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

    def _measured(self, dtype: torch.dtype) -> ProofStep:
        """Prove that constants are those of their law."""
        if self.summary is None or self.summary.distilled is None:
            return residual(self.summary, dtype)
        runs = partial(self.caller.exactly, self.original), partial(self.caller.exactly, self.converted)
        return distilled(self.summary, held_out_loss(*runs, self.kind, self.held_out))

    def _identity(self, image: Tensor, pair: tuple[Tensor, Tensor]) -> ProofStep:
        converted, original = pair
        own = self.statistics.kind in ("whole", "per-image") and not keys_of(self.plan)
        if self.summary is not None and not (own and self.summary.images == (tuple(image.shape),)):
            converted = self.caller.exactly(in_eval_mode(self._calibrated(self.original, image)), image)
        step = identity(converted, original)
        if step.status not in ("passed", "failed") or original.dtype == torch.float64:
            return step
        if step.status == "passed" and original.dtype not in HALF:
            return step
        outputs = converted, original
        return repeated_in_double(step, self.original, image, self.caller, outputs, self._calibrated)

    def _calibrated(self, original: nn.Module, image: Tensor) -> nn.Module:
        """Convert a network as planned, calibrated on one image alone."""
        plan = with_all_keys(self.plan)
        one = rewrite(original, plan)
        _calibrate_(one, plan, Images.of(image, image.device, image.dtype), self.caller)
        return one

    def _judged(self, image: Tensor, sites: Sequence[Site]) -> list[Site]:
        """Return the sites that the census alone calls live in the original and the scan, seeing more, does not.

        A network that takes one size shows the census no growth, so it suspects every norm over tokens.
        """
        quiet = {site.id for site in self.seen.scan.sites if not site.live}
        before = survey(self.original, self.caller, image, stacked=False).sites
        return [site for site in before if site.live and site.id in quiet]

    def _shifts(self, first: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[ImageShift, ...]:
        if self.images is None:
            return ()
        return tuple(
            shift(number, *pair)
            if number == 0 and image.shape == first.shape
            else shift(number, self.caller(self.converted, image), self.caller(self.original, image))
            for number, image in enumerate(map(whole, self.images))
        )
