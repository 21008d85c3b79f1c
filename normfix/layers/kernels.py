"""Triton kernels of the layers: normalisation by constants in one launch.

Imported only where Triton is: it comes with torch's wheels for CUDA. What is small is launched more than computed, and
a frozen norm is five launches of torch's. The formulas are those of normfix.layers.affine.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["normalised"]


@triton.jit  # type: ignore[untyped-decorator]
def _normalise_rows(  # type: ignore[no-untyped-def]  # noqa: ANN202
    y,  # noqa: ANN001
    x,  # noqa: ANN001
    mean,  # noqa: ANN001
    var,  # noqa: ANN001
    weight,  # noqa: ANN001
    bias,  # noqa: ANN001
    c,  # noqa: ANN001
    inner,  # noqa: ANN001
    per_row,  # noqa: ANN001
    eps,  # noqa: ANN001
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
    block: tl.constexpr,
):
    number = tl.program_id(0)
    row = number // per_row
    channel = row % c
    m = tl.load(mean + channel).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.load(var + channel).to(tl.float32) + eps)
    if has_weight:
        scale = scale * tl.load(weight + channel).to(tl.float32)
    i = (number % per_row) * block + tl.arange(0, block)
    here = i < inner
    start = row.to(tl.int64) * inner
    values = (tl.load(x + start + i, mask=here).to(tl.float32) - m) * scale
    if has_bias:
        values = values + tl.load(bias + channel).to(tl.float32)
    tl.store(y + start + i, values, mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _normalise_last(  # type: ignore[no-untyped-def]  # noqa: ANN202
    y,  # noqa: ANN001
    x,  # noqa: ANN001
    mean,  # noqa: ANN001
    var,  # noqa: ANN001
    weight,  # noqa: ANN001
    bias,  # noqa: ANN001
    c,  # noqa: ANN001
    count,  # noqa: ANN001
    eps,  # noqa: ANN001
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    channel = tl.arange(0, columns)[None, :]
    position = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    inside = channel < c
    here = inside & (position < count)
    m = tl.load(mean + channel, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.load(var + channel, mask=inside, other=1.0).to(tl.float32) + eps)
    if has_weight:
        scale = scale * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    place = position * c + channel
    values = (tl.load(x + place, mask=here, other=0.0).to(tl.float32) - m) * scale
    if has_bias:
        values = values + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, values, mask=here)


_BLOCK, _WARPS = 4096, 8
_WIDEST = 2048
"""Channels of a position that one program holds."""


def normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor | None:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, computed in float32 and rounded once, in one launch.

    None for a layout that is neither contiguous nor channels last.
    """
    c, inner = x.shape[1], x.shape[2:].numel()
    y = torch.empty_like(x)
    arguments = (y, x, mean, var, mean if weight is None else weight, mean if bias is None else bias, c)
    flags: dict[str, Any] = {"has_weight": weight is not None, "has_bias": bias is not None}
    if x.is_contiguous() and inner > 1:
        per_row = -(-inner // _BLOCK)
        grid = (x.shape[0] * c * per_row,)
        _launch(
            _normalise_rows, grid, *arguments, inner, per_row, eps, **flags, block=_BLOCK, num_warps=_WARPS
        )
        return y
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if c > _WIDEST or x.dim() not in formats or not x.is_contiguous(memory_format=formats[x.dim()]):
        return None
    columns = triton.next_power_of_2(c)
    positions, height = x.shape[0] * inner, max(1, _BLOCK // columns)
    grid = (-(-positions // height),)
    _launch(
        _normalise_last,
        grid,
        *arguments,
        positions,
        eps,
        **flags,
        rows=height,
        columns=columns,
        num_warps=_WARPS,
    )
    return y


def _launch(kernel: Any, grid: tuple[int, ...], out: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its output, which Triton does not ask for."""
    if not out.is_cuda or out.get_device() == torch.cuda.current_device():
        kernel[grid](out, *arguments, **options)
        return
    with torch.cuda.device(out.device):
        kernel[grid](out, *arguments, **options)
