"""The geometry of a network without live statistics: output scale, halo, stride and exact sizes per axis.

Where the graph bounds the reach (normfix.tiling.reach), the bound is the halo, and dye on one strip must lie within it.
Without a bound the halo is read from dye on a grid that surely contains the stride (the coarseness of the coarsest
feature map). The stride is the smallest shift that float64 confirms. Everything runs on strips that are long on
one axis and as thin as the network allows on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from normfix.errors import NormfixError
from normfix.networks.calling import refusals
from normfix.records.sites import Finding, Scan
from normfix.records.spans import Spans, in_strides, round_up
from normfix.tiling.dependence import borders_hold, followed, hides_no_place, is_isolated, is_steady
from normfix.tiling.grid import Geometry
from normfix.tiling.halo import DyeLost, DyeRefused, Felt, halo, halo_within
from normfix.tiling.material import strip
from normfix.tiling.reach.bounds import Bound
from normfix.tiling.recall import Recalling
from normfix.tiling.stride import (
    common_strip,
    common_unit,
    cutting_grid,
    ends_held,
    exact_multiple,
    lattices,
    output_scale,
    pads_inside,
    smallest_stride,
    smallest_tile,
)

__all__ = [
    "BoundExceededError",
    "Locality",
    "cross_section",
    "geometry_of",
    "held_beyond",
    "holds_stride",
    "measure_locality",
    "not_dense",
    "thinnest",
]

Function = Callable[[Tensor], Tensor]

_ALONG, _ACROSS = 512, 1 << 8
"""Pixels that a measured halo surely looked along an axis, and of a cross-section off it, where no graph bounds it."""
_FINE, _COARSE = 64, 256
"""Largest units, in pixels, that are tried where the network runs on no strip of the first, and where on some."""


@dataclass(frozen=True, slots=True)
class Locality:
    """The geometry and the least extents, or None and the findings that say why there is none.

    `steady` tells that all of dependence's measurements hold the geometry, `blind` that NaN may have missed something,
    `foreign` that an operator must not see it, `grid` and `cross` on which strips it was measured. `dye` is the halo
    as the dye shows it, which lies within that of the geometry, None where something swallows it and the graph bounds
    the halo; `extent` how far along each axis it looked.
    """

    geometry: Geometry | None
    findings: tuple[Finding, ...]
    smallest_tile: tuple[int, ...] | None = None
    steady: bool = False
    blind: bool = False
    foreign: bool = False
    grid: tuple[int, ...] = ()
    cross: tuple[int, ...] = ()
    dye: Spans | None = None
    extent: tuple[int, ...] = ()


_OTHER_IN_WINDOWS = (
    "its output moves with the input, but is another in a window than in the whole image: something depends "
    "on the size or on the opposite border (a division by H*W, a branch on the size, a cyclic shift). Take it "
    "out, or keep to one tile size."
)


class BoundExceededError(NormfixError):
    """The dye reaches further than the graph's bound: a rule of normfix's is wrong (NF251)."""


def measure_locality(
    single: Function,
    double: Function,
    example: Tensor,
    dilution: Sequence[int],
    *,
    doubtful: bool = False,
    trial: bool = False,
    foreign: bool = False,
    swallowed: bool = False,
    compared: bool = False,
    both_ends: bool = False,
    bound: Bound | None = None,
) -> Locality:
    """Measure a network in which no statistic is live.

    Where NaN is swallowed or must not be seen, the dye is followed instead, and what that gives must be steady.

    Args:
        single: the network in float32 on CPU.
        double: the network in float64 on CPU.
        example: (N, C, *space) in float32 on CPU, the material of the strips.
        dilution: per axis, the coarseness of the coarsest feature map: a multiple or divisor of the stride.
        doubtful: NaN alone is not believed, if the other measurements do not contradict it.
        trial: only a steady geometry counts.
        foreign: operators that nobody knows are among it, so that steadiness is all that holds a geometry.
        swallowed: something in it makes ordinary numbers of NaN, so that what NaN shows is tried by amplification,
            and a wider halo that the dye shows when it is followed is taken.
        compared: something in it compares numbers, on the way of the NaN or not: tried by amplification.
        both_ends: something may look past one border to the other (a cyclic shift): compare windows that start where
            the image starts as well.
        bound: of its graph, which is the halo then; what a comparison swallows or gates is in it.

    Raises:
        BoundExceededError: NF251.
    """
    example = example[:1]
    measured = partial(_measured, single, double, example, dilution, both_ends=both_ends, bound=bound)
    plain = Locality(None, (), blind=True) if trial else measured()
    foreign = foreign or plain.foreign
    tried = (swallowed or compared) and plain.geometry is not None and bound is None
    short = tried and not _is_isolated(double, example, plain)
    if not (doubtful or tried or plain.blind) or _is_label(single(example)):
        return plain
    # within a bound, how far the dye goes when it is followed adds nothing
    alike = plain.geometry is not None and (bound is not None or _is_followed(single, example, plain))
    other = plain if alike else measured(felt=followed)
    if not (doubtful or short or plain.blind):
        return other if _covers(other, plain) else plain
    steady = (wide for wide in (other, _wider(other)) if _is_steady(double, example, wide, thorough=foreign))
    return next((replace(wide, steady=True) for wide in steady), _boundless() if short else plain)


def held_beyond(double: Function, example: Tensor, measured: Locality, bound: Bound | None) -> Locality:
    """Return what was measured, or none where tiles are others on images whose values are larger.

    Where the graph does not bound the halo, or does if masks hide what cyclic shifts bring around the border, the first
    and the last tile must hold whatever is beyond it. There, and where the network may be computed with a place or the
    size, windows must agree on images of several magnitudes.

    Args:
        double: the network in float64 on CPU. At sizes that it is run at here alone, windows are not compared.
        example: (N, C, *space) in float32 on CPU, the material of the strips.
        measured: of it.
        bound: of its graph.
    """
    geometry, material = measured.geometry, example[:1].double()
    at_borders = bound is None or bool(bound.masked)
    if geometry is None or not (at_borders or (bound is not None and bound.knows_places)):
        return measured
    try:
        for axis in range(len(geometry.stride)) if at_borders else ():
            if not borders_hold(double, material, axis, geometry, measured.cross):
                return _none("NF213", f"axis {axis}", _OTHER_IN_WINDOWS)
        return measured if hides_no_place(double, material, geometry, measured.cross) else _hidden()
    except refusals():  # it takes no strip as short as that
        return measured


def _hidden() -> Locality:
    return _none(
        "NF213",
        "(all axes)",
        "windows give what the whole gives there on the image, but not where its values are larger: behind a gate (a "
        "ReLU, a comparison) something depends on the place of a pixel or on the size (coordinates, a stretched table, "
        "a division by H*W). Take it out, or keep to one tile size.",
    )


def _boundless() -> Locality:
    return _none(
        "NF212",
        "halo",
        "tiles change when what is beyond the halo that its dye shows is made huge, and no wider halo was found that "
        "holds them: a comparison or selection looks at a pixel far away (a corner, a gate, a fill). Take it out.",
    )


def _is_label(output: Tensor) -> bool:
    """Tell whether an output counts: what is rounded to whole numbers says nothing of how exact they are."""
    return not output.is_floating_point() or torch.equal(output, output.round())


def _is_followed(single: Function, example: Tensor, measured: Locality) -> bool:
    """Tell whether the dye, followed, reaches as far as its NaN does."""
    geometry = measured.geometry
    assert geometry is not None
    expected: tuple[int, int] | None = None
    for axis, (grid, scale, there) in enumerate(
        zip(measured.grid, geometry.scale, geometry.halo, strict=True)
    ):
        try:
            expected = halo(single, example, axis, grid, scale, measured.cross, expected, followed)
        except (DyeLost, DyeRefused):
            return False
        except refusals():  # it takes no strip as long as that
            return False
        if expected is None or (max(0, expected[0]), max(0, expected[1])) != there:
            return False
    return True


def _covers(other: Locality, plain: Locality) -> bool:
    """Tell whether one geometry differs from another at most by a wider halo."""
    if other.geometry is None or plain.geometry is None:
        return False
    pairs = zip(other.geometry.halo, plain.geometry.halo, strict=True)
    wider = all(b >= before and a >= after for (b, a), (before, after) in pairs)
    return wider and replace(other.geometry, halo=plain.geometry.halo) == plain.geometry


def _wider(measured: Locality) -> Locality:
    """Return it with a halo of a stride more: a weight that rounding made of zero counts too, at some sizes only."""
    geometry = measured.geometry
    if geometry is None:
        return measured
    halo = ((b + s, a + s) for s, (b, a) in zip(geometry.stride, geometry.halo, strict=True))
    return replace(measured, geometry=replace(geometry, halo=tuple(halo)))


def _is_steady(double: Function, example: Tensor, measured: Locality, *, thorough: bool) -> bool:
    if measured.geometry is None:
        return False
    try:
        return is_steady(double, example.double(), measured.geometry, measured.cross, thorough=thorough)
    except refusals():  # it does not take what a tile would give it
        return False


def _is_isolated(double: Function, example: Tensor, measured: Locality) -> bool:
    assert measured.geometry is not None
    try:
        return is_isolated(double, example.double(), measured.geometry, measured.cross)
    except refusals():  # windows are not what it takes, which says nothing of its halo
        return True


def _measured(
    single: Function,
    double: Function,
    example: Tensor,
    dilution: Sequence[int],
    *,
    felt: Felt | None = None,
    both_ends: bool,
    bound: Bound | None = None,
) -> Locality:
    coarsest = tuple(dilution)
    if bound is not None:
        dilution = tuple(map(math.lcm, dilution, bound.lattice))
    known, refusal = cross_section(single, example, dilution), ""
    for coarser in (1, 2, 4, 8, 3, 6, 12, 7, 5, 10, 14):  # blocks without padding take multiples only
        grid = [n * coarser for n in dilution]
        if coarser > 1 and max(grid) > (_FINE if known is None else _COARSE):
            continue
        cross = tuple(map(round_up, known, grid)) if known else cross_section(single, example, grid)
        if cross is None:
            continue
        try:
            return _along_axes(
                single, double, example, grid, cross, felt, coarsest, both_ends=both_ends, bound=bound
            )
        except BoundExceededError:
            if _is_turned(single, example, cross, grid):
                return _turned()
            raise
        except refusals() as error:
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


def _is_turned(f: Function, example: Tensor, cross: Sequence[int], grid: Sequence[int]) -> bool:
    """Tell whether the output does not grow along the axis along which the image does, but along others."""
    here = f(strip(example, cross)).shape[2:]
    for axis, step in enumerate(grid):
        longer = f(strip(example, [*cross[:axis], cross[axis] + 16 * step, *cross[axis + 1 :]])).shape[2:]
        if longer[axis] == here[axis] and longer != here:
            return True
    return False


def _turned() -> Locality:
    return _none(
        "NF214",
        "output",
        "its axes are those of the image in another order, so it is no map (N, C, *space) of it. Give "
        "forward_fn=lambda net, x: net(x).transpose(2, 3) or a module that turns it back.",
    )


def cross_section(f: Function, example: Tensor, grid: Sequence[int]) -> tuple[int, ...] | None:
    """Return the thinnest strip that the network runs on and gives anything for.

    Extents per axis are multiples of the grid. Of a network that crops its output a strip may be left nothing.
    """
    for least in (16, 32, 64, 128):
        size = tuple(round_up(max(least, g * least // 16), g) for g in grid)
        try:
            given = f(strip(example, size))
        except refusals():
            continue
        if given.numel():
            return size
    return None


def _along_axes(
    single: Function,
    double: Function,
    example: Tensor,
    dilution: Sequence[int],
    cross: tuple[int, ...],
    felt: Felt | None,
    coarsest: Sequence[int],
    *,
    both_ends: bool,
    bound: Bound | None = None,
) -> Locality:
    strides, halos, scales, multiples, inside, least = [], [], [], [], [], []
    dyes: list[tuple[int, int] | None] = []
    expected: tuple[int, int] | None = None
    seen: dict[tuple[int, Fraction, tuple[int, int]], tuple[int, int]] = {}  # of axes alike: stride, multiple
    coarser: dict[tuple[int, Fraction], int] = {}  # grids that turned out too fine, and what they became
    for axis, grid in enumerate(dilution):
        name = f"axis {axis}"
        scale = bound.scale[axis] if bound else output_scale(single, example, axis, grid, cross)
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
        fine = math.lcm(grid, scale.denominator)
        grid = coarser.get((fine, scale), fine)
        exact = Recalling(double)
        line = _Line(single, exact, example, axis, scale, cross, felt, coarsest[axis], bound)
        swallowed = False
        try:
            try:
                reach = line.reach(grid, expected)
            except (DyeLost, DyeRefused):
                if bound is None:
                    raise
                # nothing to hold against the bound, which needs no values
                reach, swallowed = bound.along(axis, grid), True
            like = (None, None) if reach is None else seen.get((grid, scale, reach), (None, None))
            held = None if reach is None else line.held(grid, reach)
            asked = grid, held or reach or (0, 0), like[0]
            unit = None if reach is None else line.unit(*asked)
            if reach is not None and unit is not None and grid % unit:
                # the dye's edges lay on no lattice of the network's: once more, on it
                grid = coarser[fine, scale] = math.lcm(grid, unit)
                reach = line.reach(grid) if bound is None or not swallowed else bound.along(axis, grid)
                held = None if reach is None else line.held(grid, reach)
                asked = grid, held or reach or (0, 0), unit
                unit = None if reach is None else line.unit(*asked)
        except DyeLost:
            return _none(
                "NF216",
                name,
                "no dye arrives at its output (a comparison, argmax or cast swallows it), so its halo cannot be "
                "read. Choose an output before that step.",
                blind=True,
            )
        except DyeRefused as refused:
            return _none(
                "NF245",
                name,
                f"the network runs {refused}, which must not see the NaN that a halo is read from: where it reads "
                "may depend on the data, without bound.",
                blind=True,
                foreign=True,
            )
        if reach is None:
            return _none(
                "NF212",
                name,
                "its output depends on the whole extent along this axis although no known "
                "statistic is live, so no halo is enough.",
            )
        if unit is None or held is None or (both_ends and not line.wraps_nowhere(grid, held, unit)):
            return _none("NF213", name, line.obstacle(grid, held or reach), blind=True)
        expected = reach
        around = line.around(grid, held)
        reach = max(0, held[0]), max(0, held[1])  # a tile reads at least itself
        dyes.append(None if swallowed else reach)
        if bound is not None:
            reach = line.required(unit, reach)
        reach = reach[0], max(reach[1], line.cropped(unit, around, reach[1]))
        if line.directly(*asked) is None and not line.holds(unit, reach):
            return _none("NF213", name, line.obstacle(grid, reach), blind=True)
        multiple = exact_multiple(
            exact, example.double(), axis, unit, scale, around, cross, single, like=like[1]
        )
        seen[grid, scale, expected] = unit, multiple
        multiples.append(multiple)
        inside.append(
            multiple != 1 and pads_inside(exact, example.double(), axis, unit, scale, around, cross)
        )
        least.append(smallest_tile(exact, line.seen(unit, around), axis, unit, scale, reach[1], cross[axis]))
        strides.append(unit)
        halos.append(reach)
        scales.append(scale)
    geometry = Geometry(
        stride=tuple(strides),
        halo=tuple(halos),
        scale=tuple(scales),
        multiple=tuple(multiples),
        padded_inside=tuple(inside),
    )
    dye = _shown(dyes) if bound is not None else geometry.halo
    looked = tuple(max(_ALONG, min(n, 8 * _ALONG)) for n in example.shape[2:])
    return Locality(geometry, (), tuple(least), grid=tuple(dilution), cross=cross, dye=dye, extent=looked)


def _shown(dyes: Sequence[tuple[int, int] | None]) -> Spans | None:
    """Return what the dye shows, None where something swallows it along an axis."""
    shown = tuple(dye for dye in dyes if dye is not None)
    return shown if len(shown) == len(dyes) else None


@dataclass(frozen=True, slots=True)
class _Line:
    """One axis of a network, on strips along it.

    `double` may recall what it gave; `single` may not, as it is watched while it runs. `coarsest` is how much coarser
    than the image its coarsest map is.
    """

    single: Function
    double: Function
    example: Tensor
    axis: int
    scale: Fraction
    cross: tuple[int, ...]
    felt: Felt | None
    coarsest: int
    bound: Bound | None = None

    def reach(self, grid: int, expected: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Return the halo as the dye shows it on multiples of `grid`, None where it is unbounded."""
        if self.bound is None:
            wide, least = _wide(self.cross, self.axis), self.example.shape[self.axis + 2]
            return halo(
                self.single, self.example, self.axis, grid, self.scale, wide, expected, self.felt, least
            )
        bound = self.bound.along(self.axis, grid)
        within = partial(
            halo_within,
            axis=self.axis,
            grid=grid,
            scale=self.scale,
            bound=bound,
            cross=self.cross,
            lost=max(0, math.ceil(-self.bound.offset[self.axis] / self.scale)),
        )
        reach = within(self.single, self.example, felt=self.felt)
        if self.felt is None and (
            reach is None or any(n > most for n, most in zip(reach, bound, strict=True))
        ):
            # convolutions in half precision spread NaN further than they read
            reach = within(self.double, self.example.double())
        if reach is None:
            raise self._exceeded(f"more than {max(bound)}", bound)
        return reach

    def around(self, grid: int, reach: tuple[int, int]) -> tuple[int, int]:
        """Return the halo in whole steps of the grid."""
        before, after = reach if self.bound is None else self.bound.along(self.axis, grid)
        return round_up(max(0, before), grid), round_up(max(0, after), grid)

    def held(self, unit: int, reach: tuple[int, int]) -> tuple[int, int] | None:
        """Return the halo with as much more as a window takes to hold what is needed of the maps in between, if any."""
        if self.bound is not None:  # in which it is
            return reach
        before, after = max(0, reach[0]), max(0, reach[1])
        most = round_up(before + after, unit) + unit
        if all(self._ends_held(unit, before, after)):
            return reach
        if not all(self._ends_held(unit, before + most, after + most)):
            return None
        wide = before, after
        for step in _doubled(unit, most):
            there = self._ends_held(unit, *wide)
            wide = (wide[0] if there[0] else before + step, wide[1] if there[1] else after + step)
        return wide

    def _ends_held(self, unit: int, before: int, after: int) -> tuple[bool, bool]:
        around = round_up(before, unit), round_up(after, unit)
        return ends_held(self.double, self.example.double(), self.axis, unit, self.scale, around, self.cross)

    def cropped(self, stride: int, around: tuple[int, int], after: int) -> int:
        """Return how many pixels ahead a tile reads so that the network, which crops its end, gives all of the tile.

        0 where what lies `after` a tile, up to the stride, is enough.
        """
        strip = self.seen(stride, around)
        lacking = strip.shape[self.axis + 2] * self.scale - self.double(strip).shape[self.axis + 2]
        ahead = math.ceil(lacking / self.scale)
        return ahead if ahead > round_up(after, stride) else 0

    def required(self, unit: int, reach: tuple[int, int]) -> tuple[int, int]:
        """Return the bound for tiles on multiples of `unit`.

        Raises:
            BoundExceededError: NF251 if the dye shows more, each rounded up to whole units.
        """
        assert self.bound is not None
        bound = self.bound.along(self.axis, unit)
        pairs = in_strides((reach, bound), (unit, unit))
        if any(shown > most for shown, most in zip(*pairs, strict=True)):
            raise self._exceeded(f"{reach[0]} before and {reach[1]} after", bound)
        return bound

    def _exceeded(self, shown: str, bound: tuple[int, int]) -> BoundExceededError:
        return BoundExceededError(
            "NF251",
            f"the dye shows that an output depends on {shown} pixels beyond its tile, where the graph bounds it by "
            f"{bound[0]} before and {bound[1]} after: one of normfix's rules is wrong. Give --halo measured "
            "(halo='measured' in Python) to rely on the dye alone, and please report it with the network.",
            where=f"axis {self.axis}",
        )

    def unit(self, grid: int, reach: tuple[int, int], like: int | None) -> int | None:
        """Return the stride at which windows may be cut, or None; `like` is that of a like axis, tried first.

        It divides the grid, or is that of a lattice which the network pads its input to. There the halo is known but
        for a step of the lattice, which is added to what is not compared.
        """
        unit = self.directly(grid, reach, like)
        if unit is not None:
            return unit
        for lattice in lattices(grid):
            before, after = self.around(lattice, reach)
            around = before + lattice, after + lattice
            try:
                unit = self._common(lattice, around, refuted=grid)
            except refusals():
                continue
            # what is padded on both sides can make up for a wrong shift by chance: other windows must agree as well
            if unit is not None and self._cuts_at(unit, around):
                return unit
        return None

    def directly(self, grid: int, reach: tuple[int, int], like: int | None) -> int | None:
        """Return the unit as `unit` does, if it divides the grid."""
        settled = self._is_settled(grid)
        if like and self._common(like, self.around(grid, reach), settled=True, short=settled):
            return like
        return self._common(grid, self.around(grid, reach), settled=settled, short=settled)

    def seen(self, unit: int, around: tuple[int, int]) -> Tensor:
        """Return a strip that windows at the unit were compared on, as a rule."""
        x = common_strip(
            self.example.double(),
            self.axis,
            unit,
            self.scale,
            around,
            self.cross,
            short=self._is_settled(unit),
        )
        return x.narrow(self.axis + 2, 0, x.shape[self.axis + 2] - unit)

    def _is_settled(self, grid: int) -> bool:
        """Tell whether no unit is finer or coarser: extents are lines on the grid of the coarsest map."""
        return self.bound is not None and self.bound.lattice[self.axis] == grid == self.coarsest

    def wraps_nowhere(self, grid: int, reach: tuple[int, int], unit: int) -> bool:
        """Tell whether windows from the start of the image, and to its end, give what the whole gives there."""
        return self._cuts_at(unit, self.around(grid, reach))

    def holds(self, unit: int, reach: tuple[int, int]) -> bool:
        """Tell whether windows at a unit that was found beyond a step of a lattice hold with the halo itself.

        What is at one place of the image, such as a row that is read by its number, hides in that step.
        """
        return self._cuts_at(unit, (round_up(reach[0], unit), round_up(reach[1], unit)))

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
        return _OTHER_IN_WINDOWS

    def _cuts_at(self, unit: int, around: tuple[int, int]) -> bool:
        example = self.example.double()
        return cutting_grid(self.double, example, self.axis, unit, self.scale, around, self.cross) == unit

    def _common(
        self,
        hint: int,
        around: tuple[int, int],
        *,
        settled: bool = False,
        refuted: int = 0,
        short: bool = False,
    ) -> int | None:
        example = self.example.double()
        return common_unit(
            self.double,
            example,
            self.axis,
            hint,
            self.scale,
            around,
            self.cross,
            settled=settled,
            refuted=refuted,
            short=short,
        )


