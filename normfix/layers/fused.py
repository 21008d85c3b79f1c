"""BatchRenorm in training on a GPU, by the Triton kernels of normfix.layers.passes.

At most three launches forward and three backward, one and one on small maps, instead of some thirty. What is small
costs Python and launches, not computation: so what follows from the shape is worked out once (`Plan`), a compiled
kernel is launched without Triton's dispatch, and r, d and their kin are rows of one tensor.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normfix.layers import passes
from normfix.layers.recomputation import RecordedCall, recall, remember

if TYPE_CHECKING:
    from normfix.layers.batchrenorm import BatchRenorm

TILE = 8192
WARPS = 8
PROGRAMS = 8
ONCE = 8
LAST = 64
DIRECT = True


class Plan:
    """What follows from a shape, a layout and a device: how the map is cut, and the kernels compiled for it."""

    def __init__(self, shape: tuple[int, ...], last: bool, device: torch.device) -> None:
        n, c, inner = shape[0], shape[1], 1
        for extent in shape[2:]:
            inner *= extent
        self.count = n * inner
        self.c, self.last = c, last
        self.compiled: dict[Any, Any] = {}
        if last:
            n, inner = n * inner, 1
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        self.once = self._cut(n, inner, min(LAST, 16)) <= ONCE
        if not self.once:
            self._cut(n, inner, LAST)
        splits = max(1, min(PROGRAMS * processors // self.blocks, self.tiles, 1024))
        if self.once:
            splits = 1
        self.per = -(-self.tiles // splits)
        self.splits = -(-self.tiles // self.per)
        self.sizes = (n, c, inner, self.per)
        self.cut = (last, self.rows, self.columns)
        # few kinds, for each is compiled
        wide = next(w for w in (16, 128, 1024) if w >= self.splits)
        block = 1024 // wide
        self.merging = (block, wide)
        self.grid = (self.blocks * self.splits, 1, 1)
        self.mergers = (-(-c // block), 1, 1)

    def _cut(self, n: int, inner: int, widest: int) -> int:
        if self.last:
            self.columns = min(max(_power(self.c), 4), widest)
            self.blocks = -(-self.c // self.columns)
        else:
            self.columns = min(max(_power(inner), 64), TILE)
            self.blocks = self.c
        self.rows = TILE // self.columns
        across = 1 if self.last else -(-inner // self.columns)
        self.tiles = -(-n // self.rows) * across
        return self.tiles

    def launch(self, kernel: Any, grid: tuple[int, int, int], key: Any, *arguments: Any) -> None:
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments)
            return
        compiled = kernel[grid](*arguments, num_warps=WARPS)
        if DIRECT and key is not None and arguments[0].is_cuda:
            self.compiled[key] = compiled


@lru_cache(1024)
def plan_of(shape: tuple[int, ...], last: bool, device: torch.device) -> Plan:
    return Plan(tuple(shape), last, device)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def renormalise(layer: BatchRenorm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    call = RecordedCall()
    y: Tensor = _Fused.apply(x, weight, bias, layer, call)
    if not call.repeats:
        remember(layer, call, held_by_graph=y.requires_grad)
    return y


def _laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """Return x, dense, and whether its channels are last."""
    if x.dim() == 2:
        return x.contiguous(), True
    if x.is_contiguous():
        return x, False
    format_ = _LAST.get(x.dim())
    if format_ is not None and x.is_contiguous(memory_format=format_):
        return x, True
    return x.contiguous(), False


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, layer: BatchRenorm, call: RecordedCall
    ) -> Tensor:
        x, last = _laid_out(x)
        plan = plan_of(x.shape, last, x.device)
        buffers: dict[str, Any] = layer._buffers
        y = torch.empty_like(x)
        if torch._C._current_graph_task_id() != -1 and _repeated(layer, call, x, weight, bias):
            vectors = call.vectors
            plan.launch(passes.normalise, plan.grid, None, y, x, vectors, *plan.sizes, plan.splits, *plan.cut)
        else:
            c = plan.c
            vectors = call.vectors = torch.empty((passes.VECTORS, c), dtype=torch.float32, device=x.device)
            batches = buffers["num_batches_tracked"]
            batches.add_(1)
            momentum = layer.momentum
            has_weight, has_bias, cumulative = weight is not None, bias is not None, momentum is None
            running = (
                buffers["running_mean"],
                buffers["running_var"],
                batches,
                buffers["r_max"],
                buffers["d_max"],
                weight if has_weight else vectors,
                bias if has_bias else vectors,
            )
            scalars = (layer.eps, plan.count / (plan.count - 1), 0.0 if momentum is None else momentum)
            flags = (cumulative, has_weight, has_bias)
            kind = (x.dtype, *flags)
            if x.data_ptr() & 15:
                kind = None
            if plan.once:
                plan.launch(
                    passes.forward_at_once,
                    plan.grid,
                    kind and ("once", *kind),
                    y,
                    x,
                    vectors,
                    *running,
                    *plan.sizes,
                    *scalars,
                    *flags,
                    *plan.cut,
                )
            else:
                part = torch.empty((2 * c + 1) * plan.splits, dtype=torch.float32, device=x.device)
                cut, sizes, splits = plan.cut, plan.sizes, plan.splits
                plan.launch(
                    passes.measure, plan.grid, kind and ("measure", x.dtype), part, x, *sizes, splits, *cut
                )
                plan.launch(
                    passes.correct,
                    plan.mergers,
                    kind and ("correct", *flags),
                    vectors,
                    part,
                    *running,
                    c,
                    splits,
                    *scalars,
                    *flags,
                    *plan.merging,
                )
                plan.launch(
                    passes.normalise, plan.grid, kind and ("normalise", x.dtype), y, x, vectors, *sizes, splits, *cut
                )
        ctx.save_for_backward(x, weight, vectors)
        ctx.call, ctx.plan, ctx.eps = call, plan, layer.eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, vectors = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again
            return _differentiable(ctx, grad, x, weight, vectors)
        plan: Plan = ctx.plan
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        c = plan.c
        grad_weight = torch.empty(c, dtype=torch.float32, device=x.device)
        grad_bias = torch.empty(c, dtype=torch.float32, device=x.device)
        kind = None if (x.data_ptr() | grad.data_ptr()) & 15 else x.dtype
        if plan.once:
            grad_x = torch.empty_like(x)
            plan.launch(
                passes.backward_at_once,
                plan.grid,
                kind and ("back once", kind),
                grad_x,
                grad_weight,
                grad_bias,
                grad,
                x,
                vectors,
                *plan.sizes,
                float(plan.count),
                *plan.cut,
            )
        else:
            cut, sizes, splits = plan.cut, plan.sizes, plan.splits
            part = torch.empty(2 * c * splits, dtype=torch.float32, device=x.device)
            terms = torch.empty(2 * c, dtype=torch.float32, device=x.device)
            plan.launch(
                passes.gather, plan.grid, kind and ("gather", kind), part, grad, x, vectors, *sizes, splits, *cut
            )
            plan.launch(
                passes.conclude,
                plan.mergers,
                "conclude",
                grad_weight,
                grad_bias,
                terms,
                part,
                vectors,
                c,
                splits,
                float(plan.count),
                *plan.merging,
            )
            grad_x = None
            if needs_x:
                grad_x = torch.empty_like(x)
                plan.launch(
                    passes.propagate,
                    plan.grid,
                    kind and ("propagate", kind),
                    grad_x,
                    grad,
                    x,
                    vectors,
                    terms,
                    *sizes,
                    splits,
                    *cut,
                )
        return (
            grad_x if needs_x else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            None,
            None,
        )


def _repeated(
    layer: BatchRenorm, call: RecordedCall, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> bool:
    """Take the corrections of the call that is repeated, if one is."""
    var, mean = torch.var_mean(x.float(), [i for i in range(x.dim()) if i != 1], correction=0)
    first = recall(layer, mean, var)
    if first is None:
        return False
    r, d = first.r, first.d
    invstd = (var + layer.eps).rsqrt()
    scale, shift = r * invstd, d
    if weight is not None:
        scale, shift = weight * scale, weight * shift
    if bias is not None:
        shift = shift + bias
    call.vectors = torch.stack((mean, var, r, d, invstd, scale, shift))
    call.repeats = True
    return True


def _differentiable(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor | None, vectors: Tensor
) -> tuple[Tensor | None, ...]:
    mean, _, r, d, invstd, *_ = vectors.unbind()
    scale = r if weight is None else weight * r
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    needs = [needs_x, needs_weight, needs_weight or needs_bias]
    grad_x, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
        grad, x, scale, None, None, mean, invstd, True, ctx.eps, needs
    )
    grad_weight = torch.addcmul(grad_scale * r, grad_shift, d) if needs_weight else None
    return grad_x, grad_weight, grad_shift if needs_bias else None, None, None
