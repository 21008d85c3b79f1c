"""What calibration measures at one site: moments of a norm's operand, or the values of another statistic.

A target reports what each call measures, and turns the reports of all images into what is stored: moments by
the law of total variance (normfix.layers.moments), other statistics by theirs (normfix.layers.laws).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normfix.conversion.interception import InterceptedNorm
from normfix.conversion.keys import KeysTarget
from normfix.conversion.rewriting import layer_of, set_statistics_
from normfix.errors import NormfixError
from normfix.layers import ChannelNorm, FrozenStatistic, HeldTokens
from normfix.layers.constant import fitting
from normfix.layers.laws import Observed, Part, finalise
from normfix.layers.laws import merge as merge_parts
from normfix.layers.laws import observe as observe_part
from normfix.layers.moments import Moments, measure, measure_there, on_host, pool, union
from normfix.networks.functions import operand_of
from normfix.networks.graph.program import ProgramNetwork
from normfix.records.measurements import SiteStatistics
from normfix.records.plans import Action, Decision, Plan
from normfix.records.sites import StatisticSpec, function_of

__all__ = [
    "NormTarget",
    "StatisticTarget",
    "Target",
    "TargetAround",
    "apart_targets",
    "planned_targets",
    "site_target",
]


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

    @property
    def measure(self) -> Callable[[Tensor], Any]:
        """Return what measures one block of an operand; it can be sent to another process."""
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

    def flat(self, parts: Sequence[Any]) -> tuple[int, ...]:
        """Return the channels whose spread, which is divided by, is nothing in every part."""
        ...


@dataclass(frozen=True, slots=True)
class TargetAround:
    """A target that does what another does; subclasses say what they do otherwise."""

    target: Target

    @property
    def name(self) -> str:
        """Return the site's id."""
        return self.target.name

    @property
    def module(self) -> nn.Module:
        """Return what holds the statistic."""
        return self.target.module

    @property
    def dims(self) -> tuple[int, ...] | None:
        """Return what the statistic runs over."""
        return self.target.dims

    @property
    def measure(self) -> Callable[[Tensor], Any]:
        """Return what measures a block."""
        return self.target.measure

    def watch(self, report: Callable[[Any], None]) -> Callable[[], None]:
        """Report the measures of every call."""
        return self.target.watch(report)

    def join(self, blocks: Sequence[Any]) -> Any:
        """Put blocks together."""
        return self.target.join(blocks)

    def store(self, parts: Sequence[Any]) -> None:
        """Write the statistic."""
        self.target.store(parts)

    def compare(self, parts: Sequence[Any]) -> SiteStatistics:
        """Compare with what is stored."""
        return self.target.compare(parts)

    def flat(self, parts: Sequence[Any]) -> tuple[int, ...]:
        """Return the channels without spread."""
        return self.target.flat(parts)


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

    @property
    def measure(self) -> Callable[[Tensor], Moments]:
        """Return what gives a block's moments; see Target."""
        return measure_there

    def join(self, blocks: Sequence[Moments]) -> Moments:
        """Merge the blocks' moments, where they are; see Target."""
        return union(*blocks)

    def store(self, parts: Sequence[Moments]) -> None:
        """Write the merged moments; those on a device are not waited for, so `compare` looks at them. See Target."""
        merged = union(*parts)
        _require_some(merged.count, self.name)
        if merged.mean.device.type == "cpu":
            self._fitting(merged)
        self.write(merged)

    def compare(self, parts: Sequence[Moments]) -> SiteStatistics:
        """Compare moments, rounded as they would be stored, with what is stored; see Target."""
        merged, *parts = on_host([union(*parts), *parts])
        population = self.expected(merged)
        stored_mean, stored_var, eps = self.holder.running_mean, self.holder.running_var, self.holder.eps
        assert isinstance(stored_mean, Tensor)
        assert isinstance(stored_var, Tensor)
        assert isinstance(eps, float)
        mean, var = (value.double() for value in self._fitting(merged))
        sd = (stored_var.double().cpu() + eps).sqrt()
        ratio = (var + eps) / sd.square()
        spread = max(
            float(((self.expected(part).mean - population.mean).abs() / sd).max())
            for part in parts
            if part.count
        )
        return SiteStatistics(
            site=self.name,
            elements=population.count,
            spread=spread,
            mean_shift=float(((mean - stored_mean.double().cpu()).abs() / sd).max()),
            variance_ratio=(float(ratio.min()), float(ratio.max())),
            flat=self.flat(parts),
        )

    def _fitting(self, merged: Moments) -> tuple[Tensor, Tensor]:
        """Return mean and variance in the dtypes that they are kept in, where they are finite."""
        population = self.expected(merged)
        kept_mean, kept_var = self.holder.running_mean, self.holder.running_var
        assert isinstance(kept_mean, Tensor)
        assert isinstance(kept_var, Tensor)
        mean, var = population.mean.to(kept_mean.dtype), population.var.to(kept_var.dtype)
        _require_finite(self.name, mean=mean, variance=var)
        return mean, var

    def flat(self, parts: Sequence[Moments]) -> tuple[int, ...]:
        """Return the channels whose variance is at or below eps, or below rounding, in every part; see Target."""
        stored, eps = self.holder.running_var, self.holder.eps
        assert isinstance(stored, Tensor)
        assert isinstance(eps, float)
        unit = torch.finfo(stored.dtype).eps / 2
        population = [self.expected(part) for part in parts if part.count]
        small = [p.var <= (unit * p.mean).square().clamp_min(eps) for p in population]
        return tuple(torch.stack(small).all(0).nonzero().flatten().tolist())


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

    @property
    def measure(self) -> Callable[[Tensor], Observed]:
        """Return what gives a block's part; see Target."""
        return partial(_part_of_block, self.spec)

    def join(self, blocks: Sequence[Observed]) -> Observed:
        """Merge the blocks' parts by the law; see Target."""
        spec, images = self.spec, blocks[0].images
        part = merge_parts(spec.law, [block.part for block in blocks])
        joined = finalise(spec.law, part, images=images, correction=spec.correction, power=spec.power)
        return Observed(images, joined, part)

    def store(self, parts: Sequence[Observed]) -> None:
        """Write the population's values; see Target."""
        _require_some(sum(part.part.count for part in parts), self.name)
        values = self._population(parts)
        self._fitting(values)
        self.module.set_values_(*values)

    def compare(self, parts: Sequence[Observed]) -> SiteStatistics:
        """Compare values, rounded as they would be stored, with what is stored; see Target."""
        stored = torch.cat([v.double().cpu().flatten() for v in self.module.values()])
        unit = float(stored.square().mean().sqrt()) or 1.0
        population = self._population(parts)
        rounded = [value.double().flatten() for value in self._fitting(population)]
        own = [
            torch.cat([v.flatten() for v in self._population([part])]) for part in parts if part.part.count
        ]
        joint = torch.cat([v.flatten() for v in population])
        return SiteStatistics(
            site=self.name,
            elements=int(sum(part.part.count for part in parts)),
            spread=max(float((v - joint).abs().max()) for v in own) / unit,
            mean_shift=float((torch.cat(rounded) - stored).abs().max()) / unit,
            variance_ratio=(1.0, 1.0),
        )

    def _fitting(self, population: Sequence[Tensor]) -> list[Tensor]:
        """Return values in the dtypes that they are kept in, where they are finite."""
        found = [fitting(p, v.dtype) for p, v in zip(population, self.module.values(), strict=True)]
        _require_finite(self.name, **{f"value {number}": value for number, value in enumerate(found)})
        return found

    def flat(self, parts: Sequence[Observed]) -> tuple[int, ...]:
        """Return nothing: what is divided by it is seen where it is used (networks.divisors); see Target."""
        return ()

    def _population(self, parts: Sequence[Observed]) -> tuple[Tensor, ...]:
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

    def _see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observed:
        spec = self.spec
        operand = operand_of(args, kwargs, spec.operand)
        images = _images(spec, operand)
        results: tuple[Tensor, ...] = ()
        if images == 1:
            given = tree_map(_widened, (args, dict(kwargs)))
            found = [v for v in tree_leaves(func(*given[0], **given[1])) if isinstance(v, Tensor)]
            results = tuple(v.double().cpu() for v in found[: spec.outputs])
        return Observed(images, results, _part(spec, operand, images, self._terms(args, kwargs)))

    def _terms(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """Return what the call divides by, where that is its statistic."""
        if self.spec.law == "none" or not self.spec.quotient:
            return 1.0
        (number,) = [v for v in tree_leaves((args, kwargs)) if type(v) in (int, float)]
        return float(number) if function_of(self.name) == "div" else 1 / float(number)


def apart_targets(targets: Sequence[Target], count: int) -> list[Target] | None:
    """Return targets that report a list, what they measure in each of so many images of a batch by itself.

    None where one runs over the batch as well, so that images together are not what each is alone.
    """
    found = [_apart(target, count) for target in targets]
    return None if None in found else found  # type: ignore[return-value]


def _apart(target: Target, count: int) -> Target | None:
    inner: Target = target
    while isinstance(inner, TargetAround):
        inner = inner.target
    if isinstance(inner, NormTarget):
        return _EachImage(target, count)
    batched = isinstance(inner, StatisticTarget) and inner.spec.batch is not None and inner.spec.law != "none"
    return target if batched else None


@dataclass(frozen=True, slots=True)
class _EachImage(TargetAround):
    """A norm whose operand is measured image by image."""

    count: int

    def watch(self, report: Callable[[Any], None]) -> Callable[[], None]:
        """Report the moments of each image of a call's operand."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with torch._C.DisableTorchFunction():  # outer interceptions count calls
                operand = args[0] if args else kwargs["input"]
                # (n*u, c, *space) -> n of (u, c, *space)
                images = operand.unflatten(0, (self.count, -1))
                report([measure(image) for image in images])

        return self.target.module.register_forward_pre_hook(before, with_kwargs=True).remove


def _require_some(count: float, site: str) -> None:
    """Refuse a statistic of nothing."""
    if not count:
        raise NormfixError(
            "NF138",
            "the masks ignore a pixel in every cell that a position here stands for, so nothing is left to measure. "
            "Ignore larger regions and fewer scattered pixels.",
            where=site,
        )


def _require_finite(site: str, **values: Tensor) -> None:
    """Refuse a statistic that is NaN or infinite, or that does not fit the dtype it is kept in."""
    for name, value in values.items():
        wrong = (~torch.isfinite(value.flatten())).nonzero().flatten().tolist()
        if not wrong:
            continue
        shown = ", ".join(map(str, wrong[:4])) + (", ..." if len(wrong) > 4 else "")
        dtype = str(value.dtype).removeprefix("torch.")
        raise NormfixError(
            "NF148",
            f"its {name} is not finite in {dtype} on these images (channel {shown}): the network overflows there, or "
            f"{dtype} has no room for it. Scale the images as it was trained with (--scale), or compute in a wider "
            "dtype (--dtype float64).",
            where=site,
        )


def _part_of_block(spec: StatisticSpec, operand: Tensor) -> Observed:
    images = _images(spec, operand)
    return Observed(images, (), _part(spec, operand, images))


def _images(spec: StatisticSpec, operand: Tensor) -> int:
    return operand.shape[spec.batch[0]] // spec.batch[1] if spec.batch else 1


def _part(spec: StatisticSpec, operand: Tensor, images: int, terms: float = 1.0) -> Part:
    """Return the part of an operand; of a quotient, `terms` is what the call divides by."""
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
    part = observe_part("mean", operand.double() / terms, dims)
    return Part(terms * images, part.values)


def _widened(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def site_target(model: nn.Module, decision: Decision, *, express: bool) -> Target:
    """Describe a converted site to calibration; `express` as in set_statistics_."""
    module, statistic = model.get_submodule(decision.target), decision.site.statistic
    if statistic is not None and statistic.law == "keys":
        assert isinstance(module, HeldTokens)
        return KeysTarget(decision.site.id, module, statistic)
    if statistic is not None:
        assert isinstance(module, FrozenStatistic)
        return StatisticTarget(decision.site.id, module, statistic)
    layer, spec = layer_of(model, decision), decision.site.layer
    assert spec is not None
    grouped = decision.action is Action.FREEZE

    def expected(moments: Moments) -> Moments:
        return pool(moments, spec.groups) if grouped else moments

    def store(moments: Moments) -> None:
        set_statistics_(layer, decision, moments, express=express)

    return NormTarget(decision.site.id, module, layer, store, expected)


class HoldsConstants(NormfixError):  # noqa: N818 - what it is, not what went wrong
    """A program holds a constant and nothing that could measure it again."""


class LayerGone(NormfixError):  # noqa: N818 - what happened, not what went wrong
    """A converted layer is no longer there."""


def measured_targets(model: nn.Module, plan: Plan, *, express: bool = False) -> list[Target]:
    """Describe the converted sites whose statistics are measured, not carried over; `express` as in site_target."""
    return [site_target(model, d, express=express) for d in plan.converted if d.measured]


def planned_targets(model: nn.Module, plan: Plan) -> list[Target]:
    """Describe the converted sites, all of which must still be there, with their statistics."""
    modules = dict(model.named_modules())
    for decision in plan.converted:
        layer = modules.get(decision.target)
        if isinstance(model, ProgramNetwork):
            if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
                raise HoldsConstants(
                    "NF228",
                    "the program holds the constant and no longer what computed it, so it cannot be measured anew. "
                    "Calibrate the folder or network that the program was written from and write it again, or "
                    "convert the program it was made of on these images.",
                    where=decision.site.id,
                )
        elif (
            not isinstance(layer, ChannelNorm | InterceptedNorm | FrozenStatistic | HeldTokens)
            or getattr(layer, "running_mean", layer) is None
        ):
            raise LayerGone(
                "NF302",
                "the converted layer or its statistics are gone. Convert the network as it is now.",
                where=decision.target,
            )
    return [site_target(model, decision, express=False) for decision in plan.converted]
