"""The arithmetic of BatchRenorm on vectors of one value per channel, as one Triton kernel.

Imported only where Triton is: it comes with torch's wheels for CUDA. On small inputs some twenty launches on vectors
of c numbers are what the layer costs; here it is one. The formulas are those of normfix.layers.batchrenorm.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MOST", "corrected"]

MOST = 8192
"""Channels at most: one program does them all, for it also counts the batch."""


@triton.jit
def _correct(  # type: ignore[no-untyped-def]  # noqa: ANN202
    out,  # noqa: ANN001
    mean,  # noqa: ANN001
    spread,  # noqa: ANN001
    running_mean,  # noqa: ANN001
    running_var,  # noqa: ANN001
    batches,  # noqa: ANN001
    r_max,  # noqa: ANN001
    d_max,  # noqa: ANN001
    weight,  # noqa: ANN001
    bias,  # noqa: ANN001
    c,  # noqa: ANN001
    eps,  # noqa: ANN001
    unbias,  # noqa: ANN001
    momentum,  # noqa: ANN001
    cumulative: tl.constexpr,
    inverted: tl.constexpr,
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
    block: tl.constexpr,
):
    i = tl.arange(0, block)
    here = i < c
    m = tl.load(mean + i, mask=here, other=0.0)
    s = tl.load(spread + i, mask=here, other=1.0)
    m_run = tl.load(running_mean + i, mask=here, other=0.0)
    v_run = tl.load(running_var + i, mask=here, other=1.0)
    seen = tl.load(batches)
    most_r = tl.load(r_max)
    most_d = tl.load(d_max)
    if inverted:
        invstd = s
        var = tl.maximum(1.0 / (s * s) - eps, 0.0)
    else:
        var = s
        invstd = 1.0 / tl.sqrt(var + eps)
    invstd_run = 1.0 / tl.sqrt(v_run + eps)
    # a fresh layer has no statistics to correct towards
    most_r = tl.where(seen > 0, most_r, 1.0)
    most_d = tl.where(seen > 0, most_d, 0.0)
    r = tl.minimum(tl.maximum(invstd_run / invstd, 1.0 / most_r), most_r)
    d = tl.minimum(tl.maximum((m - m_run) * invstd_run, -most_d), most_d)
    w = tl.load(weight + i, mask=here, other=1.0) if has_weight else tl.full((block,), 1.0, tl.float32)
    b = tl.load(bias + i, mask=here, other=0.0) if has_bias else tl.full((block,), 0.0, tl.float32)
    tl.store(out + i, r, mask=here)
    tl.store(out + c + i, d, mask=here)
    tl.store(out + 2 * c + i, w * r, mask=here)
    tl.store(out + 3 * c + i, b + w * d, mask=here)
    tl.store(out + 4 * c + i, b + w * d - b * r, mask=here)
    tl.store(out + 5 * c + i, var, mask=here)
    tl.store(out + 6 * c + i, invstd, mask=here)
    share = momentum
    if cumulative:
        share = 1.0 / (seen + 1).to(tl.float32)
    tl.store(running_mean + i, m_run + share * (m - m_run), mask=here)
    tl.store(running_var + i, v_run + share * (var * unbias - v_run), mask=here)
    tl.store(batches, seen + 1)


def corrected(
    mean: Tensor,
    spread: Tensor,
    running: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor, Tensor],
    affine: tuple[Tensor | None, Tensor | None],
    *,
    inverted: bool,
    eps: float,
    count: int,
    momentum: float | None,
) -> Tensor:
    """Return r, d, weight * r, bias + weight * d, that less bias * r, var and invstd, (7, c); track the batch.

    Args:
        mean: (c,), float32 as all that follow.
        spread: the biased variance of the batch, or its 1 / sqrt(var + eps) where `inverted`.
        running: running_mean, running_var and num_batches_tracked, which are written.
        bounds: r_max and d_max.
        affine: weight and bias.
        inverted: see `spread`.
        eps: of the layer.
        count: values per channel.
        momentum: of the layer.
    """
    c = mean.numel()
    out = torch.empty((7, c), dtype=torch.float32, device=mean.device)
    weight, bias = affine
    kernel: Any = _correct
    kernel[(1,)](
        out,
        mean,
        spread,
        *running,
        *bounds,
        mean if weight is None else weight,
        mean if bias is None else bias,
        c,
        eps,
        count / (count - 1),
        0.0 if momentum is None else momentum,
        cumulative=momentum is None,
        inverted=inverted,
        has_weight=weight is not None,
        has_bias=bias is not None,
        block=triton.next_power_of_2(c),
    )
    return out
