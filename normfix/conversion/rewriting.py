"""Carry out a plan: swap modules under every alias, intercept the remaining calls, keep everything else.

The new layers start with the statistics the old ones carried, or with mean 0 and variance 1 until they are
calibrated. Parameters keep their identity, dtype, device, requires_grad; modules keep hooks and mode.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from normfix import layers
from normfix.conversion.interception import Intercept, InterceptedNorm, intercept_, obstacle, release_
from normfix.errors import NormfixError
from normfix.layers.base import ChannelNorm
from normfix.layers.moments import Moments, on_host, pool
from normfix.networks.copying import copy_of
from normfix.networks.replacing import HOOKS, replace_
from normfix.records.plans import Action, Decision, Means, Plan
from normfix.records.sites import LayerSpec

__all__ = ["channel_affine", "layer_of", "released", "rewrite", "rewrite_", "set_statistics_"]

_FROZEN = {1: layers.FrozenNorm1d, 2: layers.FrozenNorm2d, 3: layers.FrozenNorm3d}
_RENORM = {1: layers.BatchRenorm1d, 2: layers.BatchRenorm2d, 3: layers.BatchRenorm3d}
_PLAIN = (bool, int, float, str, tuple, type(None))


def rewrite(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a deep copy of the model with the plan carried out; the model is not modified.

    Raises:
        NormfixError: NF205 if the plan names modules the model does not have, NF206 if a call cannot be
            intercepted.
    """
    return rewrite_(copy_of(model), plan)


def rewrite_(model: nn.Module, plan: Plan) -> nn.Module:
    """Carry out a plan in place and return the network: another object where the root itself is converted.

    Raises:
        NormfixError: as for `rewrite`.
    """
    modules = dict(model.named_modules())
    for decision in plan.converted:
        path = decision.site.owner if decision.means is Means.SWAP else decision.site.anchor
        if path not in modules:
            raise NormfixError(
                "NF205",
                "the plan names a module that this network does not have. Make the plan anew.",
                where=path,
            )
    swapped = [(modules[d.site.owner], d) for d in plan.converted if d.means is Means.SWAP]
    new = {norm: _replacement(norm, model, decision) for norm, decision in swapped}
    rewritten = replace_(model, new)
    for decision in plan.converted:
        if decision.means is Means.INTERCEPT:
            _intercept(modules, decision)
    return rewritten


def layer_of(model: nn.Module, decision: Decision) -> ChannelNorm:
    """Return the layer that normalises at a converted site."""
    module = model.get_submodule(decision.target)
    return module.norm if isinstance(module, InterceptedNorm) else module  # type: ignore[return-value]


def set_statistics_(
    layer: ChannelNorm, decision: Decision, moments: Moments, *, express: bool = True
) -> None:
    """Write calibrated statistics into a layer, in place.

    Args:
        layer: of the site.
        decision: tells groups and target.
        moments: per channel, of the population.
        express: re-express the affine map of a BatchRenorm so that it reproduces group statistics; right
            when converting, wrong when a converted network is calibrated anew.
    """
    spec = decision.site.layer
    assert spec is not None
    grouped = pool(moments, spec.groups)
    if not _is_regrouped(decision):
        _store(layer, grouped)
        return
    _store(layer, moments)
    if express:
        _express_group_affine(layer, moments, grouped, spec)


def _store(layer: ChannelNorm, moments: Moments) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    with torch.no_grad():
        layer.running_mean.copy_(moments.mean)
        layer.running_var.copy_(moments.var)
        layer.num_batches_tracked.fill_(1)


def _express_group_affine(layer: ChannelNorm, channel: Moments, group: Moments, spec: LayerSpec) -> None:
    """Apply w' = w s_c / s_g,  b' = b + w (m_c - m_g) / s_g  (normfix.scanning.rules.group)."""
    channel, group = on_host([channel, group])
    s_c, s_g = (channel.var + spec.eps).sqrt(), (group.var + spec.eps).sqrt()
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        w = weight.double().cpu()
        bias.copy_(bias.double().cpu() + w * (channel.mean - group.mean) / s_g)
        weight.copy_(w * s_c / s_g)


def _replacement(old: nn.Module, root: nn.Module, decision: Decision) -> nn.Module:
    """Return a layer for a norm of a network, with the norm's weights, statistics, hooks and attributes."""
    new = _new_layer(decision, affine=_needs_affine(decision), like=old if _has_tensors(old) else root)
    _take_affine(new, old, decision)
    _take_statistics(new, old, decision)
    new.train(old.training)
    for name in HOOKS:
        getattr(new, name).update(getattr(old, name))
    _take_attributes(new, old)
    return new


def _take_attributes(new: nn.Module, old: nn.Module) -> None:
    """Carry plain values over that the network may read of its norm: its groups, or what somebody wrote on it."""
    for name, value in vars(old).items():
        if not name.startswith("_") and not hasattr(new, name) and isinstance(value, _PLAIN):
            setattr(new, name, value)


