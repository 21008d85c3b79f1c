"""What an output depends on, observed on real forward passes: the exact halo, and interference.

NaN is the dye: any arithmetic with it gives NaN, also times a zero weight. Everything outside a clean island
of a long thin strip is dyed; the run of clean output left around the island's centre tells how far the
outside reaches in, before and after, in one forward per axis. The island starts on the stride grid, since
the reach of a strided network depends on the phase.

Comparisons and selections swallow NaN, so a halo is confirmed by interference: at fixed shape, everything
outside a window is multiplied by 1e12 in float64 and the tile must not change. Amplified, because a halo
that is one stride short is invisible on ordinary data; with noise added, because nothing amplifies a black
background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from normfix.numerics import BOUNDLESS
from normfix.tiles import round_up

__all__ = ["AMPLIFICATION", "DyeLost", "halo", "interference", "strip", "texture"]

AMPLIFICATION = 1e12
_FIRST_ISLAND, _LARGEST_ISLAND = 256, 8192

Function = Callable[[Tensor], Tensor]


class DyeLost(Exception):  # noqa: N818 - a finding, not a fault
    """The dye reached no output on one side: comparisons, argmax or casts swallowed it."""


def halo(
    f: Function, example: Tensor, axis: int, grid: int, scale: Fraction, cross: Sequence[int]
) -> tuple[int, int] | None:
    """Measure how far outside a tile, in input pixels, its output depends on the input along one axis.

    Args:
        f: the network, on CPU with oneDNN (other convolution algorithms spread NaN).
        example: (N, C, *space), the material of the strip.
        axis: spatial axis, from 0.
        grid: the stride along this axis, or a multiple of it.
        scale: output pixels per input pixel.
        cross: extents of the other axes, in the order of all axes (the entry at `axis` is ignored).

    Returns:
        (before, after), negative where a tile does not depend on its own edge; None if the dye reaches
        everywhere: the network is not local along this axis.

    Raises:
        DyeLost: the output shows no dye, so nothing can be read from it.
    """
    island, smaller = round_up(_FIRST_ISLAND, grid), None
    while island <= _LARGEST_ISLAND:
        reach = _reach(f, example, axis, island, scale, cross)
        # a widely dilated convolution may look past a short strip altogether: two sizes must agree
        if reach is not None and reach == smaller:
            break
        island, smaller = 2 * island, reach
    return smaller


def interference(
    f: Function,
    example: Tensor,
    axis: int,
    grid: int,
    scale: Fraction,
    reach: tuple[int, int],
    cross: Sequence[int],
) -> float:
    """Return how much one tile's output changes when everything outside its window is amplified.

    Args:
        f: the network in float64.
        example: (N, C, *space) in float64, the material of the strip.
        axis: spatial axis, from 0.
        grid: the stride along this axis.
        scale: output pixels per input pixel.
        reach: the halo to test, (before, after) in multiples of the stride.
        cross: as for `halo`.

    Returns:
        The largest change relative to the tile's largest output: 0 where the halo is enough. NaN counts as
        BOUNDLESS.
    """
    before, after = reach
    tile, sea = round_up(32, grid), round_up(max(128, before, after), grid)
    size = [*cross]
    size[axis] = sea + before + tile + after + sea
    x = strip(example, size) + texture(example, size)
    window = (axis + 2, sea, before + tile + after)
    kept = (axis + 2, int((sea + before) * scale), int(tile * scale))
    loud = x * AMPLIFICATION
    loud.narrow(*window).copy_(x.narrow(*window))
    quiet_tile, loud_tile = f(x).narrow(*kept), f(loud).narrow(*kept)
    change = ((quiet_tile - loud_tile).abs().max() / quiet_tile.abs().max().clamp_min(1e-300)).item()
    return min(change, BOUNDLESS) if change == change else BOUNDLESS


def strip(example: Tensor, size: Sequence[int]) -> Tensor:
    """Return a strip of the given spatial size made from the example, mirrored back and forth.

    Mirroring keeps the example's own values and their smoothness at every size.
    """
    x = example
    for axis, n in enumerate(size, start=2):
        period = torch.cat([torch.arange(x.shape[axis]), torch.arange(x.shape[axis] - 1, -1, -1)])
        x = x.index_select(axis, period.to(x.device)[torch.arange(n, device=x.device) % len(period)])
    return x


def texture(example: Tensor, size: Sequence[int]) -> Tensor:
    """Return reproducible noise as large as the example's own variation: no period can hide a shift."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*example.shape[:2], *size, generator=generator, dtype=torch.float64)
    return (noise * float(example.double().std().clamp_min(1e-3))).to(example)


def _reach(
    f: Function, example: Tensor, axis: int, island: int, scale: Fraction, cross: Sequence[int]
) -> tuple[int, int] | None:
    size = [*cross]
    size[axis] = 3 * island
    x = strip(example, size)
    dyed = torch.full_like(x, torch.nan)
    dyed.narrow(axis + 2, island, island).copy_(x.narrow(axis + 2, island, island))
    clean = _clean_run(f(dyed), axis, centre=int(island * scale) + int(island * scale) // 2)
    if clean is None:
        return None
    first, last = (Fraction(edge) / scale for edge in clean)
    # rounded outwards to whole input pixels: ceil before, floor after
    return -int(-(first - island) // 1), int(-((last - 2 * island) // 1))


def _clean_run(output: Tensor, axis: int, centre: int) -> tuple[int, int] | None:
    """Return the contiguous run of positions around `centre` where no element is NaN."""
    dirty = output.isnan().amax(dim=[d for d in range(output.dim()) if d != axis + 2])
    if centre >= len(dirty) or dirty[centre]:
        return None
    stained = dirty.nonzero().flatten()
    before, after = stained[stained < centre], stained[stained > centre]
    if not len(before) or not len(after):
        raise DyeLost
    return int(before[-1]) + 1, int(after[0])
