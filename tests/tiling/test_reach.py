"""Reach derived from graphs: every rule against brute force, what has no bound named, lattices, sizes and paths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reaching import Function, bound_for, true_reach
from torch import Tensor, nn


def _windows(x: Tensor, size: int) -> Tensor:
    """(b, c, h, w) -> (b h' w', size size, c)."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(-1, size * size, c)


def _whole(tokens: Tensor, size: int, like: Tensor) -> Tensor:
    b, c, h, w = like.shape
    x = tokens.view(b, h // size, w // size, size, size, c).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, c, h, w)


def _attending(x: Tensor, size: int = 4) -> Tensor:
    tokens = _windows(x, size)
    return _whole(torch.softmax(tokens @ tokens.transpose(1, 2), -1) @ tokens, size, x)


def _sdpa(x: Tensor) -> Tensor:
    tokens = _windows(x, 4)
    return _whole(F.scaled_dot_product_attention(tokens, tokens, tokens), 4, x)


def _tokens(x: Tensor) -> Tensor:
    """Layer norm and a product over channels, on all pixels in one row."""
    flat = F.layer_norm(x.flatten(2).transpose(1, 2), (x.shape[1],)) @ torch.eye(x.shape[1], dtype=x.dtype)
    return flat.transpose(1, 2).reshape(x.shape)


def _columns(x: Tensor) -> Tensor:
    mixed = torch.einsum("bkl,km->bml", F.unfold(x, 3, padding=1), torch.arange(81.0).view(9, 9).to(x).sin())
    return F.fold(mixed, x.shape[2:], 3, padding=1)


def _focus(x: Tensor) -> Tensor:
    return F.pixel_shuffle(
        torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1), 2
    )


def _filled(x: Tensor) -> Tensor:
    """Holes are filled from their neighbours."""
    return torch.where(x != 0, x, F.avg_pool2d(x, 5, 1, 2))


def _written(x: Tensor) -> Tensor:
    """A part is written in place into a copy."""
    y = x.clone()
    y[..., 2:] += x[..., :-2]
    return y


