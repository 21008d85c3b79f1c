"""Small networks that take another way by the size of the image, by a place in it, or by single values.

Each has an image to convert with and others to try, and is held against an arithmetic of its own (`tiles_of`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BY_PLACE",
    "BY_SIZE",
    "BY_STATISTIC",
    "BY_VALUE",
    "LOCAL",
    "UNRECORDED",
    "Branching",
    "Case",
    "tiles_of",
]

Way = Callable[[Tensor], Tensor]


class Branching(nn.Module):
    """A convolution, an instance norm and a convolution behind a way that branches."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.stem, self.norm, self.head = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.InstanceNorm2d(4),
            nn.Conv2d(4, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.stem(self.way(x)))))


@dataclass(frozen=True, slots=True)
class Case:
    """A way, an image to convert with, and images that it is tried on; images are (height, width, kind)."""

    way: Way
    first: tuple[int, int, str]
    others: tuple[tuple[int, int, str], ...]

    def network(self) -> nn.Module:
        """Return the network in eval mode."""
        return Branching(self.way).eval()

    def image(self) -> Tensor:
        """Return the image to convert with."""
        return _image(*self.first, seed=0)

    def images(self) -> list[Tensor]:
        """Return the images to try."""
        return [_image(*other, seed=3 + number) for number, other in enumerate(self.others)]


