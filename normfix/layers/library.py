"""BatchRenorm on a GPU in the time of batch norm: its vectors in one launch, and cuDNN's passes over the values.

    forward    xhat * weight + bias       by cuDNN, which takes the statistics on the way
               y = that * r + (bias + weight * d - bias * r)      in place, once r and d are known
    backward   cuDNN's, with weight * r: r and d carry no gradient, so it *is* batch norm's with that weight

What cuDNN does not take (bfloat16, no affine, rank 2) goes the way of normfix.layers.batchrenorm, its vectors in one
launch where Triton is. Without Triton the vectors are torch's.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from normfix.layers.recomputation import Call, recall, remember

if TYPE_CHECKING:
    from normfix.layers.batchrenorm import BatchRenorm

__all__ = ["Corrections", "corrections", "is_for", "renormalise"]

_FEWEST_DIMENSIONS = 3


class Corrections(NamedTuple):
    """r, d and what follows from them, all (c,): see normfix.layers.corrections."""

    r: Tensor
    d: Tensor
    scale: Tensor
    shift: Tensor
    rest: Tensor
    var: Tensor
    invstd: Tensor


class Pass(NamedTuple):
    """What batch norm's forward leaves: its output, and what its backward wants."""

    output: Tensor
    mean: Tensor
    invstd: Tensor
    reserve: Tensor
    library: int


def is_for(layer: BatchRenorm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Tell whether cuDNN's batch norm takes this, and nothing follows what is computed but autograd."""
    return (
        x.is_cuda
        and x.dtype == torch.float32
        and x.dim() >= _FEWEST_DIMENSIONS
        and x.numel() < 1 << 31
        and weight is not None
        and bias is not None
        and torch.backends.cudnn.enabled
        and _takes(layer, x, weight, bias)
    )


def corrections(
    layer: BatchRenorm,
    mean: Tensor,
    spread: Tensor,
    count: int | Tensor,
    affine: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    inverted: bool,
) -> Corrections | None:
    """Compute the corrections and track the batch in one launch; None where that cannot be."""
    weight, bias = affine
    if isinstance(count, Tensor) or not mean.is_cuda or not _takes(layer, mean, weight, bias):
        return None
    kernels = _kernels()
    if kernels is None or mean.numel() > kernels.MOST:
        return None
    buffers: dict[str, Any] = layer._buffers
    running = tuple(buffers[name] for name in ("running_mean", "running_var", "num_batches_tracked"))
    found = kernels.corrected(
        mean,
        spread,
        running,
        (buffers["r_max"], buffers["d_max"]),
        affine,
        inverted=inverted,
        eps=layer.eps,
        count=count,
        momentum=layer.momentum,
    )
    return Corrections(*found.unbind())


def renormalise(layer: BatchRenorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise as BatchRenorm does, by cuDNN."""
    with torch.no_grad():
        found = Pass(
            *torch.ops.aten._batch_norm_impl_index(x, weight, bias, None, None, True, 0.0, layer.eps, True)
        )
        count = x.numel() // x.shape[1]
        var = found.invstd.square().reciprocal_().sub_(layer.eps).clamp_(min=0) if _repeats() else None
        call = None if var is None else recall(layer, found.mean, var)
        if call is None:
            made = corrections(layer, found.mean, found.invstd, count, (weight, bias), inverted=True)
            if made is None:
                made = _by_torch(layer, found, count, weight, bias)
            call, rest = Call(mean=found.mean, var=made.var, r=made.r, d=made.d), made.rest
            made_now = True
        else:
            rest = torch.addcmul(bias, weight, call.d).addcmul_(bias, call.r, value=-1)
            made_now = False
    y: Tensor = _ByLibrary.apply(x, weight, bias, found, rest, call, layer.eps)
    if made_now:
        remember(layer, call, held_by_graph=y.requires_grad)
    return y


def _repeats() -> bool:
    """Tell whether a backward is under way, in which calls may be repeated."""
    return bool(torch._C._current_graph_task_id() != -1)


def _by_torch(layer: BatchRenorm, found: Pass, count: int, weight: Tensor, bias: Tensor) -> Corrections:
    from normfix.layers.batchrenorm import Moments

    var = found.invstd.square().reciprocal_().sub_(layer.eps).clamp_(min=0)
    r, d = layer._correct_and_track(Moments(found.mean, var, found.invstd, count))
    shift = torch.addcmul(bias, weight, d)
    return Corrections(r, d, weight * r, shift, torch.addcmul(shift, bias, r, value=-1), var, found.invstd)


def _takes(layer: BatchRenorm, *tensors: Tensor | None) -> bool:
    buffers: dict[str, Any] = layer._buffers
    statistics = (buffers["running_mean"], buffers["running_var"])
    return all(
        t is None or (t.dtype == torch.float32 and t.is_cuda) for t in (*tensors, *statistics)
    ) and not (torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None)


@cache
def _kernels() -> ModuleType | None:
    try:
        from normfix.layers import corrections as kernels
    except ImportError:  # no Triton
        return None
    return kernels


class _ByLibrary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        found: Pass,
        rest: Tensor,
        call: Call,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, found.mean, found.invstd, found.reserve, call.r, call.d)
        ctx.eps, ctx.call, ctx.library = eps, call, found.library
        shape = (1, -1, *(1,) * (x.dim() - 2))
        y = found.output
        return torch.addcmul(rest.view(shape), y, call.r.view(shape), out=y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, reserve, r, d = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x, grad_scale, grad_shift = torch.ops.aten._batch_norm_impl_index_backward(
            ctx.library, x, grad, weight * r, None, None, mean, invstd, True, ctx.eps, [True] * 3, reserve
        )
        grad_weight = torch.addcmul(grad_scale * r, grad_shift, d) if needs_weight else None
        return grad_x if needs_x else None, grad_weight, grad_shift if needs_bias else None, *[None] * 4
