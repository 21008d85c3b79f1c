"""Measure each site's statistics over whole images, consistently: every site before it already frozen.

Sites are taken in the order of the calls. For one image a single pass does it: each site is measured and
frozen when the pass reaches it, and the pass goes on with the frozen value. For several images each site
takes one pass over all of them that ends early at the site; the images' moments are merged in float64.
Measuring all sites in one pass with live statistics is not the same thing, however often it is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normfix.calling import evaluating
from normfix.errors import NormfixError
from normfix.functions import operand_of
from normfix.laws import Part, finalise
from normfix.laws import merge as merge_parts
from normfix.laws import observe as observe_part
from normfix.layers.statistic import FrozenStatistic
from normfix.moments import Moments, measure, merge
from normfix.numerics import exact_arithmetic
from normfix.records import CalibrationSummary, SiteStatistics, StatisticSpec

__all__ = ["Calibration", "NormTarget", "StatisticTarget", "Target", "measure_sites_", "restoring_on_error"]

Run = Callable[[nn.Module, Tensor], Tensor]
Progress = Callable[[int, int], None]


class Target(Protocol):
    """One site to calibrate: `watch` reports what each call measures, `store` and `compare` take such reports."""

    @property
    def name(self) -> str:
        """Return the site's id."""
        ...

    @property
    def module(self) -> nn.Module:
        """Return what holds the statistic."""
        ...

    def watch(self, report: Callable[[Any], None]) -> Callable[[], None]:
        """Report the measures of every call before it is answered; return what ends the watch."""
        ...

    @property
    def dims(self) -> tuple[int, ...] | None:
        """Return the operand's dimensions that the statistic runs over; None if blocks cannot be put together."""
        ...

    def measure(self, operand: Tensor) -> Any:
        """Return the measures of one block of an operand."""
        ...

    def join(self, blocks: Sequence[Any]) -> Any:
        """Put the measures of an image's blocks together, in the order given, as `watch` reports those of a call."""
        ...

    def store(self, parts: Sequence[Any]) -> None:
        """Write the statistic of the union of all parts, one per image."""
        ...

    def compare(self, parts: Sequence[Any]) -> SiteStatistics:
        """Compare what the parts' union would store with what is stored."""
        ...


