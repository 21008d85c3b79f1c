"""The arithmetic of giving a norm by constants to stock batch norm, or to a convolution beside it.

Such a norm is y = s x + t per channel, with s = weight / sqrt(var + eps) and t = bias - s mean. Hence

    norm(conv(x; W, b))  =  conv(x; s W, s b + t)            exact, whatever the padding
    conv(norm(x); W, b)  =  conv(x; W s, b + sum of W t)     exact unless zeros are padded in between

where the sum is over a kernel's inputs: at a zero-padded border part of them is missing, so t would be added
where the original has none. All products are taken in float64 and rounded once.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from normfix.layers.base import ChannelNorm
from normfix.layers.batchrenorm import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from normfix.layers.frozen import FrozenNorm1d, FrozenNorm2d, FrozenNorm3d
from normfix.layers.synchronised import SyncBatchRenorm1d, SyncBatchRenorm2d, SyncBatchRenorm3d

__all__ = [
    "BATCH_NORMS",
    "FROZEN",
    "STOCK",
    "TRANSPOSED",
    "fold_backward_",
    "fold_forward_",
    "frozen",
    "is_convolution",
    "pads_zeros",
    "stock",
]

STOCK: dict[type[nn.Module], type[nn.Module]] = {
    FrozenNorm1d: nn.BatchNorm1d,
    FrozenNorm2d: nn.BatchNorm2d,
    FrozenNorm3d: nn.BatchNorm3d,
    BatchRenorm1d: nn.BatchNorm1d,
    BatchRenorm2d: nn.BatchNorm2d,
    BatchRenorm3d: nn.BatchNorm3d,
    SyncBatchRenorm1d: nn.BatchNorm1d,
    SyncBatchRenorm2d: nn.BatchNorm2d,
    SyncBatchRenorm3d: nn.BatchNorm3d,
}
FROZEN: dict[type[nn.Module], type[ChannelNorm]] = {
    BatchRenorm1d: FrozenNorm1d,
    BatchRenorm2d: FrozenNorm2d,
    BatchRenorm3d: FrozenNorm3d,
    SyncBatchRenorm1d: FrozenNorm1d,
    SyncBatchRenorm2d: FrozenNorm2d,
    SyncBatchRenorm3d: FrozenNorm3d,
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_convolution(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Tell stock convolutions; parametrised and fused ones are subclasses and may compute more."""
    return type(module) in _CONVS + TRANSPOSED


def pads_zeros(conv: Any) -> bool:
    """Tell whether the convolution sees zeros beyond the border of its input."""
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        return False
    return conv.padding == "same" or any(conv.padding)


def stock(layer: ChannelNorm) -> nn.Module:
    """Return the stock batch norm in eval that shares the layer's tensors."""
    # a frozen layer's constants must not drift should someone call train()
    momentum = layer.momentum if isinstance(layer, BatchRenorm) else 0.0
    stock = STOCK[type(layer)](layer.num_features, layer.eps, momentum, layer.affine, device="meta")
    _share_(stock, layer)
    return stock.eval()


def frozen(layer: ChannelNorm) -> ChannelNorm:
    """Return the layer of constants that shares a BatchRenorm's tensors."""
    constant = FROZEN[type(layer)](layer.num_features, layer.eps, layer.affine, device="meta")
    _share_(constant, layer)
    return constant.train(layer.training)


@torch.no_grad()
def fold_backward_(conv: Any, norm: nn.Module) -> None:
    """Write norm(conv(x)) into the convolution."""
    scale, shift = _scale_and_shift(norm)
    weight = conv.weight.double()
    if type(conv) in TRANSPOSED:
        split = weight.unflatten(1, (1, -1)).unflatten(0, (conv.groups, -1))  # (g, in/g, 1, out/g, *k)
        per_output = scale.view(conv.groups, 1, 1, -1, *[1] * (weight.ndim - 2))
        weight = (split * per_output).reshape(conv.weight.shape)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    _write(conv, weight, bias)


@torch.no_grad()
def fold_forward_(norm: nn.Module, conv: Any) -> None:
    """Write conv(norm(x)) into the convolution, which pads no zeros and is not transposed."""
    weight = conv.weight.double()
    per_group = (values.view(conv.groups, -1) for values in _scale_and_shift(norm))  # (g, in/g)
    # (g, in/g) -> (out, in/g, 1, ...): each output sees the channels of its group
    scale, shift = (
        values.repeat_interleave(conv.out_channels // conv.groups, 0).view(
            *weight.shape[:2], *[1] * (weight.ndim - 2)
        )
        for values in per_group
    )
    bias = (weight * shift).flatten(1).sum(1)
    _write(conv, weight * scale, bias if conv.bias is None else conv.bias.double() + bias)


def _share_(new: Any, layer: ChannelNorm) -> None:
    new.weight, new.bias = layer.weight, layer.bias
    for name, buffer in layer.named_buffers():
        if name in new._buffers:
            new._buffers[name] = buffer


@torch.no_grad()
def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -scale * norm.running_mean.double()
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _write(conv: Any, weight: Tensor, bias: Tensor) -> None:
    dtype, trainable = conv.weight.dtype, conv.weight.requires_grad
    conv.weight = nn.Parameter(weight.to(dtype), trainable)
    conv.bias = nn.Parameter(bias.to(dtype), trainable)
