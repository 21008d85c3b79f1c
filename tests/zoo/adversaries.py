"""Small networks that try to reach further than a scan says, in families that differ in how they reach.

Each is judged by an arithmetic of its own (torch alone): whole images in float64 against tiles at the stride and halo
that are claimed, on images that the scan has not seen, of other sizes and contents; and single pixels outside of a
tile's window, which must not change it. What is refused claims nothing.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfix
from normfix.records.sites import Scan

from .shifting import shifting_families

__all__ = ["ADVERSARIES", "Outcome", "attack", "perturbed", "tiled"]

Build = Callable[[], nn.Module]


class Computed(nn.Module):
    """A convolution, what is given as a function, and a convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 3, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first, self.last = conv(1, width, 3, padding=1), conv(width, 1, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return a map."""
        return self.last(self.function(self.first(x)))


class Raw(nn.Module):
    """A function of the image itself, and a convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.last = function, nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map."""
        return self.last(self.function(x))


def _shifted(x: Tensor, down: int, right: int) -> Tensor:
    """Move a map within its extent."""
    h, w = x.shape[2:]
    moved = F.pad(x, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    return moved[..., max(-down, 0) : max(-down, 0) + h, max(-right, 0) : max(-right, 0) + w]


def _windows(x: Tensor, size: int, mix: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `mix` to the tokens of windows (b n, size², c), on a map padded to whole windows."""
    b, c, h, w = x.shape
    y = F.pad(x, (0, -w % size, 0, -h % size))
    rows, columns = y.shape[2] // size, y.shape[3] // size
    tokens = y.view(b, c, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1)
    tokens = mix(tokens.reshape(-1, size * size, c)).view(b, rows, columns, size, size, c)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * size, columns * size)[..., :h, :w]


def _attention(tokens: Tensor) -> Tensor:
    return torch.softmax(tokens @ tokens.transpose(1, 2), -1) @ tokens


