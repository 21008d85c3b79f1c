"""The effective receptive field: the mean absolute input gradient of a central output.

The theoretical field is what an output can depend on; the gradient says on what it does, for this image
(Luo et al. 2016 take it at random inputs). A live statistic spreads a thin gradient over everything, so the
share that lies beyond the theoretical field is a sign of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normfix.records.diagnoses import ReceptiveField
from normfix.records.spans import round_up
from normfix.tiling.grid import Geometry, at

__all__ = ["SHARE", "gradient", "receptive_field"]

SHARE = 0.95
"""The part of the gradient that the effective field holds, along each axis."""

_ROUNDING = 1e-12

Function = Callable[[Tensor], Tensor]


def gradient(
    f: Function, image: Tensor, geometry: Geometry, extents: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the mean absolute gradient over channels, (*space), of the outputs of one central stride cell.

    Args:
        f: the network; where its output has no gradient, as classes and masks have none, that is 0.
        image: (1, C, *space); a middle part of `extents` is used.
        geometry: of the network.
        extents: of the part, per axis; rounded to the stride.

    Returns:
        The gradient and the position of the output in it, per axis.
    """
    part, centre, span = image, [], []
    for axis, (n, want, stride, scale) in enumerate(
        zip(image.shape[2:], extents, geometry.stride, geometry.scale, strict=True)
    ):
        extent = min(n // stride * stride, round_up(want, stride))
        start = (n - extent) // 2 // stride * stride
        part = part.narrow(axis + 2, start, extent)
        middle = extent // 2 // stride * stride
        centre.append(middle + stride // 2)
        first = int(centre[-1] * scale)
        span.append(slice(first, first + 1))
    with torch.enable_grad():
        x = part.detach().clone().requires_grad_(True)
        y = f(x)
        total = torch.zeros(x.shape[2:], dtype=torch.float64)
        chosen = y[at(span)].flatten()
        for i, value in enumerate(chosen if chosen.requires_grad else ()):
            (found,) = torch.autograd.grad(value, x, retain_graph=i + 1 < len(chosen))
            total += found.detach().abs().double().mean((0, 1)).cpu()
    return total / len(chosen), tuple(centre)


def receptive_field(
    found: Tensor, centre: Sequence[int], geometry: Geometry, *, bounded: bool
) -> ReceptiveField:
    """Read the theoretical and the effective field from a gradient.

    Args:
        found: (*space), from `gradient`.
        centre: the position of the output in it.
        geometry: its halo is the theoretical field of whole tiles.
        bounded: whether the halo is one at all once nothing is live.
    """
    total, effective, within = float(found.sum()), [], found
    for axis, (middle, (before, after), stride) in enumerate(
        zip(centre, geometry.halo, geometry.stride, strict=True)
    ):
        others = [d for d in range(found.dim()) if d != axis]
        effective.append(_holding(found.sum(others) if others else found, middle))
        low = max(0, middle - round_up(before, stride) - stride)
        within = within.narrow(
            axis, low, min(found.shape[axis], middle + round_up(after, stride) + stride) - low
        )
    outside = 1 - float(within.sum()) / total if total > 0 else None
    return ReceptiveField(
        theoretical=geometry.halo if bounded else None,
        effective=tuple(effective),
        outside=outside if outside is None or outside > _ROUNDING else 0.0,
    )


def _holding(marginal: Tensor, centre: int) -> tuple[int, int]:
    """Return the smallest (before, after) that grows evenly and holds the share of a marginal."""
    total = float(marginal.sum())
    reach = 0
    while total > 0 and reach < len(marginal):
        low, high = max(0, centre - reach), min(len(marginal), centre + reach + 1)
        if float(marginal[low:high].sum()) >= SHARE * total:
            return centre - low, high - 1 - centre
        reach += 1
    return 0, 0
