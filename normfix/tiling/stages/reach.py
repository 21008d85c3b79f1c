"""How far a stage reads beyond a block: bounded by its graph, else measured on it in cells; proved by interference.

The rules that bound a whole network bound a stage: its values are maps over the image, whose pixels are counted from
the same lattice. Where a rule has no bound the stage is measured.

A stage has several inputs and outputs at several scales. Packed into cells (one cell is the stage's grid, its
pixels of every value become channels) it is one function of one image at stride 1, and what measures the halo
and the stride of a whole network measures those of the stage: dye for the halo, shift equivariance in float64 for
the grid, amplified interference in float64 as the proof that the halo is enough.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from normfix.errors import NormfixError
from normfix.layers.affine import normalise, normalise_rectified
from normfix.networks.calling import refusals
from normfix.networks.devices import CPU, bytes_of
from normfix.networks.numerics import EXACT, as_numbers
from normfix.records.derivations import Obstacle
from normfix.records.spans import Spans, round_up
from normfix.tiling.dependence import followed, keeps_borders_apart
from normfix.tiling.halo import DyeLost, DyeRefused, halo, interference
from normfix.tiling.material import strip
from normfix.tiling.reach.bounds import Bound, bound_between
from normfix.tiling.reach.extents import Unsized
from normfix.tiling.stages.cutting import Stage
from normfix.tiling.stages.maps import Map, ProgramMaps
from normfix.tiling.stages.program import Shapes
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stride import common_unit, cutting_grid, smallest_stride

__all__ = [
    "Reach",
    "fingerprint",
    "in_dtype",
    "is_bounded",
    "is_derived",
    "knows_places",
    "measure_reach",
    "values_of",
]

Function = Callable[[Tensor], Tensor]

_NEAR, _AFAR = 32, 128
"""Cells that are amplified on each side of a block's window, where its graph bounds what it reads, and where not."""

_DOUBTFUL = 1024
"""Cells of shore at which a stage is given up that its graph has no bound for: attention takes their square."""

_CELLS = {1: 32, 2: 32, 3: 8}
"""Cells per axis of the noise that strips are made of, per number of axes: a cell has as many pixels as its grid."""

_MOST = 1 << 30
"""Values of the noise that strips are made of, at most: 8 GiB of float64."""

_MULTIPLES = (1, 2, 4, 8, 16)
"""Numbers of cells that a stage is tried to be cut at, until it runs on strips of such lengths."""


@dataclass(frozen=True, slots=True)
class Reach:
    """A stage's grid and what a block reads beyond itself, per axis, in pixels of the image."""

    grid: tuple[int, ...]
    halo: tuple[tuple[int, int], ...]


