"""Calibrate and predict stage by stage over blocks, where the network can be captured; the reason where not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normfix.calibration import restoring_on_error
from normfix.calling import Caller, evaluating, home_of
from normfix.errors import NormfixError
from normfix.numerics import exact_arithmetic
from normfix.pipeline.capturing import program_of, schedule_of
from normfix.pipeline.masking import measure_in_passes_, require_maskable
from normfix.pipeline.placing import Place
from normfix.records import CalibrationSummary, SiteStatistics
from normfix.rewriting import twin_of
from normfix.streaming import (
    Engine,
    Journal,
    Local,
    Masked,
    Outlook,
    OutputFile,
    Schedule,
    Source,
    Statistic,
    Step,
    Store,
    TensorSource,
    Watch,
    describe,
    execute,
    kept_name,
    largest_block,
    run_of,
)
from normfix.targets import Target, TargetAround
from normfix.tiles import Geometry

__all__ = [
    "NOT_IN_STAGES",
    "Resources",
    "StoredTarget",
    "measure_in_stages_",
    "measure_streamed_",
    "predict_in_stages",
    "tell_fallback",
]

NOT_IN_STAGES = ("NF320", "NF321", "NF322", "NF323", "NF324", "NF325")
"""Codes that say that a network or an image cannot run in stages, while passes over the whole may."""

Progress = Callable[[int, int], None]

_LOG = logging.getLogger("normfix")

_SCRATCH = 3
"""As many times what is alive in a block on a device its kernels take: their workspaces, float64 copies to measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What stages may use: block extents in pixels per axis, bytes of memory, a folder, an engine; who is told."""

    tile: int | Sequence[int]
    budget: int | None = None
    store: Path | None = None
    engine: Engine = field(default_factory=Local)
    watch: Watch | None = None

    @contextmanager
    def run(
        self, planned: Schedule, images: Sequence[Source], statistics: Sequence[Statistic]
    ) -> Iterator[tuple[Store, Journal]]:
        """Give a store and a journal for one run, that of an earlier process if it was the same."""
        tile = self.extents(len(images[0].shape) - 2)
        sites = [statistic.site for statistic in statistics]
        parts = partial(describe, planned, images, tile, sites)
        at_a_time = self.engine.workers if isinstance(self.engine, Local) else 1
        aside = _SCRATCH * largest_block(planned, tile) * at_a_time
        with run_of(
            self.store, parts, self.budget, shared=self.engine.shared, device=planned.device, aside=aside
        ) as given:
            yield given

    def extents(self, ndim: int) -> tuple[int, ...]:
        """Return the block extents per axis.

        Raises:
            NormfixError: NF402 for what is no number of pixels per axis.
        """
        given = (self.tile,) * ndim if isinstance(self.tile, int) else tuple(self.tile)
        if len(given) != ndim or not all(isinstance(n, int) and n > 0 for n in given):
            raise NormfixError(
                "NF402", f"give 1 or {ndim} positive numbers of pixels, not {self.tile!r}.", where="tile"
            )
        return given


def measure_streamed_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Sequence[Source],
    caller: Caller,
    resources: Resources | None,
    *,
    geometry: Geometry | None = None,
    progress: Progress = lambda done, total: None,
) -> CalibrationSummary:
    """Calibrate the targets in place, in stages where the network can, else in passes: the same numbers.

    See `measure_in_stages_`. Images are extended to a size the network is exact at. Passes read them whole, one
    at a time; without resources passes are what is asked for.
    """
    stride = geometry.stride if geometry is not None else None
    if geometry is not None:
        images = [image.padded(geometry.padding(image.shape[2:])) for image in images]
    require_maskable(targets, images)
    if resources is None:
        return measure_in_passes_(model, targets, images, caller, stride, progress)
    try:
        return measure_in_stages_(model, targets, images, caller, resources, stride=stride, progress=progress)
    except NormfixError as error:
        if error.code not in NOT_IN_STAGES:
            raise
        _require_whole(images, error)
        tell_fallback("statistics are measured in passes over whole images", error)
        summary = measure_in_passes_(model, targets, images, caller, stride, progress)
        return replace(summary, reason=str(error))


def measure_in_stages_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Sequence[Source],
    caller: Caller,
    resources: Resources,
    *,
    stride: Sequence[int] | None = None,
    progress: Progress = lambda done, total: None,
) -> CalibrationSummary:
    """Calibrate the targets in place in one walk through the network, stage by stage.

    Args:
        model: holds the targets' modules.
        targets: in any order.
        images: of any sizes the network is exact at.
        caller: calls the model.
        resources: what may be used.
        stride: of the network, per axis, or a multiple of it.
        progress: called with (stages done, stages).

    Raises:
        NormfixError: a code of NOT_IN_STAGES where this network cannot run so; the old statistics are back then,
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
        store, journal = stack.enter_context(resources.run(planned, images, measured))
        execute(
            planned,
            images,
            tile=resources.extents(ndim),
            store=store,
            statistics=measured,
            settled=program.following_(model),
            engine=resources.engine,
            journal=journal,
            watch=resources.watch or _Counted(progress),
        )
    return CalibrationSummary(
        images=tuple(image.shape for image in images),
        sites=tuple(statistics[target.name] for target in targets),
        engine="stages",
    )


