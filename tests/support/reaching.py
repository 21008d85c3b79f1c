"""The reach of a module by brute force: one column of pixels after the other is changed, and the tile looked at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normfix.networks.graph.capture import export
from normfix.tiling.reach.bounds import Bound, bound_of

__all__ = ["Function", "bound_for", "true_reach"]

_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x + 1,
    lambda x: 1e3 * x.abs() + 1e3,
    lambda x: -1e3 * x.abs() - 1e3,
    torch.zeros_like,
)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def bound_for(module: nn.Module, shape: tuple[int, ...]) -> Bound:
    """Return the bound of a module that takes images of a shape."""
    return bound_of(export(module.eval(), torch.randn(shape)))


def true_reach(
    module: nn.Module,
    bound: Bound,
    axis: int,
    length: int,
    *,
    channels: int = 1,
    cross: int = 16,
    tile: int | None = None,
) -> tuple[int, int]:
    """Return (before, after) of the tile number `tile` of a strip along an axis, the middle one by default.

    Args:
        module: in float64 afterwards.
        bound: gives lattice and scale, nothing else.
        axis: spatial axis that is long.
        length: of it, a multiple of the lattice.
        channels: of the image.
        cross: extent of the other axes.
        tile: its number; each is one step of the lattice.
    """
    module = module.double().eval()
    pixels, scale = bound.lattice[axis], bound.scale[axis]
    size = [cross] * len(bound.lattice)
    size[axis] = length
    x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # zeros, for what looks at holes
    x = x * (x.abs() > 0.3)
    start = (length // pixels // 2 if tile is None else tile) * pixels
    kept = slice(int(start * scale), int((start + pixels) * scale))
    with torch.no_grad():
        quiet = module(x).transpose(2, axis + 2)[:, :, kept]
        reached = torch.zeros(length, dtype=torch.bool)
        for change in _CHANGES:
            loud = x.repeat(length, 1, *(1,) * len(size)).transpose(1, axis + 2)
            changed = change(x).transpose(1, axis + 2)
            for column in range(length):
                loud[column, column] = changed[0, column]
            tiles = module(loud.transpose(1, axis + 2).contiguous()).transpose(2, axis + 2)[:, :, kept]
            reached |= ((tiles - quiet).abs() > 1e-9 * quiet.abs().max()).flatten(1).any(1)
    seen = reached.nonzero().flatten().tolist()
    if not seen:
        return 0, 0
    return max(0, start - seen[0]), max(0, seen[-1] - (start + pixels - 1))
