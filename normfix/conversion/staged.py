"""Measure statistics stage by stage over blocks, where the network can be captured; the reason where not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from normfix.conversion.masks import Mask, masked, measure_in_passes_, require_maskable
from normfix.conversion.measuring import remeasure_sites, restoring_on_error
from normfix.conversion.targets import Target, TargetAround, planned_targets
from normfix.errors import NormfixError
from normfix.images.collections import Items
from normfix.images.sources import Image, TensorImage
from normfix.networks.calling import Caller, evaluating
from normfix.networks.numerics import exact_arithmetic
from normfix.records.measurements import CalibrationSummary, SiteStatistics
from normfix.records.plans import Plan
from normfix.records.progress import Progress, silent
from normfix.tiling.grid import Geometry
from normfix.tiling.stages.cache import program_of, schedule_of
from normfix.tiling.stages.execution import execute
from normfix.tiling.stages.masks import Masked
from normfix.tiling.stages.options import Blocks
from normfix.tiling.stages.outlook import Outlook, Step
from normfix.tiling.stages.prediction import tell_fallback
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.running import Statistic
from normfix.tiling.stitching import padded

__all__ = ["StoredTarget", "measure_in_stages_", "measure_streamed_", "remeasure"]


def remeasure(
    model: nn.Module,
    plan: Plan,
    images: Items | Sequence[Image],
    caller: Caller,
    *,
    geometry: Geometry | None = None,
    mask: Mask | Sequence[Mask] | None = None,
    blocks: Blocks | None = None,
) -> CalibrationSummary:
    """Measure the converted sites under the statistics they have, over all of every image, and change none.

    Args:
        model: converted by the plan.
        plan: names the sites.
        images: whole, or read by window and measured in stages.
        caller: calls the model.
        geometry: extends images to a size that the network is exact at.
        mask: as for `calibrate`.
        blocks: how to run in stages.

    Raises:
        NormfixError: as for `calibrate`.
    """
    targets = planned_targets(model, plan)
    if isinstance(images, Items) and mask is None:
        if geometry is not None:
            images = replace(images, prepare=partial(padded, geometry=geometry))
        return remeasure_sites(model, targets, images, caller)
    passes = isinstance(images, Items)
    sources: Sequence[Image] = [TensorImage(image) for image in images] if passes else images  # type: ignore[arg-type,assignment]
    with ExitStack() as opened:  # mask files
        if mask is not None:
            sources = list[Image](masked(sources, mask, opened))
        kept = [StoredTarget(target) for target in targets]
        return measure_streamed_(
            model, kept, sources, caller, None if passes else blocks or Blocks(), geometry=geometry
        )


def measure_streamed_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Sequence[Image],
    caller: Caller,
    blocks: Blocks | None,
    *,
    geometry: Geometry | None = None,
    progress: Progress = silent,
) -> CalibrationSummary:
    """Calibrate the targets in place, in stages where the network can, else in passes: the same numbers.

    See `measure_in_stages_`. Images are extended to a size the network is exact at. Passes read them whole, one
    at a time; without blocks passes are what is asked for.
    """
    stride = geometry.stride if geometry is not None else None
    if geometry is not None:
        images = [image.padded(geometry.padding(image.shape[2:])) for image in images]
    require_maskable(targets, images)
    if blocks is None:
        return measure_in_passes_(model, targets, images, caller, stride, progress)
    try:
        return measure_in_stages_(model, targets, images, caller, blocks, stride=stride, progress=progress)
    except NotInStages as error:
        _require_whole(images, error)
        tell_fallback("statistics are measured in passes over whole images", error)
        summary = measure_in_passes_(model, targets, images, caller, stride, progress)
        return replace(summary, reason=str(error))


def measure_in_stages_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Sequence[Image],
    caller: Caller,
    blocks: Blocks,
    *,
    stride: Sequence[int] | None = None,
    progress: Progress = silent,
) -> CalibrationSummary:
    """Calibrate the targets in place in one walk through the network, stage by stage.

    Args:
        model: holds the targets' modules.
        targets: in any order.
        images: of any sizes the network is exact at.
        caller: calls the model.
        blocks: how to run in stages.
        stride: of the network, per axis, or a multiple of it.
        progress: called with ("calibrate", stages done, stages).

    Raises:
        NotInStages: NF320 to NF325 where this network cannot run so; the old statistics are back then,
            as after any other error.
    """
    ndim = len(images[0].shape) - 2
    paths = _paths(model, targets)
    statistics: dict[str, SiteStatistics] = {}

    def statistic(target: Target) -> Statistic:
        def settle(parts: list[list[Any]]) -> None:
            per_image = [target.join(blocks) for blocks in parts]
            target.store(per_image)
            statistics[target.name] = target.compare(per_image)

        return Statistic(paths[target.name], target.dims, target.measure, settle)

    with ExitStack() as stack:
        for context in (evaluating(model), exact_arithmetic(), restoring_on_error(targets)):
            stack.enter_context(context)
        stride = stride or (32,) * ndim
        program = stack.enter_context(program_of(model, caller, tuple(paths.values()), images[0], stride))
        planned = schedule_of(program, stride, images, measured=tuple(paths.values()), outputs=False)
        measured = [statistic(target) for target in targets]
        store, journal = stack.enter_context(blocks.run(planned, images, measured))
        execute(
            planned,
            images,
            tile=blocks.extents(ndim),
            store=store,
            statistics=measured,
            settled=program.following_(model),
            engine=blocks.crew,
            journal=journal,
            watch=blocks.watch or _Counted(progress),
        )
    return CalibrationSummary(
        images=tuple(image.shape for image in images),
        sites=tuple(statistics[target.name] for target in targets),
        engine="stages",
    )


def _require_whole(images: Sequence[Image], error: NormfixError) -> None:
    """Refuse passes over images that were opened by window: as a rule they do not fit."""
    opened = [image.image if isinstance(image, Masked) else image for image in images]
    if not all(isinstance(image, TensorImage) for image in opened):
        raise NormfixError(
            error.code,
            f"the network cannot run in stages ({error}), and an image that is read by window is not read whole "
            "instead. Give images that fit as tensors (without --tile, --budget and --store on the command line), "
            "or smaller parts of them.",
            where=error.where,
        ) from error


class StoredTarget(TargetAround):
    """A target that is measured and compared, and keeps the statistic it has."""

    __slots__ = ()

    def store(self, parts: Sequence[Any]) -> None:
        """Keep what is stored."""


@dataclass(frozen=True, slots=True)
class _Counted:
    """A watch that counts stages."""

    report: Progress
    timed: bool = False

    def begin(self, outlook: Outlook) -> None:
        """Expect nothing."""

    def block(self, step: Step) -> None:
        """Report the stages done."""
        self.report("calibrate", step.stage + (step.done == step.blocks), step.stages)


def _paths(model: nn.Module, targets: Sequence[Target]) -> dict[str, str]:
    """Return the path of each target's module."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {target.name: paths[id(target.module)] for target in targets}
