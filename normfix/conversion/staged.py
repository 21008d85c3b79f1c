"""Measure statistics stage by stage over blocks, where the network can be captured, and predict in the same walk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normfix.conversion.keys import KeysTarget
from normfix.conversion.measuring import restoring_on_error
from normfix.conversion.targets import Target, TargetAround
from normfix.images.sources import Image, confirm
from normfix.images.writing import OutputFile
from normfix.networks.calling import Caller, evaluating
from normfix.networks.numerics import exact_arithmetic
from normfix.records.measurements import CalibrationSummary
from normfix.records.progress import Progress, silent
from normfix.tiling.grid import Geometry
from normfix.tiling.stages.cache import program_of, schedule_of
from normfix.tiling.stages.execution import execute
from normfix.tiling.stages.options import Blocks
from normfix.tiling.stages.outlook import Outlook, Step
from normfix.tiling.stages.prediction import predict_in_stages
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.running import Statistic

__all__ = ["measure_in_stages_", "predict_measured_"]


def measure_in_stages_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Sequence[Image],
    caller: Caller,
    blocks: Blocks,
    *,
    stride: Sequence[int] | None = None,
    stored: bool = False,
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
        stored: measure the targets under the statistics they have, and change none.
        progress: called with ("calibrate", stages done, stages).

    Raises:
        NotInStages: NF320 to NF325 where this network cannot run so; the old statistics are back then,
            as after any other error.
    """
    ndim = len(images[0].shape) - 2
    _require_of_blocks(targets)
    if stored:
        targets = [StoredTarget(target) for target in targets]
    measured, settled = _statistics(model, targets)
    with ExitStack() as stack:
        for context in (evaluating(model), exact_arithmetic(), restoring_on_error(targets)):
            stack.enter_context(context)
        names = tuple(statistic.site for statistic in measured)
        program = stack.enter_context(program_of(model, caller, names, images[0], stride))
        planned = schedule_of(program, stride, images, measured=names, outputs=False)
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
        for image in images:
            confirm(image)
        # after the last stage: numbers of a device are waited for
        statistics = {target.name: target.compare(parts) for target, parts in settled}
    return CalibrationSummary(
        images=tuple(image.shape for image in images),
        sites=tuple(statistics[target.name] for target in targets),
        engine="stages",
    )


def predict_measured_(
    model: nn.Module,
    targets: Sequence[Target],
    image: Image,
    caller: Caller,
    blocks: Blocks,
    *,
    geometry: Geometry | None,
    extended: bool = True,
    sites: Sequence[str] = (),
    out: OutputFile | None = None,
) -> Tensor | None:
    """Measure the targets on an image, in place, and predict it under what was measured, in one walk.

    Args:
        model: holds the targets' modules.
        targets: in any order.
        image: (1, C, *space), of any size.
        caller: calls the model and picks the output.
        blocks: how to run in stages.
        geometry: of the network whatever its statistics are, as for predict_in_stages.
        extended: as for predict_in_stages.
        sites: paths of layers to cut at besides the targets' modules.
        out: where the prediction goes; default: into memory.

    Returns:
        (1, C', *out), or None if it went to `out`.

    Raises:
        NotInStages: NF320 to NF325 where this network cannot run so; the old statistics are back then,
            as after any other error.
    """
    _require_of_blocks(targets)
    measured, settled = _statistics(model, targets)
    with evaluating(model), restoring_on_error(targets):
        result = predict_in_stages(
            model,
            image,
            caller,
            blocks,
            geometry=geometry,
            extended=extended,
            sites=tuple(dict.fromkeys((*(statistic.site for statistic in measured), *sites))),
            statistics=measured,
            out=out,
        )
        for target, parts in settled:
            target.compare(parts)
    return result


def _require_of_blocks(targets: Sequence[Target]) -> None:
    """Refuse constants that blocks are not put together to.

    Raises:
        NotInStages: NF323.
    """
    for target in targets:
        if isinstance(target, KeysTarget):
            raise NotInStages(
                "NF323",
                "keys that are held are measured in passes over whole images: those of a site are known once the "
                "sites before it hold theirs, and blocks are not put together to one constant. That takes the memory "
                "of one forward pass of each image. Give parts that fit as tensors (--keys N keeps N of all), or leave "
                'keys out and predict each image with statistics="per-image": that keeps its keys in stages, on disk '
                "where blocks have a store.",
                where=target.name,
            )


def _statistics(
    model: nn.Module, targets: Sequence[Target]
) -> tuple[list[Statistic], list[tuple[Target, list[Any]]]]:
    """Return what measures the targets' sites and stores it in them, and the list of what was stored so far."""
    paths = _paths(model, targets)
    settled: list[tuple[Target, list[Any]]] = []

    def statistic(target: Target) -> Statistic:
        def settle(parts: list[list[Any]]) -> None:
            per_image = [target.join(blocks) for blocks in parts]
            target.store(per_image)
            settled.append((target, per_image))

        return Statistic(paths[target.name], target.dims, target.measure, settle)

    return [statistic(target) for target in targets], settled


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
