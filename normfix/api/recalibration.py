"""calibrate: measure a network's statistics anew on whole images, in a copy or in place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from normfix.conversion.conformity import moved, stored_moments
from normfix.conversion.flatness import all_empty, flat_before, judged
from normfix.conversion.masks import Mask
from normfix.conversion.measurement import measure_
from normfix.conversion.multiplicity import objection
from normfix.conversion.results import Calibration
from normfix.conversion.sampling import Sample
from normfix.conversion.targets import NormTarget, Target, planned_targets
from normfix.errors import NormfixError
from normfix.images.collections import ImageFiles
from normfix.images.given import GivenImages, images_of
from normfix.layers import FrozenStatistic, HeldTokens
from normfix.layers.moments import Moments
from normfix.networks.calling import Caller, in_eval_mode
from normfix.networks.copying import copy_of, twin_of
from normfix.networks.provenance import outdate_, provenance_of, rescale_
from normfix.networks.responses import is_as_known
from normfix.networks.surroundings import undisturbed
from normfix.records.measurements import CalibrationSummary
from normfix.records.progress import Progress, logged
from normfix.records.saved import Provenance, Scaling
from normfix.records.sites import Family
from normfix.records.sizes import ProvedSizes
from normfix.records.statistics import WHOLE
from normfix.scanning.base import base_of
from normfix.scanning.known import ForwardFn
from normfix.scanning.renewal import renew_
from normfix.scanning.scan import look
from normfix.scanning.sites import survey
from normfix.tiling.domain import extension
from normfix.tiling.geometry import geometry_of
from normfix.tiling.stages.cache import hand_on
from normfix.tiling.stages.options import Blocks
from normfix.tiling.stitching import padded

__all__ = ["CalibrateOptions", "calibrate", "calibrate_"]

_LOG = logging.getLogger("normfix")


class CalibrateOptions(TypedDict, total=False):
    """Options of `calibrate`."""

    mask: Mask | Sequence[Mask] | None
    sample: float | None
    seed: int
    allow_flat: bool | None
    blocks: Blocks | None
    forward_fn: ForwardFn | None
    output: str | int | None
    progress: Progress


@undisturbed()
def calibrate(
    model: nn.Module,
    images: GivenImages,
    tile: int | Sequence[int] | None = None,
    *,
    mask: Mask | Sequence[Mask] | None = None,
    sample: float | None = None,
    seed: int = 0,
    allow_flat: bool | None = None,
    blocks: Blocks | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    progress: Progress = logged,
) -> Calibration:
    """Return a copy of a network whose statistics are measured anew on whole images.

    Args:
        model: converted by normfix, or any network with batch norms on running statistics; not modified.
        images: re-iterable of (N, C, *space) tensors, one tensor, or images that are read by window
            (normfix.open_image) and measured in stages; also arrays and files, see normfix.convert. A scaling that
            normfix.read_images was given travels with the result from then on.
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
        blocks: how to run in stages, in place of `tile` or beside it; see normfix.Blocks.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        progress: called with ("calibrate", passes or stages done, passes or stages in all); default: logged as
            normfix.progress, at level INFO.

    Raises:
        NormfixError: NF302 if the network has live statistics, or none at all; NF301 and codes of the images; NF326
            to NF332 of the store; NF333 to NF336 of the cluster; NF137, NF138 and NF139 of the masks; NF140 of
            the sample; NF231 for a statistic without spread; NF409 for an image with several of a statistic of which
            the network was converted with one.
    """
    measured = _measured(
        model,
        images,
        tile,
        mask=mask,
        sample=sample,
        seed=seed,
        allow_flat=allow_flat,
        blocks=blocks,
        forward_fn=forward_fn,
        output=output,
        progress=progress,
    )
    copied = copy_of(model)
    measured.take_over_(copied)
    hand_on(model, copied)
    return Calibration(copied, measured.summary)


@undisturbed()
def calibrate_(
    model: nn.Module,
    images: GivenImages,
    tile: int | Sequence[int] | None = None,
    **options: Unpack[CalibrateOptions],
) -> CalibrationSummary:
    """Measure a network's statistics anew in place, on the same module objects; arguments are those of `calibrate`.

    Optimizers, compiled and distributed wrappers keep their model. Nothing changes before all is measured, and nothing
    on any error; whoever runs the model meanwhile runs it with the old statistics and in its own mode.
    """
    measured = _measured(model, images, tile, **options)
    measured.take_over_(model)
    return measured.summary


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was measured in a twin of a network, its call, a part of the first image, and the scaling of files.

    `is_known` tells whether the network was, before, what it was when its geometry was measured.
    """

    twin: nn.Module
    summary: CalibrationSummary
    targets: Sequence[Target]
    caller: Caller
    image: Tensor
    scaling: Scaling | None
    is_known: bool

    def take_over_(self, model: nn.Module) -> None:
        """Write the statistics into a network's own layers, and what depends on them into what travels with it."""
        places = {id(module): path for path, module in self.twin.named_modules()}
        with torch.no_grad():
            for target in self.targets:
                measured, own = target.module, model.get_submodule(places[id(target.module)])
                if isinstance(measured, HeldTokens) and isinstance(own, HeldTokens):
                    own.hold_(measured.values_held(), measured.bias)
                    continue
                buffers = dict(own.named_buffers())
                for name, value in measured.named_buffers():
                    buffers[name].copy_(value)
        if self.scaling is not None:
            rescale_(model, self.scaling)
        renew_(model, self.image, self.caller)
        # under the new statistics it gives something else, which is remembered: of the old ones nothing tells any more
        known = provenance_of(model)
        if known is not None and not (self.is_known and is_as_known(model, self.caller, *_scanned(known))):
            outdate_(model)


