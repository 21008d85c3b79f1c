"""The windows of a user's tiling, with each of its faults present or fixed: integers and index lists only.

Fixed means what normfix itself does: context as far as the network reaches, windows that start and end on
the stride grid, and nothing beyond the image's border. A fault changes its own number and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normfix.records.diagnoses import Tiling
from normfix.records.spans import round_up
from normfix.tiling.grid import Geometry, at

__all__ = ["Window", "faults", "paste", "take", "windows"]


@dataclass(frozen=True, slots=True)
class Window:
    """One window per axis: what it reads (may lie beyond the image), and the tile it is responsible for."""

    read: tuple[tuple[int, int], ...]
    tile: tuple[tuple[int, int], ...]

    def keep(self, geometry: Geometry) -> tuple[slice, ...]:
        """Return where the tile lies in the window's output."""
        pairs = zip(self.write(geometry), self.read, geometry.scale, strict=True)
        return tuple(
            slice(w.start - int(read[0] * scale), w.stop - int(read[0] * scale)) for w, read, scale in pairs
        )

    def write(self, geometry: Geometry) -> tuple[slice, ...]:
        """Return where the tile lies in the whole output."""
        return tuple(
            slice(int(a * s), int(b * s)) for (a, b), s in zip(self.tile, geometry.scale, strict=True)
        )


def faults(tiling: Tiling, geometry: Geometry, size: Sequence[int]) -> tuple[str, ...]:
    """Return the causes that the numbers of a tiling admit, on an image of `size`."""
    found = []
    halos = zip(tiling.halo, geometry.halo, strict=True)
    if any(h < e for given, need in halos for h, e in zip(given, need, strict=True)):
        found.append("halo")
    starts = zip(tiling.tile, tiling.halo, geometry.stride, strict=True)
    if any(tile % stride or before % stride for tile, (before, _), stride in starts):
        found.append("phase")
    if tiling.last == "pushed back":
        found.append("last tile")
    if tiling.context != "image":
        found.append("border padding")
    if tiling.scaling is not None:
        found.append("tile scaling")
    if tiling.train:
        found.append("train mode")
    if any(geometry.padding(size)) and not tiling.padded:
        found.append("size")
    return tuple(found)


def windows(
    size: Sequence[int],
    tiling: Tiling,
    geometry: Geometry,
    present: frozenset[str],
    shift: Sequence[int] | None = None,
) -> Iterator[Window]:
    """Yield the windows of an image of `size`, with the faults in `present` and all others fixed.

    `shift` makes the first tile of an axis that much shorter, which moves all later ones.
    """
    axes = [
        list(_along(n, axis, tiling, geometry, present, (shift or (0,) * len(size))[axis]))
        for axis, n in enumerate(size)
    ]
    for parts in itertools.product(*axes):
        read, tile = zip(*parts, strict=True)
        yield Window(read, tile)


def take(image: Tensor, window: Window, context: str) -> Tensor:
    """Return the window's pixels; what lies beyond the image, or the tile, is mirrored."""
    for axis, ((first, last), tile) in enumerate(zip(window.read, window.tile, strict=True)):
        low, high = tile if context == "mirrored tile" else (0, image.shape[axis + 2])
        index = torch.arange(first, last, device=image.device)
        image = image.index_select(axis + 2, _mirrored(index, low, high))
    return image


def paste(stitched: Tensor, output: Tensor, window: Window, geometry: Geometry) -> int:
    """Copy the tile out of a window's output to its place in the whole, in place.

    Returns:
        How many pixels of the tile the output lacks: a network that rounds its output down to its stride gives fewer
        for a window that the stride does not divide.
    """
    target, part = stitched[at(window.write(geometry))], output[at(window.keep(geometry))]
    common = at([slice(0, min(a, b)) for a, b in zip(target.shape[2:], part.shape[2:], strict=True)])
    target[common].copy_(part[common])
    return target[0, 0].numel() - target[common][0, 0].numel()


def _along(
    n: int, axis: int, tiling: Tiling, geometry: Geometry, present: frozenset[str], shift: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    step, stride, multiple = tiling.tile[axis], geometry.stride[axis], geometry.multiple[axis]
    halo = tiling.halo[axis], geometry.halo[axis]
    before, after = (
        halo[0] if "halo" in present else (_enough(g, e, stride) for g, e in zip(*halo, strict=True))
    )
    aligned = "phase" not in present
    mirrored = "border padding" in present
    starts = [0, *range(step - shift if shift else step, n, step)]
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        a, b = start - before, stop + after
        if aligned:
            a, b = a // stride * stride, round_up(b, stride)
        if mirrored:
            if multiple > 1:
                b = a + round_up(b - a, multiple)
            yield (a, b), (start, stop)
            continue
        if aligned:  # a window narrower than its halo may not run: read further back
            a = min(a, (n - round_up(before, stride) - stride - round_up(after, stride)) // stride * stride)
        a, b = max(0, a), min(n, b)
        if "last tile" in present and stop == n:
            a = max(0, n - round_up(step + before + after, stride))
        elif not aligned and multiple > 1:
            a, b = _whole_multiple(a, b, n, multiple)
        yield (a, b), (start, stop)


def _enough(given: int, need: int, stride: int) -> int:
    """Return the smallest halo that is enough and in the phase of the given one."""
    return given if given >= need else given + round_up(need - given, stride)


def _whole_multiple(a: int, b: int, n: int, multiple: int) -> tuple[int, int]:
    """Extend a window to a length the network takes: ahead, or back where the image ends."""
    extra = round_up(b - a, multiple) - (b - a)
    return (a, b + extra) if b + extra <= n else (max(0, a - extra), b)


def _mirrored(index: Tensor, low: int, high: int) -> Tensor:
    """Reflect positions outside [low, high) back into it, without repeating the edge."""
    extent = high - low
    if extent == 1:
        return torch.full_like(index, low)
    period = 2 * (extent - 1)
    folded = (index - low) % period
    return low + torch.minimum(folded, period - folded)
