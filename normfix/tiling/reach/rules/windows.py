"""Convolutions and pools: a window of s i - P ... s i - P + d (k - 1) around each position, or its converse.

    forward      i reads       s i - P  ...  s i - P + d (k - 1)
    transposed   i reads       ceil((i + P - d (k - 1)) / s)  ...  floor((i + P) / s)

Borders, ceil_mode, count_include_pad and output padding change how many positions there are, not what one reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from torch.fx import Node

from normfix.tiling.reach.calls import Call
from normfix.tiling.reach.extents import Vector
from normfix.tiling.reach.links import WHOLE, Along, ByDimension, Link, Reading, Whole, Window
from normfix.tiling.reach.needs import Interval, Reads
from normfix.tiling.reach.rules.rule import Rule

__all__ = ["WINDOWS", "Kernel", "proportional"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A window along one axis: extent, stride, padding before, dilation."""

    extent: int
    stride: int
    padding: int
    dilation: int

    @property
    def span(self) -> int:
        """Return the distance of its first and last position."""
        return self.dilation * (self.extent - 1)

    def reads(self, given: Interval) -> Interval:
        """Return what a convolution or pool reads."""
        first, last = given
        return self.stride * first - self.padding, self.stride * last - self.padding + self.span

    def spreads(self, given: Interval) -> Interval:
        """Return what the transposed convolution reads."""
        first, last = given
        return -((self.span - first - self.padding) // self.stride), (last + self.padding) // self.stride

    def moves(self, reads: Reads) -> Reads | None:
        """Return what is read, None for a window of one that stays where it is."""
        return None if (self.stride, self.padding, self.span) == (1, 0, 0) else reads


def _convolution(call: Call) -> list[Reading]:
    x, weight = call.tensor("input"), call.tensor("weight")
    kernel = call.extents(weight)[2:]
    transposed = bool(call.get("transposed", "transpose" in call.name))
    axes = _kernels(call, [call.fixed(k) for k in kernel])
    reads = [axis.moves(axis.spreads if transposed else axis.reads) for axis in axes]
    # (n, c, *space), or (c, *space) without a batch
    return [_over_space(call, x, reads, (Along(0), WHOLE))]


def _kernels(call: Call, extents: Sequence[int]) -> list[Kernel]:
    count = len(extents)
    stride, dilation = call.numbers("stride", count, 1), call.numbers("dilation", count, 1)
    padding = call.get("padding", 0)
    if padding == "same":
        # the odd one of an even kernel goes behind
        before: Sequence[int] = [d * (k - 1) // 2 for d, k in zip(dilation, extents, strict=True)]
    elif padding == "valid":
        before = [0] * count
    else:
        before = call.numbers("padding", count, 0)
    return [Kernel(*of) for of in zip(extents, stride, before, dilation, strict=True)]


def _pool(call: Call) -> list[Reading]:
    x = call.first()
    count = _rank_of(call.name)
    extents = call.numbers("kernel_size", count)
    strides = call.numbers("stride", count) if call.get("stride") else extents
    padding, dilation = call.numbers("padding", count, 0), call.numbers("dilation", count, 1)
    axes = [Kernel(*of) for of in zip(extents, strides, padding, dilation, strict=True)]
    return [_over_space(call, x, [axis.moves(axis.reads) for axis in axes], (Along(0), Along(1)))]


def _rank_of(name: str) -> int:
    return int(next(c for c in name if c.isdigit()))


def _over_space(call: Call, x: Node, reads: Sequence[Reads | None], outer: tuple[Link, Link]) -> Reading:
    rank, count = len(call.extents(x)), len(reads)
    lead = outer[2 - (rank - count) :]
    dims = range(rank - count, rank)
    space = [Along(dim) if r is None else Window(dim, r) for dim, r in zip(dims, reads, strict=True)]
    return ByDimension(x, (*lead, *space))


def _adaptive_pool(call: Call) -> list[Reading]:
    x = call.first()
    links: list[Link] = []
    for dim, (given, taken) in enumerate(zip(call.shape, call.extents(x), strict=True)):
        if given == taken:
            links.append(Along(dim))
        elif call.sizes.is_constant(given):
            links.append(Whole("it pools the whole extent to a fixed number of cells"))
        else:
            ratio, slack = proportional(call, given, taken)
            links.append(Window(dim, _cells(ratio, slack)))
    return [ByDimension(x, tuple(links))]


def _cells(ratio: Fraction, slack: tuple[Fraction, Fraction]) -> Reads:
    """Return what cell i of a pool in proportion reads: floor(i r) ... ceil((i + 1) r) - 1."""
    low, high = slack
    return lambda given: (floor(given[0] * ratio + low), -floor(-((given[1] + 1) * ratio + high)) - 1)


def proportional(
    call: Call, given: Vector, taken: Vector, less: int = 0
) -> tuple[Fraction, tuple[Fraction, Fraction]]:
    """Return positions of an operand per position of the result, and how far i (taken - less) / (given - less) strays.

    With given = c + b n and taken = c' + b' n it strays from i b'/b by at most c' - less - (c - less) b'/b, at the end.
    """
    of, to = call.sizes.growth(given), call.sizes.growth(taken)
    if of is None or to is None:
        return Fraction(0), (Fraction(0), Fraction(0))
    ratio = Fraction(to.step, of.step)
    stray = (to.rest - less) - ratio * (of.rest - less)
    return ratio, (min(stray, Fraction(0)), max(stray, Fraction(0)))


def _unfolded(call: Call) -> list[Reading]:
    """Read step i ... step i + size - 1 at position i of the dimension; they are the last dimension."""
    x = call.tensor("self")
    rank = len(call.extents(x))
    dim = call.dim(call.get("dimension", 0), rank)
    kernel = Kernel(call.constant(call.get("size")), call.constant(call.get("step")), 0, 1)
    links: list[Link] = [Along(d) for d in range(rank)]
    links[dim] = Window(dim, kernel.reads)
    return [ByDimension(x, tuple(links))]


def _unpool(call: Call) -> list[Reading]:
    """Each maximum goes to a place inside the window that it is of, if its index is of a pool."""
    x, indices, pool = call.tensor("self"), call.tensor("indices"), _pool_of(call.tensor("indices"))
    count = _rank_of(call.name)
    if pool is None:
        return []
    origin = Call(indices, pool, call.name, 1, _arguments(pool), call.sizes)
    extents = origin.numbers("kernel_size", count)
    strides = origin.numbers("stride", count) if origin.get("stride") else extents
    padding, dilation = origin.numbers("padding", count, 0), origin.numbers("dilation", count, 1)
    axes = [Kernel(*of) for of in zip(extents, strides, padding, dilation, strict=True)]
    reads = [axis.moves(axis.spreads) for axis in axes]
    return [_over_space(call, operand, reads, (Along(0), Along(1))) for operand in (x, indices)]


def _pool_of(indices: Node) -> Node | None:
    """Return the pool that gave indices as its second result."""
    parent = indices.args[0] if len(indices.args) > 1 and indices.args[1] == 1 else None
    return parent if isinstance(parent, Node) and "max_pool" in str(parent.target) else None


def _arguments(pool: Node) -> dict[str, object]:
    names = [argument.name for argument in pool.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, pool.args, strict=False)), **pool.kwargs}


WINDOWS: dict[str, Rule] = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d", "conv_transpose2d")
        + ("conv_transpose3d",),
        _convolution,
    ),
    **dict.fromkeys(
        ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
        + ("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
        _pool,
    ),
    **dict.fromkeys(
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d")
        + ("_adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        _adaptive_pool,
    ),
    "unfold": _unfolded,
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), _unpool),
}