def tell_fallback(what: str, error: NormfixError) -> None:
    """Say on stderr, before it runs, that something else runs than was asked for, and why."""
    _LOG.warning("%s, for the network cannot run in stages: %s", what, error)


def _require_whole(images: Sequence[Source], error: NormfixError) -> None:
    """Refuse passes over images that were opened by window: as a rule they do not fit."""
    opened = [image.image if isinstance(image, Masked) else image for image in images]
    if not all(isinstance(image, TensorSource) for image in opened):
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


def predict_in_stages(
    model: nn.Module,
    image: Source,
    caller: Caller,
    resources: Resources,
    *,
    geometry: Geometry,
    sites: Sequence[str] = (),
    out: OutputFile | None = None,
) -> Tensor | None:
    """Predict an image stage by stage over blocks.

    Args:
        model: without live statistics.
        image: of any size; extended to one the network is exact at, and the result cut back.
        caller: calls the model and picks the output.
        resources: what may be used.
        geometry: of the network.
        sites: paths of the layers to cut at; default: before norms, or after convolutions.
        out: where the prediction goes; default: into memory.

    Returns:
        (N, C', *out), or None if it went to `out`.

    Raises:
        NormfixError: a code of NOT_IN_STAGES where this network cannot run so.
    """
    ndim = len(image.shape) - 2
    twin = twin_of(model)
    with ExitStack() as stack:
        stack.enter_context(exact_arithmetic())
        whole = image.padded(geometry.padding(image.shape[2:]))
        program = stack.enter_context(program_of(twin, caller, tuple(sites), whole, geometry.stride))
        planned = schedule_of(program, geometry.stride, [whole], measured=(), outputs=True)
        lasts = resources.store is not None
        place = Place(program.outputs[0], image, geometry, home_of(model)[0], out)
        store, journal = stack.enter_context(resources.run(planned, [whole], ()))
        execute(
            planned,
            [whole],
            tile=resources.extents(ndim),
            store=store,
            sink=place.wait if lasts else place.take,
            keep=[place.node] if lasts else [],
            engine=resources.engine,
            journal=journal,
            watch=resources.watch,
        )
        if lasts:
            place.copy(store[kept_name(0, place.node)])
    return place.result()


@dataclass(frozen=True, slots=True)
class _Counted:
    """A watch that counts stages."""

    report: Progress
    timed: bool = False

    def begin(self, outlook: Outlook) -> None:
        """Expect nothing."""

    def block(self, step: Step) -> None:
        """Report the stages done."""
        self.report(step.stage + (step.done == step.blocks), step.stages)


def _paths(model: nn.Module, targets: Sequence[Target]) -> dict[str, str]:
    """Return the path of each target's module."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {target.name: paths[id(target.module)] for target in targets}