def measure_reach(
    stage: Stage, maps: ProgramMaps, shapes: Shapes, image: Node, device: torch.device = CPU
) -> Reach:
    """Measure one stage.

    Args:
        stage: of a program.
        maps: of the program.
        shapes: of its values at one image size.
        image: of the program.
        device: computes in float64; what shows a reach by dye does so on the CPU, whose operators keep NaN apart.

    Raises:
        NormfixError: NF324 if no halo is enough, or the stage depends on size or position.
    """
    double = _Cells(stage, maps, shapes, image, torch.float64, device)
    known = _bound_of(stage, image)
    bound = _bounds(known, stage, maps)
    single = _Cells(stage, maps, shapes, image, torch.float32) if bound is None else None
    # a mask that hides the opposite border is left to the proof
    wrapped = known is None or bool(known.wraps)
    cross = _cross_section(double, len(stage.grid))
    grids, halos = [], []
    for axis, pixels in enumerate(stage.grid):
        if bound is None:
            assert single is not None
            before, after = _shown(single, stage, axis, cross, () if known is None else known.obstacles())
            reach = before, after - (-_lacking(stage, maps)[axis] // pixels)
        else:
            reach = -(-bound[axis][0] // pixels), -(-bound[axis][1] // pixels)
        settled = bound is not None and known is not None and pixels % known.lattice[axis] == 0
        if settled and _cuts_anywhere(double, axis, reach, cross):
            cells: int | None = 1
        else:
            cells = _cells_per_block(double, axis, reach, cross)
        if cells is None:
            raise _refused(stage, axis, "blocks of it differ from the whole: it depends on size or position")
        rounded = tuple(-(-r // cells) * cells for r in reach)
        before, after = rounded[0], rounded[1]
        least = _AFAR if bound is None else _NEAR
        change = interference(double, double.example, axis, cells, Fraction(1), (before, after), cross, least)
        if change > EXACT:
            raise _refused(stage, axis, f"a block changes by {change:.1g} with what lies beyond its halo")
        if single is not None and wrapped:
            apart = keeps_borders_apart(single, single.example, axis, (before, after), cells, cross)
            if not apart:
                raise _refused(stage, axis, "a block at a border depends on the opposite one")
        grids.append(cells * pixels)
        halos.append((before * pixels, after * pixels))
    return Reach(tuple(grids), tuple(halos))


def is_derived(reach: Reach, stage: Stage, maps: ProgramMaps, image: Node) -> bool:
    """Tell whether a reach that a file states is what the stage's graph gives, so that nothing need be measured."""
    known, axes = _bound_of(stage, image), len(stage.grid)
    bound = _bounds(known, stage, maps)
    if known is None or bound is None or (len(reach.grid), len(reach.halo)) != (axes, axes):
        return False
    return all(
        pixels % known.lattice[axis] == 0
        and reach.grid[axis] == pixels
        and reach.halo[axis] == tuple(round_up(side, pixels) for side in bound[axis])
        for axis, pixels in enumerate(stage.grid)
    )


def is_bounded(stage: Stage, image: Node) -> bool:
    """Tell whether a stage's graph bounds what it reads, so that nothing of it need be measured."""
    known = _bound_of(stage, image)
    return known is not None and known.is_whole


def knows_places(stage: Stage, image: Node) -> bool:
    """Tell whether a stage may be computed with the place of a pixel or the image's size."""
    known = _bound_of(stage, image)
    return known is None or known.knows_places


def fingerprint(stage: Stage, maps: ProgramMaps, shapes: Shapes, *, bounded: bool = True) -> str:
    """Return what differs if a stage computes something else, or the same with other weights.

    Statistics are no part of it: a norm by constants reads one position, whatever they are. Other values are where the
    graph does not bound what is read, as `is_bounded` says: rows that are read by number may be held.
    """
    ends = [(maps.maps[node], tuple(shapes[node])) for node in (*stage.reads, *stage.whole, *stage.gives)]
    seen = [tuple(shapes[node]) for node in stage.overviews]
    found = hashlib.sha256(repr((stage.run.code, stage.grid, ends, seen)).encode())
    weights = dict(stage.run.named_parameters(remove_duplicate=False))
    for name in sorted({str(node.target) for node in stage.run.graph.nodes if node.op == "get_attr"}):
        if name in weights:
            found.update(bytes_of(weights[name]))
    if not bounded:
        found.update(values_of(stage).encode())
    return found.hexdigest()


def values_of(stage: Stage) -> str:
    """Return what differs if a stage holds other values, but for statistics of its norms."""
    found = hashlib.sha256()
    for node in stage.run.graph.nodes:
        if node.op == "get_attr" and not all(_is_statistic(node, user) for user in node.users):
            value = attrgetter(str(node.target))(stage.run)
            if isinstance(value, Tensor):
                found.update(bytes_of(value))
    return found.hexdigest()


def _is_statistic(node: Node, user: Node) -> bool:
    """Tell whether a norm takes a value for a statistic alone."""
    places = [place for place, given in enumerate(user.args) if given is node]
    normalises = user.target in (torch.ops.aten.batch_norm.default, normalise, normalise_rectified)
    return normalises and set(places) <= {3, 4}


def _bound_of(stage: Stage, image: Node) -> Bound | None:
    """Return what the stage's graph gives of its reach, None where it gives nothing."""
    try:
        return bound_between(
            image,
            (*stage.reads, *stage.whole, *(n for bias in stage.biases for n in bias.gives), *stage.overviews),
            stage.gives,
        )
    except Unsized:
        return None


def _bounds(known: Bound | None, stage: Stage, maps: ProgramMaps) -> Spans | None:
    """Return what a block reads beyond itself at most, per axis in pixels; None where its graph does not bound it."""
    if known is None or not known.is_whole:
        return None
    lacking = _lacking(stage, maps)
    return tuple((b, a + n) for (b, a), n in zip(known.halo(stage.grid), lacking, strict=True))


def _lacking(stage: Stage, maps: ProgramMaps) -> tuple[int, ...]:
    """Return per axis the pixels by which results end before the block where what it reads does, at most."""
    if not any(any(maps.maps[node].lost) for node in stage.reads):
        return (0,) * len(stage.grid)
    results = [maps.maps[node] for node in stage.gives]
    return tuple(
        max((math.ceil(found.lost[axis] / found.scale[axis]) for found in results), default=0)
        for axis in range(len(stage.grid))
    )


def _shown(
    f: _Cells, stage: Stage, axis: int, cross: Sequence[int], obstacles: Sequence[Obstacle]
) -> tuple[int, int]:
    """Return the halo in cells as the dye shows it; obstacles are what the graph has against a bound."""
    farthest = _DOUBTFUL if obstacles else None
    shown = partial(halo, f, f.example, axis, 1, Fraction(1), cross, farthest=farthest)
    try:
        found = shown()
        if found is not None:
            # what a comparison, a selection or a sort swallows counts, whatever its values
            found = shown(felt=followed)
    except DyeLost:
        raise _refused(stage, axis, "no dye arrives at its output, so its halo cannot be read") from None
    except DyeRefused as error:
        raise _refused(stage, axis, f"no dye goes through {error}, so its halo cannot be read") from None
    except refusals() as error:
        raise _refused(stage, axis, f"it does not run on strips: {error}") from error
    if found is None:
        causes = "".join(f" ({o.operator} in {o.where}: {o.why})" for o in obstacles[:1])
        raise _refused(stage, axis, f"its output depends on the whole extent, so no halo is enough{causes}")
    return max(0, found[0]), max(0, found[1])


def _cuts_anywhere(f: Function, axis: int, reach: tuple[int, int], cross: Sequence[int]) -> bool:
    """Tell whether blocks may be cut at each cell, which the stage's graph says."""
    example = f.example  # type: ignore[attr-defined]
    try:
        return common_unit(f, example, axis, 1, Fraction(1), reach, cross, settled=True, short=True) == 1
    except refusals():
        return False


def _cells_per_block(f: Function, axis: int, reach: tuple[int, int], cross: Sequence[int]) -> int | None:
    """Return the smallest number of cells at which blocks may be cut."""
    example = f.example  # type: ignore[attr-defined]
    one = Fraction(1)
    for known in _MULTIPLES:
        try:
            stride = smallest_stride(f, example, axis, known, one, reach, cross)
            return None if stride is None else cutting_grid(f, example, axis, stride, one, reach, cross)
        except refusals():  # it takes multiples alone, as what shrinks a map and grows it again does
            continue
    return None


def _cross_section(f: Function, ndim: int) -> tuple[int, ...]:
    """Return the thinnest strip, in cells, that the stage runs on and gives anything for."""
    example = f.example  # type: ignore[attr-defined]
    for cells in (2, 4, 8, 16, 32):
        try:
            given = f(strip(example, (cells,) * ndim))
        except refusals():
            continue
        if given.numel():
            return (cells,) * ndim
    raise NotInStages("NF324", "it runs on no small block.", where=f"stage {f.stage.number}")  # type: ignore[attr-defined]


def _refused(stage: Stage, axis: int, reason: str) -> NormfixError:
    sites = ", ".join(site for site, _ in stage.measures[:2]) or "output"
    return NotInStages("NF324", f"{reason}.", where=f"stage {stage.number} ({sites}), axis {axis}")


class _Cells:
    """A stage as a function (1, channels, *cells) -> (1, channels', *cells)."""

    def __init__(
        self,
        stage: Stage,
        maps: ProgramMaps,
        shapes: Shapes,
        image: Node,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        self.stage = stage
        self._ndim = len(stage.grid)
        self._reads = [_Packing(maps.maps[n], shapes[n], stage.grid) for n in stage.reads]
        self._gives = [_Packing(maps.maps[n], shapes[n], stage.grid) for n in stage.gives]
        self._sizes = [(n, maps.maps[n.args[0]], shapes[n.args[0]]) for n in stage.sizes]  # type: ignore[index]
        self._run = in_dtype(stage.run, dtype, device)
        channels = sum(p.channels for p in self._reads)
        generator = torch.Generator().manual_seed(0)
        whole, seen = (
            [torch.randn(shapes[n], generator=generator).to(device, dtype) for n in nodes]
            for nodes in (stage.whole, stage.overviews)
        )
        # biases move no reach
        self._whole = [*whole, *(None for _ in stage.biases), *seen]
        space = (_CELLS[self._ndim],) * self._ndim
        if channels * math.prod(space) > _MOST:
            side = "x".join(map(str, stage.grid))
            raise NotInStages(
                "NF324",
                f"its maps start at whole positions every {side} pixels only, and blocks of so many are too large to "
                "be compared.",
                where=f"stage {stage.number}",
            )
        self.example = torch.randn(1, channels, *space, generator=generator, dtype=torch.float64)
        self.example = self.example.to(device, dtype)

    def __call__(self, cells: Tensor) -> Tensor:
        extents = tuple(cells.shape[2:])
        parts = torch.split(cells, [p.channels for p in self._reads], dim=1)
        values = [p.unpack(part) for p, part in zip(self._reads, parts, strict=True)]
        with torch.no_grad():
            results = self._run(*values, *self._whole, *(self._extent(n, extents) for n, _, _ in self._sizes))
        packed = [p.pack(as_numbers(r), extents) for p, r in zip(self._gives, results, strict=True)]
        # where one of them ends before the others, cells that all of them have
        whole = map(min, zip(*(p.shape[2:] for p in packed), strict=True))
        kept = (slice(None), slice(None), *map(slice, whole))
        return torch.cat([p[kept] for p in packed], 1)

    def _extent(self, node: Node, cells: Sequence[int]) -> int:
        _, found, shape = next(entry for entry in self._sizes if entry[0] is node)
        dim = node.args[1]
        assert isinstance(dim, int)
        if dim in found.dims:
            axis = found.dims.index(dim)
            return int(cells[axis] * self.stage.grid[axis] * found.scale[axis]) - found.lost[axis]
        return shape[dim]


class _Packing:
    """Moves the pixels of a cell into channels and back."""

    def __init__(self, found: Map, shape: Sequence[int], grid: Sequence[int]) -> None:
        self._pixels = tuple(int(g * s) for g, s in zip(grid, found.scale, strict=True))
        others = [d for d in range(len(shape)) if d not in found.dims]
        self._rest = tuple(shape[d] for d in others)
        self._lost = found.lost
        self._order = (*others, *found.dims)
        self.channels = math.prod(self._rest) * math.prod(self._pixels)

    def unpack(self, cells: Tensor) -> Tensor:
        """(1, channels, *cells) -> the value on these cells, without what the map loses at its end."""
        ndim, extents = len(self._pixels), cells.shape[2:]
        x = cells.reshape(*self._rest, *self._pixels, *extents)
        lead = len(self._rest)
        pairs = [d for axis in range(ndim) for d in (lead + ndim + axis, lead + axis)]
        x = x.permute(*range(lead), *pairs)  # (*rest, c0, k0, c1, k1, ...)
        x = x.reshape(*self._rest, *(c * k for c, k in zip(extents, self._pixels, strict=True)))
        for axis, less in enumerate(self._lost, start=lead):
            x = x.narrow(axis, 0, x.shape[axis] - less)
        inverse = [self._order.index(d) for d in range(len(self._order))]
        return x.permute(*inverse).contiguous()

    def pack(self, value: Tensor, cells: Sequence[int]) -> Tensor:
        """Return a value as (1, channels, *cells); a cell that is not whole at the end is left out."""
        x = value.permute(*self._order)
        lead, ndim = len(self._rest), len(self._pixels)
        whole = [min(c, x.shape[lead + a] // self._pixels[a]) for a, c in enumerate(cells)]
        for axis, (n, k) in enumerate(zip(whole, self._pixels, strict=True)):
            x = x.narrow(lead + axis, 0, n * k)
        split = [n for pair in zip(whole, self._pixels, strict=True) for n in pair]
        x = x.reshape(*x.shape[:lead], *split)  # (*rest, c0, k0, c1, k1, ...)
        x = x.permute(
            *range(lead), *(lead + 2 * a + 1 for a in range(ndim)), *(lead + 2 * a for a in range(ndim))
        )
        return x.reshape(1, self.channels, *whole)


def in_dtype(run: GraphModule, dtype: torch.dtype, device: torch.device = CPU) -> GraphModule:
    """Return a graph that computes on a device in this dtype throughout, whatever it casts to on the way.

    Asserts are left out. Built anew rather than copied: a copy takes the inputs' tree along, and what else it owns.
    """
    graph, copies = Graph(), dict[Node, Node]()
    for node in run.graph.nodes:
        if node.op == "output":
            graph.output(map_arg(node.args[0], copies.__getitem__))
        elif node.op != "call_module":
            copies[node] = graph.node_copy(node, copies.__getitem__)

    def changed(argument: Any) -> Any:
        if isinstance(argument, torch.dtype) and argument in _FLOATING:
            return dtype
        return device if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        node.args = map_aggregate(node.args, changed)
        node.kwargs = map_aggregate(node.kwargs, changed)
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return GraphModule({name: _held(attrgetter(name)(run), dtype, device) for name in names}, graph)


def _held(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return what a graph holds, on a device and in a dtype."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype if value.is_floating_point() else None)
    return copy.deepcopy(value).to(device, dtype) if isinstance(value, nn.Module) else value


_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
