"""BatchRenorm in training on a GPU, by the Triton kernels of normfix.layers.passes.

One launch forward and one backward on small maps, three and three on others, instead of some thirty. What is small
costs Python and launches, not computation: so what follows from a shape is worked out once (`Plan`), compiled kernels
are launched without asking Triton which, and r, d and their kin are the rows of one tensor. r and d carry no gradient,
so the gradients are batch norm's with weight * r, to which torch's own backward is left where it is differentiated
again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normfix.layers.affine import is_followed, kernels_of
from normfix.layers.recomputation import RecordedCall, in_backward, recall, remember

if TYPE_CHECKING:
    from normfix.layers.batchrenorm import BatchRenorm

__all__ = ["is_for", "renormalise"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_MOST = 1 << 31
_OF_VECTORS = 2
_ALIGNED = 16
_VECTORS = 7
_Affine = tuple[Tensor | None, Tensor | None]


def is_for(layer: BatchRenorm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Tell whether the kernels take this, and nothing follows what is computed but autograd."""
    if not x.is_cuda or x.dtype not in _DTYPES or type(x) is not Tensor or x.numel() // x.shape[1] >= _MOST:
        return False
    if is_followed():
        return False
    buffers: dict[str, Any] = layer._buffers
    vectors = (buffers["running_mean"], buffers["running_var"], weight, bias)
    if not all(t is None or (t.dtype == torch.float32 and t.device == x.device) for t in vectors):
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and kernels_of(x.device) is not None


