"""The geometry of a network without live statistics: output scale, halo, stride and exact sizes per axis.

The halo is read from dye on a grid that surely contains the stride (the coarseness of the coarsest feature
map), then the stride is the smallest shift that float64 confirms. Everything runs on strips that are long on
one axis and as thin as the network allows on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from normfix.calling import REFUSALS
from normfix.dye import DyeLost, DyeRefused, halo, strip
from normfix.records import Finding
from normfix.symmetry import (
    common_unit,
    cutting_grid,
    exact_multiple,
    lattices,
    output_scale,
    smallest_stride,
    smallest_tile,
)
from normfix.tiles import Geometry, round_up

__all__ = ["Locality", "cross_section", "measure_locality", "not_dense"]

Function = Callable[[Tensor], Tensor]

_FINE, _COARSE = 64, 256
"""Largest units, in pixels, that are tried where the network runs on no strip of the first, and where on some."""


@dataclass(frozen=True, slots=True)
class Locality:
    """The geometry and the least extents, or None and the findings that say why there is none."""

    geometry: Geometry | None
    findings: tuple[Finding, ...]
    smallest_tile: tuple[int, ...] | None = None


def measure_locality(
    single: Function,
    double: Function,
    example: Tensor,
    dilution: Sequence[int],
    *,
    both_ends: bool = False,
) -> Locality:
    """Measure a network in which no statistic is live.

    Args:
        single: the network in float32 on CPU.
        double: the network in float64 on CPU.
        example: (N, C, *space) in float32 on CPU, the material of the strips.
        dilution: per axis, the coarseness of the coarsest feature map: a multiple or divisor of the stride.
        both_ends: something may look past one border to the other (a cyclic shift): compare windows that start where
            the image starts as well.
    """
    example = example[:1]
    known, refusal = cross_section(single, example, dilution), ""
    for coarser in (1, 2, 4, 8, 3, 6, 12, 7, 5, 10, 14):  # blocks without padding take multiples only
        grid = [n * coarser for n in dilution]
        if coarser > 1 and max(grid) > (_FINE if known is None else _COARSE):
            continue
        cross = tuple(map(round_up, known, grid)) if known else cross_section(single, example, grid)
        if cross is None:
            continue
        try:
            return _along_axes(single, double, example, grid, cross, both_ends=both_ends)
        except REFUSALS as error:
            refusal = f"it runs on no strip of another length: {error}."
    size = "x".join(map(str, example.shape[2:]))
    none = f"the network runs on no strip, only on sizes like {size}, so it cannot be tiled."
    return _none("NF210", "size", refusal or none)


def not_dense(output: Sequence[int], follows: Collection[int], rank: int) -> Locality:
    """Say why there is nothing to stitch, and what to give instead.

    Args:
        output: shape of the network's result.
        follows: its dimensions that follow the image's extent.
        rank: of the image.
    """
    shape = "x".join(map(str, output))
    if len(output) == rank and {*follows} == {*range(1, rank - 1)}:
        order = ", ".join(map(str, (0, rank - 1, *range(1, rank - 1))))
        message = (
            f"its shape {shape} follows the image with channels last, so it is no map (N, C, *space). Give "
            f"forward_fn=lambda net, x: net(x).permute({order}), or such a module around the network."
        )
    elif follows:
        message = (
            f"its shape {shape} follows the image, but not along each axis as a map (N, C, *space) does: tokens, or an "
            "axis that was pooled away. Bring it to that layout in "
            "forward_fn or in a module around the network, or choose another output with --output."
        )
    else:
        message = (
            f"its shape {shape} does not follow the image's extent (a classifier?), so there is nothing to stitch. "
            "Choose another output with --output, or features_only for timm networks."
        )
    return _none("NF214", "output", message)


def cross_section(f: Function, example: Tensor, grid: Sequence[int]) -> tuple[int, ...] | None:
    """Return the thinnest strip the network runs on: extents per axis, each a multiple of the grid."""
    for least in (16, 32, 64, 128):
        size = tuple(round_up(max(least, g * least // 16), g) for g in grid)
        try:
            f(strip(example, size))
        except REFUSALS:
            continue
        return size
    return None


def _along_axes(
    single: Function,
    double: Function,
    example: Tensor,
    dilution: Sequence[int],
    cross: tuple[int, ...],
    *,
    both_ends: bool,
) -> Locality:
    strides, halos, scales, multiples, least = [], [], [], [], []
    expected: tuple[int, int] | None = None
    seen: dict[tuple[int, Fraction, tuple[int, int]], tuple[int, int]] = {}  # of axes alike: stride, multiple
    for axis, grid in enumerate(dilution):
        name = f"axis {axis}"
        scale = output_scale(single, example, axis, grid, cross)
        if scale is None:
            return _none(
                "NF254",
                name,
                "the output grows with the input along this axis, but by no simple fraction of it, so no place in the "
                "image has a place in the output that tiles could share. Resize by a factor such as 2, 1.5 or 1/3, or "
                "choose the output before the resize.",
            )
        if scale <= 0:
            return _none("NF211", name, "the output does not grow with the input along this axis.")
        grid = math.lcm(grid, scale.denominator)
        line = _Line(single, double, example, axis, scale, cross)
        try:
            reach = line.reach(grid, expected)
            like = (None, None) if reach is None else seen.get((grid, scale, reach), (None, None))
            unit = None if reach is None else line.unit(grid, reach, like[0])
            if reach is not None and unit is not None and grid % unit:
                # the dye's edges lay on no lattice of the network's: once more, on it
                grid = math.lcm(grid, unit)
                reach = line.reach(grid)
                unit = None if reach is None else line.unit(grid, reach, unit)
        except DyeLost:
            return _none(
                "NF216",
                name,
                "no dye arrives at its output (a comparison, argmax or cast swallows it), so its halo cannot be "
                "read. Choose an output before that step.",
            )
        except DyeRefused as refused:
            return _none(
                "NF245",
                name,
                f"the network runs {refused}, which must not see the NaN that a halo is read from: where it reads "
                "may depend on the data, without bound.",
            )
        if reach is None:
            return _none(
                "NF212",
                name,
                "its output depends on the whole extent along this axis although no known "
                "statistic is live, so no halo is enough.",
            )
        if unit is None or (both_ends and not line.wraps_nowhere(grid, reach, unit)):
            return _none("NF213", name, line.obstacle(grid, reach))
        expected = reach
        around = line.around(grid, reach)
        reach = max(0, reach[0]), max(0, reach[1])  # a tile reads at least itself
        multiple = exact_multiple(
            double, example.double(), axis, unit, scale, around, cross, single, like=like[1]
        )
        seen[grid, scale, expected] = unit, multiple
        multiples.append(multiple)
        least.append(smallest_tile(single, example, axis, unit, scale, reach[1], cross))
        strides.append(unit)
        halos.append(reach)
        scales.append(scale)
    geometry = Geometry(
        stride=tuple(strides), halo=tuple(halos), scale=tuple(scales), multiple=tuple(multiples)
    )
    return Locality(geometry, (), tuple(least))


@dataclass(frozen=True, slots=True)
class _Line:
    """One axis of a network, on strips along it."""

    single: Function
    double: Function
    example: Tensor
    axis: int
    scale: Fraction
    cross: tuple[int, ...]

    def reach(self, grid: int, expected: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Return the halo as the dye shows it on multiples of `grid`, None where it is unbounded."""
        return halo(self.single, self.example, self.axis, grid, self.scale, self.cross, expected)

    def around(self, grid: int, reach: tuple[int, int]) -> tuple[int, int]:
        """Return the halo in whole steps of the grid."""
        return round_up(max(0, reach[0]), grid), round_up(max(0, reach[1]), grid)

    def unit(self, grid: int, reach: tuple[int, int], like: int | None) -> int | None:
        """Return the stride at which windows may be cut, or None; `like` is that of a like axis, tried first.

        It divides the grid, or is that of a lattice which the network pads its input to. There the halo is known but
        for a step of the lattice, which is added to what is not compared.
        """
        if like and self._common(like, self.around(grid, reach), settled=True):
            return like
        unit = self._common(grid, self.around(grid, reach))
        if unit is not None:
            return unit
        for lattice in lattices(grid):
            before, after = self.around(lattice, reach)
            try:
                unit = self._common(lattice, (before + lattice, after + lattice))
            except REFUSALS:
                continue
            if unit is not None:
                return unit
        return None

    def wraps_nowhere(self, grid: int, reach: tuple[int, int], unit: int) -> bool:
        """Tell whether windows from the start of the image, and to its end, give what the whole gives there."""
        around, example = self.around(grid, reach), self.example.double()
        return cutting_grid(self.double, example, self.axis, unit, self.scale, around, self.cross) == unit

    def obstacle(self, grid: int, reach: tuple[int, int]) -> str:
        """Say why there is no unit."""
        around = self.around(grid, reach)
        if (
            smallest_stride(
                self.double, self.example.double(), self.axis, grid, self.scale, around, self.cross
            )
            is None
        ):
            return (
                "no shift of the input shifts the output: something knows the place of a pixel or the size "
                "(align_corners=True, position embeddings, a resize to a fixed size; NF244 names such calls). Replace "
                "it, or keep to one tile size and place."
            )
        return (
            "its output moves with the input, but is another in a window than in the whole image: something depends "
            "on the size or on the opposite border (a division by H*W, a branch on the size, a cyclic shift). Take it "
            "out, or keep to one tile size."
        )

    def _common(self, hint: int, around: tuple[int, int], *, settled: bool = False) -> int | None:
        example = self.example.double()
        return common_unit(
            self.double, example, self.axis, hint, self.scale, around, self.cross, settled=settled
        )


def _none(code: str, where: str, message: str) -> Locality:
    return Locality(None, (Finding(code=code, where=where, message=message),))
