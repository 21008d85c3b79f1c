"""What an output depends on, observed on real forward passes: the exact halo, and interference.

NaN is the dye: any arithmetic with it gives NaN, also times a zero weight. A wide sea in the middle of a long
thin strip is dyed; the last output it stains on either side tells how far a tile's outside reaches in, before
and after, in one forward per axis. The sea starts and ends on the stride grid, since the reach of a strided
network depends on the phase.

Comparisons and selections swallow NaN, so a halo is confirmed by interference: at fixed shape, everything
outside a window is multiplied by 1e12 in float64 and the tile must not change. Amplified, because a halo
that is one stride short is invisible on ordinary data; with noise added, because nothing amplifies a black
background.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normfix.networks import operators
from normfix.networks.numerics import BOUNDLESS
from normfix.records.spans import round_up
from normfix.tiling.material import AMPLIFICATION, strip, textured

__all__ = [
    "DyeLost",
    "DyeRefused",
    "halo",
    "halo_within",
    "interference",
]

_FIRST_SEA, _LARGEST_SEA, _LARGEST_SHORE = 256, 8192, 4096
_SEA, _SHORE = 64, 128
"""Sea, and clean shore at least, in pixels, where a bound is known: the dye only confirms it."""
_GROWN = 2048
"""Sea, in pixels, up to which a halo must have stopped growing faster and faster."""
_LARGEST_FELT = 1024
"""Sea and shore, in pixels, at which what may well be global is given up."""

Function = Callable[[Tensor], Tensor]
Felt = Callable[[Function, Tensor, int, int, int], Tensor]
"""Gets (network, image, axis, first pixel, extent) of a region; returns where the output depends on it."""


class DyeRefused(BaseException):
    """An operation was about to take NaN for an address, or is one that nobody knows."""


class DyeLost(Exception):  # noqa: N818 - a finding, not a fault
    """The dye reached no output: comparisons, argmax or casts swallowed it."""


def halo(
    f: Function,
    example: Tensor,
    axis: int,
    grid: int,
    scale: Fraction,
    cross: Sequence[int],
    expected: tuple[int, int] | None = None,
    felt: Felt | None = None,
    least: int = 0,
    farthest: int | None = None,
) -> tuple[int, int] | None:
    """Measure how far outside a tile, in input pixels, its output depends on the input along one axis.

    Args:
        f: the network, on CPU with oneDNN (other convolution algorithms spread NaN).
        example: (N, C, *space), the material of the strip.
        axis: spatial axis, from 0.
        grid: the stride along this axis, or a multiple of it.
        scale: output pixels per input pixel.
        cross: extents of the other axes, in the order of all axes (the entry at `axis` is ignored).
        expected: what another axis gave; if this one agrees, it needs no second strip.
        felt: tells which pixels of the output depend on a region, in place of the NaN in the output.
        least: pixels of the sea that must have agreed at least: a single tap as far away as that is seen.
        farthest: pixels of shore at which it is given up; default: by how the dependence is told.

    Returns:
        (before, after), negative where a tile does not depend on its own edge; None if the dye reaches
        everywhere, or further on every longer strip: the network is not local along this axis.

    Raises:
        DyeLost: the output shows no dye, so nothing can be read from it.
        DyeRefused: an operation must not see NaN; its name.
    """
    sea, smaller = round_up(_FIRST_SEA, grid), None
    seen: list[tuple[int, int]] = []
    shore = sea // 2
    if expected is not None:
        sea, shore = 2 * sea, max(0, *expected) + grid
    most, usual = (_LARGEST_SEA, _LARGEST_SHORE) if felt is None else (2 * _LARGEST_FELT, _LARGEST_FELT)
    least = round_up(min(least, most // 2), grid)
    while sea <= most:
        reach = _reach(f, example, axis, grid, sea, shore, scale, cross, felt)
        if reach is None:
            if shore >= (farthest or usual):
                return None
            shore = 2 * shore
            continue
        # a widely dilated convolution may look past a narrow sea altogether: two sizes must agree
        if reach in (smaller, expected) and sea >= least:
            return reach
        if (
            reach in seen and sea >= least
        ):  # the lattice of a coarser unit than the grid: as wide as it is anywhere on it
            return max(before for before, _ in seen), max(after for _, after in seen)
        seen.append(reach)
        if sea >= _GROWN and _accelerates([sum(reach) for reach in seen]):
            return None
        sea, smaller, shore = max(2 * sea, least), reach, max(0, *reach) + grid
    return smaller if felt is None else None


def halo_within(
    f: Function,
    example: Tensor,
    axis: int,
    grid: int,
    scale: Fraction,
    bound: tuple[int, int],
    cross: Sequence[int],
    felt: Felt | None = None,
    lost: int = 0,
) -> tuple[int, int] | None:
    """Measure a halo that a bound is known for, in one forward pass.

    Args:
        f: as for `halo`, whose second strip only tells whether the first was long enough.
        example: as for `halo`.
        axis: as for `halo`.
        grid: as for `halo`.
        scale: as for `halo`.
        bound: (before, after) that no output can exceed.
        cross: as for `halo`.
        felt: as for `halo`.
        lost: pixels by which the output ends before the strip does, where borders are not padded.

    Returns:
        (before, after); None if the dye reaches further than the bound.

    Raises:
        DyeLost: the output shows no dye.
        DyeRefused: an operation must not see NaN; its name.
    """
    # a tap further away than the bound lies in the sea, however narrow, for some output of a shore as wide as it is far
    shore = round_up(max(*bound, _SHORE) + lost, grid) + 2 * grid
    return _reach(f, example, axis, grid, round_up(_SEA, grid), shore, scale, cross, felt)


def interference(
    f: Function,
    example: Tensor,
    axis: int,
    grid: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
    least: int = 128,
) -> float:
    """Return how much one tile's output changes when everything outside its window is amplified, with either sign.

    Args:
        f: the network in float64.
        example: (N, C, *space) in float64, the material of the strip.
        axis: spatial axis, from 0.
        grid: the stride along this axis.
        scale: output pixels per input pixel.
        reach: the halo to test, (before, after) in multiples of the stride.
        cross: as for `halo`.
        least: pixels that are amplified on each side, at least.

    Returns:
        The largest change relative to the tile's largest output: 0 where the halo is enough. NaN counts as
        BOUNDLESS.
    """
    before, after = reach
    tile, sea = round_up(32, grid), round_up(max(least, before, after), grid)
    size = [*cross]
    size[axis] = sea + before + tile + after + sea
    x = textured(example, size)
    window = (axis + 2, sea, before + tile + after)
    kept = (axis + 2, int((sea + before) * scale), int(tile * scale))
    quiet_tile = f(x).narrow(*kept)
    extent = quiet_tile.abs().max().clamp_min(1e-300)
    changes = []
    # of both signs: a comparison looks at one only
    for factor in (AMPLIFICATION, -AMPLIFICATION):
        loud = x * factor
        loud.narrow(*window).copy_(x.narrow(*window))
        change = ((quiet_tile - f(loud).narrow(*kept)).abs().max() / extent).item()
        changes.append(min(change, BOUNDLESS) if change == change else BOUNDLESS)
    return max(changes)


def _reach(
    f: Function,
    example: Tensor,
    axis: int,
    grid: int,
    sea: int,
    shore: int,
    scale: Fraction,
    cross: Sequence[int],
    felt: Felt | None,
) -> tuple[int, int] | None:
    """Dye a sea between two clean shores; None if the dye reaches the end of one of them."""
    first = round_up(shore, grid)
    last = first + sea
    size = [*cross]
    # where something is turned around, a sea in the middle would lie on itself
    size[axis] = last + first + (sea if felt else 0)
    x = strip(example, size)
    dyed = _isnan(f, x, axis, first, sea) if felt is None else felt(f, x, axis, first, sea)
    dirty = dyed.amax(dim=[d for d in range(dyed.dim()) if d != axis + 2])
    stained = dirty.nonzero().flatten()
    if not len(stained):
        raise DyeLost
    start, end = int(stained[0]), int(stained[-1]) + 1
    if start == 0 or end == len(dirty):
        return None
    # rounded outwards to whole input pixels: ceil before, floor after
    return -int(-(Fraction(end) / scale - last) // 1), -int((Fraction(start) / scale - first) // 1)


def _accelerates(extents: Sequence[int]) -> bool:
    """Tell whether extents grow by more and more, as those of a kernel do that follows the length of the strip."""
    steps = [b - a for a, b in itertools.pairwise(extents)]
    return len(steps) > 1 and steps[0] > 0 and all(b > a for a, b in itertools.pairwise(steps))


def _isnan(f: Function, x: Tensor, axis: int, first: int, extent: int) -> Tensor:
    x.narrow(axis + 2, first, extent).fill_(torch.nan)
    with _Guard():  # type: ignore[no-untyped-call]
        return f(x).isnan()


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops before an operator that could take NaN for an address, and lets an unpooled maximum dye its window."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):
            risky = tree_leaves((operators.at_risk(func, args), kwargs if operators.is_foreign(func) else ()))
            if any(isinstance(t, Tensor) and bool(t.isnan().any()) for t in risky):
                raise DyeRefused(operators.name_of(func))
        result = func(*args, **kwargs)
        if isinstance(func, OpOverload) and operators.is_unpooling(func):
            _fill_windows_(result, args[0])
        return result


def _fill_windows_(unpooled: Tensor, pooled: Tensor) -> None:
    """Dye all of a window whose maximum is dyed: the index of a NaN says where it is, not where else it could be."""
    dyed = F.interpolate(pooled.isnan().to(unpooled.dtype), size=unpooled.shape[2:])
    unpooled.masked_fill_(dyed > 0, torch.nan)