def tiles_of(
    network: Way, x: Tensor, stride: Sequence[int], halo: Sequence[tuple[int, int]], tile: int = 32
) -> Tensor:
    """Stitch tiles, by nothing of normfix's: windows are cut at the border, halos rounded up to the stride."""
    (up, down), (before, after) = [
        [-(-h // s) * s for h in pair] for pair, s in zip(halo, stride, strict=True)
    ]
    height, width = x.shape[2:]
    rows, columns = (-(-tile // s) * s for s in stride)
    out = torch.zeros_like(network(x))
    for i in range(0, height, rows):
        for j in range(0, width, columns):
            top, left = max(0, i - up), max(0, j - before)
            y = network(
                x[
                    ..., top : min(height, i + rows + down), left : min(width, j + columns + after)
                ].contiguous()
            )
            h, w = min(rows, height - i), min(columns, width - j)
            out[..., i : i + h, j : j + w] = y[..., i - top : i - top + h, j - left : j - left + w]
    return out


def _image(height: int, width: int, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1, height, width, generator=generator) * 0.4
    if kind == "bright":
        return x + 0.5
    if kind == "blobs":
        for i in range(0, height, 40):
            for j in range(0, width, 40):
                x[..., i : i + 20, j : j + 20] += 0.5
    return x


def _blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1)


def _far(x: Tensor) -> Tensor:
    """Look forty pixels to the left."""
    return x + F.pad(x, (40, 0))[..., : x.shape[3]]


def _coarse(x: Tensor) -> Tensor:
    return F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:])


def _if(condition: Callable[[Tensor], object], then: Way = _blurred, other: Way = lambda x: x) -> Way:
    return lambda x: then(x) if condition(x) else other(x)


def _inverted(value: Callable[[Tensor], object]) -> Way:
    return _if(value, lambda x: 1 - x)


def _where(chosen: Callable[[Tensor], Tensor]) -> Way:
    return lambda x: torch.where(chosen(x) > 0.5, 1 - x, x)


def _shrunk(x: Tensor) -> Tensor:
    if max(x.shape[2:]) <= 256:
        return x
    small = F.interpolate(x, size=[min(n, 256) for n in x.shape[2:]])
    return F.interpolate(small, size=x.shape[2:])


def _normed(x: Tensor) -> Tensor:
    return F.instance_norm(x) if x.shape[2] * x.shape[3] > 1 << 14 else x


def _window(x: Tensor, size: int) -> Tensor:
    """Blur inside of windows of a size, after padding to a multiple of it."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % size, 0, -height % size))
    n, c, h, w = x.shape
    # (n, c, h, w) -> (n, c, h/s, s, w/s, s)
    blocks = x.reshape(n, c, h // size, size, w // size, size)
    return (blocks - 0.5 * blocks.mean((3, 5), keepdim=True)).reshape(n, c, h, w)[..., :height, :width]


def _middle(x: Tensor) -> Tensor:
    return x[..., x.shape[2] // 2, x.shape[3] // 2]


_SMALL = (64, 96, "plain")
_LARGER = ((192, 192, "plain"), (64, 320, "plain"))

BY_SIZE: Mapping[str, Case] = {
    "area": Case(_if(lambda x: x.shape[2] * x.shape[3] > 160 * 160, _coarse), _SMALL, _LARGER),
    "area, small": Case(
        _if(lambda x: x.shape[2] * x.shape[3] < 30_000, _far), (192, 192, "plain"), (_SMALL,)
    ),
    "width": Case(_if(lambda x: x.shape[3] > 600), _SMALL, ((32, 640, "plain"),)),
    "height at least": Case(_if(lambda x: x.shape[2] >= 300, _far), _SMALL, ((320, 96, "plain"),)),
    "either": Case(_if(lambda x: max(x.shape[2:]) > 250), _SMALL, _LARGER),
    "both": Case(_if(lambda x: min(x.shape[2:]) > 150), _SMALL, _LARGER),
    "between": Case(_if(lambda x: 500 < x.shape[3] < 600), _SMALL, ((32, 560, "plain"), (32, 640, "plain"))),
    "one width": Case(
        lambda x: x + ((x > -9) & (x.shape[3] == 34)), (96, 144, "plain"), ((96, 144, "plain"),)
    ),
    "one size": Case(_if(lambda x: x.shape[3] == 1024), _SMALL, ((32, 1024, "plain"),)),
    "square": Case(_if(lambda x: x.shape[2] == x.shape[3], _far), (64, 160, "plain"), ((160, 160, "plain"),)),
    "not square": Case(
        _if(lambda x: x.shape[2] != x.shape[3], _far), (160, 160, "plain"), ((96, 160, "plain"),)
    ),
    "wide": Case(_if(lambda x: x.shape[3] > 4 * x.shape[2], _far), (96, 96, "plain"), ((32, 256, "plain"),)),
    "elements": Case(_if(lambda x: x.numel() > 30_000), _SMALL, _LARGER),
    "elements of a channel": Case(_if(lambda x: x[0, 0].numel() > 30_000), _SMALL, _LARGER),
    "root of the area": Case(_if(lambda x: (x.shape[2] * x.shape[3]) ** 0.5 > 150), _SMALL, _LARGER),
    "sum of the sides": Case(_if(lambda x: x.shape[2] + x.shape[3] > 300), _SMALL, _LARGER),
    "difference of the sides": Case(_if(lambda x: x.shape[3] - x.shape[2] > 100), (96, 96, "plain"), _LARGER),
    "kernel by width": Case(
        lambda x: F.avg_pool2d(x, 2 * (x.shape[3] // 128) + 1, 1, x.shape[3] // 128), _SMALL, _LARGER
    ),
    "dilation by width": Case(
        lambda x: (
            x
            + F.conv2d(
                x, torch.ones(1, 1, 3, 3) / 9, padding=1 + x.shape[3] // 200, dilation=1 + x.shape[3] // 200
            )
        ),
        _SMALL,
        _LARGER,
    ),
    "rounds by width": Case(lambda x: _rounds(x, x.shape[3] // 150), _SMALL, _LARGER),
    "whole number of a half": Case(_if(lambda x: int(x.shape[3] * 0.5) > 100), _SMALL, _LARGER),
    "length of a row": Case(_if(lambda x: len(x[0, 0, 0]) > 200), _SMALL, _LARGER),
    "at most 256": Case(
        lambda x: F.interpolate(F.interpolate(x, size=[min(256, n) for n in x.shape[2:]]), size=x.shape[2:]),
        _SMALL,
        ((32, 400, "plain"),),
    ),
    "shrunk where large": Case(_shrunk, _SMALL, ((32, 400, "plain"),)),
    "normed where large": Case(_normed, _SMALL, _LARGER),
    "first 200 columns": Case(
        lambda x: x + F.pad(x[..., :200], (0, max(0, x.shape[3] - 200))), _SMALL, ((32, 400, "plain"),)
    ),
    "every hundredth width": Case(_if(lambda x: x.shape[3] % 100 == 0), _SMALL, ((32, 400, "plain"),)),
    "every thousandth width": Case(_if(lambda x: x.shape[3] % 1000 == 0), _SMALL, ((32, 1000, "plain"),)),
    "odd height": Case(
        _if(lambda x: x.shape[2] % 2 == 1, _far), _SMALL, ((65, 96, "plain"), (96, 256, "plain"))
    ),
    "nested": Case(
        _if(lambda x: x.shape[3] > 200, _if(lambda x: x.shape[3] > 400, _far)),
        _SMALL,
        ((32, 300, "plain"), (32, 500, "plain")),
    ),
    "batch times area": Case(
        _if(lambda x: x.shape[0] * x.shape[2] * x.shape[3] >= 20_000, _far), _SMALL, _LARGER
    ),
}


def _rounds(x: Tensor, count: int) -> Tensor:
    for _ in range(count):
        x = _blurred(x)
    return x


_TABLE = torch.ones(1, 1, 1, 4096)
_TABLE[..., 300:] = 0.2
_WIDE = ((32, 500, "plain"),)

BY_PLACE: Mapping[str, Case] = {
    "columns from 300 on": Case(lambda x: x + (torch.arange(x.shape[3]) > 300).to(x), _SMALL, _WIDE),
    "rows from 300 on": Case(
        lambda x: x * (1 + (torch.arange(x.shape[2]) > 300).to(x))[:, None], _SMALL, ((500, 32, "plain"),)
    ),
    "table": Case(lambda x: x * _TABLE[..., : x.shape[3]], _SMALL, _WIDE),
    "clamped ramp": Case(
        lambda x: x + (torch.arange(x.shape[3]) / 100 - 3).clamp_min(0).to(x), _SMALL, _WIDE
    ),
    "counted": Case(lambda x: x * (torch.ones(x.shape[3]).cumsum(0) < 300).to(x), _SMALL, _WIDE),
    "grid": Case(
        lambda x: torch.where(
            torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")[1] > 300,
            1 - x,
            x,
        ),
        _SMALL,
        _WIDE,
    ),
}

_BRIGHT = ((128, 192, "blobs"), (128, 192, "bright"))
_PLAIN = (96, 128, "plain")

BY_VALUE: Mapping[str, Case] = {
    "corner": Case(_inverted(lambda x: x[0, 0, 0, 0] > 0.5), _PLAIN, _BRIGHT),
    "last corner": Case(_inverted(lambda x: x[0, 0, -1, -1].item() > 0.5), _PLAIN, _BRIGHT),
    "centre": Case(_inverted(lambda x: float(_middle(x)[0, 0]) > 0.5), _PLAIN, _BRIGHT),
    "fifth value": Case(_inverted(lambda x: x.flatten()[5] > 0.5), _PLAIN, _BRIGHT),
    "mean of a patch": Case(_inverted(lambda x: x[..., :8, :8].mean() > 0.5), _PLAIN, _BRIGHT),
    "list of a row": Case(_inverted(lambda x: x[0, 0, 0].tolist()[3] > 0.5), _PLAIN, _BRIGHT),
    "array": Case(_inverted(lambda x: x.detach().numpy()[0, 0, 7, 7] > 0.5), _PLAIN, _BRIGHT),
    "thumbnail": Case(_inverted(lambda x: F.interpolate(x, size=(4, 4)).amax() > 0.5), _PLAIN, _BRIGHT),
    "where the corner": Case(_where(lambda x: x[..., :1, :1]), _PLAIN, _BRIGHT),
    "where the centre": Case(_where(lambda x: _middle(x)[..., None, None]), _PLAIN, _BRIGHT),
    "where the first row": Case(_where(lambda x: x[..., :1, :]), _PLAIN, _BRIGHT),
    "where the last column": Case(_where(lambda x: x[..., -1:]), _PLAIN, _BRIGHT),
    "where it is selected": Case(
        _where(lambda x: x.select(2, 3).select(2, 3)[..., None, None]), _PLAIN, _BRIGHT
    ),
    "where it is gathered": Case(
        _where(lambda x: x.index_select(2, torch.tensor([2])).index_select(3, torch.tensor([5]))),
        _PLAIN,
        _BRIGHT,
    ),
    "where a coarse corner": Case(_where(lambda x: F.max_pool2d(x, 8)[..., :1, :1]), _PLAIN, _BRIGHT),
    "times a comparison": Case(lambda x: x * (x[..., :1, :1] < 0.5), _PLAIN, _BRIGHT),
    "filled": Case(lambda x: x.masked_fill(x[..., 4:5, 4:5] > 0.5, 0.0), _PLAIN, _BRIGHT),
    "expanded": Case(lambda x: x * (x[..., :1, :1].expand_as(x) < 0.5), _PLAIN, _BRIGHT),
}

BY_STATISTIC: Mapping[str, Case] = {
    "far where bright": Case(
        lambda x: torch.where(x.mean() > 0.5, _far(x), x), _PLAIN, ((128, 192, "plain"), (128, 192, "bright"))
    ),
    "far if bright": Case(_if(lambda x: x.mean() > 0.5, _far), _PLAIN, ((128, 192, "bright"),)),
    "coarse if bright": Case(_if(lambda x: x.amax() > 0.5, _coarse), _PLAIN, ((128, 192, "bright"),)),
    "far behind a gate": Case(
        lambda x: x + torch.relu(x.mean((2, 3), keepdim=True) - 0.5) * 20 * _far(x),
        _PLAIN,
        ((128, 192, "bright"),),
    ),
    "coarse behind a gate": Case(
        lambda x: x + F.hardsigmoid(40 * (x.mean((2, 3), keepdim=True) - 0.6)) * _coarse(x),
        _PLAIN,
        ((128, 192, "bright"),),
    ),
    "inverted if bright": Case(_inverted(lambda x: x.mean() > 0.5), _PLAIN, _BRIGHT),
}

LOCAL: Mapping[str, Case] = {
    "plain": Case(lambda x: x, _SMALL, _LARGER),
    "padded to 16": Case(
        lambda x: F.pad(x, (0, -x.shape[3] % 16, 0, -x.shape[2] % 16))[..., : x.shape[2], : x.shape[3]],
        _SMALL,
        _LARGER,
    ),
    "padded if odd": Case(
        lambda x: F.interpolate(
            F.avg_pool2d(
                F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)) if (x.shape[2] % 2 or x.shape[3] % 2) else x,
                2,
            ),
            scale_factor=2,
        )[..., : x.shape[2], : x.shape[3]],
        _SMALL,
        (*_LARGER, (97, 131, "plain")),
    ),
    "windows": Case(lambda x: _window(x, 8), _SMALL, (*_LARGER, (100, 130, "plain"))),
    "replicated by hand": Case(
        lambda x: F.avg_pool2d(torch.cat([x[..., :1], x, x[..., -1:]], 3), (1, 3), 1), _SMALL, _LARGER
    ),
    "resized to itself": Case(
        lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:]) if x.shape[2] % 2 == 0 else x,
        _SMALL,
        _LARGER,
    ),
}


def _gained(asks: Callable[[Tensor], object]) -> Way:
    def way(x: Tensor) -> Tensor:
        gain = 1.5 if asks(x) else 1.0
        return x * gain + gain

    return way


def _compared(x: Tensor) -> Tensor:
    gain = torch.where(torch.tensor(x.shape[-1]) == 64, 1.5, 1.0)
    return x * gain + gain


UNRECORDED: Mapping[str, Way] = {
    "table": _gained(lambda x: {64: True, 65: False}.get(x.shape[-1], False)),
    "length": _gained(lambda x: len(x[0, 0, 0]) == 64),
    "float": _gained(lambda x: math.isclose(float(x.shape[-1]), 64)),
    "bytes": _gained(lambda x: x[0, 0, 0].nbytes == 64 * x.element_size()),
    "power of two": _gained(lambda x: x.shape[-1] & (x.shape[-1] - 1) == 0),
    "text": _gained(lambda x: f"{x.shape[-1]}" in {"64", "65"}),
    "text of a shape": _gained(lambda x: repr(x.shape).endswith("64])")),
    "compared as a tensor": _compared,
    "unless it is captured": _gained(lambda x: isinstance(x.shape[-1], int) and x.shape[-1] == 64),
}
"""Ways that are another function for images 64 pixels wide, and of which no captured graph says so."""
