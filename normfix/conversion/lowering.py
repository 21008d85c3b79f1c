"""Lower: constants need no layer of ours. `lower` gives stock batch norm, `fold` gives it to a convolution.

`freeze` comes before both: BatchRenorm becomes the layer of constants that it is in eval.

What a convolution's output is used for is observed on an example input, and the folded network is compared
with the original there; without an example only neighbours in a network that is a plain nn.Sequential throughout are
folded. Whatever is left as it was is named, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normfix.conversion.interception import InterceptedNorm
from normfix.conversion.neighbours import Run, neighbours, observe, parents_of
from normfix.layers import BatchRenorm, ChannelNorm
from normfix.layers.folding import (
    BATCH_NORMS,
    FROZEN,
    STOCK,
    TRANSPOSED,
    fold_backward_,
    fold_forward_,
    frozen,
    is_convolution,
    pads_zeros,
    stock,
)
from normfix.networks.randomness import OwnRandomness
from normfix.networks.replacing import is_hooked, replace_
from normfix.records.encoding import Record

__all__ = [
    "Lowering",
    "LoweringRecord",
    "LoweringStep",
    "attempt_fold",
    "fold",
    "freeze",
    "lower",
    "rounding",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweringStep(Record):
    """One layer: what became of it, or why nothing did."""

    path: str
    layer: str
    done: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweringRecord(Record):
    """What was done to each layer, in the order of the model's modules."""

    steps: tuple[LoweringStep, ...]

    @property
    def complete(self) -> bool:
        """Whether no layer was left as it was."""
        return all(step.done for step in self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowering:
    """A new model and the record of how it was made."""

    model: nn.Module
    record: LoweringRecord


def freeze(model: nn.Module) -> Lowering:
    """Replace BatchRenorm by FrozenNorm, also where it serves a call inside its owner's forward, in a copy.

    Outputs in eval are the same to the last bit, state dicts have the same keys, and `train()` changes no norm.

    Example:
        >>> from torch import nn
        >>> from normfix.layers import BatchRenorm2d
        >>> from normfix.conversion.lowering import freeze
        >>> type(freeze(nn.Sequential(BatchRenorm2d(8))).model[0]).__name__
        'FrozenNorm2d'
    """
    return _each_replaced(model, BatchRenorm, lambda _, layer: _why_not_frozen(layer), frozen)


def lower(model: nn.Module) -> Lowering:
    """Replace FrozenNorm and BatchRenorm by stock nn.BatchNorm in eval, in a copy of the model.

    Outputs in eval are the same (to the last bit on the CPU and in float64, to rounding on a GPU), state dicts have the
    same keys, and nothing of normfix is needed to load them. On a GPU stock batch norm is slow at a batch of one, which
    the steps say; `fold` is not. A stock layer obeys `train()`, which brings batch statistics back.

    Example:
        >>> from torch import nn
        >>> from normfix.layers import FrozenNorm2d
        >>> from normfix import lower
        >>> lower(nn.Sequential(FrozenNorm2d(8))).record.steps[0].detail
        'became BatchNorm2d in eval'
    """
    on_gpu = any(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
    slow = "; on this GPU it takes 2 to 35 times a copy of its operand at a batch of one, which fold avoids"
    return _each_replaced(model, ChannelNorm, _why_not_lowered, stock, " in eval" + slow * on_gpu)


def fold(model: nn.Module, example: Tensor | tuple[Any, ...] | None = None) -> Lowering:
    """Fold norms by constants into the neighbouring convolution, where that is exact, in a copy of the model.

    Folds FrozenNorm, BatchRenorm in its eval form and stock BatchNorm in eval. The result is for inference.

    Args:
        model: any network.
        example: input, or tuple of inputs, on which to observe the data flow and to compare the result with
            the original; if the outputs differ, nothing is folded and every step says so.

    Example:
        >>> from torch import nn
        >>> from normfix.layers import FrozenNorm2d
        >>> from normfix import fold
        >>> fold(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), FrozenNorm2d(8))).record.steps[0].detail
        'folded into the convolution 0 before it'
    """
    if example is None:
        return attempt_fold(model)
    given = _as_tuple(example)

    def run(network: nn.Module) -> Any:
        with OwnRandomness():  # the same numbers for both, and none of the caller's
            return network(*copy.deepcopy(given))

    return _compared(model, attempt_fold(model, run), run)


def attempt_fold(model: nn.Module, run: Run | None = None) -> Lowering:
    """Fold as `fold` does, and leave it to the caller to compare outputs.

    Args:
        model: any network.
        run: runs a network on an example, by which the data flow is observed; returns all it returns.
    """
    folded = copy.deepcopy(model)
    paths = {module: path for path, module in folded.named_modules()}
    flow = neighbours(folded) if run is None else observe(folded, run)
    steps = []
    for path, norm in list(folded.named_modules()):
        if not (isinstance(norm, ChannelNorm) or type(norm) in BATCH_NORMS):
            continue
        before, after = flow(norm)
        reason = _why_not_folded(folded, norm, before, after, observed=run is not None, paths=paths)
        detail = reason
        if not reason and is_convolution(before):
            fold_backward_(before, norm)
            detail = f"folded into the convolution {paths[before]} before it"
        elif not reason:
            fold_forward_(norm, after)
            detail = f"folded into the convolution {paths[after]} behind it"
        if not reason:
            folded = replace_(folded, {norm: nn.Identity()})
        steps.append(LoweringStep(path=path, layer=type(norm).__name__, done=not reason, detail=detail))
    return Lowering(model=folded, record=LoweringRecord(steps=tuple(steps)))


def rounding(dtype: torch.dtype) -> float:
    """Return by how many sd of its output a folded network may differ: weights are rounded once more."""
    return min(0.1, 1e4 * torch.finfo(dtype).eps)


def _each_replaced(
    model: nn.Module,
    kind: type[ChannelNorm],
    why_not: Callable[[nn.Module, ChannelNorm], str],
    make: Callable[[ChannelNorm], nn.Module],
    ending: str = "",
) -> Lowering:
    """Replace every layer of a kind, where nothing speaks against it, in a copy of the model."""
    model = copy.deepcopy(model)
    steps, new = [], dict[nn.Module, nn.Module]()
    for path, layer in model.named_modules():
        if not isinstance(layer, kind):
            continue
        detail = reason = why_not(model, layer)
        if not reason:
            new[layer] = make(layer)
            detail = f"became {type(new[layer]).__name__}{ending}"
        steps.append(LoweringStep(path=path, layer=type(layer).__name__, done=not reason, detail=detail))
    return Lowering(model=replace_(model, new), record=LoweringRecord(steps=tuple(steps)))


def _why_not_frozen(layer: ChannelNorm) -> str:
    if type(layer) not in FROZEN:
        return "it is a subclass, which may compute more than its base"
    if layer.running_mean is None:
        return "it keeps no running statistics, so it has no constants"
    return _why_bound(layer)


def _why_not_lowered(model: nn.Module, layer: ChannelNorm) -> str:
    if type(layer) not in STOCK:
        return "it is a subclass, which may compute more than its base"
    if layer.running_mean is None:
        return "it keeps no running statistics, so it has no constants"
    return _why_not_replaced(model, layer)


def _why_live(model: nn.Module, batch_norm: nn.Module) -> str:
    if batch_norm.training or batch_norm.running_mean is None:
        return "it normalises by batch statistics; call eval() first, or keep running statistics"
    return _why_not_replaced(model, batch_norm)


def _why_not_replaced(model: nn.Module, layer: nn.Module) -> str:
    if reason := _why_bound(layer):
        return reason
    if any(isinstance(parent, InterceptedNorm) for parent in parents_of(model, layer)):
        return "it serves a call inside its owner's forward; torch.export leaves plain batch norm of it"
    return ""


def _why_bound(layer: nn.Module) -> str:
    if is_hooked(layer):
        return "it carries hooks, which would be lost"
    if "forward" in layer.__dict__:
        return "its forward is set on the instance"
    return ""


def _why_not_folded(
    model: nn.Module,
    norm: nn.Module,
    before: nn.Module | None,
    after: nn.Module | None,
    *,
    observed: bool,
    paths: Mapping[nn.Module, str],
) -> str:
    if reason := _why_not_lowered(model, norm) if isinstance(norm, ChannelNorm) else _why_live(model, norm):
        return reason
    if is_convolution(before):
        return _why_conv_stays(before)
    if not is_convolution(after):
        if observed:
            return "no convolution feeds only it or is fed only by it, so there is nothing to fold it into"
        return (
            "no convolution is its neighbour in a network that is a plain nn.Sequential throughout; give an example "
            "input, on which the data flow can be observed"
        )
    if type(after) in TRANSPOSED:
        return (
            f"the convolution {paths[after]} behind it is transposed: outputs do not see every kernel weight"
        )
    if pads_zeros(after):
        return (
            f"the convolution {paths[after]} behind it pads zeros, which the norm does not shift: "
            f"the border would change"
        )
    return _why_conv_stays(after)


def _why_conv_stays(conv: nn.Module) -> str:
    return "the convolution carries hooks, which may rely on its output" if is_hooked(conv) else ""


@torch.no_grad()
def _compared(original: nn.Module, done: Lowering, run: Run) -> Lowering:
    outputs = (run(copy.deepcopy(network).eval()) for network in (original, done.model))
    pairs = zip(*map(tree_leaves, outputs), strict=True)
    gaps = [_gap(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]
    worst = max((gap for gap, _ in gaps), default=0.0)
    if all(gap <= limit for gap, limit in gaps):
        return done
    reason = f"not folded: the folded network's output differed by {worst:.1e} sd on the example"
    steps = tuple(
        LoweringStep(path=s.path, layer=s.layer, done=False, detail=reason if s.done else s.detail)
        for s in done.record.steps
    )
    return Lowering(model=copy.deepcopy(original), record=LoweringRecord(steps=steps))


def _gap(original: Tensor, folded: Tensor) -> tuple[float, float]:
    sd = original.double().std(correction=0).item() or 1.0
    return (original - folded).abs().max().item() / sd, rounding(original.dtype)


def _as_tuple(example: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    return example if isinstance(example, tuple) else (example,)
