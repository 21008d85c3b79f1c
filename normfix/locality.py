"""The geometry of a network without live statistics: output scale, halo, stride and exact sizes per axis.

The halo is read from dye on a grid that surely contains the stride (the coarseness of the coarsest feature
map), then the stride is the smallest shift that float64 confirms. Everything runs on strips that are long on
one axis and as thin as the network allows on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from normfix.calling import REFUSALS
from normfix.dye import DyeLost, halo, strip
from normfix.records import Finding
from normfix.symmetry import cutting_grid, exact_multiple, output_scale, smallest_stride
from normfix.tiles import Geometry, round_up

__all__ = ["Locality", "cross_section", "measure_locality"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Locality:
    """The geometry, or None and the findings that say why there is none."""

    geometry: Geometry | None
    findings: tuple[Finding, ...]


def measure_locality(
    single: Function, double: Function, example: Tensor, dilution: Sequence[int]
) -> Locality:
    """Measure a network in which no statistic is live.

    Args:
        single: the network in float32 on CPU.
        double: the network in float64 on CPU.
        example: (N, C, *space) in float32 on CPU, the material of the strips.
        dilution: per axis, the coarseness of the coarsest feature map: a multiple or divisor of the stride.
    """
    example = example[:1]
    cross = cross_section(single, example, dilution)
    if cross is None:
        size = "x".join(map(str, example.shape[2:]))
        return _none(
            "NF210",
            "size",
            f"the network runs on no strip, only on sizes like {size}, so it cannot be tiled.",
        )
    try:
        return _along_axes(single, double, example, dilution, cross)
    except REFUSALS as error:
        return _none("NF210", "size", f"it runs on no strip of another length: {error}.")


def cross_section(f: Function, example: Tensor, grid: Sequence[int]) -> tuple[int, ...] | None:
    """Return the thinnest strip the network runs on: extents per axis, each a multiple of the grid."""
    for factor in (2, 4, 8, 16):
        size = tuple(round_up(factor * max(8, g), g) for g in grid)
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
) -> Locality:
    strides, halos, scales, multiples = [], [], [], []
    for axis, grid in enumerate(dilution):
        name = f"axis {axis}"
        scale = output_scale(single, example, axis, grid, cross)
        if scale <= 0:
            return _none("NF211", name, "the output does not grow with the input along this axis.")
        try:
            reach = halo(single, example, axis, grid, scale, cross)
        except DyeLost:
            return _none(
                "NF216",
                name,
                "no dye arrives at its output (a comparison, argmax or cast swallows it), so its halo cannot be "
                "read. Choose an output before that step.",
            )
        if reach is None:
            return _none(
                "NF212",
                name,
                "its output depends on the whole extent along this axis although no known "
                "statistic is live, so no halo is enough.",
            )
        reach = max(0, reach[0]), max(0, reach[1])  # a tile reads at least itself
        around = round_up(reach[0], grid), round_up(reach[1], grid)
        stride = smallest_stride(double, example.double(), axis, grid, scale, around, cross)
        if stride is None:
            return _none(
                "NF213",
                name,
                "no shift of the input shifts the output: it depends on size or position "
                "(align_corners=True, position embeddings, resizing to a fixed size).",
            )
        unit = cutting_grid(double, example.double(), axis, stride, scale, around, cross)
        if unit is None:
            return _none(
                "NF213", name, "windows of whole strides differ from the whole: its output depends on size."
            )
        stride = unit
        strides.append(stride)
        halos.append(reach)
        scales.append(scale)
        multiples.append(exact_multiple(double, example.double(), axis, stride, scale, around, cross))
    geometry = Geometry(
        stride=tuple(strides), halo=tuple(halos), scale=tuple(scales), multiple=tuple(multiples)
    )
    return Locality(geometry, ())


def _none(code: str, where: str, message: str) -> Locality:
    return Locality(None, (Finding(code=code, where=where, message=message),))
