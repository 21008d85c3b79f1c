"""Measure statistics over all of every image: in passes over whole images, in stages over blocks, or on a sample.

One function chooses. Stages run where they are asked for, where images are read by window, and where only some pixels
count; a network that cannot be cut takes passes, with the same numbers, as long as its images are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import nn

from normfix.conversion.masks import Mask, ignored_pixels, masked, require_maskable
from normfix.conversion.measuring import measure_sites_, remeasure_sites
from normfix.conversion.pooling import parts_of, pooled_targets
from normfix.conversion.sampling import Sample, measure_sampled_
from normfix.conversion.staged import measure_in_stages_
from normfix.conversion.targets import Target
from normfix.errors import NormfixError
from normfix.images.collections import Images
from normfix.images.sources import Cut, Image, TensorImage
from normfix.networks.calling import Caller
from normfix.records.measurements import CalibrationSummary
from normfix.records.progress import Progress, silent
from normfix.records.statistics import WHOLE, Statistics
from normfix.tiling.grid import Geometry
from normfix.tiling.stages.masks import Masked
from normfix.tiling.stages.options import Blocks
from normfix.tiling.stages.prediction import tell_fallback
from normfix.tiling.stages.refusals import NotInStages

__all__ = ["measure_"]


def measure_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Images,
    caller: Caller,
    blocks: Blocks | None = None,
    *,
    geometry: Geometry | None = None,
    mask: Mask | Sequence[Mask] | None = None,
    sample: Sample | None = None,
    stored: bool = False,
    statistics: Statistics = WHOLE,
    progress: Progress = silent,
) -> CalibrationSummary:
    """Calibrate the targets in place, and re-measure them under the stored statistics.

    Args:
        model: holds the targets' modules.
        targets: in the order in which a forward pass reaches them.
        images: in memory, or read by window; extended to a size that the network is exact at.
        caller: calls the model.
        blocks: how to run in stages, where that is asked for.
        geometry: of the network, if it is known.
        mask: for each image, what is no part of any statistic.
        sample: measure a random sample of blocks.
        stored: measure the targets under the statistics they have, and change none.
        statistics: what constants are measured on.
        progress: called with ("calibrate", passes or stages done, passes or stages in all).

    Raises:
        NormfixError: NF588 for windows with masks or a sample; NF137 and NF138 of the masks, NF139 for
            statistics that have no meaning for a part of the image and networks in which none can be measured,
            NF140 of the sample, NF301 if a pass does not reach a site, NF320 to NF325 where an image read by window
            cannot be measured in stages; codes of the images and the store. The old statistics are back in place
            then, as after any other error.
    """
    blocks = blocks or Blocks()
    if statistics.pools or statistics.kind == "windows":
        if mask is not None or sample is not None:
            raise NormfixError(
                "NF588",
                "parts have statistics of all of their pixels, so no mask and no sample. Give parts of the images.",
                where=f"statistics={statistics.words}",
            )
        if geometry is not None:
            images = replace(images, padding=geometry.padding)
        parts = [part for image in images for part in parts_of(image, statistics, geometry)]
        targets = pooled_targets(targets, statistics.law)
        if not (blocks.asked or images.by_window):
            return _in_passes_(model, targets, parts, caller, stored, progress)
        return _stages_or_passes_(
            model, targets, parts, caller, blocks, geometry, stored=stored, progress=progress
        )
    if not (blocks.asked or images.by_window or mask is not None or sample is not None):
        if geometry is not None:
            images = replace(images, padding=geometry.padding)
        return _in_passes_(model, targets, images, caller, stored, progress)
    sources: Sequence[Image] = list(images)
    with ExitStack() as opened:  # mask files
        if mask is not None:
            sources = masked(sources, mask, opened)
        ignored = tuple(map(ignored_pixels, sources)) if mask is not None else ()
        if geometry is not None:
            sources = [image.padded(geometry.padding(image.shape[2:])) for image in sources]
        require_maskable(targets, sources)
        if sample is not None:
            summary = measure_sampled_(
                model, targets, sources, caller, blocks, geometry, sample, stored=stored
            )
        else:
            summary = _stages_or_passes_(
                model, targets, sources, caller, blocks, geometry, stored=stored, progress=progress
            )
        return replace(summary, ignored=ignored)


def _in_passes_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Images | Sequence[Image],
    caller: Caller,
    stored: bool,
    progress: Progress,
) -> CalibrationSummary:
    if stored:
        return remeasure_sites(model, targets, images, caller.exactly)
    return measure_sites_(model, targets, images, caller.exactly, progress)


def _stages_or_passes_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Sequence[Image],
    caller: Caller,
    blocks: Blocks,
    geometry: Geometry | None,
    *,
    stored: bool,
    progress: Progress,
) -> CalibrationSummary:
    stride = None if geometry is None else geometry.stride
    try:
        return measure_in_stages_(
            model, targets, images, caller, blocks, stride=stride, stored=stored, progress=progress
        )
    except NotInStages as error:
        _require_whole(images, error)
        tell_fallback("statistics are measured in passes over whole images", error)
        summary = _in_passes_(model, targets, images, caller, stored, progress)
        return replace(summary, reason=str(error))


def _require_whole(images: Sequence[Image], error: NormfixError) -> None:
    """Refuse passes over images with masks, or that were opened by window: as a rule they do not fit."""
    if any(isinstance(image, Masked) for image in images):
        raise NormfixError(
            "NF139",
            f"pixels can be ignored in stages alone, and the network cannot run so ({error}). Calibrate without a "
            "mask, or crop the images instead.",
            where=error.where,
        ) from error
    if not all(isinstance(image, TensorImage | Cut) for image in images):
        raise NormfixError(
            error.code,
            f"the network cannot run in stages ({error}), and an image that is read by window is not read whole "
            "instead. Give images that fit as tensors (without --tile, --budget and --store on the command line), "
            "or smaller parts of them.",
            where=error.where,
        ) from error
