"""Neighbourhood attention on a CPU: an operator with the name and the arguments of NATTEN's, written in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["NeighbourhoodBlock"]


def _places(extent: int, kernel: int, dilation: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Return which positions each of an axis attends to, (extent, kernel), and which of them there are."""
    group, place = torch.arange(extent) % dilation, torch.arange(extent) // dilation
    count = (extent - group + dilation - 1) // dilation
    first = (
        place - kernel + 1 if causal else torch.minimum((place - kernel // 2).clamp_min(0), count - kernel)
    )
    found = first[:, None] + torch.arange(kernel)
    return found.clamp_min(0) * dilation + group[:, None], found >= 0


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    *_tiles: Sequence[int],
) -> tuple[Tensor, Tensor]:
    assert stride == [1, 1]
    axes = zip(query.shape[1:3], kernel_size, dilation, is_causal, strict=True)
    (rows, in_y), (columns, in_x) = (_places(*axis) for axis in axes)
    keys, values = key[:, rows][:, :, :, columns], value[:, rows][:, :, :, columns]
    scores = scale * torch.einsum("nyxhc,nyixjhc->nyxhij", query, keys)
    outside = ~(in_y[:, None, None, :, None] & in_x[None, :, None, None, :])
    scores = scores.masked_fill(outside, -torch.inf)
    weights = scores.flatten(-2).softmax(-1).view(scores.shape)
    answers = torch.einsum("nyxhij,nyixjhc->nyxhc", weights, values)
    return answers.contiguous(), scores.flatten(-2).logsumexp(-1).float()


_LIBRARY = torch.library.Library("natten", "FRAGMENT")
_LIBRARY.define(
    "na2d_forward(Tensor query, Tensor key, Tensor value, int[] kernel_size, int[] stride, int[] dilation, "
    "bool[] is_causal, float scale, int[] q_tile_shape, int[] kv_tile_shape) -> (Tensor, Tensor)"
)
_LIBRARY.impl("na2d_forward", _attend, "CPU")


def _shapes(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    answers = query.new_empty([*query.shape[:-1], value.shape[-1]])
    return answers, query.new_empty(query.shape[:-1], dtype=torch.float32)


torch.library.register_fake("natten::na2d_forward", _shapes, lib=_LIBRARY)


class NeighbourhoodBlock(nn.Module):
    """Two heads attend to windows around each pixel; (N, channels, H, W) gives the same shape."""

    def __init__(
        self,
        channels: int,
        kernel: int,
        dilation: int = 1,
        *,
        causal: bool = False,
        stride: int = 1,
        norm: bool,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels) if norm else nn.Identity()
        self.qkv, self.project = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        self.form = [kernel] * 2, [stride] * 2, [dilation] * 2, [causal] * 2

    def forward(self, x: Tensor) -> Tensor:
        n, channels, h, w = x.shape
        heads = self.qkv(self.norm(x)).reshape(n, 3, 2, channels // 2, h, w).permute(1, 0, 4, 5, 2, 3)
        tiles = [8, 8]
        answers, _ = torch.ops.natten.na2d_forward(*heads.contiguous(), *self.form, 0.5, tiles, tiles)
        return x + self.project(answers.permute(0, 3, 4, 1, 2).reshape(x.shape))
