"""BatchRenorm over all processes: the batch is what every rank sees together, however unequal the shares.

With counts n_k, means m_k and biased variances v_k of the ranks, n = sum n_k:

    mean = sum n_k m_k / n          var = sum n_k (v_k + (m_k - mean)^2) / n

and the gradient of x, with the sums over the positions of all ranks, is batch norm's:

    dx = scale / sigma_b * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfix.layers.base import BatchMoments
from normfix.layers.batchrenorm import (
    BatchRenorm,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    affine_of,
    batch_moments,
)
from normfix.layers.recomputation import RecordedCall

__all__ = [
    "SyncBatchRenorm",
    "SyncBatchRenorm1d",
    "SyncBatchRenorm2d",
    "SyncBatchRenorm3d",
    "synchronise",
]


def synchronise(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Return a copy of the model whose BatchRenorm layers share their batch statistics between processes.

    Wrap the result in DistributedDataParallel and make the optimizer from it. Subclasses of the layers are
    left as they are.

    Args:
        model: any network.
        process_group: whose ranks share a batch; None is all of them.

    Example:
        >>> from torch import nn
        >>> from normfix.layers import BatchRenorm2d, synchronise
        >>> type(synchronise(nn.Sequential(BatchRenorm2d(8)))[0]).__name__
        'SyncBatchRenorm2d'
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) in _SYNCHRONISED:
            module.__class__ = _SYNCHRONISED[type(module)]  # keeps aliases, hooks and tensors
            module.process_group = process_group  # type: ignore[assignment]
    return model


class SyncBatchRenorm(BatchRenorm):
    """BatchRenorm whose batch is spread over processes; abstract over the rank.

    Without an initialised process group, or with one process, it is BatchRenorm. A rank may have an empty
    batch; a batch of at most one value per channel over all ranks leaves the running statistics as they are.
    Gradients are first order only.
    """

    process_group: dist.ProcessGroup | None = None

    def _normalize_live(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.running_mean is None or not self._is_shared():
            return super()._normalize_live(x, weight, bias)
        return self._renormalize(x, weight, bias)

    def _is_shared(self) -> bool:
        available = dist.is_available() and dist.is_initialized()
        return available and dist.get_world_size(self.process_group) > 1

    def _moments(self, x: Tensor) -> BatchMoments:
        if not self._is_shared():
            return super()._moments(x)
        # float64 counts 2^53 voxels exactly
        own = torch.zeros((3, x.shape[1]), dtype=torch.float64, device=x.device)
        if x.numel():
            own[0] = x.numel() // x.shape[1]
            own[1], own[2] = batch_moments(x)
        shares = [torch.empty_like(own) for _ in range(dist.get_world_size(self.process_group))]
        dist.all_gather(shares, own, group=self.process_group)
        counts, means, variances = torch.stack(shares).unbind(1)  # (ranks, 3, c) -> 3 x (ranks, c)
        count = counts.sum(0)
        values = count.clamp_min(1)  # where every rank's batch is empty
        mean = (counts * means).sum(0) / values
        var = (counts * (variances + (means - mean).square())).sum(0) / values
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, var, count = mean.to(dtype), var.to(dtype), count.to(dtype)
        return BatchMoments(mean, var, (var + self.eps).rsqrt(), count)

    def _share(self, batches: Tensor, count: int | Tensor, dtype: torch.dtype) -> Tensor | float:
        share = super()._share(batches, count, dtype)
        # asking whether it is 1 would wait for the device
        return share * (count > 1).to(dtype) if isinstance(count, Tensor) else share

    def _apply_corrections(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: BatchMoments,
        r: Tensor,
        d: Tensor,
        call: RecordedCall | None,
    ) -> Tensor:
        if not isinstance(batch.size, Tensor):
            return super()._apply_corrections(x, weight, bias, batch, r, d, call)
        inputs = (x, weight, bias, *batch, r, d, self.eps, self.process_group, call)
        y: Tensor = _SyncRenormalise.apply(*inputs)
        return y


class SyncBatchRenorm1d(SyncBatchRenorm):
    """Renormalise batches of (n, c) or (n, c, l) spread over processes."""

    _ranks = (2, 3)


class SyncBatchRenorm2d(SyncBatchRenorm):
    """Renormalise batches of (n, c, h, w) spread over processes."""

    _ranks = (4,)


class SyncBatchRenorm3d(SyncBatchRenorm):
    """Renormalise batches of (n, c, d, h, w) spread over processes."""

    _ranks = (5,)


_SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    BatchRenorm1d: SyncBatchRenorm1d,
    BatchRenorm2d: SyncBatchRenorm2d,
    BatchRenorm3d: SyncBatchRenorm3d,
}


class _SyncRenormalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        invstd: Tensor,
        count: Tensor,
        r: Tensor,
        d: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
        call: RecordedCall | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, invstd, count, r, d)
        ctx.eps, ctx.group, ctx.call = eps, group, call
        scale, shift = affine_of(weight, bias, r, d)
        return torch.batch_norm(x, scale, shift, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, invstd, count, r, d = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        scale = r if weight is None else weight * r
        grad_x, own = torch.zeros_like(x), torch.zeros_like(torch.stack((mean, mean)))
        if x.numel():
            grad_x, *sums = torch.ops.aten.native_batch_norm_backward(
                grad, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
            own = torch.stack(sums)  # of dy * xhat and of dy, over this rank
        if needs_x:
            total = own.clone()
            dist.all_reduce(total, group=ctx.group)
            if x.numel():
                of_xhat, constant = total * scale * invstd / count
                grad_x -= torch.batch_norm(x, of_xhat, constant, mean, var, False, 0.0, ctx.eps, False)
        grad_weight = own[0] * r + own[1] * d if needs_weight else None
        grad_bias = own[1] if needs_bias else None
        return grad_x if needs_x else None, grad_weight, grad_bias, *[None] * 9
