"""Exact moments: float64 count, mean and sum of squared deviations per channel, merged without loss.

Chan, Golub and LeVeque (1979), for parts a and b with delta = mean_b - mean_a and n = n_a + n_b:

    mean = mean_a + delta n_b / n
    M2   = M2_a + M2_b + delta^2 n_a n_b / n

The second line is the law of total variance: the variance of a union is the mean variance of the parts plus
the variance of their means. E[x^2] - E[x]^2 is never used: in float32 it is 13 % wrong at mean/sd = 1000.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import torch
from torch import Tensor

from normfix.layers.affine import kernels_of

__all__ = ["Moments", "measure", "measure_there", "merge", "on_host", "pool", "union"]

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of each channel: `count` values, `mean` and `m2` of shape (C,), float64, of one device."""

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Return the biased variance, shape (C,)."""
        return self.m2 / self.count


def measure(x: Tensor) -> Moments:
    """Measure a tensor over batch and space, in float64 throughout; the moments are on the host.

    Args:
        x: (N, C) or (N, C, *space), any floating dtype.

    Example:
        >>> m = measure(torch.tensor([[[1.0, 3.0]]]))
        >>> m.count, m.mean.item(), m.var.item()
        (2, 2.0, 1.0)
    """
    return on_host([measure_there(x)])[0]


def measure_there(x: Tensor) -> Moments:
    """Measure as `measure` does and leave the moments where the tensor is, so that nobody waits for them."""
    count = x.numel() // max(1, x.shape[1])
    kernel = _kernel_of(x.device) if x.device.type == "cuda" and count else None
    found = None if kernel is None else kernel(x.detach())
    if found is not None:
        return Moments(count, found[0], found[1])
    channels = x.detach().movedim(1, 0).flatten(1)  # (N, C, *space) -> (C, N*space)
    if x.device.type == "cuda":
        return _measure_together(channels)
    means, m2s = [], []
    wide = torch.empty(channels.shape[1], dtype=torch.float64, device=x.device)
    for channel in channels:
        mean = wide.copy_(channel).mean()
        means.append(mean)
        m2s.append(wide.sub_(mean).square_().sum())
    return Moments(channels.shape[1], torch.stack(means), torch.stack(m2s))


_WIDE = 1 << 25
"""Values that are copied to float64 at a time on a GPU, where a launch per channel costs more than its work."""


def _measure_together(channels: Tensor) -> Moments:
    """Measure several channels (C, values) at a time, each by Welford's rule as torch.var_mean does."""
    count = channels.shape[1]
    step = max(1, _WIDE // max(1, count))
    parts = [
        torch.var_mean(channels[i : i + step].double(), 1, correction=0)
        for i in range(0, len(channels), step)
    ]
    variances, means = (torch.cat(values) for values in zip(*parts, strict=True))
    return Moments(count, means, variances * count)


@cache
def _kernel_of(device: torch.device) -> Callable[[Tensor], Tensor | None] | None:
    """Return the kernel that measures on a device in one reading, once it ran there."""
    kernels = kernels_of(device)
    if kernels is None:
        return None
    try:
        kernels.moments(torch.zeros((1, 2, 2, 2), device=device))
    except Exception as error:  # noqa: BLE001 - whatever a compiler runs into, torch's own kernels are there
        reason = " ".join(str(error).split())[:160]
        logging.getLogger("normfix").warning("moments are measured without Triton's kernel: %s", reason)
        return None
    found: Callable[[Tensor], Tensor | None] = kernels.moments
    return found


def union(*parts: Moments) -> Moments:
    """Return the moments of the union where they are: on a device all at once, so that nobody waits; else as `merge`.

    With n = sum n_i and mean = sum n_i mean_i / n, the sum of squares is M2 = sum (M2_i + n_i (mean_i - mean)^2).
    """
    filled = [part for part in parts if part.count]
    devices = {part.mean.device for part in filled}
    if len(devices) != 1 or devices == {CPU}:
        return merge(*parts)
    if len(filled) == 1:
        return filled[0]
    n = sum(part.count for part in filled)
    counts = torch.tensor([[part.count] for part in filled], dtype=torch.float64)
    if filled[0].mean.is_cuda:  # what is not pinned is waited for
        counts = counts.pin_memory()
    counts = counts.to(filled[0].mean.device, non_blocking=True)
    means, m2s = torch.stack([part.mean for part in filled]), torch.stack([part.m2 for part in filled])
    mean = (means * (counts / n)).sum(0)
    return Moments(n, mean, (m2s + (means - mean).square() * counts).sum(0))


def merge(*parts: Moments) -> Moments:
    """Return the moments of the union, merged on the host in the order given.

    Example:
        >>> one, two = measure(torch.zeros(1, 1, 2)), measure(torch.full((1, 1, 2), 2.0))
        >>> merge(one, two).var.item()
        1.0
    """
    return reduce(_merge_two, on_host(parts))


def pool(moments: Moments, groups: int) -> Moments:
    """Return the moments of each group of channels, broadcast back to the channels.

    Args:
        moments: of C channels.
        groups: divides C; `groups == C` changes nothing.
    """
    channels = moments.mean.numel()
    if groups == channels:
        return moments
    means = moments.mean.reshape(groups, -1)  # (C,) -> (G, C/G)
    mean = means.mean(1, keepdim=True)
    between = (means - mean).square().sum(1, keepdim=True) * moments.count
    m2 = moments.m2.reshape(groups, -1).sum(1, keepdim=True) + between
    members = channels // groups
    return Moments(
        moments.count,
        mean.expand(-1, members).flatten(),
        (m2 / members).expand(-1, members).flatten(),
    )


def on_host(parts: Sequence[Moments]) -> list[Moments]:
    """Bring moments to the host, those of a device in one copy."""
    away = [part for part in parts if part.mean.device.type != "cpu"]
    if not away:
        return list(parts)
    values = iter(torch.stack([torch.stack((part.mean, part.m2)) for part in away]).cpu())
    found = []
    for part in parts:
        if part.mean.device.type == "cpu":
            found.append(part)
        else:
            mean, m2 = next(values)
            found.append(Moments(part.count, mean, m2))
    return found


def _merge_two(a: Moments, b: Moments) -> Moments:
    if a.count == 0 or b.count == 0:
        return a if b.count == 0 else b  # the mean of nothing is NaN and must not spread
    n = a.count + b.count
    delta = b.mean - a.mean
    return Moments(n, a.mean + delta * (b.count / n), a.m2 + b.m2 + delta.square() * (a.count * b.count / n))
