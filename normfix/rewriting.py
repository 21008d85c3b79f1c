"""Carry out a plan: swap modules under every alias, intercept the remaining calls, keep everything else.

The new layers start with the statistics the old ones carried, or with mean 0 and variance 1 until they are
calibrated. Parameters keep their identity, dtype, device, requires_grad; modules keep hooks and mode.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from normfix import layers
from normfix.calling import failures, require_network
from normfix.errors import NormfixError
from normfix.interception import Intercept, InterceptedNorm, intercept_, obstacle
from normfix.layers.base import ChannelNorm
from normfix.moments import Moments, pool
from normfix.records import Action, Decision, LayerSpec, Means, Plan
from normfix.rules import channel_affine

__all__ = ["as_trained_copy", "copy_of", "layer_of", "original_of", "rewrite", "set_statistics_", "twin_of"]

_FROZEN = {1: layers.FrozenNorm1d, 2: layers.FrozenNorm2d, 3: layers.FrozenNorm3d}
_RENORM = {1: layers.BatchRenorm1d, 2: layers.BatchRenorm2d, 3: layers.BatchRenorm3d}
_TRIALS = 5
Memo: TypeAlias = dict[int, Any]
_STATE = frozenset({"_parameters", "_buffers", "_modules"})
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def rewrite(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a deep copy of the model with the plan carried out; the model is not modified.

    Raises:
        NormfixError: NF205 if the plan names modules the model does not have, NF206 if a call cannot be
            intercepted.
    """
    rewritten = copy_of(model)
    modules = dict(rewritten.named_modules())
    for decision in plan.converted:
        path = decision.site.owner if decision.means is Means.SWAP else decision.site.anchor
        if path not in modules:
            raise NormfixError(
                "NF205",
                "the plan names a module that this network does not have. Make the plan anew.",
                where=path,
            )
    for decision in _bottom_up(plan):
        if decision.means is Means.SWAP:
            rewritten = _swap(rewritten, modules[decision.site.owner], decision)
        else:
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


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, in the same mode module by module: some classes' own copies are in train mode.

    Raises:
        NormfixError: NF118 if it is no network, or one without data or behind a compiler; NF208 if it cannot be
            copied.
    """
    require_network(model)
    return _copied(model, {})


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy to run in eval mode, whose parameters are the model's own: it takes next to no memory.

    Modules, buffers, hooks and modes are its own, so that another thread that runs or trains the model meanwhile
    notices nothing, and nothing that a forward pass keeps is kept in the model. What cannot be copied (locks, open
    files) is the model's own too.

    Raises:
        NormfixError: NF118 if it is no network, NF208 if even so it cannot be copied.
    """
    require_network(model)
    shared: Memo = {id(parameter): parameter for parameter in model.parameters()}
    try:
        twin = _copied(model, shared)
    except NormfixError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        twin = _copied(model, {**shared, **_uncopyable(model, shared)})
    _ORIGINALS[twin] = weakref.ref(model)
    return twin.eval()


_ORIGINALS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def original_of(model: nn.Module) -> nn.Module:
    """Return the network that a twin was made of, or the network itself if it is no twin."""
    known = _ORIGINALS.get(model)
    original = None if known is None else known()
    return model if original is None else original_of(original)


def _copied(model: nn.Module, shared: Memo) -> nn.Module:
    """Copy a network, again if a container changed meanwhile: another thread may be running it."""
    for trial in range(_TRIALS):
        try:
            return _deep_copy(model, dict(shared))
        except failures() as error:
            if trial + 1 == _TRIALS or type(error) is not RuntimeError:
                raise _not_copied(model, error) from error
    raise AssertionError("unreachable")


def _deep_copy(model: nn.Module, memo: Memo) -> nn.Module:
    modes = {path: module.training for path, module in model.named_modules()}
    alive = _replace_uninitialised(model, memo), _detach(model, memo)  # no other object may take their ids
    copied = copy.deepcopy(model, memo)
    for path, module in copied.named_modules():
        module.training = modes.get(path, module.training)
    del alive
    return copied


