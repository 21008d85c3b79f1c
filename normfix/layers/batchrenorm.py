"""BatchRenorm (Ioffe 2017, arXiv:1702.03275): train on the statistics that inference will use.

    sigma_b = sqrt(var_b + eps), var_b biased
    sigma = sqrt(running_var + eps), running_var before its update
    r = clip(sigma_b / sigma, 1 / r_max, r_max)
    d = clip((mean_b - running_mean) / sigma, -d_max, d_max)
    y = ((x - mean_b) / sigma_b * r + d) * weight + bias

Gradients flow through mean_b and sigma_b but not through r and d. With r_max = 1 and d_max = 0 this is batch
norm; where nothing is clipped, y is what inference gives with the running statistics.

r and d only change the affine: y = xhat * (weight * r) + (bias + weight * d). So one pass takes the
statistics, one call of batch norm in its eval form gives y, and batch norm's own backward, given weight * r,
gives the gradients; what is kept for it beyond batch norm's is a few vectors of one value per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from normfix.layers import fused, library
from normfix.layers.base import BatchMoments, ChannelNorm
from normfix.layers.recomputation import RecordedCall, keep, recall, remember

__all__ = ["BatchRenorm", "BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"]


class BatchRenorm(ChannelNorm):
    """Normalise by batch statistics, corrected towards the running ones; abstract over the rank.

    In eval, nn.BatchNorm: to the last bit on the CPU and in float64, to rounding on a GPU. A layer that has
    seen no batch treats its first as batch norm does.
    `r_max` and `d_max` are 0-d buffers outside the state dict, which RenormSchedule writes. A `held` layer
    normalises as in eval in either mode; as with `training`, that is no part of the state dict.

    Args:
        num_features: number of channels c of an input (n, c, *space).
        eps: added to each variance inside the root.
        momentum: weight of a new batch in the running statistics; None gives every batch the same weight.
        affine: hold a weight and a bias per channel.
        track_running_stats: without them there is nothing to correct towards, and the layer is batch norm.
        r_max: largest correction of the scale, at least 1.
        d_max: largest correction of the shift, in running standard deviations.
        device: where the tensors are made.
        dtype: of parameters and statistics.

    Raises:
        ValueError: r_max is below 1 or d_max below 0.
    """

    r_max: Tensor
    d_max: Tensor
    held = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (r_max >= 1 and d_max >= 0):
            raise ValueError(f"r_max must be at least 1 and d_max at least 0, got {r_max} and {d_max}")
        super().__init__(num_features, eps, affine, track_running_stats, device, dtype)
        self.momentum = momentum
        self.r_limit = float(r_max)  # where a schedule ends
        self.d_limit = float(d_max)
        self.register_buffer("r_max", torch.empty((), device=device), persistent=False)
        self.register_buffer("d_max", torch.empty((), device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to the state of a new layer, r_max and d_max included."""
        super().reset_parameters()
        self.set_bounds_(self.r_limit, self.d_limit)

    def set_bounds_(self, r_max: float, d_max: float) -> None:
        """Write the bounds of the corrections in place, without waiting for the device."""
        self.r_max.fill_(r_max)
        self.d_max.fill_(d_max)

    def hold_(self, held: bool = True) -> None:
        """Normalise by the running statistics, unchanged, in training mode too; or no longer."""
        self.held = held

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise x with the given affine in place of the layer's own.

        Raises:
            ValueError: x has a rank or a number of channels the layer is not for, or a single value per
                channel where batch statistics are needed.
        """
        self._check_input(x)
        if self.running_mean is not None and (self.held or not self.training):
            return self._normalize_by_constants(x, weight, bias)
        if torch._C._len_torch_function_stack() == 0 or not self.training:
            return self._normalize_live(x, weight, bias)
        with torch._C.DisableTorchFunction():  # whoever counts the calls of a forward counts the same in eval
            return self._normalize_live(x, weight, bias)

    def extra_repr(self) -> str:
        """Show the arguments as nn.BatchNorm does; r_max and d_max as they were given."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, r_max={self.r_limit:g}, d_max={self.d_limit:g}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.r_max.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.r_max.is_meta:  # no state dict will fill in what to_empty left
            self.set_bounds_(self.r_limit, self.d_limit)
        return self

    def _normalize_live(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.size()}"
            )
        if self.running_mean is None or x.numel() == 0:
            return self._normalize_by_batch(x, weight, bias)
        return self._renormalize(x, weight, bias) if x.is_cpu else self._renormalize_there(x, weight, bias)

    def _renormalize_there(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if fused.is_for(self, x, weight, bias):
            return fused.renormalise(self, x, weight, bias)
        if weight is not None and bias is not None and library.is_for(self, x, weight, bias):
            return library.renormalise(self, x, weight, bias)
        return self._renormalize(x, weight, bias)

    def _normalize_by_batch(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)  # all that an empty batch changes in BatchNorm
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, self.eps, cudnn)

    def _renormalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        batch = self._moments(x.detach())
        if torch.compiler.is_compiling():
            return self._apply_corrections(x, weight, bias, batch, *self._correct_and_track(batch), None)
        call = recall(self, batch.mean, batch.var)
        if call is not None:
            return self._apply_corrections(x, weight, bias, batch, call.r, call.d, call)
        r, d = self._correct_and_track(batch)
        call = RecordedCall(vectors=(batch.mean, batch.var, r, d))
        y = self._apply_corrections(x, weight, bias, batch, r, d, call)
        remember(self, call, held_by_graph=y.requires_grad)
        return y

    def _moments(self, x: Tensor) -> BatchMoments:
        mean, var = batch_moments(x)
        return BatchMoments(mean, var, (var + self.eps).rsqrt(), x.numel() // x.shape[1])

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
        y: Tensor = Renormalise.apply(
            x, weight, bias, batch.mean, batch.var, batch.invstd, r, d, self.eps, call
        )
        return y

    def _correct_and_track(self, batch: BatchMoments) -> tuple[Tensor, Tensor]:
        # few operations and look-ups: on small inputs they are what the layer costs
        mean, var, invstd, count = batch
        buffers: dict[str, Any] = self._buffers
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        batches, r_max, d_max = buffers["num_batches_tracked"], buffers["r_max"], buffers["d_max"]
        seen = batches.clamp(max=1)  # 0 in a fresh layer, which closes the bounds
        r_max = r_max.to(mean.dtype) ** seen
        running_invstd = (running_var.to(mean.dtype) + self.eps).rsqrt()
        r = (running_invstd / invstd).clamp(r_max.reciprocal(), r_max)
        d = ((mean - running_mean) * running_invstd).clamp(-d_max, d_max) * seen
        if torch.compiler.is_dynamo_compiling():  # before torch 2.14 Dynamo takes is_exporting() for true
            r, d = keep(torch.stack((r, d))).unbind()
        batches.add_(1)
        share = self._share(batches, count, running_mean.dtype)
        # by torch's convention
        unbiased = var * (count / (count - 1 if isinstance(count, int) else (count - 1).clamp_min(1)))
        running_mean.lerp_(mean.to(running_mean.dtype), share)
        running_var.lerp_(unbiased.to(running_var.dtype), share)
        return r, d

    def _share(self, batches: Tensor, count: int | Tensor, dtype: torch.dtype) -> Tensor | float:
        return batches.to(dtype).reciprocal() if self.momentum is None else self.momentum


class BatchRenorm1d(BatchRenorm):
    """Renormalise batches of (n, c) or (n, c, l)."""

    _ranks = (2, 3)


class BatchRenorm2d(BatchRenorm):
    """Renormalise batches of (n, c, h, w).

    Example:
        >>> import torch
        >>> from normfix.layers import BatchRenorm2d
        >>> layer = BatchRenorm2d(3)
        >>> layer.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
        >>> layer(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """

    _ranks = (4,)


class BatchRenorm3d(BatchRenorm):
    """Renormalise batches of (n, c, d, h, w)."""

    _ranks = (5,)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    space = [dim for dim in range(x.ndim) if dim != 1]
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        var, mean = torch.var_mean(x.to(dtype), space, correction=0)
        return mean, var
    if _sums_are_faster(x):
        mean = x.mean(space)
        return mean, (x - mean.view(-1, *[1] * (x.ndim - 2))).square_().mean(space)
    # scratch only for the dtype of the results, which is that of x otherwise
    scratch = x.new_zeros((x.shape[1],), dtype=dtype) if dtype != x.dtype else None
    mean, var = torch.batch_norm_update_stats(x, scratch, scratch, 0.0)
    return mean, var


def _sums_are_faster(x: Tensor) -> bool:
    # torch's own pass is scalar code on CPU; sums are vectorised along contiguous memory
    return x.is_cpu and x.dtype == torch.float32 and x.is_contiguous() and x.shape[2:].numel() >= _LONG_ROW


_LONG_ROW = 64  # values of a channel in one sample


def affine_of(weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight * r and bias + weight * d, where a missing weight is 1 and a missing bias 0."""
    if weight is None:
        return r, d if bias is None else d + bias
    return weight * r, weight * d if bias is None else torch.addcmul(bias, weight, d)


class Renormalise(torch.autograd.Function):
    """y = xhat * (weight * r) + (bias + weight * d), differentiated as batch norm with r and d constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        invstd: Tensor,
        r: Tensor,
        d: Tensor,
        eps: float,
        call: RecordedCall | None,
    ) -> Tensor:
        # setup_context, which torch.func wants, would cost as much as all of the per-channel arithmetic
        ctx.save_for_backward(x, weight, mean, invstd, r, d)
        ctx.eps, ctx.call = eps, call
        scale, shift = affine_of(weight, bias, r, d)
        return torch.batch_norm(x, scale, shift, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, r, d = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        scale = r if weight is None else weight * r
        needs = [needs_x, needs_weight, needs_weight or needs_bias]
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, invstd, True, ctx.eps, needs
        )
        grad_weight = torch.addcmul(grad_scale * r, grad_shift, d) if needs_weight else None
        return grad_x, grad_weight, grad_shift if needs_bias else None, *[None] * 7