def _measured(
    original: nn.Module,
    images: GivenImages,
    tile: int | Sequence[int] | None,
    *,
    mask: Mask | Sequence[Mask] | None = None,
    sample: float | None = None,
    seed: int = 0,
    allow_flat: bool | None = None,
    blocks: Blocks | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    progress: Progress = logged,
) -> _Measured:
    """Measure in a twin, so that the capture of the network itself is kept."""
    blocks = (blocks or Blocks()).sized(tile)
    model = twin_of(original)
    known = provenance_of(model)
    caller = Caller.of(known, forward_fn, output)
    taken = images_of(images, model, like=known.scan.example if known else None, caller=caller)
    geometry = geometry_of(known.scan) if known is not None else None
    is_known = known is None or is_as_known(original, caller, *_scanned(known))
    for finding in extension(next(iter(taken)).shape[2:], geometry):
        _LOG.warning(finding.line)
    targets: Sequence[Target]
    if known is not None:
        targets = planned_targets(model, known.plan)
        if known.statistics.needs_original:
            raise NormfixError(
                "NF559",
                f"its constants are {known.statistics.words}, which takes the original. Convert that anew on these "
                "images.",
                where=type(model).__name__,
            )
        if not targets:
            raise NormfixError(
                "NF302",
                "there is nothing to calibrate: its plan converts no site, so no statistic of it is normfix's. Batch "
                "norms on running statistics that a plan kept are measured anew in the network it was made of.",
                where=type(model).__name__,
            )
    else:
        ready = base_of(model, taken.excerpt(), caller)
        caller = ready.caller
        targets = _batch_norms(model, ready.example, caller)
    # what is flat in the running statistics of a trained network is no news
    begun = [t for t in targets if _is_trained(known, t.name)]
    trained, before = flat_before(begun), stored_moments(begun)
    summary = measure_(
        model,
        targets,
        taken,
        caller,
        blocks,
        geometry=geometry,
        mask=mask,
        sample=None if sample is None else Sample(sample, seed),
        statistics=WHOLE if known is None else known.statistics,
        progress=progress,
    )
    if known is not None:
        for shape in dict.fromkeys(summary.images):
            reason = objection(original, in_eval_mode(model), known.plan, caller, known.scan.example, shape)
            if reason:
                raise NormfixError("NF409", reason, where=known.scan.model)
    first = taken.excerpt()[:1]
    judgement = judged(
        model,
        targets,
        summary,
        caller,
        first if geometry is None else padded(first, geometry),
        allow=allow_flat,
        classes=_classes(known, model, targets),
        known=trained,
        empty=all_empty(taken),
    )
    unlike = moved(begun, before)
    for finding in unlike:
        _LOG.warning(finding.line)
    judgement = replace(judgement, findings=(*judgement.findings, *unlike))
    scaling = images.scaling if isinstance(images, ImageFiles) else None
    return _Measured(model, judgement, targets, caller, first, scaling, is_known)


def _scanned(known: Provenance) -> tuple[tuple[int, ...], ProvedSizes | None]:
    """Return the shape that a network was scanned with, and the sizes that the scan speaks for."""
    return known.scan.example, known.scan.sizes


def _is_trained(known: Provenance | None, site: str) -> bool:
    """Tell whether a site's statistics began as running statistics of training."""
    return known is None or any(d.site.id == site and not d.measured for d in known.plan.converted)


def _classes(known: Provenance | None, model: nn.Module, targets: Sequence[Target]) -> dict[str, str]:
    if known is not None:
        return {d.site.id: d.site.owner_class.rpartition(".")[2] for d in known.plan.converted}
    return {target.name: type(target.module).__name__ for target in targets}


def _batch_norms(model: nn.Module, example: Tensor, caller: Caller) -> list[NormTarget]:
    """Describe the batch norms of a network that normfix did not convert; what no one can convert may stay live."""
    if any(isinstance(module, FrozenStatistic | HeldTokens) for module in model.modules()):
        raise NormfixError(
            "NF302",
            "it holds constants that normfix wrote and not what they are of: a part of it was converted, or it is a "
            "deep copy of a torch.fx GraphModule. Calibrate the network that convert or load returned.",
            where=type(model).__name__,
        )
    copied = in_eval_mode(copy_of(model))
    sites = survey(copied, caller, example).sites
    live = [site for site in sites if site.live]
    if live:  # the census alone suspects the token norms of a network that takes one size
        seen = look(partial(copy_of, copied), example, caller).scan
        live = [site for site in seen.sites if site.live and site.convertible]
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
