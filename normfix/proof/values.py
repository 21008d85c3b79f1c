"""What a converted network gives beside what its statistics' own formulas give, in float64, on any input.

    norm        y = (x - mean) / sqrt(var + eps) * w + b, with the stored mean and var (those of groups pooled)
    statistic   the stored value
    attention   softmax(q K^T / sqrt(d) + b) V, with the keys K, values V and biases b that are held

Where the original is there, its own calls are answered by the formulas while it runs, which shares nothing with how
calls were replaced in the converted network; else each converted layer is held against its formula where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from normfix.conversion.interception import InterceptedNorm
from normfix.conversion.rewriting import layer_of
from normfix.layers import ChannelNorm, FrozenKeys, FrozenOperand, FrozenStatistic, HeldTokens
from normfix.layers.moments import Moments, pool
from normfix.networks.calling import Caller, refusals
from normfix.networks.copying import copy_of
from normfix.networks.functions import arguments_of, bound
from normfix.networks.numerics import IDENTITY, deviation
from normfix.proof.attention import attended, multiplied, repeated
from normfix.records.plans import Action, Decision, Plan
from normfix.scanning.census import census

__all__ = ["differing_from_original", "differing_layers"]

_ROUNDINGS = 32
"""Roundings that a norm's few operations may add up to, with room for half precision's fused ones."""


def differing_from_original(
    original: nn.Module, converted: nn.Module, plan: Plan, caller: Caller, image: Tensor, actual: Tensor
) -> list[str]:
    """Compare the converted network with the original whose statistics are held at the stored values.

    Args:
        original: in eval mode.
        converted: of it, in eval mode.
        plan: of the conversion.
        caller: calls either.
        image: any that both run on.
        actual: what the converted network gives for it.

    Returns:
        What is wrong, in words; nothing if they agree.
    """
    if gone := [d.site.id for d in plan.converted if d.measured and not _holds(converted, d)]:
        return [f"{site} lost its layer" for site in gone]
    if not actual.is_floating_point():  # a choice between classes; the proof is inconclusive for it anyway
        return []
    expected, missing = _held(original, converted, plan, caller, image)
    if missing:
        return [f"{site} does not run in the original there" for site in missing]
    apart, limit = _apart(actual, expected), IDENTITY.get(actual.dtype, 0.0)
    if not apart <= limit and not _regrouped(plan):  # re-expressed weights are rounded to the network's dtype
        try:
            apart, limit = _apart_in_double(original, converted, plan, caller, image), IDENTITY[torch.float64]
        except refusals():  # it takes no float64, so that its own dtype decides
            pass
    return [] if apart <= limit else [f"the output is {apart:.2g} sd from the formulas' (bound {limit:.0e})"]


def differing_layers(model: nn.Module, plan: Plan, run: Callable[[], Any]) -> list[str]:
    """Run a converted network and hold each converted layer against its formula; return the sites that differ."""
    modules, wrong = dict(model.named_modules()), dict[str, None]()

    def after(site: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        with torch._C.DisableTorchFunction():  # outer interceptions count calls
            if not _agrees(module, args, kwargs, result):
                wrong[f"{site} does not give what its statistics say"] = None

    handles = [
        modules[d.target].register_forward_hook(partial(after, d.site.id), with_kwargs=True)
        for d in plan.converted
        if d.target in modules
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(wrong)


def _held(
    original: nn.Module,
    converted: nn.Module,
    plan: Plan,
    run: Callable[[nn.Module, Tensor], Tensor],
    image: Tensor,
) -> tuple[Tensor, list[str]]:
    """Return the original's output with every measured statistic at its stored value, and sites it did not reach."""
    waiting = {d.site.id: d for d in plan.converted if d.measured}
    left = dict(waiting)

    def settle(site: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        decision = waiting.get(site)
        if decision is None:
            return func(*args, **kwargs)
        left.pop(site, None)
        held, spec = converted.get_submodule(decision.target), decision.site.statistic
        if spec is not None and isinstance(
            held, FrozenOperand
        ):  # of another number of tokens than the call has
            return multiplied(held, func, args, kwargs, spec.operand)
        live = func(*args, **kwargs)
        if isinstance(held, FrozenKeys):
            return _replaced(live, [attended(held, arguments_of(decision.site.function, args, kwargs))])
        if decision.site.layer is None:
            return _replaced(live, held.values())  # type: ignore[operator]
        given = bound(decision.site.function, args, kwargs)
        mean, var = _stored(converted, decision)
        affine = given.get("weight"), given.get("bias")
        return _replaced(live, [_normalised(given["input"], mean, var, float(given["eps"]), [affine])])

    _, _, output = census(original, run, image, settle)
    return output, list(left)


def _holds(converted: nn.Module, decision: Decision) -> bool:
    """Tell whether a converted site still has a layer of ours with its statistics."""
    try:
        module = converted.get_submodule(decision.target)
    except AttributeError:
        return False
    norm = module.norm if isinstance(module, InterceptedNorm) else module
    kept = isinstance(norm, ChannelNorm) and norm.running_mean is not None
    return isinstance(module, FrozenStatistic | HeldTokens) or kept


def _apart_in_double(
    original: nn.Module, converted: nn.Module, plan: Plan, caller: Caller, image: Tensor
) -> float:
    double = image.double()
    theirs, mine = copy_of(original).double(), copy_of(converted).double()
    expected, _ = _held(theirs, mine, plan, caller.in_double, double)
    return _apart(caller.in_double(mine, double), expected)


def _apart(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return deviation(actual, expected, float(expected.double().std()) or 1.0)[0]


def _regrouped(plan: Plan) -> bool:
    return any(
        d.action is Action.BATCHRENORM
        and d.site.layer is not None
        and d.site.layer.groups != d.site.layer.features
        for d in plan.converted
    )


def _stored(converted: nn.Module, decision: Decision) -> tuple[Tensor, Tensor]:
    """Return the stored mean and variance per channel in float64, those of channels pooled as the original pools."""
    layer, spec = layer_of(converted, decision), decision.site.layer
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert spec is not None
    mean, var = layer.running_mean.double(), layer.running_var.double()
    if decision.action is Action.BATCHRENORM:
        pooled = pool(Moments(1, mean, var), spec.groups)
        mean, var = pooled.mean, pooled.var
    return mean, var


def _normalised(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, affines: Sequence[tuple[Tensor | None, Tensor | None]]
) -> Tensor:
    """Return the formula in float64, with one affine map after the other."""
    shape = (1, -1, *(1,) * (x.dim() - 2))
    y = (x.double() - mean.to(x.device).view(shape)) / (var.to(x.device).view(shape) + eps).sqrt()
    for weight, bias in affines:
        if weight is not None:
            y = y * (weight.double().view(shape) if weight.dim() == 1 else weight.double())
        if bias is not None:
            y = y + (bias.double().view(shape) if bias.dim() == 1 else bias.double())
    return y


def _replaced(live: Any, values: Sequence[Tensor]) -> Any:
    """Return what a call gave with its first tensors replaced."""
    leaves, structure = tree_flatten(live)
    for place, value in enumerate(values):
        leaves[place] = value.to(leaves[place]).reshape(leaves[place].shape)
    return tree_unflatten(leaves, structure)


def _agrees(module: nn.Module, args: Any, kwargs: Mapping[str, Any], result: Any) -> bool:
    if isinstance(module, FrozenKeys):
        found, expected = tree_flatten(result)[0][0], attended(module, args[1])
        unit = float(expected.square().mean().sqrt()) or 1.0
        return deviation(found, expected, unit)[0] <= IDENTITY.get(found.dtype, 0.0)
    if isinstance(module, FrozenOperand):
        return torch.equal(result, repeated(module.operand, args[0], *module.batch))
    if isinstance(module, FrozenStatistic):
        given = [v for v in tree_flatten(result)[0] if isinstance(v, Tensor)]
        pairs = zip(given, module.values(), strict=True)
        return all(bool((a.double() == b.to(a.dtype).double()).all()) for a, b in pairs)
    norm: Any = module.norm if isinstance(module, InterceptedNorm) else module
    if getattr(norm, "running_mean", None) is None:
        return True  # said elsewhere: its statistics are gone
    operands = [*args, *(kwargs[key] for key in ("input", "weight", "bias") if key in kwargs)]
    x, affines = operands[0], [(norm.weight, norm.bias)]
    if isinstance(module, InterceptedNorm):
        affines.append((operands[1], operands[2]))
    mean, var = norm.running_mean.double(), norm.running_var.double()
    expected = _normalised(x, mean, var, norm.eps, affines)
    terms = _normalised(x.double().abs() + mean.abs().max(), 0 * mean, var, norm.eps, _absolute(affines))
    return bool(((result - expected).abs() <= _ROUNDINGS * torch.finfo(result.dtype).eps * terms).all())


def _absolute(
    affines: Sequence[tuple[Tensor | None, Tensor | None]],
) -> list[tuple[Tensor | None, Tensor | None]]:
    return [(None if w is None else w.abs(), None if b is None else b.abs()) for w, b in affines]