def _not_copied(model: nn.Module, error: Exception) -> NormfixError:
    return NormfixError(
        "NF208",
        f"the network cannot be deep-copied ({error}), and normfix never changes the one it was given. "
        "Detach what holds graphs, locks or open files.",
        where=type(model).__name__,
    )


def _uncopyable(model: nn.Module, shared: Memo) -> Memo:
    """Return the attributes of modules that cannot be copied, as a memo that shares them."""
    found: Memo = {}
    for module in model.modules():
        for name, value in tuple(vars(module).items()):
            if name in _STATE or isinstance(value, nn.Module | Tensor):
                continue
            try:
                copy.deepcopy(value, dict(shared))
            except TypeError:
                found[id(value)] = value
            except RuntimeError:  # it changed meanwhile, so it is no lock or file
                continue
    return found


def _replace_uninitialised(model: nn.Module, memo: Memo) -> list[Tensor]:
    """Let a deepcopy make new uninitialised tensors for those that torch cannot copy yet."""
    blank: list[Tensor] = [
        cast(Tensor, tensor)
        for tensor in (*model.parameters(), *model.buffers())
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer)
    ]
    for tensor in blank:
        kind: Any = type(tensor)
        memo[id(tensor)] = kind(requires_grad=tensor.requires_grad, device=tensor.device, dtype=tensor.dtype)
    return blank


def _detach(model: nn.Module, memo: Memo) -> list[Tensor]:
    """Let a deepcopy take tensors that a forward pass in training left on a module, without their graph."""
    left = [
        value
        for module in model.modules()
        for value in tuple(vars(module).values())
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    memo.update((id(value), value.detach().clone()) for value in left)
    return left


def as_trained_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy whose batch and instance norms use the statistics of their input also in eval mode.

    This is the function of a network that people run in train mode (pix2pix practice), without the side
    effects of that mode.
    """
    copied = copy_of(model)
    for module in copied.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return copied


def _store(layer: ChannelNorm, moments: Moments) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    with torch.no_grad():
        layer.running_mean.copy_(moments.mean)
        layer.running_var.copy_(moments.var)
        layer.num_batches_tracked.fill_(1)


def _express_group_affine(layer: ChannelNorm, channel: Moments, group: Moments, spec: LayerSpec) -> None:
    """Apply w' = w s_c / s_g,  b' = b + w (m_c - m_g) / s_g  (normfix.rules.group)."""
    s_c, s_g = (channel.var + spec.eps).sqrt(), (group.var + spec.eps).sqrt()
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        w = weight.double().cpu()
        bias.copy_(bias.double().cpu() + w * (channel.mean - group.mean) / s_g)
        weight.copy_(w * s_c / s_g)


def _bottom_up(plan: Plan) -> Iterator[Decision]:
    """Yield swaps first, then interceptions in the order of the calls."""
    yield from (d for d in plan.converted if d.means is Means.SWAP)
    yield from (d for d in plan.converted if d.means is Means.INTERCEPT)


def _swap(root: nn.Module, old: nn.Module, decision: Decision) -> nn.Module:
    new = _new_layer(decision, affine=_needs_affine(decision), like=old if _has_tensors(old) else root)
    _take_affine(new, old, decision)
    _take_statistics(new, old, decision)
    new.train(old.training)
    for name in _HOOKS:
        getattr(new, name).update(getattr(old, name))
    if old is root:
        return new
    for parent in list(root.modules()):
        for name, child in parent._modules.items():  # named_children would skip a second alias
            if child is old:
                parent._modules[name] = new
    return root


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
        target=decision.target.removeprefix(f"{site.anchor}.") if site.anchor else decision.target,
        site=site.id,
        operand=spec.operand if spec else 0,
        dims=spec.dims if spec else (),
    )
    intercept_(anchor, (planned,))


def _wrapped_norm(decision: Decision, owner: nn.Module, like: nn.Module) -> InterceptedNorm:
    spec = decision.site.layer
    assert spec is not None
    norm = _new_layer(decision, affine=_is_regrouped(decision), like=like)
    _take_statistics(norm, owner, decision)
    return InterceptedNorm(norm)


def _constant(decision: Decision, like: nn.Module) -> layers.FrozenStatistic:
    spec = decision.site.statistic
    assert spec is not None
    device, dtype = _home(like)
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