def _doubled(first: int, most: int) -> Iterator[int]:
    """Yield a number, its doubles that are less than another, and that."""
    while first < most:
        yield first
        first *= 2
    yield most


def _wide(cross: Sequence[int], axis: int) -> tuple[int, ...]:
    """Return a cross-section so wide that taps off the axis are seen, in whole multiples of the thinnest."""
    factor = 1
    while len(cross) > 1 and math.prod(2 * factor * n for i, n in enumerate(cross) if i != axis) <= _ACROSS:
        factor *= 2
    return tuple(n if i == axis else factor * n for i, n in enumerate(cross))


def _none(code: str, where: str, message: str, *, blind: bool = False, foreign: bool = False) -> Locality:
    return Locality(None, (Finding(code=code, where=where, message=message),), blind=blind, foreign=foreign)


def geometry_of(scan: Scan) -> Geometry | None:
    """Return a scan's geometry in numbers, or None where it has none."""
    if scan.stride is None or scan.halo is None or scan.scale is None or scan.exact_sizes is None:
        return None
    return Geometry(
        stride=scan.stride,
        halo=scan.halo,
        scale=tuple(map(Fraction, scan.scale)),
        multiple=scan.exact_sizes,
        padded_inside=scan.padded_inside or (),
    )


def holds_stride(f: Function, example: Tensor, geometry: Geometry, cross: Sequence[int]) -> bool:
    """Tell whether windows may be cut at a geometry's stride, as it was measured.

    Args:
        f: the network in float64.
        example: (1, C, *space) in float64, the material of the strips.
        geometry: as measured.
        cross: extents of the thinnest strip.
    """
    axes = zip(geometry.stride, geometry.scale, geometry.halo, strict=True)
    return all(
        cutting_grid(
            f, example, axis, stride, scale, (round_up(before, stride), round_up(after, stride)), cross
        )
        == stride
        for axis, (stride, scale, (before, after)) in enumerate(axes)
    )


def thinnest(f: Callable[[Tensor], Tensor], example: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """Return the extents of the thinnest strip the network runs on."""
    cross = cross_section(f, example[:1], geometry.stride)
    if cross is None:
        f(example[:1])  # a network that runs on nothing says why
        raise NormfixError("NF210", "the network runs on no strip, so its halo cannot be proved.")
    return cross
