"""What the original network gives in parts: windows of its training size, blended, and tiles side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from normfix.records.spans import round_up
from normfix.tiling.grid import Geometry, at
from normfix.tiling.stitching import tile_extents, tiled

__all__ = ["blended_windows", "side_by_side"]

Run = Callable[[Tensor], Tensor]


def blended_windows(run: Run, image: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    """Predict an image in windows that overlap by half, blended by a Hann window: sliding-window inference.

    Args:
        run: the original network.
        image: (1, C, *space), of a size that it is exact at.
        size: of windows, one number or one per axis, multiples of the stride.
        geometry: of the network.

    Returns:
        (1, C', *out).
    """
    space = image.shape[2:]
    sizes = tuple(size) if len(size) == len(space) else tuple(size) * len(space)
    extents = [min(n, m) for n, m in zip(sizes, space, strict=True)]
    spans = [_spans(*axis) for axis in zip(space, extents, geometry.stride, strict=True)]
    total: Tensor | None = None
    weights = torch.zeros(())
    # the last window first: it ends where the output ends
    for corner in reversed(list(product(*spans))):
        window = run(image[at(corner)])
        starts = [int(span.start * scale) for span, scale in zip(corner, geometry.scale, strict=True)]
        if total is None:
            out = [a + n for a, n in zip(starts, window.shape[2:], strict=True)]
            total = window.new_zeros((*window.shape[:2], *out), dtype=torch.float64)
            weights = torch.zeros_like(total[:1, :1])
        hann = _hann(window.shape[2:]).to(total)
        there = at([slice(a, a + n) for a, n in zip(starts, window.shape[2:], strict=True)])
        total[there] += window.double() * hann
        weights[there] += hann
    assert total is not None
    return (total / weights).to(image.dtype)


def side_by_side(run: Run, image: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    """Predict an image in tiles without context, as windows are put side by side."""
    apart = replace(geometry, halo=((0, 0),) * len(geometry.stride))
    return tiled(run, image, tile_extents(size[0] if len(size) == 1 else tuple(size), apart), apart)


def _spans(extent: int, size: int, stride: int) -> list[slice]:
    """Return windows that start every half of their size, on the grid, up to the one that ends with the axis.

    That one is longer by what the axis has beyond the grid.
    """
    last = (extent - size) // stride * stride
    starts = range(0, last, round_up(max(1, size // 2), stride))
    return [*(slice(start, start + size) for start in starts), slice(last, extent)]


def _hann(extents: Sequence[int]) -> Tensor:
    """Return the product over axes of sin^2(pi (i + 1/2) / n), which is nowhere 0."""
    product_ = torch.ones((), dtype=torch.float64)
    for n in extents:
        along = torch.sin(math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n).square()
        product_ = product_[..., None] * along
    return product_
