"""Fill a library's network of BatchNorms with a converted network's constants and weights, in float64.

A norm by constants is y = (x - mean) / sqrt(var + eps) * weight + bias per channel. A BatchNorm with another eps'
holds it with var' = max(var + eps - eps', 0) and weight' = weight * sqrt(var' + eps') / sqrt(var + eps), which is
weight wherever var' is positive. Norms belong together by the order in which one forward pass calls them; all else by
its name, and what the library names otherwise by the order of calls as well. A convolution whose bias the library
leaves out before a BatchNorm gives it to the norm: x - mean = (x - bias) - (mean - bias).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normfix.conversion.interception import InterceptedNorm
from normfix.conversion.neighbours import observe
from normfix.giving.refusals import Unfit
from normfix.layers import ChannelNorm

__all__ = ["fill_"]

Run = Callable[[nn.Module], Any]


@dataclass(frozen=True, slots=True)
class _Constants:
    """What one call of a norm does, and the module that does it."""

    module: nn.Module
    mean: Tensor
    var: Tensor
    eps: float
    weight: Tensor | None
    bias: Tensor | None

    @property
    def channels(self) -> int:
        return self.mean.numel()

    def equals(self, other: _Constants) -> bool:
        """Tell whether both calls do the same."""
        pairs = ((self.mean, other.mean), (self.var, other.var))
        affine = ((self.weight, other.weight), (self.bias, other.bias))
        same = all(torch.equal(mine, theirs) for mine, theirs in pairs)
        return same and self.eps == other.eps and all(_equal(*pair) for pair in affine)


@dataclass(frozen=True, slots=True)
class _Calls:
    """One forward pass: the norms' calls, and the other modules that hold state, each in order."""

    norms: list[_Constants]
    others: list[str]


def fill_(library: nn.Module, converted: nn.Module, run: Run) -> None:
    """Fill the library's network in place.

    Args:
        library: in eval mode and float64.
        converted: likewise; not modified.
        run: runs either on one input.

    Raises:
        Unfit: NF551 if it has other norms, or no place for a weight.
    """
    theirs, own = _calls(converted, run), _calls(library, run)
    if [c.channels for c in theirs.norms] != [c.channels for c in own.norms]:
        raise _unfit(
            f"it calls {len(own.norms)} BatchNorms, where the converted network calls {len(theirs.norms)} norms by "
            "constants, or of other channels"
        )
    pairs = list(zip(own.norms, theirs.norms, strict=True))
    left = _carry_(library, converted, own, theirs)
    shifts = _shifts(converted, left, run)
    filled: dict[nn.Module, _Constants] = {}
    for mine, source in pairs:
        shift = shifts.get(source.module)
        constants = source if shift is None else replace(source, mean=source.mean - shift)
        known = filled.setdefault(mine.module, constants)
        if not known.equals(constants):
            raise _unfit(
                "it normalises twice with one BatchNorm, where the converted network has two sets of constants"
            )
        _write_(mine.module, constants)


def _calls(network: nn.Module, run: Run) -> _Calls:
    calls, handles = _Calls([], []), []
    inner = {module.norm for module in network.modules() if isinstance(module, InterceptedNorm)}

    def watch(path: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if _is_norm(module):
                calls.norms.append(_constants_of(module, args))
            elif path not in calls.others:
                calls.others.append(path)

        handles.append(module.register_forward_pre_hook(before))

    for path, module in network.named_modules():
        if module not in inner and (_is_norm(module) or module._parameters or module._buffers):
            watch(path, module)
    try:
        with torch.no_grad():
            run(network)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, ChannelNorm | InterceptedNorm | _BatchNorm)


def _constants_of(module: Any, args: Sequence[Any]) -> _Constants:
    """Return what a call does; an intercepted one brings an affine map of its own."""
    norm = module.norm if isinstance(module, InterceptedNorm) else module
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise _unfit("one of its BatchNorms keeps no running statistics, or does not obey eval")
    weight, bias = norm.weight, norm.bias
    if isinstance(module, InterceptedNorm):
        weight, bias = _composed(weight, bias, *args[1:3])
    return _Constants(module, norm.running_mean, norm.running_var, norm.eps, weight, bias)


