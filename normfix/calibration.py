"""Measure each site's statistics over whole images, consistently: every site before it already frozen.

Sites are taken in the order of the calls. For one image a single pass does it: each site is measured and
frozen when the pass reaches it, and the pass goes on with the frozen value. For several images each site
takes one pass over all of them that ends early at the site; the images' moments are merged in float64.
Measuring all sites in one pass with live statistics is not the same thing, however often it is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfix.calling import evaluating
from normfix.errors import NormfixError
from normfix.moments import Moments, measure, merge
from normfix.numerics import exact_arithmetic
from normfix.records import CalibrationSummary, SiteStatistics

__all__ = ["Calibration", "Target", "measure_sites_", "restoring_on_error", "site_statistics"]

Run = Callable[[nn.Module, Tensor], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Target:
    """One site to calibrate.

    `module` receives the operand as its first argument; `holder` has running_mean, running_var and eps;
    `store` writes population moments into the holder; `expected` reduces measured moments to what the holder
    should hold (group statistics pool channels).
    """

    name: str
    module: nn.Module
    holder: nn.Module
    store: Callable[[Moments], None]
    expected: Callable[[Moments], Moments]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A recalibrated copy of a model and the record of what was measured."""

    model: nn.Module
    summary: CalibrationSummary

    @property
    def record(self) -> CalibrationSummary:
        """Return the record, under the name all results use."""
        return self.summary


def measure_sites_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Iterable[Tensor],
    run: Run,
    progress: Progress = lambda done, total: None,
) -> CalibrationSummary:
    """Calibrate the targets in place, in order, and re-measure them under the stored statistics.

    Args:
        model: holds the targets' modules; put in eval mode meanwhile, every module's own mode is restored.
        targets: in the order in which a forward pass reaches them.
        images: re-iterable, each (N, C, *space); sizes may differ. Read several times.
        run: calls the model on one image.
        progress: called with (passes done, passes in all).

    Raises:
        NormfixError: NF301 if a pass does not reach a site. The old statistics are back in place then, as
            after any other error.
    """
    count = sum(1 for _ in images)
    with evaluating(model), exact_arithmetic(), restoring_on_error(targets):
        passes = 2 if count == 1 else len(targets) + 1
        if count == 1:
            _freeze_as_it_goes(model, targets, images, run)
            progress(1, passes)
        else:
            for done, target in enumerate(targets, start=1):
                target.store(_population(model, target, images, run))
                progress(done, passes)
        summary = _summary(model, targets, images, run)
        progress(passes, passes)
    return summary


def _freeze_as_it_goes(
    model: nn.Module, targets: Sequence[Target], images: Iterable[Tensor], run: Run
) -> None:
    reached: set[str] = set()

    def observe(target: Target, operand: Tensor) -> None:
        if target.name not in reached:  # statistics come from one call; a second is a fault found below
            target.store(measure(operand))
        reached.add(target.name)

    with _observed(targets, observe):
        for image in images:
            run(model, image)
    _require_reached(targets, reached)


class _Reached(BaseException):
    """Ends a forward pass early; no `except Exception` in a network's code may swallow it."""


def _population(model: nn.Module, target: Target, images: Iterable[Tensor], run: Run) -> Moments:
    parts: list[Moments] = []

    def observe(target: Target, operand: Tensor) -> None:
        parts.append(measure(operand))
        raise _Reached

    with _observed([target], observe):
        for number, image in enumerate(images, start=1):
            with suppress(_Reached):
                run(model, image)
            _require_reached([target], {target.name} if len(parts) == number else set())
    return merge(*parts)


def _summary(
    model: nn.Module, targets: Sequence[Target], images: Iterable[Tensor], run: Run
) -> CalibrationSummary:
    """Re-measure every site under the stored statistics."""
    measured: dict[str, list[Moments]] = {target.name: [] for target in targets}

    def observe(target: Target, operand: Tensor) -> None:
        measured[target.name].append(measure(operand))

    shapes = []
    with _observed(targets, observe):
        for image in images:
            run(model, image)
            shapes.append(tuple(image.shape))
    for target in targets:
        if len(measured[target.name]) != len(shapes):
            raise _call_count(target, len(measured[target.name]), len(shapes))
    sites = tuple(site_statistics(target, measured[target.name]) for target in targets)
    return CalibrationSummary(images=tuple(shapes), sites=sites)


def site_statistics(target: Target, parts: list[Moments]) -> SiteStatistics:
    """Compare what was measured per image, rounded as it would be stored, with what is stored."""
    population = target.expected(merge(*parts))
    stored_mean, stored_var, eps = target.holder.running_mean, target.holder.running_var, target.holder.eps
    assert isinstance(stored_mean, Tensor)
    assert isinstance(stored_var, Tensor)
    assert isinstance(eps, float)
    mean, var = population.mean.to(stored_mean.dtype).double(), population.var.to(stored_var.dtype).double()
    sd = (stored_var.double().cpu() + eps).sqrt()
    ratio = (var + eps) / sd.square()
    spread = max(float(((target.expected(part).mean - population.mean).abs() / sd).max()) for part in parts)
    return SiteStatistics(
        site=target.name,
        elements=population.count,
        spread=spread,
        mean_shift=float(((mean - stored_mean.double().cpu()).abs() / sd).max()),
        variance_ratio=(float(ratio.min()), float(ratio.max())),
    )


@contextmanager
def _observed(targets: Sequence[Target], observe: Callable[[Target, Tensor], None]) -> Iterator[None]:
    """Call `observe` with each target's operand before its module runs; no hook stays behind."""
    handles = []

    def watch(target: Target) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observe(target, args[0] if args else kwargs["input"])

        handles.append(target.module.register_forward_pre_hook(before, with_kwargs=True))

    try:
        for target in targets:
            watch(target)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def restoring_on_error(targets: Sequence[Target]) -> Iterator[None]:
    """Give the targets their old statistics back after any error."""
    before = [{key: value.clone() for key, value in t.module.state_dict().items()} for t in targets]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for target, state in zip(targets, before, strict=True):
                target.module.load_state_dict(state)
        raise


def _require_reached(targets: Sequence[Target], reached: set[str]) -> None:
    for target in targets:
        if target.name not in reached:
            raise _call_count(target, 0, 1)


def _call_count(target: Target, calls: int, expected: int) -> NormfixError:
    return NormfixError(
        "NF301",
        f"the plan expects one call per image, but {calls} were made for {expected}. The network takes another "
        "path on this input than when it was scanned; scan it with an input like the images.",
        where=target.name,
    )