def _global_attention(x: Tensor) -> Tensor:
    return _attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def _rows_attention(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(b * h, w, c)
    return _attention(rows).reshape(b, h, w, c).permute(0, 3, 1, 2)


def _columns(x: Tensor, k: int, d: int) -> Tensor:
    unfolded = F.unfold(x, k, padding=d * (k // 2), dilation=d)
    return unfolded.view(x.shape[0], x.shape[1], k * k, *x.shape[2:]).amax(2)


def _folded(x: Tensor, k: int, s: int) -> Tensor:
    return F.fold(
        torch.tanh(F.unfold(x, k, stride=s, padding=k // 2)), x.shape[2:], k, stride=s, padding=k // 2
    )


def _filled(x: Tensor, radius: int, times: int) -> Tensor:
    """Fill what is zero from around, again and again."""
    for _ in range(times):
        x = torch.where(x != 0, x, F.max_pool2d(x, 2 * radius + 1, 1, radius))
    return x


def _diffused(x: Tensor, times: int) -> Tensor:
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=x.dtype).expand(x.shape[1], 1, 3, 3)
    for _ in range(times):
        x = x + 0.1 * F.conv2d(x, kernel, padding=1, groups=x.shape[1])
    return x


def _written(x: Tensor, n: int) -> Tensor:
    y = x.clone()
    y[..., n:] += x[..., :-n]
    return y


def _spread(x: Tensor, n: int) -> Tensor:
    """Scatter each column to the one n further on."""
    width = x.shape[3]
    index = (torch.arange(width) + n).clamp(max=width - 1).expand(x.shape)
    return torch.zeros_like(x).scatter(3, index, x) + x


def _at(x: Tensor, index: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Take columns by an index computed from their number."""
    return x + x.index_select(3, index(torch.arange(x.shape[3]), x.shape[3]))


def _warped(x: Tensor, offset: Callable[[Tensor], Tensor]) -> Tensor:
    """Sample where the grid and an offset in pixels say."""
    h, w = x.shape[2:]
    rows = (torch.arange(h).to(x) * 2 + 1) / h - 1
    columns = (torch.arange(w).to(x) * 2 + 1) / w - 1
    moved = offset(x[:, :1]) * 2 / w
    grid = torch.stack(
        [columns.expand(h, w)[None] + moved[:, 0], rows[:, None].expand(h, w)[None] + 0 * moved[:, 0]], -1
    )
    return F.grid_sample(x, grid, align_corners=False)


def _down_up(x: Tensor, factor: float, down: str, up: str, corners: bool | None = None) -> Tensor:
    small = F.interpolate(x, scale_factor=1 / factor, mode=down)
    return F.interpolate(torch.tanh(small), size=x.shape[2:], mode=up, align_corners=corners)


def _strided(k: int, s: int, p: int, mode: str = "zeros") -> nn.Module:
    """A strided convolution, and its result brought back to the image's size."""
    conv = nn.Conv2d(3, 3, k, s, p, padding_mode=mode)
    return _Holding(conv, lambda m, x: F.interpolate(m(x), size=x.shape[2:]))


def _transposed(k: int, s: int, p: int, extra: int) -> nn.Module:
    up = nn.ConvTranspose2d(3, 3, k, s, p, extra)
    return _Holding(nn.Sequential(nn.Conv2d(3, 3, 3, s, 1), up), lambda m, x: m(x))


class _Holding(nn.Module):
    """A convolution, a module that a function calls, and a convolution."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.module, self.last = nn.Conv2d(1, 3, 3, padding=1), module, nn.Conv2d(3, 1, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return a map."""
        return self.last(self.function(self.module, self.first(x)))


class _Tower(nn.Module):
    """Residual blocks in blocks."""

    def __init__(self, depth: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=dilation, dilation=dilation)
        self.inner = _Tower(depth - 1, 2 * dilation) if depth > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(torch.relu(self.conv(x)))


def _aspp(rate: int, stride: int) -> nn.Module:
    far = nn.Conv2d(3, 3, 3, padding=rate, dilation=rate)
    return _Holding(far, lambda m, x: F.interpolate(m(F.avg_pool2d(x, stride)), scale_factor=float(stride)))


def _dead(dilation: int) -> nn.Module:
    far = nn.Conv2d(3, 3, 3, padding=dilation, dilation=dilation)
    nn.init.zeros_(far.weight)
    return _Holding(far, lambda m, x: x + m(x))


class _Recurrent(nn.Module):
    """Rows read one pixel after the other."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rows, self.last = kind(1, 2, batch_first=True), nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows = self.rows(x.permute(0, 2, 3, 1).reshape(b * h, w, c))[0]
        return self.last(rows.reshape(b, h, w, 2).permute(0, 3, 1, 2))


class _Positioned(nn.Module):
    """A stored map is resized to the image's extent and added."""

    def __init__(self, extent: int) -> None:
        super().__init__()
        self.map, self.conv = nn.Parameter(torch.randn(1, 1, extent, extent)), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.interpolate(self.map, size=x.shape[2:], mode="bilinear")


class _Sliced(nn.Module):
    """Dilation follows the image's width."""

    def forward(self, x: Tensor) -> Tensor:
        d = max(1, x.shape[3] // 64)
        kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype) / 9
        return F.conv2d(x, kernel, padding=d, dilation=d)


def _families() -> Iterator[tuple[str, Build]]:
    of, raw = Computed, Raw
    for d in (2, 5, 9, 17, 33):
        yield (
            f"dilated {d}",
            lambda d=d: _Holding(nn.Conv2d(3, 3, 3, padding=d, dilation=d), lambda m, x: m(x)),
        )
    for k, s, p in ((3, 2, 1), (4, 2, 1), (5, 3, 2), (7, 4, 3), (2, 2, 0), (3, 3, 0), (5, 2, 0)):
        yield f"strided {k} {s} {p}", lambda a=(k, s, p): _strided(*a)
    for mode, k in itertools.product(("reflect", "replicate", "circular"), (3, 7)):
        yield (
            f"padded {mode} {k}",
            lambda m=mode, k=k: _Holding(
                nn.Conv2d(3, 3, k, padding=k // 2, padding_mode=m), lambda m, x: m(x)
            ),
        )
    for mode in ("reflect", "circular"):
        yield f"strided, padded {mode}", lambda m=mode: _strided(4, 2, 1, m)
    for k, s, p, e in (
        (2, 2, 0, 0),
        (3, 2, 1, 1),
        (4, 2, 1, 0),
        (5, 3, 1, 0),
        (6, 4, 1, 0),
        (4, 4, 0, 0),
        (3, 2, 0, 1),
    ):
        yield f"transposed {k} {s} {p} {e}", lambda a=(k, s, p, e): _transposed(*a)
    for ceil, k, s in ((False, 3, 2), (True, 3, 2), (True, 2, 2), (True, 5, 3), (False, 4, 4)):
        for pool in (F.max_pool2d, F.avg_pool2d):
            yield (
                f"{pool.__name__} {k} {s} ceil {ceil}",
                lambda f=pool, k=k, s=s, c=ceil: of(
                    lambda x: F.interpolate(f(x, k, s, k // 2, ceil_mode=c), size=x.shape[2:])
                ),
            )
    yield "uncounted padding", lambda: of(lambda x: F.avg_pool2d(x, 5, 1, 2, count_include_pad=False))
    yield "dilated pool", lambda: of(lambda x: F.max_pool2d(F.pad(x, (6, 6, 6, 6)), 3, 1, dilation=6))
    yield "power pool", lambda: of(lambda x: F.interpolate(F.lp_pool2d(x, 2, 4), scale_factor=4.0))
    yield "unpooled", lambda: of(lambda x: F.max_unpool2d(*F.max_pool2d(x, 4, return_indices=True), 4))
    for n in (1, 37):
        yield f"rolled {n}", lambda n=n: of(lambda x: x + x.roll(n, 3))
        yield f"rolled {n} and back", lambda n=n: of(lambda x: _diffused(x.roll(n, 2), 1).roll(-n, 2))
        yield f"flipped, moved {n}, flipped", lambda n=n: of(lambda x: x + _shifted(x.flip(3), 0, n).flip(3))
    yield "flipped", lambda: of(lambda x: x + x.flip(2))
    yield "turned", lambda: of(lambda x: x + x.rot90(2, (2, 3)))
    yield "transposed axes", lambda: of(lambda x: x + x.transpose(2, 3) if x.shape[2] == x.shape[3] else x)
    yield (
        "mirrored test-time augmentation",
        lambda: _Holding(nn.Conv2d(3, 3, 3, padding=1), lambda m, x: m(x) + m(x.flip(3)).flip(3)),
    )
    for n in (3, 130):
        yield f"index {n} further", lambda n=n: of(lambda x: _at(x, lambda i, w: (i + n).clamp(max=w - 1)))
        yield f"written {n} further", lambda n=n: of(lambda x: _written(x, n))
        yield f"scattered {n} further", lambda n=n: of(lambda x: _spread(x, n))
    yield "index from the end", lambda: of(lambda x: _at(x, lambda i, w: w - 1 - i))
    yield "index by period", lambda: of(lambda x: _at(x, lambda i, w: i // 8 * 8))
    yield "index doubled", lambda: of(lambda x: _at(x, lambda i, w: (2 * i) % w))
    yield "gathered by value", lambda: of(lambda x: x.gather(3, (x.abs() * 9).long().clamp(0, 15)))
    yield "interleaved", lambda: of(lambda x: torch.stack([x[..., ::2], x[..., 1::2].tanh()], -1).flatten(3))
    yield "columns swapped", lambda: of(lambda x: torch.stack([x[..., 1::2], x[..., ::2]], -1).flatten(3))
    for k, d in ((3, 1), (3, 4), (5, 2), (7, 1)):
        yield f"unfolded {k} {d}", lambda k=k, d=d: of(lambda x: _columns(x, k, d))
    for k, s in ((3, 1), (5, 2), (8, 4)):
        yield f"folded {k} {s}", lambda k=k, s=s: of(lambda x: _folded(x, k, s))
    for r in (2, 3, 4):
        yield (
            f"shuffled {r}",
            lambda r=r: _Holding(
                nn.Conv2d(3 * r * r, 3 * r * r, 3, padding=1),
                lambda m, x, r=r: F.pixel_shuffle(m(F.pixel_unshuffle(x, r)), r),
            ),
        )
    yield "channels shuffled", lambda: of(lambda x: F.channel_shuffle(x, 3))
    for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area"):
        for factor in (2.0, 3.0, 1.5):
            up = "nearest" if mode == "area" else mode
            yield (
                f"resized {mode} {factor}",
                lambda m=mode, f=factor, u=up: of(lambda x: _down_up(x, f, m, u)),
            )
    yield "aligned corners", lambda: of(lambda x: _down_up(x, 2, "nearest", "bilinear", True))
    yield (
        "antialiased",
        lambda: of(
            lambda x: F.interpolate(
                F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2), mode="bilinear", antialias=True),
                scale_factor=2.0,
            )
        ),
    )
    yield "resized to 32", lambda: of(lambda x: F.interpolate(F.interpolate(x, (32, 32)), x.shape[2:]))
    for radius, times in ((2, 1), (2, 5), (9, 2)):
        yield f"holes filled {radius} {times}", lambda r=radius, t=times: raw(lambda x: _filled(x, r, t))
    yield "rare mask", lambda: raw(lambda x: x.masked_fill(F.max_pool2d(x, 61, 1, 30) > 9, 0.0))
    yield "rare route", lambda: raw(lambda x: torch.where(x > 8, F.avg_pool2d(x, 41, 1, 20), x))
    yield "sign of far", lambda: raw(lambda x: x + torch.sign(F.max_pool2d(x, 21, 1, 10) - 7))
    yield "far comparison", lambda: raw(lambda x: x * (_shifted(x, 0, 77) > 6))
    yield "far maximum", lambda: raw(lambda x: torch.maximum(x, _shifted(x, 90, 0) - 5))
    yield "far threshold", lambda: raw(lambda x: x + F.threshold(_shifted(x, 0, -64), 7.0, 0.0))
    yield "argmax over channels", lambda: of(lambda x: x * (F.avg_pool2d(x, 9, 1, 4).argmax(1, True) == 1))
    yield (
        "median of windows",
        lambda: of(lambda x: F.unfold(x, 3, padding=1).view(1, 3, 9, *x.shape[2:]).median(2)[0]),
    )
    yield "erosion to zero", lambda: raw(lambda x: x * (F.avg_pool2d((x > 5).to(x), 31, 1, 15) > 0))
    for name in ("cumsum", "cummax", "logcumsumexp", "cumprod"):
        for dim in (1, 2, 3):
            yield (
                f"{name} {dim}",
                lambda n=name, d=dim: of(
                    lambda x: (lambda y: y[0] if isinstance(y, tuple) else y)(getattr(torch, n)(x / 4, d))
                ),
            )
    far = lambda x: _shifted(x, 0, 50)  # noqa: E731 - one of two branches, often
    yield "branch on pixels", lambda: of(lambda x: x + far(x) if x.shape[2] * x.shape[3] > 200 * 200 else x)
    yield "branch on width", lambda: of(lambda x: x + far(x) if x.shape[3] > 300 else x)
    yield "branch on a rest", lambda: of(lambda x: x + far(x) if x.shape[3] % 96 == 32 else x)
    yield "branch on the longer side", lambda: of(lambda x: x + far(x) if max(x.shape[2:]) >= 512 else x)
    yield "branch on a length", lambda: of(lambda x: x + far(x) if len(x[0, 0, 0]) > 400 else x)
    yield (
        "at most 384",
        lambda: of(lambda x: x + x[..., : min(384, x.shape[3])].mean(3, keepdim=True) * 0 + x),
    )
    yield "slice of 256", lambda: of(lambda x: x + F.pad(x[..., :256], (0, max(0, x.shape[3] - 256))))
    yield "dilation by width", lambda: raw(lambda x: _Sliced()(x))
    yield (
        "kernel by width",
        lambda: raw(lambda x: F.avg_pool2d(x, 2 * (x.shape[3] // 128) + 1, 1, x.shape[3] // 128)),
    )
    yield "padded by width", lambda: raw(lambda x: _shifted(x, 0, x.shape[3] // 8))
    yield (
        "half the image",
        lambda: of(lambda x: torch.cat([x[..., x.shape[3] // 2 :], x[..., : x.shape[3] // 2]], 3)),
    )
    for down, right in ((0, 5), (40, 0), (40, 40), (0, 300), (-120, 120), (260, -260)):
        yield f"beside itself {down} {right}", lambda d=down, r=right: of(lambda x: x + _shifted(x, d, r))
    for size in (4, 7, 8):
        yield f"windows {size}", lambda n=size: of(lambda x: _windows(x, n, _attention))
        yield (
            f"shifted windows {size}",
            lambda n=size: of(
                lambda x: _windows(x.roll((-2, -2), (2, 3)), n, _attention).roll((2, 2), (2, 3))
            ),
        )
        yield (
            f"windows mixed {size}",
            lambda n=size: of(lambda x: _windows(x, n, lambda t: t + t.mean(1, True))),
        )
    yield "attention", lambda: of(_global_attention)
    yield "attention in rows", lambda: of(_rows_attention)
    for depth in (1, 3, 6):
        yield f"tower {depth}", lambda d=depth: _Holding(_Tower(d, 1), lambda m, x: m(x))
    for norm in ("instance_norm", "group_norm", "layer_norm", "normalize", "softmax", "spatial softmax"):
        yield f"functional {norm}", lambda n=norm: of(_NORMS[n])
    yield "less its mean", lambda: of(lambda x: x - x.mean((2, 3), True))
    yield "less the mean of rows", lambda: of(lambda x: x - x.mean(3, True))
    yield "by its maximum", lambda: of(lambda x: x / x.abs().amax((2, 3), True).clamp(min=1e-3))
    yield (
        "by its quantile",
        lambda: of(lambda x: x / x.flatten(2).quantile(0.9, 2)[..., None, None].clamp(min=0.1)),
    )
    yield "position", lambda: of(lambda x: x + torch.linspace(0, 1, x.shape[3]).to(x))
    yield "position beyond 256", lambda: of(lambda x: x * (torch.arange(x.shape[3]) < 256).to(x))
    yield "periodic", lambda: of(lambda x: x * (torch.arange(x.shape[3]) % 8 < 4).to(x))
    yield "resized table", lambda: _Positioned(16)
    yield "corner decides", lambda: raw(lambda x: 1 - x if bool(x[0, 0, 0, 0] > 2) else x)
    yield "corner gates", lambda: raw(lambda x: torch.where(x[:, :, :1, :1] > 2, -x, x))
    yield "mean gates", lambda: raw(lambda x: torch.where(x.mean() > 1, _shifted(x, 0, 60), x))
    yield "maximum decides", lambda: raw(lambda x: x / 2 if float(x.max()) > 20 else x)
    yield (
        "centre picked",
        lambda: raw(lambda x: x * x[:, :, x.shape[2] // 2, x.shape[3] // 2][..., None, None]),
    )
    yield "as many as are bright", lambda: raw(lambda x: x + (x > 30).sum().to(x))
    for rate, stride in ((12, 8), (72, 8), (40, 4)):
        yield f"sparse {rate} at {stride}", lambda r=rate, s=stride: _aspp(r, s)
    for d in (4, 90):
        yield f"dead {d}", lambda d=d: _dead(d)
    yield "sorted", lambda: of(lambda x: x + x.sort(3)[0])
    yield "highest five", lambda: of(lambda x: x * (x >= x.topk(5, 3)[0][..., -1:]))
    yield "fourier", lambda: of(lambda x: torch.fft.irfft2(torch.fft.rfft2(x).tanh(), s=x.shape[2:]).to(x))
    yield "rounded", lambda: of(lambda x: (F.avg_pool2d(x, 7, 1, 3) * 8).round() / 8)
    yield "whole numbers", lambda: of(lambda x: (F.max_pool2d(x, 7, 1, 3) * 8).int().to(x))
    yield (
        "fake quantised",
        lambda: of(lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -9, 9).to(x)),
    )
    for times in (1, 12):
        yield f"diffused {times}", lambda t=times: of(lambda x: _diffused(x, t))
    yield "until it is small", lambda: raw(lambda x: _diffused(x, int(x.abs().max() > 10) * 6 + 1))
    yield "long short-term memory", lambda: _Recurrent(nn.LSTM)
    yield "gated recurrence", lambda: _Recurrent(nn.GRU)
    yield "warped by 9", lambda: of(lambda x: _warped(x, lambda v: 0 * v + 9))
    yield "warped by values", lambda: of(lambda x: _warped(x, lambda v: v * 3))
    yield "product of matrices", lambda: of(lambda x: x @ x.transpose(2, 3) @ x / 1e3)
    yield "outer product of profiles", lambda: of(lambda x: x + x.mean(2, True) * x.mean(3, True))
    yield "running mean", lambda: of(lambda x: F.avg_pool2d(x, (1, 65), 1, (0, 32)))
    yield "squeeze and excite", lambda: of(lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)))
    yield (
        "pyramid of pools",
        lambda: of(lambda x: x + F.interpolate(F.adaptive_avg_pool2d(x, 4), x.shape[2:])),
    )
    yield (
        "pooled in proportion",
        lambda: of(
            lambda x: F.interpolate(F.adaptive_max_pool2d(x, (x.shape[2] // 8, x.shape[3] // 8)), x.shape[2:])
        ),
    )


_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "instance_norm": F.instance_norm,
    "group_norm": lambda x: F.group_norm(x, 3),
    "layer_norm": lambda x: F.layer_norm(x.movedim(1, -1), (3,)).movedim(-1, 1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "softmax": lambda x: x.softmax(1),
    "spatial softmax": lambda x: x.softmax(3),
}

ADVERSARIES: dict[str, Build] = {**dict(_families()), **dict(shifting_families())}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one: "local", "converted", "refused", or "silently wrong" with the largest difference in sd."""

    kind: str
    worst: float = 0.0
    where: str = ""


def attack(name: str, *, images: int | None = None) -> Outcome:
    """Scan one, convert it where something is live, and judge what is claimed.

    Args:
        name: of ADVERSARIES.
        images: how many of the images are tried; all by default.
    """
    torch.manual_seed(crc32(name.encode()))
    net = ADVERSARIES[name]().eval().requires_grad_(False)
    example = _content("noise", (96, 128))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scan = normfix.scan(net, example)
            kind = "local"
            if scan.live or not scan.tile_invariant:
                done = normfix.convert(net, example)
                if not done.proof.passed:
                    return Outcome("refused")
                net, scan, kind = done.model, done.scan, "converted"
        except normfix.NormfixError:
            return Outcome("refused")
    if scan.halo is None or scan.stride is None:
        return Outcome("refused")
    return _judged(net.double(), scan, kind, images)


def _judged(net: nn.Module, scan: Scan, kind: str, images: int | None) -> Outcome:
    worst = Outcome(kind)
    for content, wanted in list(_images())[:images]:
        size = _exact(scan, wanted)
        if _excluded(scan, size):
            continue
        image = _content(content, size).double()
        with torch.no_grad():
            whole = net(image)
            # what is constant but for rounding has no spread
            spread = max(float(whole.std()), 1e-6 * float(whole.abs().max()), 1e-12)
            found = float((tiled(net, image, scan) - whole).abs().max()) / spread
            if content in _PERTURBED:
                found = max(found, perturbed(net, image, whole, scan) / spread)
        if not found <= max(1e-9, worst.worst):
            worst = Outcome("silently wrong", found, f"{content} {size}")
    return worst


_PERTURBED, _PIXELS = ("steps", "dark"), 10


def perturbed(net: nn.Module, image: Tensor, whole: Tensor, scan: Scan) -> float:
    """Return how much tiles change with single pixels outside of their windows: next to a corner, or anywhere."""
    assert scan.scale is not None
    scales = [Fraction(s) for s in scan.scale]
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for window, tile in list(_windows_of(scan, image.shape[2:]))[::7]:
        places = [[a - 1 if i & bit else b for bit, (a, b) in enumerate(window, start=1)] for i in range(4)]
        places += [
            [int(torch.randint(n, (1,), generator=generator)) for n in image.shape[2:]]
            for _ in range(_PIXELS)
        ]
        # next to the window along one axis, within it along the other
        places += [[window[0][0] - 1, tile[1][0]], [tile[0][0], window[1][1]]]
        kept = (..., *(slice(int(a * s), int(b * s)) for (a, b), s in zip(tile, scales, strict=True)))
        for place in places:
            outside = any(not a <= p < b for p, (a, b) in zip(place, window, strict=True))
            if not outside or not all(0 <= p < n for p, n in zip(place, image.shape[2:], strict=True)):
                continue
            other = image.clone()
            other[(..., *place)] += 50
            largest = max(largest, float((net(other)[kept] - whole[kept]).abs().max()))
    return largest


def _images() -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield contents and extents: long along an axis, square, narrow."""
    sizes = ((96, 704), (704, 96), (224, 288), (128, 416))
    contents = ("sparse", "holes", "steps", "noise", "bright", "dark")
    yield from ((content, sizes[i % len(sizes)]) for i, content in enumerate(contents))
    yield from (("sparse", size) for size in sizes[1:])


def _content(kind: str, size: Sequence[int]) -> Tensor:
    """Return an image (1, 1, *size)."""
    generator = torch.Generator().manual_seed(crc32(kind.encode()))
    noise = torch.randn(1, 1, *size, generator=generator)
    rare = torch.rand(1, 1, *size, generator=generator)
    return {
        "noise": noise,
        "sparse": torch.where(rare > 0.999, 40.0, 0.0) + torch.where(rare < 0.2, noise, 0.0),
        "holes": torch.where(rare > 0.3, noise, 0.0),
        "steps": (noise.cumsum(3) / 8).round() * 3,
        "bright": 1e3 * noise.abs() + 30,
        "dark": -3 - noise.abs(),
    }[kind]


def _exact(scan: Scan, size: Sequence[int]) -> tuple[int, ...]:
    """Return extents that are exact, and whole strides."""
    assert scan.exact_sizes is not None
    assert scan.stride is not None
    steps = [math.lcm(a, b) for a, b in zip(scan.exact_sizes, scan.stride, strict=True)]
    return tuple(-(-n // s) * s for n, s in zip(size, steps, strict=True))


def _excluded(scan: Scan, size: tuple[int, ...]) -> bool:
    """Tell whether the scan says that it does not speak for an image or its windows."""
    sizes = scan.sizes
    if sizes is None:
        return False
    extents = [size, *(tuple(b - a for a, b in window) for window, _ in _windows_of(scan, size))]
    return sizes.exceeded(size) or any(sizes.broken(extent) for extent in extents)


def _windows_of(
    scan: Scan, size: Sequence[int]
) -> Iterator[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """Yield (window, tile), each as (start, stop) per axis: the halo in whole strides, cut at the borders."""
    assert scan.halo is not None
    assert scan.stride is not None
    cuts = []
    for n, stride, (before, after) in zip(size, scan.stride, scan.halo, strict=True):
        tile = -(-48 // stride) * stride
        before, after = (-(-reach // stride) * stride for reach in (before, after))
        tiles = [(start, min(n, start + tile)) for start in range(0, n, tile)]
        cuts.append([((max(0, a - before), min(n, b + after)), (a, b)) for a, b in tiles])
    for chosen in itertools.product(*cuts):
        yield [window for window, _ in chosen], [tile for _, tile in chosen]


def tiled(net: Callable[[Tensor], Tensor], image: Tensor, scan: Scan) -> Tensor:
    """Return the map of an image (1, 1, *space) put together from tiles, NaN where none of them has it."""
    assert scan.scale is not None
    scales = [Fraction(s) for s in scan.scale]
    pieces: list[tuple[list[tuple[int, int]], Tensor]] = []
    for window, tile in _windows_of(scan, image.shape[2:]):
        part: Any = net(image[(..., *(slice(a, b) for a, b in window))])
        place = []
        for axis, ((first, _), (a, b), scale) in enumerate(zip(window, tile, scales, strict=True)):
            begin, width = int((a - first) * scale), int((b - a) * scale)
            if b == image.shape[axis + 2]:
                width = part.shape[axis + 2] - begin
            part = part.narrow(axis + 2, begin, min(width, part.shape[axis + 2] - begin))
            place.append((int(a * scale), int(a * scale) + part.shape[axis + 2]))
        pieces.append((place, part))
    extents = [max(place[axis][1] for place, _ in pieces) for axis in range(len(scales))]
    whole = torch.full((*pieces[0][1].shape[:2], *extents), math.nan, dtype=image.dtype)
    for place, part in pieces:
        whole[(..., *(slice(a, b) for a, b in place))] = part
    return whole