def _composed(
    scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the affine map of a call after the norm's own: w (s x + t) + b."""
    if scale is None or shift is None:
        return weight, bias
    if weight is not None:
        scale, shift = weight * scale, weight * shift
    return scale, shift if bias is None else shift + bias


def _carry_(library: nn.Module, converted: nn.Module, own: _Calls, theirs: _Calls) -> dict[str, Tensor]:
    """Carry over all that is no norm's; return what there was no place for."""
    renamed = (
        dict(zip(own.others, theirs.others, strict=False)) if len(own.others) == len(theirs.others) else {}
    )
    norms, layers = {c.module for c in own.norms}, {c.module for c in theirs.norms}
    given = dict(_state(converted, layers))
    used = {tensor.data_ptr() for c in theirs.norms for tensor in (c.weight, c.bias) if tensor is not None}
    for name, tensor in _state(library, norms):
        path, _, attribute = name.rpartition(".")
        value = given.get(name)
        if value is None or value.shape != tensor.shape:
            value = given.get(_joined(renamed.get(path, path), attribute))
        if value is None:
            value = _standing_in(library.get_submodule(path), attribute, tensor)
        if value is None or value.shape != tensor.shape:
            raise _unfit(f"the converted network has no {name} of shape {tuple(tensor.shape)}")
        used.add(value.data_ptr())
        tensor.copy_(value)
    return {name: tensor for name, tensor in given.items() if tensor.data_ptr() not in used}


def _state(network: nn.Module, but: set[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Return a network's state under each of its names, but that of some modules and below them."""
    names = network.state_dict(keep_vars=True)
    places = [path for path, module in network.named_modules(remove_duplicate=False) if module in but]
    outside = tuple(f"{path}." for path in places)
    for name, tensor in names.items():
        if not name.startswith(outside) or not outside:
            yield name, tensor.detach()


def _joined(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def _standing_in(module: nn.Module, attribute: str, tensor: Tensor) -> Tensor | None:
    """Return what stands for state that the converted network lacks: no bias is 0; an uncalled norm's is as built."""
    if isinstance(module, _BatchNorm):
        return tensor.clone()
    return torch.zeros_like(tensor) if attribute == "bias" else None


def _shifts(converted: nn.Module, left: Mapping[str, Tensor], run: Run) -> dict[nn.Module, Tensor]:
    """Return what the mean of each norm takes over: biases of convolutions that feed it alone."""
    if not left:
        return {}
    flow = observe(converted, run)
    feeders = {before: norm for norm in converted.modules() if (before := flow(norm)[0]) is not None}
    shifts = {}
    for name, tensor in left.items():
        path, _, attribute = name.rpartition(".")
        norm = feeders.get(converted.get_submodule(path)) if attribute == "bias" else None
        if norm is None:
            raise _unfit(f"it has no place for {name}")
        shifts[norm] = tensor
    return shifts


@torch.no_grad()
def _write_(norm: Any, constants: _Constants) -> None:
    spread = constants.var + constants.eps
    var = (spread - norm.eps).clamp_min(0)
    # the same bits where eps is the same
    var = constants.var if constants.eps == norm.eps else var
    scale = ((var + norm.eps) / spread).sqrt()
    weight = scale if constants.weight is None else constants.weight * scale
    bias = torch.zeros_like(scale) if constants.bias is None else constants.bias
    if norm.weight is None and not (bool((weight == 1).all()) and bool((bias == 0).all())):
        raise _unfit("its BatchNorms have no weight and bias, which the converted network's norms have")
    norm.running_mean.copy_(constants.mean)
    norm.running_var.copy_(var)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(1)
    if norm.weight is not None:
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _unfit(why: str) -> Unfit:
    return Unfit("NF551", f"{why}.")
