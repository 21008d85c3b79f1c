"""Large convolutions in float64, in slabs: torch writes out all windows first, in gigabytes and most of the time.

For float64 there is no direct convolution on a CPU. What is written out is 27 times the input of a 3x3x3 kernel; in
slabs of a few megabytes the same memory is used again and again, and half of the time is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["in_slabs", "is_convolution"]

_WHOLE, _SLAB = 128 << 20, 16 << 20
"""Bytes of written out windows up to which a convolution is left whole, and that a slab takes at most."""

_CONVOLUTIONS = {torch.conv2d: 2, torch.conv3d: 3}


def is_convolution(func: object) -> bool:
    """Tell whether a function is one that can be computed in slabs."""
    return func in _CONVOLUTIONS


def in_slabs(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return what a convolution gives, in slabs along its longest axis where it is large and needs no gradients.

    `func` is torch.conv2d or torch.conv3d, and what follows its own arguments.
    """

    def whole(x: Tensor, pads: Any) -> Tensor:
        return func(x, weight, bias, stride, pads, dilation, groups)

    rank = _CONVOLUTIONS[func]
    fits = type(input) is Tensor and input.dtype == torch.float64 and input.device.type == "cpu"
    if not fits or input.dim() != rank + 2 or isinstance(padding, str) or torch.is_grad_enabled():
        return whole(input, padding)
    steps, pads, gaps = (_each(v, rank) for v in (stride, padding, dilation))
    kernel = weight.shape[2:]
    sizes = [
        (n + 2 * p - g * (k - 1) - 1) // s + 1
        for n, p, g, k, s in zip(input.shape[2:], pads, gaps, kernel, steps, strict=True)
    ]
    written = input.element_size() * input.shape[1] * math.prod(kernel) * math.prod(sizes)
    if min(sizes) < 1 or math.prod(kernel) == 1 or written <= _WHOLE:
        return whole(input, padding)
    axis = sizes.index(max(sizes))
    rows = max(1, _SLAB * sizes[axis] // written)
    reads = gaps[axis] * (kernel[axis] - 1) + 1
    around = [0, 0] * (rank - axis - 1) + [pads[axis], pads[axis]]
    padded = F.pad(input, around)
    rest = [0 if other == axis else p for other, p in enumerate(pads)]
    slabs = []
    for first in range(0, sizes[axis], rows):
        count = min(rows, sizes[axis] - first)
        extent = (count - 1) * steps[axis] + reads
        slabs.append(whole(padded.narrow(axis + 2, first * steps[axis], extent), rest))
    return torch.cat(slabs, axis + 2)


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values