def _pasted(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., 1:, :] = x[..., :-1, :]
    return x + y


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # name: (module, lattice)
    "conv": (lambda: nn.Conv2d(1, 2, 3, padding=1), 1),
    "even kernel": (lambda: nn.Conv2d(1, 1, 4, padding="same"), 1),
    "valid": (lambda: nn.Conv2d(1, 1, 5), 1),
    "dilated": (lambda: nn.Conv2d(1, 1, 3, padding=4, dilation=4), 1),
    "grouped": (lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2), 1),
    "strided": (lambda: nn.Conv2d(1, 1, 3, stride=2, padding=1), 2),
    "valid strided": (lambda: nn.Conv2d(1, 1, 4, stride=3), 3),
    "reflect": (lambda: nn.Conv2d(1, 1, 5, padding=2, padding_mode="reflect"), 1),
    "replicate": (lambda: nn.Conv2d(1, 1, 5, padding=2, padding_mode="replicate"), 1),
    "transposed": (lambda: nn.ConvTranspose2d(1, 1, 2, stride=2), 1),
    "transposed 3": (lambda: nn.ConvTranspose2d(1, 1, 3, stride=2, padding=1, output_padding=1), 1),
    "transposed 4": (lambda: nn.ConvTranspose2d(1, 1, 4, stride=2, padding=1), 1),
    "max pool": (lambda: nn.MaxPool2d(3, 2, 1), 2),
    "max pool ceil": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), 2),
    "dilated pool": (lambda: nn.MaxPool2d(3, 1, 1, dilation=2), 1),
    "avg pool": (lambda: nn.AvgPool2d(4), 4),
    "indices": (lambda: Function(lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[0]), 2),
    "unpooled": (lambda: Function(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)), 2),
    "adaptive": (lambda: Function(lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 4, x.shape[3] // 4))), 4),
    "nearest": (lambda: nn.Upsample(scale_factor=2), 1),
    "nearest down": (lambda: Function(lambda x: F.interpolate(x, scale_factor=0.5)), 2),
    "nearest exact": (
        lambda: Function(lambda x: F.interpolate(x, scale_factor=0.5, mode="nearest-exact")),
        2,
    ),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), 1),
    "bilinear 4": (lambda: nn.Upsample(scale_factor=4, mode="bilinear"), 1),
    "bilinear to size": (
        lambda: Function(lambda x: F.interpolate(F.avg_pool2d(x, 2), x.shape[2:], mode="bilinear")),
        2,
    ),
    "bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), 1),
    "constant pad": (lambda: Function(lambda x: F.pad(x, (3, 0, 1, 0))[..., : x.shape[2], : x.shape[3]]), 1),
    "slice": (lambda: Function(lambda x: x[..., 2:, 1:-3]), 1),
    "strided slice": (lambda: Function(lambda x: x[..., 1::2, ::2]), 2),
    "focus": (lambda: Function(_focus), 2),
    "shuffles": (
        lambda: nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2)),
        4,
    ),
    "flip and back": (
        lambda: Function(lambda x: F.pad(x.flip(-1), (2, 0))[..., : x.shape[3]].flip(-1) + x),
        1,
    ),
    "repeat interleave": (lambda: Function(lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)), 1),
    "windows": (lambda: Function(_attending), 4),
    "padded windows": (
        lambda: Function(
            lambda x: _attending(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)))[
                ..., : x.shape[2], : x.shape[3]
            ]
        ),
        4,
    ),
    "sdpa windows": (lambda: Function(_sdpa), 4),
    "tokens": (lambda: Function(_tokens), 1),
    "columns": (lambda: Function(_columns), 1),
    "tensor unfold": (lambda: Function(lambda x: x.unfold(3, 4, 4).unfold(2, 4, 4).amax((-1, -2))), 4),
    "patch embedding": (
        lambda: Function(lambda x: x.view(*x.shape[:2], x.shape[2] // 4, 4, x.shape[3] // 4, 4).mean((3, 5))),
        4,
    ),
    "where": (lambda: Function(_filled), 1),
    "rare mask": (lambda: Function(lambda x: x.masked_fill(F.max_pool2d(x, 7, 1, 3) > 900, 0.0)), 1),
    "written in place": (lambda: Function(_written), 1),
    "pasted": (lambda: Function(_pasted), 1),
    "einsum": (
        lambda: Function(
            lambda x: torch.einsum("bchw,dc->bdhw", F.avg_pool2d(x, 3, 1, 1), torch.ones(2, 1).to(x))
        ),
        1,
    ),
    "stacked": (lambda: Function(lambda x: torch.stack([x, F.avg_pool2d(x, 3, 1, 1)], 2).sum(2)), 1),
    "chunks": (lambda: Function(lambda x: sum(torch.cat([x, F.avg_pool2d(x, 5, 1, 2)], 1).chunk(2, 1))), 1),
    "channel softmax": (
        lambda: Function(lambda x: torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1).softmax(1)),
        1,
    ),
    "diagonal": (lambda: Function(lambda x: x + F.pad(x, (6, 0, 5, 0))[..., : x.shape[2], : x.shape[3]]), 1),
    "two scales": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2, 2, 3, 2, 1),
            nn.Upsample(scale_factor=4, mode="bilinear"),
        ),
        4,
    ),
    "upsampled by hand": (
        lambda: Function(
            lambda x: (
                x[:, :, :, None, :, None]
                .expand(-1, -1, -1, 2, -1, 2)
                .reshape(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
            )
        ),
        1,
    ),
    "local response": (lambda: Function(lambda x: F.local_response_norm(F.avg_pool2d(x, 3, 1, 1), 3)), 1),
}


def _channels(module: nn.Module) -> int:
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)), None)
    return first.in_channels if first is not None and not isinstance(module, nn.Sequential) else 1


@pytest.mark.parametrize("name", CASES)
def test_a_bound_is_the_truth_of_brute_force(name: str):
    """For the ordinary forms of every operator the bound is exactly what changing one column after the other shows."""
    torch.manual_seed(0)
    build, lattice = CASES[name]
    module = build()
    channels = _channels(module)
    bound = bound_for(module, (1, channels, 32, 48))
    assert bound.obstacles() == ()
    assert bound.lattice == (lattice, lattice)
    for axis in (0, 1):
        truth = true_reach(module, bound, axis, 48, channels=channels, cross=16)
        assert bound.halo(bound.lattice)[axis] == truth
