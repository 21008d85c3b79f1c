"""Exact moments: float64 count, mean and sum of squared deviations per channel, merged without loss.

Chan, Golub and LeVeque (1979), for parts a and b with delta = mean_b - mean_a and n = n_a + n_b:

    mean = mean_a + delta n_b / n
    M2   = M2_a + M2_b + delta^2 n_a n_b / n

The second line is the law of total variance: the variance of a union is the mean variance of the parts plus
the variance of their means. E[x^2] - E[x]^2 is never used: in float32 it is 13 % wrong at mean/sd = 1000.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

__all__ = ["Moments", "measure", "merge", "pool"]


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of each channel: `count` values, `mean` and `m2` of shape (C,), float64."""

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Return the biased variance, shape (C,)."""
        return self.m2 / self.count


def measure(x: Tensor) -> Moments:
    """Measure a tensor over batch and space, channel by channel in one float64 copy.

    Args:
        x: (N, C) or (N, C, *space), any floating dtype.

    Example:
        >>> m = measure(torch.tensor([[[1.0, 3.0]]]))
        >>> m.count, m.mean.item(), m.var.item()
        (2, 2.0, 1.0)
    """
    channels = x.detach().movedim(1, 0).flatten(1)  # (N, C, *space) -> (C, N*space)
    means, m2s = [], []
    wide = torch.empty(channels.shape[1], dtype=torch.float64, device=x.device)
    for channel in channels:
        mean = wide.copy_(channel).mean()
        means.append(mean)
        m2s.append(wide.sub_(mean).square_().sum())
    return Moments(channels.shape[1], torch.stack(means).cpu(), torch.stack(m2s).cpu())


def merge(*parts: Moments) -> Moments:
    """Return the moments of the union, merged in the order given.

    Example:
        >>> one, two = measure(torch.zeros(1, 1, 2)), measure(torch.full((1, 1, 2), 2.0))
        >>> merge(one, two).var.item()
        1.0
    """
    return reduce(_merge_two, parts)


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


def _merge_two(a: Moments, b: Moments) -> Moments:
    if a.count == 0 or b.count == 0:
        return a if b.count == 0 else b  # the mean of nothing is NaN and must not spread
    n = a.count + b.count
    delta = b.mean - a.mean
    return Moments(n, a.mean + delta * (b.count / n), a.m2 + b.m2 + delta.square() * (a.count * b.count / n))
