"""Patches laid out as columns: unfold and fold (im2col, col2im).

im2col    column (i, j) holds the window s i - P ... s i - P + d (k - 1), as many values per window as it has
col2im    adds the columns up again where they came from: what a transposed convolution reads
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from normfix.tiling.reach.calls import Call
from normfix.tiling.reach.extents import Vector, times
from normfix.tiling.reach.frames import Frame, Layout, frame_of, joined
from normfix.tiling.reach.links import Reading, moved, whole
from normfix.tiling.reach.needs import Boundless, Need
from normfix.tiling.reach.rules.rule import Rule
from normfix.tiling.reach.rules.windows import Kernel

__all__ = ["PATCHES"]


@dataclass(frozen=True, slots=True)
class Columns:
    """The reading of im2col: of a map (n, c, h, w), to columns (n, c k k, (h') (w'))."""

    operand: Node
    kernels: tuple[Kernel, ...]

    def frames(self, layout: Layout, call: Call) -> Mapping[int, Frame]:
        """Return the columns' frame: one factor per axis."""
        extents = call.extents(self.operand)[-len(self.kernels) :]
        return {len(call.shape) - 1: _columns(self.kernels, extents, call)}

    def carried(self, need: Need, result: Layout, layout: Layout, call: Call) -> Need:
        """Carry each factor of the columns to its axis."""
        rank, last = len(layout), len(result) - 1
        columns, found = result[last], Need()
        for number, kernel in enumerate(self.kernels):
            dim = rank - len(self.kernels) + number
            span = None
            if len(columns) == len(self.kernels) and len(layout[dim]) == 1:
                span = moved(kernel.reads, columns[number], layout[dim][0], need.get((last, number)))
            spans = whole(layout[dim], _unfollowed(call)) if span is None else {0: span}
            found.update({(dim, n): s for n, s in spans.items()})
        return found


@dataclass(frozen=True, slots=True)
class Folded:
    """The reading of col2im: of columns (n, c k k, (h') (w')), to a map (n, c, h, w)."""

    operand: Node
    kernels: tuple[Kernel, ...]

    def frames(self, layout: Layout, call: Call) -> Mapping[int, Frame]:
        """Return nothing: the map's frame follows from its extents."""
        return {}

    def carried(self, need: Need, result: Layout, layout: Layout, call: Call) -> Need:
        """Carry each axis to its factor of the columns."""
        rank, last = len(result), len(layout) - 1
        columns = layout[last]
        spans = []
        for number, kernel in enumerate(self.kernels):
            given, span = result[rank - len(self.kernels) + number], None
            if len(columns) == len(self.kernels) and len(given) == 1:
                of = need.get((rank - len(self.kernels) + number, 0))
                span = moved(kernel.spreads, given[0], columns[number], of)
            spans.append(span)
        if None in spans:
            return {(last, n): s for n, s in whole(columns, _unfollowed(call)).items()}
        return {(last, number): span for number, span in enumerate(spans) if span is not None}


def _unfollowed(call: Call) -> Boundless:
    return Boundless(call.origin, "its columns are laid out in a way that is not followed")


def _columns(kernels: Sequence[Kernel], extents: Sequence[Vector], call: Call) -> Frame:
    counts = [
        tuple((n + 2 * k.padding - k.span - 1) // k.stride + 1 for n in extent)
        for k, extent in zip(kernels, extents, strict=True)
    ]
    if times(counts, call.sizes.ones) != call.shape[-1]:
        return frame_of(call.shape[-1], call.sizes)
    return joined([factor for extent in counts for factor in frame_of(extent, call.sizes)])


def _kernels(call: Call) -> tuple[Kernel, ...]:
    extents = call.numbers("kernel_size", 2)
    stride, padding = call.numbers("stride", 2, 1), call.numbers("padding", 2, 0)
    dilation = call.numbers("dilation", 2, 1)
    return tuple(Kernel(*of) for of in zip(extents, stride, padding, dilation, strict=True))


def _im2col(call: Call) -> list[Reading]:
    return [Columns(call.tensor("self"), _kernels(call))]


def _col2im(call: Call) -> list[Reading]:
    return [Folded(call.tensor("self"), _kernels(call))]


PATCHES: dict[str, Rule] = {"im2col": _im2col, "col2im": _col2im}
