"""Grids of tiles, what each must read, and where its result goes: integers and slices only.

Tiles start on multiples of the stride. A tile reads its own area and `halo` (before, after) pixels of
context per axis, rounded outwards to the stride so that reading starts in phase; at the border of the image
it ends where the image ends and the network's own padding applies, as it does to the whole image. A last
tile of a few pixels reads further back, since a network may not run on a window narrower than its halo.

A network that pads inside to whole strides, some of it before the image, moves its grid with what is left over of an
extent. Windows that leave as much over as the image are on its grid, and read up to a stride more on either side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import EllipsisType

from normfix.records.spans import Spans, round_up

__all__ = ["Geometry", "Tile", "at", "cuts_of", "grid", "window_sizes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What tiling needs to know of a network, per spatial axis.

    `halo` is (before, after) in input pixels, `scale` output pixels per input pixel, `multiple` the number
    that sizes must be divisible by to be exact, unless the network pads itself: `padded_inside` tells where windows
    that leave over as much as the image, divided by it, give what the whole gives.
    """

    stride: tuple[int, ...]
    halo: Spans
    scale: tuple[Fraction, ...]
    multiple: tuple[int, ...]
    padded_inside: tuple[bool, ...] = ()

    def padding(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return how many pixels to add at the end of each axis to reach an exact size."""
        rests = zip(size, self.multiple, self.rests(size), strict=True)
        return tuple(0 if rest else round_up(n, m) - n for n, m, rest in rests)

    def rests(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return how many pixels of each axis whole strides leave over, where all windows leave as many over; else 0.

        >>> Geometry(
        ...     stride=(8,) * 2, halo=((3, 3),) * 2, scale=(Fraction(1),) * 2, multiple=(8,) * 2,
        ...     padded_inside=(True, False),
        ... ).rests((97, 118))
        (1, 0)
        """
        axes = zip(size, self.multiple, self._inside, strict=True)
        return tuple(n % multiple if by_itself else 0 for n, multiple, by_itself in axes)

    @property
    def _inside(self) -> tuple[bool, ...]:
        return self.padded_inside or (False,) * len(self.multiple)

    def context(self, size: Sequence[int]) -> Spans:
        """Return what windows of an image read before and after a tile, in whole strides."""
        return tuple(
            (round_up(before + more, stride), round_up(after + more, stride))
            for (before, after), stride, more in (
                (halo, stride, stride - 1 if rest else 0)
                for halo, stride, rest in zip(self.halo, self.stride, self.rests(size), strict=True)
            )
        )

    def covers(self, other: Geometry) -> bool:
        """Tell whether tiles of this geometry are right for a network that has the other."""
        whole = (
            all(a % b == 0 for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in ((self.stride, other.stride), (self.multiple, other.multiple))
        )
        sides = zip(itertools.chain(*self.halo), itertools.chain(*other.halo), strict=True)
        moved = zip(self._inside, other._inside, other.multiple, strict=True)
        by_itself = all(theirs or multiple == 1 for mine, theirs, multiple in moved if mine)
        return self.scale == other.scale and all(whole) and by_itself and all(a >= b for a, b in sides)

    def third(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return a tile that leaves a first, a last and a middle window per axis: a third, at most 256 pixels.

        Fewer would leave none that is cut on both sides; more repeat what these show. Where windows of a third would
        cover the image, it is a quarter.

        Example:
            >>> g = Geometry(stride=(4,) * 2, halo=((6, 6),) * 2, scale=(Fraction(1),) * 2, multiple=(4,) * 2)
            >>> g.third((128, 1024))
            (44, 256)
        """
        axes = zip(size, self.stride, self.context(size), strict=True)
        return tuple(_third(n, stride, after) for n, stride, (_, after) in axes)

    def dividing(self, size: Sequence[int], most: int = 256) -> tuple[int, ...]:
        """Return a tile that divides an image: of at most so many pixels, and smaller where windows would cover it.

        Where the halo leaves no such tile on an axis, it is half the image.

        Example:
            >>> g = Geometry(stride=(4,) * 2, halo=((6, 6),) * 2, scale=(Fraction(1),) * 2, multiple=(4,) * 2)
            >>> g.dividing((1024, 64)), g.dividing((24, 12))
            ((256, 32), (12, 4))
        """
        axes = zip(size, self.stride, self.context(size), strict=True)
        return tuple(_dividing(n, stride, after, most) for n, stride, (_, after) in axes)


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile: what to read of the input, what to keep of the window's output, where it goes.

    All are one slice per spatial axis; `read` in input pixels, `keep` in pixels of the window's output,
    `write` in pixels of the whole output. `keep` and `write` of the last tile of an axis have no stop. `stride` is that
    of the network, `scale` its output pixels per pixel.
    """

    read: tuple[slice, ...]
    keep: tuple[slice, ...]
    write: tuple[slice, ...]
    stride: tuple[int, ...]
    scale: tuple[Fraction, ...]

    def covers(self, size: Sequence[int]) -> tuple[bool, ...]:
        """Tell per axis whether the window reads the whole extent."""
        return tuple(s.start == 0 and s.stop == n for s, n in zip(self.read, size, strict=True))


def at(spans: Sequence[slice]) -> tuple[EllipsisType | slice, ...]:
    """Return the index that applies one slice per spatial axis to a tensor (N, C, *space)."""
    return (..., *spans)


def cuts_of(tiles: Iterable[Tile]) -> tuple[tuple[int, ...], ...]:
    """Return per axis where, in the output, a new tile starts."""
    starts = zip(*([span.start for span in tile.write] for tile in tiles), strict=True)
    return tuple(tuple(sorted({start for start in axis if start > 0})) for axis in starts)


def grid(
    size: Sequence[int], tile: Sequence[int], geometry: Geometry, *, wide: bool = False
) -> Iterator[Tile]:
    """Yield the tiles of an image of `size` in row-major order; together they write every pixel once.

    Args:
        size: pixels per spatial axis.
        tile: pixels per spatial axis, each a multiple of the stride.
        geometry: of the network.
        wide: the last windows read as many pixels as the first ones, though their halo is smaller.

    Example:
        >>> g = Geometry(stride=(4,), halo=((3, 5),), scale=(Fraction(1),), multiple=(4,))
        >>> [(t.read[0].start, t.read[0].stop) for t in grid((24,), (8,), g)]
        [(0, 16), (4, 24), (8, 24)]
    """
    for parts in _products(_axes(size, tile, geometry, wide)):
        read, keep, write = zip(*parts, strict=True)
        yield Tile(read, keep, write, geometry.stride, geometry.scale)


def window_sizes(size: Sequence[int], tile: Sequence[int], geometry: Geometry) -> Iterator[tuple[int, ...]]:
    """Yield the different extents that the tiles of an image read; arguments as for `grid`.

    Example:
        >>> g = Geometry(stride=(4,), halo=((4, 4),), scale=(Fraction(1),), multiple=(4,))
        >>> sorted(window_sizes((40,), (8,), g))
        [(12,), (16,)]
    """
    yield from itertools.product(*(axis.extents() for axis in _axes(size, tile, geometry)))


def _third(n: int, stride: int, after: int) -> int:
    third = round_up(-(-n // 3), stride)
    if 2 * third >= n or third + after >= n:
        third = n // 4 // stride * stride
    return max(stride, min(256 // stride * stride, third))


def _dividing(n: int, stride: int, after: int, most: int) -> int:
    """Return the largest of three tiles whose first window ends before an axis of n pixels does."""
    tiles = [max(stride, extent // stride * stride) for extent in (min(most, n), n // 2, n // 4)]
    return next((tile for tile in tiles if tile + after < n), tiles[1])


@dataclass(frozen=True, slots=True)
class _Axis:
    """The spans of tiles along one axis of n pixels: one after the other, since there may be millions."""

    n: int
    step: int
    stride: int
    before: int
    after: int
    scale: Fraction
    wide: bool = False
    rest: int = 0

    @property
    def starts(self) -> range:
        """Return where tiles start."""
        return range(0, self.n, self.step)

    def span(self, start: int) -> tuple[slice, slice, slice]:
        """Return what the tile that starts at a pixel reads, keeps and writes."""
        # where the narrowest full window may start
        inner = self.before + self.stride
        latest = (self.n - max(inner, self.step * self.wide) - self.after) // self.stride * self.stride
        stop = min(start + self.step, self.n)
        read = slice(max(0, min(start - self.before, latest)), min(self.n, stop + self.after + self.rest))
        offset = int(read.start * self.scale)
        first = int(start * self.scale)
        # the border tile keeps all that comes out
        last = int(stop * self.scale) if stop < self.n else None
        return read, slice(first - offset, last and last - offset), slice(first, last)

    def extents(self) -> set[int]:
        """Return the different extents that tiles read: further from both ends than windows reach they are alike."""
        near = (self.before + self.after + self.stride + self.rest) // self.step + 3
        reads = (self.span(start)[0] for start in (*self.starts[:near], *self.starts[-near:]))
        return {read.stop - read.start for read in reads}


def _axes(size: Sequence[int], tile: Sequence[int], geometry: Geometry, wide: bool = False) -> list[_Axis]:
    return [
        _Axis(n, step, stride, before, after, scale, wide, rest)
        for n, step, stride, (before, after), scale, rest in zip(
            size,
            tile,
            geometry.stride,
            geometry.context(size),
            geometry.scale,
            geometry.rests(size),
            strict=True,
        )
    ]


def _products(axes: Sequence[_Axis]) -> Iterator[tuple[tuple[slice, slice, slice], ...]]:
    """Yield one span per axis, in row-major order."""
    if not axes:
        yield ()
        return
    for start in axes[0].starts:
        span = axes[0].span(start)
        yield from ((span, *rest) for rest in _products(axes[1:]))
