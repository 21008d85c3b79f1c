"""Conditions on the size, put to the measurement: tiles equal the whole on either side of one, or they do not.

A branch on the size may do the same thing in another way, in chunks for instance. A lattice condition, such as that of
padding to multiples, should make no difference to any tile, and a number that torch.export built in may be no
condition at all. Each is tried on strips for which it holds, and on strips for which it fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from normfix.networks.calling import refusals
from normfix.records.sizes import Condition
from normfix.records.spans import round_up
from normfix.scanning.graph.bounds import AXES, SizeLook
from normfix.tiling.dependence import agrees, far, shortest
from normfix.tiling.grid import Geometry
from normfix.tiling.material import magnitudes

__all__ = ["Crossings"]

_PIXELS = (1 << 18, 1 << 20)
"""Pixels of the strips on which a branch on the size is tried, at most."""
_TILE = 32
"""Pixels along a tile, at least."""
_LARGE, _WIDE = 64, 1 << 16
"""Pixels along the largest tiles of which smaller ones are tried, and of the images they are cut from, if they may."""
_PERIOD = 4096
"""Pixels over which remainders are looked for."""

Size = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Crossings:
    """A network without live statistics in float64, the material of its strips, and how it is tiled.

    What a strip showed is kept: several conditions hold or fail at one size. `apart` are sizes at which the network was
    seen to make other calls: of a condition that single sizes fail, no strip tells which they are.
    """

    double: Callable[[Tensor], Tensor]
    example: Tensor
    geometry: Geometry
    cross: Sequence[int]
    apart: tuple[Size, ...] = ()
    _agreements: dict[tuple[int, Size, tuple[int, ...], bool], bool] = field(
        default_factory=dict, init=False, repr=False
    )

    def crossed(self, branch: Condition) -> bool:
        """Tell whether tiles equal the whole on either side of a branch, at all sizes and magnitudes that are tried."""
        sizes = list(dict.fromkeys(self._astride(branch)))
        apart = [size for size in self.apart if self._excludes(branch, size)]
        outside = bool(apart) or any(self._excludes(branch, size) for _, size in sizes)
        return (
            outside
            and all(self._agrees_around(branch, size) for size in apart)
            and all(self._agrees(axis, size, magnified=True) for axis, size in sizes)
            and self._agree_where_windows_are_excluded(branch)
        )

    def differing(self, sizes: SizeLook) -> tuple[Condition, ...]:
        """Return the conditions that should make no difference to tiles and do: they count wherever they fail."""
        wrong = [condition for condition in sizes.lattice if not self.harmless(condition)]
        numbers = (*sizes.built, *sizes.numbers)
        wrong += [condition for condition in numbers if not self.harmless(condition, afar=True)]
        return tuple(replace(condition, strict=True) for condition in wrong)

    def fitting(self) -> tuple[Condition, ...]:
        """Return which windows give what the whole gives, where no graph tells it: () for all.

        Those from an extent on, or none. What is compared is wide along every axis, and windows are tried from large
        ones to a stride, in halves.
        """
        names = AXES[self.example.dim()]
        found = []
        for axis in self._axes:
            least = None
            for tile in self._tiles(axis):
                if not self._fits(axis, tile):
                    here = f"== {self.example.shape[axis + 2]}" if least is None else f">= {least}"
                    found.append(Condition(text=f"{names[axis]} {here}", line="", strict=True))
                    break
                least = self._context(axis) + tile
        return tuple(found)

    def _tiles(self, axis: int) -> Iterator[int]:
        tile = stride = self.geometry.stride[axis]
        while 2 * tile <= _LARGE:
            tile *= 2
        while tile > stride:
            yield tile
            tile //= 2
        yield stride

    def _fits(self, axis: int, tile: int) -> bool:
        """Tell whether windows along an axis give what the whole gives, or are refused."""
        try:
            return agrees(self.double, self.example.double(), axis, self.geometry, self._wide(axis), tile)
        except refusals():
            return True

    def _wide(self, axis: int) -> Size:
        """Return extents of an image that windows along an axis are cut from."""
        least = [shortest(self.geometry, self.cross, other, _LARGE)[other] for other in self._axes]
        side = int((_WIDE / least[axis]) ** (1 / max(1, len(least) - 1)))
        others = zip(self.cross, least, self.geometry.stride, strict=True)
        return tuple(
            n if other == axis else max(across, min(n, side) // stride * stride)
            for other, (across, n, stride) in enumerate(others)
        )

    def _context(self, axis: int) -> int:
        stride = self.geometry.stride[axis]
        return sum(round_up(side, stride) for side in self.geometry.halo[axis])

    def harmless(self, condition: Condition, *, afar: bool = False) -> bool:
        """Tell whether tiles equal the whole whether a condition holds or fails that should make no difference.

        Sizes are tried that an image may have once it is padded to an exact one.

        Args:
            condition: of a lattice, or of a number that was built in.
            afar: try the longest strips as well: for what does not repeat.
        """
        shortest: dict[tuple[int, int, bool], Size] = {}
        names = AXES[self.example.dim()]
        asked = [axis for axis in self._axes if names[axis] in condition.text]
        for axis, varied in itertools.product(self._axes, asked):
            for size in self._lengths(axis, varied):
                shortest.setdefault((axis, varied, condition.holds(self._named(size))), size)
                if len([key for key in shortest if key[:2] == (axis, varied)]) > 1:
                    break
        sizes = [(axis, size) for (axis, _, _), size in shortest.items()]
        sizes += [(axis, far(self.geometry, self.cross, axis)) for axis in self._axes if afar]
        if all(condition.holds(self._named(size)) for _, size in sizes):
            return True
        return self._agree(list(dict.fromkeys(sizes)))

    @property
    def _axes(self) -> range:
        return range(len(self.geometry.stride))

    def _agree(self, sizes: Sequence[tuple[int, Size]]) -> bool:
        return all(self._agrees(axis, size) for axis, size in sizes)

    def _agree_where_windows_are_excluded(self, branch: Condition) -> bool:
        """Compare the least and the largest windows that a branch excludes with images that it does not exclude."""
        images = [tuple(self.example.shape[2:])]
        images += [far(self.geometry, self.cross, axis, _PIXELS[0]) for axis in self._axes]
        for axis, size in itertools.product(self._axes, images):
            tiles = [] if self._excludes(branch, size) else list(self._excluded(branch, axis, size))
            if not all(self._agrees(axis, size, tile, magnified=True) for tile in {*tiles[:1], *tiles[-1:]}):
                return False
        return True

    def _agrees_around(self, branch: Condition, apart: Size) -> bool:
        """Compare tiles with an image of a size that a branch excludes, with strips along it, and windows of that size.

        Strips count that are as thick as it is along some axes, and images that windows of its extent are cut from.
        """
        for axis in self._axes:
            others = ((n,) if other == axis else (n, self.cross[other]) for other, n in enumerate(apart))
            window = apart[axis] - self._context(axis)
            if window < 2 * self.geometry.stride[axis] or window % self.geometry.stride[axis]:
                return False
            for size in itertools.product(*others):
                cut = size, window // 2
                strip = shortest(self.geometry, size, axis), _TILE
                if not all(
                    self._agrees(axis, extents, tile, magnified=True)
                    for extents, tile in (cut, strip)
                    if self._excludes(branch, extents)
                ):
                    return False
                if not self._agrees(
                    axis, shortest(self.geometry, size, axis, window), window, magnified=True
                ):
                    return False
        return True

    def _excluded(self, branch: Condition, axis: int, size: Size) -> Iterator[int]:
        """Yield the tiles whose windows of an image, cut along an axis, a branch excludes."""
        stride, context = self.geometry.stride[axis], self._context(axis)
        for tile in range(stride, size[axis] - context, stride):
            if self._excludes(branch, (*size[:axis], context + tile, *size[axis + 1 :])):
                yield tile

    def _agrees(self, axis: int, size: Size, *tile: int, magnified: bool = False) -> bool:
        key = axis, size, tile, magnified
        if key not in self._agreements:
            example = self.example.double()
            try:
                agreement = all(
                    agrees(self.double, x, axis, self.geometry, size, *tile)
                    for x in (magnitudes(example) if magnified else [example])
                )
            except refusals():
                agreement = False
            self._agreements[key] = agreement
        return self._agreements[key]

    def _astride(self, branch: Condition) -> Iterator[tuple[int, Size]]:
        """Yield strips that a branch excludes, the shortest and the longest, and images that it does not."""
        for axis, limit in itertools.product(self._axes, _PIXELS):
            longest = far(self.geometry, self.cross, axis, limit)
            if not self._excludes(branch, longest):
                continue
            yield axis, longest
            lengths = range(self._least(axis)[axis], longest[axis], self.geometry.stride[axis])
            strips = ((*longest[:axis], n, *longest[axis + 1 :]) for n in lengths)
            shortest = next((strip for strip in strips if self._excludes(branch, strip)), longest)
            yield axis, shortest
            for other in self._axes:
                wide = self._least(other)
                yield other, (*wide[:axis], max(wide[axis], shortest[axis]), *wide[axis + 1 :])
        least = tuple(self._least(axis)[axis] for axis in self._axes)
        for size in (tuple(self.example.shape[2:]), (max(least),) * len(least)):
            if all(n >= m for n, m in zip(size, least, strict=True)) and not self._excludes(branch, size):
                yield from ((axis, size) for axis in self._axes)

    def _lengths(self, axis: int, varied: int) -> Iterator[Size]:
        """Yield strips along an axis, of exact sizes along another or the same, from the shortest on."""
        least, multiple = self._least(axis), self.geometry.multiple[varied]
        start = round_up(least[varied], multiple)
        for extent in range(start, start + _PERIOD, multiple):
            yield (*least[:varied], extent, *least[varied + 1 :])

    def _least(self, axis: int) -> Size:
        """Return the shortest strip that several windows are cut from."""
        return shortest(self.geometry, self.cross, axis)

    def _excludes(self, branch: Condition, size: Size) -> bool:
        return branch.excludes(self._named(size))

    def _named(self, size: Size) -> dict[str, int]:
        return {"N": 1, **dict(zip(AXES[self.example.dim()], size, strict=True))}