@dataclass(frozen=True, slots=True)
class NormTarget:
    """A norm.

    `module` receives the operand as its first argument; `holder` has running_mean, running_var and eps;
    `write` writes population moments into the holder; `expected` reduces measured moments to what the holder
    should hold (group statistics pool channels).
    """

    name: str
    module: nn.Module
    holder: nn.Module
    write: Callable[[Moments], None]
    expected: Callable[[Moments], Moments]

    def watch(self, report: Callable[[Any], None]) -> Callable[[], None]:
        """Measure each call's operand; see Target."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with torch._C.DisableTorchFunction():  # outer interceptions count calls
                report(measure(args[0] if args else kwargs["input"]))

        return self.module.register_forward_pre_hook(before, with_kwargs=True).remove

    @property
    def dims(self) -> tuple[int, ...]:
        """Return batch and space; see Target."""
        return (0, 2, 3, 4)

    def measure(self, operand: Tensor) -> Moments:
        """Return a block's moments; see Target."""
        return measure(operand)

    def join(self, blocks: Sequence[Moments]) -> Moments:
        """Merge the blocks' moments; see Target."""
        return merge(*blocks)

    def store(self, parts: Sequence[Moments]) -> None:
        """Write the merged moments; see Target."""
        self.write(merge(*parts))

    def compare(self, parts: Sequence[Moments]) -> SiteStatistics:
        """Compare moments, rounded as they would be stored, with what is stored; see Target."""
        population = self.expected(merge(*parts))
        stored_mean, stored_var, eps = self.holder.running_mean, self.holder.running_var, self.holder.eps
        assert isinstance(stored_mean, Tensor)
        assert isinstance(stored_var, Tensor)
        assert isinstance(eps, float)
        mean = population.mean.to(stored_mean.dtype).double()
        var = population.var.to(stored_var.dtype).double()
        sd = (stored_var.double().cpu() + eps).sqrt()
        ratio = (var + eps) / sd.square()
        spread = max(float(((self.expected(part).mean - population.mean).abs() / sd).max()) for part in parts)
        return SiteStatistics(
            site=self.name,
            elements=population.count,
            spread=spread,
            mean_shift=float(((mean - stored_mean.double().cpu()).abs() / sd).max()),
            variance_ratio=(float(ratio.min()), float(ratio.max())),
        )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one call of a statistic gave: its own results where it saw one image, and the part its law needs."""

    images: int
    results: tuple[Tensor, ...]
    part: Part


@dataclass(frozen=True, slots=True)
class StatisticTarget:
    """A statistic that is no norm: the function itself for one image, its population law for several."""

    name: str
    module: FrozenStatistic
    spec: StatisticSpec

    def watch(self, report: Callable[[Any], None]) -> Callable[[], None]:
        """Evaluate each intercepted call in float64; see Target."""

        def observe(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            with torch._C.DisableTorchFunction():  # outer interceptions count calls
                report(self._see(func, args, kwargs))

        def end() -> None:
            self.module.observer = None

        self.module.observer = observe
        return end

    @property
    def dims(self) -> tuple[int, ...] | None:
        """Return what the law runs over; None without a law, or where the call's own numbers count; see Target."""
        return None if self.spec.law == "none" or self.spec.quotient else self.spec.dims

    def measure(self, operand: Tensor) -> _Seen:
        """Return a block's part; see Target."""
        images = self._images(operand)
        return _Seen(images, (), self._part(operand, images, (), {}))

    def join(self, blocks: Sequence[_Seen]) -> _Seen:
        """Merge the blocks' parts by the law; see Target."""
        spec, images = self.spec, blocks[0].images
        part = merge_parts(spec.law, [block.part for block in blocks])
        joined = finalise(spec.law, part, images=images, correction=spec.correction, power=spec.power)
        return _Seen(images, joined, part)

    def store(self, parts: Sequence[_Seen]) -> None:
        """Write the population's values; see Target."""
        self.module.set_values_(*self._population(parts))

    def compare(self, parts: Sequence[_Seen]) -> SiteStatistics:
        """Compare values, rounded as they would be stored, with what is stored; see Target."""
        stored = torch.cat([v.double().cpu().flatten() for v in self.module.values()])
        unit = float(stored.square().mean().sqrt()) or 1.0
        population = self._population(parts)
        rounded = [
            p.to(v.dtype).double().flatten() for p, v in zip(population, self.module.values(), strict=True)
        ]
        own = [torch.cat([v.flatten() for v in self._population([part])]) for part in parts]
        joint = torch.cat([v.flatten() for v in population])
        return SiteStatistics(
            site=self.name,
            elements=int(sum(part.part.count for part in parts)),
            spread=max(float((v - joint).abs().max()) for v in own) / unit,
            mean_shift=float((torch.cat(rounded) - stored).abs().max()) / unit,
            variance_ratio=(1.0, 1.0),
        )

    def _population(self, parts: Sequence[_Seen]) -> tuple[Tensor, ...]:
        images = sum(part.images for part in parts)
        if images == 1:
            return parts[0].results
        if self.spec.law == "none":
            raise NormfixError(
                "NF230",
                f"this statistic has no population law, so its values on {images} images cannot become one. "
                "Give one image, or keep its module live with --keep.",
                where=self.name,
            )
        part = merge_parts(self.spec.law, [p.part for p in parts])
        spec = self.spec
        return finalise(spec.law, part, images=images, correction=spec.correction, power=spec.power)

    def _see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Seen:
        spec = self.spec
        operand = operand_of(args, kwargs, spec.operand)
        images = self._images(operand)
        results: tuple[Tensor, ...] = ()
        if images == 1:
            given = tree_map(_widened, (args, dict(kwargs)))
            found = [v for v in tree_leaves(func(*given[0], **given[1])) if isinstance(v, Tensor)]
            results = tuple(v.double().cpu() for v in found[: spec.outputs])
        return _Seen(images, results, self._part(operand, images, args, kwargs))

    def _images(self, operand: Tensor) -> int:
        batch = self.spec.batch
        return operand.shape[batch[0]] // batch[1] if batch else 1

    def _part(self, operand: Tensor, images: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Part:
        spec = self.spec
        if spec.law == "none":
            return Part(1, ())
        dims = spec.dims
        if spec.batch is not None:
            stacked = spec.batch[0]
            shape = [*operand.shape]
            shape[stacked : stacked + 1] = [images, spec.batch[1]]
            operand = operand.reshape(shape)  # (.., n*u, ..) -> (.., n, u, ..)
            dims = (stacked, *(d if d < stacked else d + 1 for d in dims))
        if not spec.quotient:
            return observe_part(spec.law, operand, dims, power=spec.power)
        (number,) = [v for v in tree_leaves((args, kwargs)) if type(v) in (int, float)]
        terms = float(number) if self.name.split("/")[-2] == "div" else 1 / float(number)
        part = observe_part("mean", operand.double() / terms, dims)
        return Part(terms * images, part.values)


def _widened(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


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
                target.store(_parts(model, target, images, run))
                progress(done, passes)
        summary = _summary(model, targets, images, run)
        progress(passes, passes)
    return summary


def _freeze_as_it_goes(
    model: nn.Module, targets: Sequence[Target], images: Iterable[Tensor], run: Run
) -> None:
    reached: set[str] = set()

    def observe(target: Target, part: object) -> None:
        if target.name not in reached:  # statistics come from one call; a second is a fault found below
            target.store([part])
        reached.add(target.name)

    with _observed(targets, observe):
        for image in images:
            run(model, image)
    _require_reached(targets, reached)


class _Reached(BaseException):
    """Ends a forward pass early; no `except Exception` in a network's code may swallow it."""


def _parts(model: nn.Module, target: Target, images: Iterable[Tensor], run: Run) -> list[Any]:
    parts: list[Any] = []

    def observe(target: Target, part: object) -> None:
        parts.append(part)
        raise _Reached

    with _observed([target], observe):
        for number, image in enumerate(images, start=1):
            with suppress(_Reached):
                run(model, image)
            _require_reached([target], {target.name} if len(parts) == number else set())
    return parts


def _summary(
    model: nn.Module, targets: Sequence[Target], images: Iterable[Tensor], run: Run
) -> CalibrationSummary:
    """Re-measure every site under the stored statistics."""
    measured: dict[str, list[Any]] = {target.name: [] for target in targets}

    def observe(target: Target, part: object) -> None:
        measured[target.name].append(part)

    shapes = []
    with _observed(targets, observe):
        for image in images:
            run(model, image)
            shapes.append(tuple(image.shape))
    for target in targets:
        if len(measured[target.name]) != len(shapes):
            raise _call_count(target, len(measured[target.name]), len(shapes))
    sites = tuple(target.compare(measured[target.name]) for target in targets)
    return CalibrationSummary(images=tuple(shapes), sites=sites)


@contextmanager
def _observed(targets: Sequence[Target], observe: Callable[[Target, Any], None]) -> Iterator[None]:
    """Call `observe` with what each target measures before its call is answered; nothing stays behind."""
    ends: list[Callable[[], None]] = []
    try:
        for target in targets:
            ends.append(target.watch(partial(observe, target)))
        yield
    finally:
        for end in ends:
            end()


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
