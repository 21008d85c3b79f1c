"""What a network is tried on: strips made from an example, and images made from those to show what follows values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "AMPLIFICATION",
    "CHANGES",
    "MAGNITUDES",
    "NOISES",
    "TEXTURES",
    "VARIANTS",
    "Change",
    "magnitudes",
    "ranged",
    "strip",
    "textured",
]

AMPLIFICATION = 1e12

_PERIOD = 16
"""Pixels along a diagonal over which an image goes through all magnitudes."""

Change = Callable[[Tensor], Tensor]


def strip(example: Tensor, size: Sequence[int]) -> Tensor:
    """Return a strip of the given spatial size made from the example, mirrored back and forth.

    Mirroring keeps the example's own values and their smoothness at every size.
    """
    x = example
    for axis, n in enumerate(size, start=2):
        period = torch.cat([torch.arange(x.shape[axis]), torch.arange(x.shape[axis] - 1, -1, -1)])
        x = x.index_select(axis, period.to(x.device)[torch.arange(n, device=x.device) % len(period)])
    return x


def textured(example: Tensor, size: Sequence[int]) -> Tensor:
    """Return a strip, see `strip`, with noise as large as the example's own variation: no period can hide a shift.

    The noise is the same each time.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*example.shape[:2], *size, generator=generator, dtype=torch.float64)
    return strip(example, size) + (noise * float(example.double().std().clamp_min(1e-3))).to(example)


def _noise(x: Tensor) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return noise.to(x) * x.abs().mean().clamp_min(1e-3)


def ranged(x: Tensor) -> Tensor:
    """Return it in magnitudes that rise from a hundredth to ten millions along its diagonals, time and again.

    What compares a few neighbours with two numbers finds values between them in any part that is as large as a period.
    """
    places = torch.zeros(x.shape[2:], dtype=torch.float64)
    for dim, n in enumerate(reversed(x.shape[2:])):
        places += torch.arange(n).view(-1, *(1,) * dim)
    powers = places % _PERIOD * (9 / _PERIOD) - 2
    return x / x.abs().mean().clamp_min(1e-3) * 10 ** powers.to(x)


CHANGES: tuple[Change, ...] = (
    lambda x: x * AMPLIFICATION,
    lambda x: -x.abs() * AMPLIFICATION,
    lambda x: x.abs() * 1e4 + 1e4,
    torch.zeros_like,
    _noise,
)
"""What becomes of everything that must not count."""

TEXTURES: tuple[Change, ...] = (
    lambda x: torch.where(_noise(x) > 2 * _noise(x).std(), 50 * x.abs() + 50, 0 * x),
    torch.ones_like,
    lambda x: -torch.ones_like(x),
    lambda x: (x - x.mean()).cumsum(-1),
    lambda x: (x - x.mean()).cumsum(-2 if x.dim() > 3 else -1),
)
"""Images that are flat but for a few pixels, or everywhere, and smooth ones."""

VARIANTS: tuple[Change, ...] = (
    lambda x: x,
    lambda x: x * 1e3,
    lambda x: -30 * x,
    lambda x: x * 1e9,
    *TEXTURES,
)
"""Images of several magnitudes and textures made from one: a reach that follows the values shows on one of them."""

MAGNITUDES: tuple[Change, ...] = (lambda x: x * 1e4, lambda x: x.abs() * 1e9, lambda x: x.abs() * -1e9)
"""What opens the gates of a network: a threshold between ordinary numbers and these is passed on one of them.

Of one sign are most images, and products of two pixels then: what takes the largest of some takes the same side of all.
"""


NOISES: tuple[Change, ...] = (
    torch.clone,
    lambda noise: noise * 1e4,
    lambda noise: noise.abs() * 1e9,
    lambda noise: noise**9,
    lambda noise: torch.where(noise > 2, 50 * noise, 0),
)
"""What becomes of noise of unit variance: a gate that is shut on one image opens on another.

The fourth has a few values far from the rest, which a norm brings no nearer.
"""


def magnitudes(image: Tensor) -> tuple[Tensor, ...]:
    """Return an image and the same in other magnitudes: what a bound does shows beyond it alone.

    >>> [float(x) for x in magnitudes(torch.ones(1))]
    [1.0, 1000.0, -30.0]
    """
    return tuple(change(image) for change in VARIANTS[:3]) if image.is_floating_point() else (image,)
