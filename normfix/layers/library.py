"""BatchRenorm on a GPU without Triton: cuDNN's passes over the values, and some twenty launches for the vectors.

    forward    xhat * weight + bias       by cuDNN, which takes the statistics on the way
               y = that * r + (bias + weight * d - bias * r)      in place, once r and d are known
    backward   cuDNN's, with weight * r: r and d carry no gradient, so it *is* batch norm's with that weight

What cuDNN does not take (bfloat16, no affine, rank 2) goes the way of normfix.layers.batchrenorm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from normfix.layers.affine import is_followed
from normfix.layers.base import BatchMoments
from normfix.layers.recomputation import RecordedCall, in_backward, recall, remember

if TYPE_CHECKING:
    from normfix.layers.batchrenorm import BatchRenorm

__all__ = ["is_for", "renormalise"]

_FEWEST_DIMENSIONS = 3


class Corrections(NamedTuple):
    """r, d, weight * r, bias + weight * d - bias * r and var, all (c,)."""

    r: Tensor
    d: Tensor
    scale: Tensor
    rest: Tensor
    var: Tensor


class Pass(NamedTuple):
    """What batch norm's forward leaves: its output, and what its backward wants."""

    output: Tensor
    mean: Tensor
    invstd: Tensor
    reserve: Tensor
    library: int


def is_for(layer: BatchRenorm, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Tell whether cuDNN's batch norm takes this, and nothing follows what is computed but autograd."""
    return (
        x.is_cuda
        and x.dtype == torch.float32
        and x.dim() >= _FEWEST_DIMENSIONS
        and x.numel() < 1 << 31
        and torch.backends.cudnn.enabled
        and _takes(layer, x, weight, bias)
    )


def renormalise(layer: BatchRenorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise as BatchRenorm does, by cuDNN."""
    with torch.no_grad():
        found = Pass(*_FORWARD(x, weight, bias, None, None, True, 0.0, layer.eps, True))
        call = recall(layer, found.mean, _variance(found, layer.eps)) if in_backward() else None
        if call is not None:
            made = _of(call, weight, bias)
        else:
            made = _by_torch(layer, found, x.numel() // x.shape[1], weight, bias)
    repeated = call is not None
    call = call or RecordedCall(vectors=(found.mean, made.var, made.r, made.d))
    y: Tensor = _ByLibrary.apply(x, weight, bias, found, made, call, layer.eps)
    if not repeated:
        remember(layer, call, held_by_graph=y.requires_grad)
    return y


_FORWARD = torch.ops.aten._batch_norm_impl_index.default
_BACKWARD = torch.ops.aten._batch_norm_impl_index_backward.default


def _of(call: RecordedCall, weight: Tensor, bias: Tensor) -> Corrections:
    return _with_affine(call.r, call.d, call.var, weight, bias)


def _variance(found: Pass, eps: float) -> Tensor:
    return found.invstd.square().reciprocal_().sub_(eps).clamp_(min=0)


def _by_torch(layer: BatchRenorm, found: Pass, count: int, weight: Tensor, bias: Tensor) -> Corrections:
    var = _variance(found, layer.eps)
    r, d = layer._correct_and_track(BatchMoments(found.mean, var, found.invstd, count))
    return _with_affine(r, d, var, weight, bias)


def _with_affine(r: Tensor, d: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Corrections:
    rest = torch.addcmul(bias, weight, d).addcmul_(bias, r, value=-1)
    return Corrections(r, d, weight * r, rest, var)


def _takes(layer: BatchRenorm, *tensors: Tensor | None) -> bool:
    buffers: dict[str, Any] = layer._buffers
    statistics = (buffers["running_mean"], buffers["running_var"])
    return (
        all(t is None or (t.dtype == torch.float32 and t.is_cuda) for t in (*tensors, *statistics))
        and not is_followed()
    )


class _ByLibrary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        found: Pass,
        made: Corrections,
        call: RecordedCall,
        eps: float,
    ) -> Tensor:
        r, d, scale, rest, _ = made
        ctx.save_for_backward(x, weight, found.mean, found.invstd, found.reserve, r, d, scale)
        ctx.eps, ctx.call, ctx.library = eps, call, found.library
        shape = (1, -1, *(1,) * (x.dim() - 2))
        y = found.output
        return torch.addcmul(rest.view(shape), y, r.view(shape), out=y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, reserve, r, d, scale = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again
            scale = weight * r
        grad_x, grad_scale, grad_shift = _BACKWARD(
            ctx.library, x, grad, scale, None, None, mean, invstd, True, ctx.eps, [True] * 3, reserve
        )
        grad_weight = torch.addcmul(grad_scale * r, grad_shift, d) if needs_weight else None
        return grad_x if needs_x else None, grad_weight, grad_shift if needs_bias else None, *[None] * 4
