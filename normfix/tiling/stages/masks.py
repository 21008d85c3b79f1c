"""Which positions of a map count in a statistic, where pixels of the image are to be ignored.

A mask is nonzero where a pixel is ignored. Position i of a map of scale s (positions per pixel) stands for the pixels
from floor(i / s) to ceil((i + 1) / s) - 1, within the image. It counts where none of them is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from normfix.images.sources import Image, Span, confirm
from normfix.tiling.stages.maps import Map

__all__ = ["Masked", "counted", "mask_of", "selected"]


class Masked:
    """A source and its mask (1, 1, *space), which travel together."""

    def __init__(self, image: Image, mask: Image) -> None:
        self.image, self.mask = image, mask

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the extents of the image."""
        return self.image.shape

    def read(self, window: Sequence[Span]) -> Tensor:
        """Return a window of the image, ignored pixels too."""
        return self.image.read(window)

    def padded(self, padding: Sequence[int]) -> Masked:
        """Return image and mask extended alike."""
        return Masked(self.image.padded(padding), self.mask.padded(padding))

    def fingerprint(self) -> str:
        """Return what differs if image or mask does; see Image."""
        return f"{self.image.fingerprint()} without {self.mask.fingerprint()}"

    def confirm(self) -> None:
        """Make sure that both are what was read of them."""
        confirm(self.image)
        confirm(self.mask)


def mask_of(image: Image) -> Image | None:
    """Return the mask of a source that has one."""
    return image.mask if isinstance(image, Masked) else None


def counted(mask: Image, found: Map, spans: Sequence[Span]) -> Tensor:
    """Return which positions of a map count.

    Args:
        mask: of the image.
        found: the map's dimensions and scale.
        spans: of the map, per axis.

    Returns:
        Booleans of the spans' extents.
    """
    size = mask.shape[2:]
    cells = [
        [(min(n - 1, math.floor(i / s)), min(n, math.ceil((i + 1) / s))) for i in range(*span)]
        for span, s, n in zip(spans, found.scale, size, strict=True)
    ]
    window = [(axis[0][0], axis[-1][1]) for axis in cells]
    ignored = (mask.read(window)[0, 0] != 0).to(torch.int32).cpu()
    for axis, (pixels, (first, _)) in enumerate(zip(cells, window, strict=True)):
        sums = torch.cat([torch.zeros_like(ignored.narrow(axis, 0, 1)), ignored.cumsum(axis)], axis)
        starts, stops = (torch.tensor([pixel[i] - first for pixel in pixels]) for i in (0, 1))
        ignored = (sums.index_select(axis, stops) > sums.index_select(axis, starts)).to(torch.int32)
    return ignored == 0


def selected(operand: Tensor, dims: Sequence[int], counts: Tensor) -> Tensor:
    """Return the positions that count, along the first of a map's dimensions; the others have extent 1.

    >>> selected(torch.arange(4.0).reshape(1, 1, 2, 2), (2, 3), torch.tensor([[True, False], [True, True]]))
    tensor([[[[0.],
              [2.],
              [3.]]]])
    """
    last = tuple(range(operand.dim() - len(dims), operand.dim()))
    flat = operand.movedim(tuple(dims), last).flatten(last[0])  # (..., *space) -> (..., positions)
    kept = flat[..., counts.flatten().to(operand.device)]
    return kept.reshape(*kept.shape, *(1,) * (len(dims) - 1)).movedim(last, tuple(dims))