def renormalise(layer: BatchRenorm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Normalise as BatchRenorm does."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():  # which Triton does not ask for
        with torch.cuda.device(x.device):
            return renormalise(layer, x, weight, bias)
    call = RecordedCall()
    y: Tensor = _APPLY(x, weight, bias, layer, call)
    if not call.repeats:
        remember(layer, call, held_by_graph=y.requires_grad)
    return y


class Plan:
    """What follows from a shape, its layout and its device: how a map is cut, and the kernels compiled for it."""

    TILE = 8192
    """Values of a tile: 32 in each of 256 threads."""
    PER_PROCESSOR = 8
    """Programs that a processor has to choose from."""
    AT_ONCE = 8
    """Tiles at most that one program takes alone, twice: some 10 us on an H100."""
    SPLITS = (16, 128, 1024)
    """Widths in which splits are merged: few, for each is compiled."""

    def __init__(self, shape: tuple[int, ...], last: bool, device: torch.device) -> None:
        self.c, self.last, self.device = shape[1], last, device
        images, inner = shape[0], math.prod(shape[2:])
        self.count = images * inner
        n, inner = (self.count, 1) if last else (images, inner)
        tiles = self._cut(n, inner, 16)
        self.at_once = tiles <= self.AT_ONCE
        if not self.at_once:
            tiles = self._cut(n, inner, 64)
        wanted = 1 if self.at_once else self.PER_PROCESSOR * _processors(device) // self.blocks
        per = -(-tiles // max(1, min(wanted, tiles, self.SPLITS[-1])))
        self.splits = -(-tiles // per)
        self.sizes = (n, self.c, inner, per)
        self.grid = (self.blocks * self.splits, 1, 1)
        wide = next(width for width in self.SPLITS if width >= self.splits)
        self.merging = (1024 // wide, wide)
        self.merging_grid = (-(-self.c // self.merging[0]), 1, 1)
        self._kept: dict[Any, Any] = {}

    def launch(
        self, name: str, key: Any, grid: tuple[int, int, int], tensors: Sequence[Any], *rest: Any
    ) -> None:
        """Launch a kernel; the key says what it depends on beyond the plan.

        Asking Triton which compiled kernel it is costs as much again as the launch, so each is kept here. Those of
        aligned memory are: what is not takes the long way.
        """
        run = self._kept.get((name, key))
        pointers = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        if run is not None and not bits % _ALIGNED:
            run(*pointers, *rest, stream=torch._C._cuda_getCurrentRawStream(self.device.index))
            return
        compiled = getattr(_passes(), name)[grid](*tensors, *rest, num_warps=8)
        if not bits % _ALIGNED and self.device.type == "cuda" and _keeps_kernels():
            self._kept[name, key] = compiled[grid]

    def _cut(self, n: int, inner: int, widest: int) -> int:
        """Choose the tiles and return how many a channel has."""
        if self.last:
            columns = min(max(_power(self.c), 4), widest)
            self.blocks, across = -(-self.c // columns), 1
        else:
            columns = min(max(_power(inner), 64), self.TILE)
            self.blocks, across = self.c, -(-inner // columns)
        rows = self.TILE // columns
        self.cut = (self.last, rows, columns)
        return -(-n // rows) * across


@lru_cache(1024)
def _plan(shape: tuple[int, ...], last: bool, device: torch.device) -> Plan:
    return Plan(shape, last, device)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def _passes() -> Any:
    from normfix.layers import passes

    return passes


@cache
def _keeps_kernels() -> bool:
    """Tell whether this Triton's compiled kernels take the arguments that their function does."""
    import triton

    return tuple(int(number) for number in triton.__version__.split(".")[:2]) >= (3, 6)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        layer: BatchRenorm,
        call: RecordedCall,
    ) -> Tensor:
        x, last = _dense(x)
        plan = _plan(x.shape, last, x.device)
        y = torch.empty_like(x)
        affine = (weight, bias)
        if not in_backward() or not _repeats(layer, call, x, affine):
            vectors = call.vectors = _forward(layer, plan, y, x, affine)
        else:
            vectors = torch.stack(list(call.vectors))
            _normalise(plan, y, x, vectors, None)
        ctx.save_for_backward(x, weight, vectors)
        ctx.call, ctx.plan, ctx.eps = call, plan, layer.eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, vectors = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *_differentiable(grad, x, weight, vectors, ctx.eps, needs), None, None
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        grads = _backward(ctx.plan, grad, x, vectors, needs[0])
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


# Function.apply less its look for transforms, which is_for has looked for
_APPLY: Any = super(torch.autograd.Function, _Fused).apply


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """Return x as one run of memory, and whether its channels are last."""
    if x.dim() == _OF_VECTORS:
        return x.contiguous(), True
    if x.is_contiguous():
        return x, False
    format_ = _LAST.get(x.dim())
    if format_ is not None and x.is_contiguous(memory_format=format_):
        return x, True
    return x.contiguous(), False


def _forward(layer: BatchRenorm, plan: Plan, y: Tensor, x: Tensor, affine: _Affine) -> Tensor:
    """Write y, track the batch, and return the vectors of the call."""
    buffers: dict[str, Any] = layer._buffers
    (weight, bias), batches, momentum = affine, buffers["num_batches_tracked"], layer.momentum
    vectors = torch.empty((_VECTORS, plan.c), dtype=torch.float32, device=x.device)
    state = (
        buffers["running_mean"],
        buffers["running_var"],
        batches,
        buffers["r_max"],
        buffers["d_max"],
        vectors if weight is None else weight,
        vectors if bias is None else bias,
    )
    numbers = (layer.eps, plan.count / (plan.count - 1), 0.0 if momentum is None else momentum)
    flags = (momentum is None, weight is not None, bias is not None)
    if plan.at_once:
        batches.add_(1)
        values = (*plan.sizes, *numbers, *flags, *plan.cut)
        plan.launch("forward_at_once", (x.dtype, flags), plan.grid, (y, x, vectors, *state), *values)
        return vectors
    part = torch.empty((2 * plan.c + 1) * plan.splits, dtype=torch.float32, device=x.device)
    plan.launch("measure", x.dtype, plan.grid, (part, x), *plan.sizes, plan.splits, *plan.cut)
    rest = (plan.c, plan.splits, *numbers, *flags, *plan.merging)
    plan.launch("correct", flags, plan.merging_grid, (vectors, part, *state), *rest)
    _normalise(plan, y, x, vectors, batches)
    return vectors


def _normalise(plan: Plan, y: Tensor, x: Tensor, vectors: Tensor, batches: Tensor | None) -> None:
    counts = batches is not None
    tensors = (y, x, vectors, batches if counts else vectors)
    rest = (*plan.sizes, plan.splits, counts, *plan.cut)
    plan.launch("normalise", (x.dtype, counts), plan.grid, tensors, *rest)


def _backward(plan: Plan, grad: Tensor, x: Tensor, vectors: Tensor, needs_x: bool) -> list[Tensor | None]:
    """Return the gradients of x, of the weight and of the bias."""
    c, device, count = plan.c, x.device, float(plan.count)
    grad_weight = torch.empty(c, dtype=torch.float32, device=device)
    grad_bias = torch.empty(c, dtype=torch.float32, device=device)
    grad_x = torch.empty_like(x) if needs_x or plan.at_once else None
    grads = [grad_x, grad_weight, grad_bias]
    if plan.at_once:
        values = (*plan.sizes, count, *plan.cut)
        plan.launch("backward_at_once", x.dtype, plan.grid, (*grads, grad, x, vectors), *values)
        return grads
    part = torch.empty((2 * plan.splits + 2) * c, dtype=torch.float32, device=device)
    rest = (*plan.sizes, plan.splits, *plan.cut)
    plan.launch("gather", x.dtype, plan.grid, (part, grad, x, vectors), *rest)
    tensors = (grad_weight, grad_bias, part, vectors)
    plan.launch("conclude", None, plan.merging_grid, tensors, c, plan.splits, count, *plan.merging)
    if grad_x is not None:
        plan.launch("propagate", x.dtype, plan.grid, (grad_x, grad, x, vectors, part), *rest)
    return grads


def _repeats(layer: BatchRenorm, call: RecordedCall, x: Tensor, affine: _Affine) -> bool:
    """Take the corrections of the call that is repeated, if one is."""
    var, mean = torch.var_mean(x.float(), [dim for dim in range(x.dim()) if dim != 1], correction=0)
    first = recall(layer, mean, var)
    if first is None:
        return False
    weight, bias = affine
    r, d, invstd = first.r, first.d, (var + layer.eps).rsqrt()
    scale, shift = r * invstd, d
    if weight is not None:
        scale, shift = weight * scale, weight * shift
    if bias is not None:
        shift = shift + bias
    call.vectors, call.repeats = (mean, var, r, d, invstd, scale, shift), True
    return True


def _differentiable(
    grad: Tensor, x: Tensor, weight: Tensor | None, vectors: Tensor, eps: float, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients by operations that are differentiated again."""
    mean, _, r, d, invstd, *_ = vectors.unbind()
    needs_x, needs_weight, needs_bias = needs
    scale = r if weight is None else weight * r
    grad_x, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
        grad,
        x,
        scale,
        None,
        None,
        mean,
        invstd,
        True,
        eps,
        [needs_x, needs_weight, needs_weight or needs_bias],
    )
    grad_weight = torch.addcmul(grad_scale * r, grad_shift, d) if needs_weight else None
    return grad_x, grad_weight, grad_shift if needs_bias else None
