"""Calibrate and predict stage by stage over blocks, where the network can be captured; the reason where not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from normfix.calibration import Target, measure_sites_, restoring_on_error
from normfix.calling import Caller, evaluating
from normfix.errors import NormfixError
from normfix.numerics import exact_arithmetic
from normfix.records import CalibrationSummary, SiteStatistics
from normfix.streaming import (
    Program,
    Schedule,
    Source,
    Statistic,
    Store,
    TensorSource,
    captured_program,
    execute,
    schedule,
)
from normfix.tiles import Geometry

__all__ = ["NOT_IN_STAGES", "Resources", "measure_in_stages_", "measure_streamed_", "predict_in_stages"]

NOT_IN_STAGES = ("NF320", "NF321", "NF322", "NF323", "NF324", "NF325")
"""Codes that say that a network or an image cannot run in stages, while passes over the whole may."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What stages may use: block extents in pixels per axis, bytes of memory, a folder, blocks at a time."""

    tile: int | Sequence[int]
    budget: int | None = None
    store: Path | None = None
    workers: int = 1

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
    images: Iterable[Tensor],
    caller: Caller,
    resources: Resources,
    *,
    geometry: Geometry | None = None,
    progress: Progress = lambda done, total: None,
) -> CalibrationSummary:
    """Calibrate the targets in place, in stages where the network can, else in passes: the same numbers.

    See `measure_in_stages_`; images are tensors here, as passes need them.
    """
    sources = [TensorSource(image) for image in images]
    multiple = geometry.multiple if geometry is not None else None
    try:
        return measure_in_stages_(
            model, targets, sources, caller, resources, multiple=multiple, progress=progress
        )
    except NormfixError as error:
        if error.code not in NOT_IN_STAGES:
            raise
        return replace(measure_sites_(model, targets, images, caller, progress), reason=str(error))


def measure_in_stages_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Sequence[Source],
    caller: Caller,
    resources: Resources,
    *,
    multiple: Sequence[int] | None = None,
    progress: Progress = lambda done, total: None,
) -> CalibrationSummary:
    """Calibrate the targets in place in one walk through the network, stage by stage.

    Args:
        model: holds the targets' modules.
        targets: in any order.
        images: of any sizes the network is exact at.
        caller: calls the model.
        resources: what may be used.
        multiple: of image sizes, per axis.
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

    with evaluating(model), exact_arithmetic(), restoring_on_error(targets):
        program = _program(model, caller, tuple(paths.values()), images[0])
        planned = _schedule(program, multiple or (32,) * ndim, measured=tuple(paths.values()), outputs=False)
        with _store(resources) as store:
            execute(
                planned,
                images,
                tile=resources.extents(ndim),
                store=store,
                statistics=[statistic(target) for target in targets],
                settled=lambda: program.refresh_(model),
                workers=resources.workers,
                progress=lambda stage, stages, done, total: progress(stage + (done == total), stages),
            )
    return CalibrationSummary(
        images=tuple(image.shape for image in images),
        sites=tuple(statistics[target.name] for target in targets),
        engine="stages",
    )


def predict_in_stages(
    model: nn.Module,
    image: Source,
    caller: Caller,
    resources: Resources,
    *,
    sites: Sequence[str] = (),
    multiple: Sequence[int] | None = None,
) -> Tensor:
    """Predict an image stage by stage over blocks.

    Args:
        model: without live statistics.
        image: of a size the network is exact at.
        caller: calls the model and picks the output.
        resources: what may be used.
        sites: paths of the layers to cut at; default: before norms, or after convolutions.
        multiple: of image sizes, per axis.

    Raises:
        NormfixError: a code of NOT_IN_STAGES where this network cannot run so.
    """
    ndim = len(image.shape) - 2
    result: list[_InPlace] = []

    def sink(
        number: int, node: Node, shape: tuple[int, ...], dtype: torch.dtype, blocks: tuple[int, ...]
    ) -> _InPlace | None:
        if node not in program.outputs:
            return None
        result.append(_InPlace(torch.empty(shape, dtype=dtype, device=program.image.meta["val"].device)))
        return result[-1]

    with evaluating(model), exact_arithmetic():
        program = _program(model, caller, tuple(sites), image)
        planned = _schedule(program, multiple or (32,) * ndim, measured=(), outputs=True)
        with _store(resources) as store:
            execute(
                planned,
                [image],
                tile=resources.extents(ndim),
                store=store,
                sink=sink,
                workers=resources.workers,
            )
    return result[0].array


@dataclass(frozen=True, slots=True)
class _InPlace:
    array: Tensor

    def read(self, index: tuple[slice, ...]) -> Tensor:
        return self.array[index]

    def write(self, index: tuple[slice, ...], value: Tensor) -> None:
        self.array[index] = value


class _store:  # noqa: N801 - a context manager, used as a function
    """Give a store whose folder is a temporary one inside the folder that the caller named."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._folder = (
            None
            if resources.store is None
            else TemporaryDirectory(dir=resources.store, prefix="normfix-", ignore_cleanup_errors=True)
        )

    def __enter__(self) -> Store:
        return Store(self._resources.budget, None if self._folder is None else Path(self._folder.name))

    def __exit__(self, *error: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def _paths(model: nn.Module, targets: Sequence[Target]) -> dict[str, str]:
    """Return the path of each target's module."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {target.name: paths[id(target.module)] for target in targets}


_PROGRAMS: weakref.WeakKeyDictionary[nn.Module, tuple[object, Program]] = weakref.WeakKeyDictionary()
_SCHEDULES: weakref.WeakKeyDictionary[Any, dict[object, Schedule]] = weakref.WeakKeyDictionary()


def _program(model: nn.Module, caller: Caller, sites: tuple[str, ...], image: Source) -> Program:
    """Capture the model, or take the capture of last time with the model's present weights."""
    ndim = len(image.shape) - 2
    key = (caller, sites, ndim, _fingerprint(model))
    known = _PROGRAMS.get(model)
    if known is not None and known[0] == key:
        known[1].refresh_(model)
        return known[1]
    limit = {1: 1024, 2: 256, 3: 64}[ndim]
    example = image.read([(0, min(n, limit)) for n in image.shape[2:]])[:1]
    program = captured_program(model, caller, example, sites)
    _PROGRAMS[model] = key, program
    return program


def _schedule(
    program: Program, multiple: Sequence[int], *, measured: tuple[str, ...], outputs: bool
) -> Schedule:
    known = _SCHEDULES.setdefault(program.body, {})
    key = (tuple(multiple), measured, outputs)
    if key not in known:
        known[key] = schedule(program, multiple=multiple, measured=measured, outputs=outputs)
    return known[key]


def _fingerprint(model: nn.Module) -> object:
    """Return what must not have changed for a captured graph to still be the model's."""
    return (
        tuple((path, type(module), id(module)) for path, module in model.named_modules()),
        tuple(
            (name, t.shape, t.dtype, t.device)
            for name, t in (*model.named_parameters(), *model.named_buffers())
        ),
    )