def _intercept(modules: dict[str, nn.Module], decision: Decision) -> None:
    site = decision.site
    anchor, owner = modules[site.anchor], modules[site.owner]
    if reason := obstacle(anchor):
        raise NormfixError("NF206", f"its calls cannot be intercepted: {reason}.", where=site.id)
    like = next((m for m in (owner, anchor, modules[""]) if _home(m)[1] is not None), anchor)
    layer = _wrapped_norm(decision, owner, like) if site.statistic is None else _constant(decision, like)
    layer.train(owner.training)
    modules[site.holder].add_module(decision.target.rpartition(".")[2], layer)
    spec = site.statistic
    planned = Intercept(
        function=site.function,
        index=decision.position,
        visible=decision.visible,
        target=_within(decision),
        site=site.id,
        operand=spec.operand if spec else 0,
        dims=spec.dims if spec else (),
    )
    intercept_(anchor, (planned,))


def released(model: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    """Return a copy in which values without a population law are computed again, if there are any, and its plan.

    Args:
        model: with the plan carried out; not modified.
        plan: of it.
    """
    lawless = {d.site.id for d in plan.converted if d.site.statistic and d.site.statistic.law == "none"}
    if not lawless:
        return model, plan
    copied = copy_of(model)
    for decision in plan.converted:
        if decision.site.id in lawless:
            release_(copied.get_submodule(decision.site.anchor), _within(decision))
    return copied, replace(plan, decisions=tuple(d for d in plan.decisions if d.site.id not in lawless))


def _within(decision: Decision) -> str:
    """Return the path of what calls are handed to, from what they are intercepted in."""
    anchor = decision.site.anchor
    return decision.target.removeprefix(f"{anchor}.") if anchor else decision.target


def _wrapped_norm(decision: Decision, owner: nn.Module, like: nn.Module) -> InterceptedNorm:
    spec = decision.site.layer
    assert spec is not None
    norm = _new_layer(decision, affine=_is_regrouped(decision), like=like)
    _take_statistics(norm, owner, decision)
    return InterceptedNorm(norm)


def _constant(decision: Decision, like: nn.Module) -> layers.FrozenStatistic | layers.HeldTokens:
    spec = decision.site.statistic
    assert spec is not None
    device, dtype = _home(like)
    if spec.law == "keys":
        assert spec.batch is not None
        kind = layers.FrozenKeys if spec.outputs == 2 else layers.FrozenOperand
        return kind(rank=spec.rank, tokens=spec.dims[0], batch=spec.batch[:2], device=device, dtype=dtype)
    return layers.FrozenStatistic(
        spec.shape,
        outputs=spec.outputs,
        rank=spec.rank,
        sizes=spec.sizes,
        batch=spec.batch,
        selects=spec.selects,
        device=device,
        dtype={"bool": torch.bool, "int": torch.long}.get(spec.number, dtype),
    )


def _needs_affine(decision: Decision) -> bool:
    spec = decision.site.layer
    assert spec is not None
    return spec.affine or _is_regrouped(decision)


def _is_regrouped(decision: Decision) -> bool:
    """Tell whether statistics of groups become those of channels, and the affine map is re-expressed."""
    spec = decision.site.layer
    assert spec is not None
    return decision.action is Action.BATCHRENORM and spec.groups != spec.features


def _new_layer(decision: Decision, *, affine: bool, like: nn.Module) -> ChannelNorm:
    spec = decision.site.layer
    assert spec is not None
    if spec.ndim not in _FROZEN:
        raise NormfixError(
            "NF209",
            f"it normalises {spec.ndim} spatial dimensions; 1, 2 or 3 are supported.",
            where=decision.site.id,
        )
    kinds = _FROZEN if decision.action is Action.FREEZE else _RENORM
    device, dtype = _home(like)
    return kinds[spec.ndim](spec.features, eps=spec.eps, affine=affine, device=device, dtype=dtype)


def _home(like: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    tensor = next((t for t in (*like.parameters(), *like.buffers()) if t.is_floating_point()), None)
    return (None, None) if tensor is None else (tensor.device, tensor.dtype)


def _has_tensors(module: nn.Module) -> bool:
    return any(
        t.is_floating_point() for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )


def _take_affine(new: ChannelNorm, old: nn.Module, decision: Decision) -> None:
    spec = decision.site.layer
    assert spec is not None
    for name in ("weight", "bias"):
        parameter = getattr(old, name, None)
        if parameter is None:
            continue
        if isinstance(old, nn.LayerNorm):
            values = channel_affine(parameter.detach(), spec.features, spec.ndim)
            parameter = nn.Parameter(values, requires_grad=parameter.requires_grad)
        elif _is_regrouped(decision):
            # norms that share one affine map need one each
            parameter = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(new, name, parameter)


def _take_statistics(new: ChannelNorm, old: nn.Module, decision: Decision) -> None:
    """Carry running statistics over, where eval mode uses them."""
    assert decision.site.layer is not None
    if not decision.site.layer.carries:
        return
    if getattr(old, "running_mean", None) is None or getattr(old, "running_var", None) is None:
        raise NormfixError(
            "NF206",
            "it normalises with running statistics that are not its running_mean and running_var, so they "
            f"cannot be carried over. Add --keep '{decision.site.owner}'.",
            where=decision.site.id,
        )
    with torch.no_grad():
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if isinstance(value := getattr(old, name, None), Tensor):
                getattr(new, name).copy_(value)


def channel_affine(parameter: Tensor, features: int, ndim: int) -> Tensor:
    """Return the (C,) values of a LayerNorm parameter that is constant over space.

    Args:
        parameter: shape (C, *space) or, for a norm over space alone, (*space).
        features: C.
        ndim: number of spatial dimensions.
    """
    return parameter.reshape(-1, *parameter.shape[-ndim:]).flatten(1)[:, 0].expand(features).clone()
