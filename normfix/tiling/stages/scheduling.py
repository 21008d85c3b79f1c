"""From a program to a schedule that was proved: cut, measure each stage's reach, compare blocks with the whole.

The proof runs the schedule in float64 on small images that are long along one axis each, in blocks that touch the
border and blocks that do not, and compares every value that any stage computes with the program's own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from normfix.images.sources import Image, TensorImage
from normfix.networks.calling import refusals
from normfix.networks.devices import CPU
from normfix.networks.numerics import EXACT, exact_arithmetic
from normfix.records.spans import round_up
from normfix.tiling.lengths import LARGEST, strips_along
from normfix.tiling.material import NOISES, strip
from normfix.tiling.stages.cutting import Stage, cut
from normfix.tiling.stages.execution import execute
from normfix.tiling.stages.maps import ProgramMaps, find_maps
from normfix.tiling.stages.overviews import Overview, with_ragged
from normfix.tiling.stages.plans import Plan
from normfix.tiling.stages.program import Program, Shapes, Unguarded
from normfix.tiling.stages.reach import (
    Reach,
    fingerprint,
    in_dtype,
    is_bounded,
    is_derived,
    knows_places,
    measure_reach,
    values_of,
)
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.schedule import Schedule
from normfix.tiling.stages.store import Kept, Store
from normfix.tiling.stages.tokens import attend_to_stored_biased

__all__ = ["largest_difference", "plans_of", "recall_", "require_images", "schedule", "told"]


def schedule(
    program: Program,
    *,
    stride: Sequence[int],
    rests: Collection[tuple[int, ...]] = (),
    measured: Sequence[str] = (),
    outputs: bool = True,
) -> Schedule:
    """Cut a program into stages and prove that blocks of them are the whole.

    Args:
        program: of the network.
        stride: of the network per axis, or a multiple of it.
        rests: pixels per axis that images have beyond multiples of it; the proof covers them.
        measured: sites whose operands are measured.
        outputs: whether what the network returns is computed.

    Raises:
        NormfixError: NF323, NF324 with the value or stage that cannot be streamed, NF325 if the proof fails.
    """
    known = _KNOWN.setdefault(program.body, _Known())
    size = _example_size(program, stride)
    maps = find_maps(program, size, [round_up(64, m) for m in stride])
    resized = with_ragged(
        program, maps, [(*size[:2], *map(sum, zip(size[2:], r, strict=True))) for r in rests]
    )
    if resized is not program:
        program, maps = resized, find_maps(resized, size, [round_up(64, m) for m in stride])
    shapes = program.shapes(size)
    stages = cut(program, maps, shapes, cuts=program.cuts, measured=measured, outputs=outputs)
    with exact_arithmetic():
        names = [
            fingerprint(stage, maps, shapes, bounded=known.bounds(stage, program.image)) for stage in stages
        ]
        for name, stage in zip(names, stages, strict=True):
            if name not in known.reaches:
                reach = known.stated.get(name)
                if reach is None or not is_derived(reach, stage, maps, program.image):
                    reach = known.measured(name, partial(_reach_of, stage, maps, shapes, program))
                known.reaches[name] = reach
        reaches = tuple(known.reaches[name] for name in names)
        planned = Schedule(program, maps, tuple(stages), reaches, program.device)
        plan = Plan(_name(planned, stride, rests), tuple(zip(names, reaches, strict=True)))
        if known.plans.get(plan.cut) != plan:
            _prove(planned, stride, rests)
            known.plans[plan.cut] = plan
    return planned


def require_images(planned: Schedule, stride: Sequence[int], images: Sequence[Image]) -> None:
    """Prove a schedule at images' sizes and values, where a stage has values of places, or no bound of what it reads.

    What such values are far from the image's corner no short strip shows: a mask that begins at the thousandth row, or
    a count of rows that is compared with a thousand. And what a gate hides on every image that was tried may be open on
    this one. Images of more than LARGEST pixels are proved on strips that are as long along one axis each: of noise,
    and of their own middle.

    Args:
        planned: as `schedule` returned it.
        stride: as `schedule` was given it.
        images: that it will run over, (N, C, *space).

    Raises:
        NotInStages: NF325.
    """
    known = _KNOWN.setdefault(planned.program.body, _Known())
    if not any(stage.is_laid or not known.bounds(stage, planned.program.image) for stage in planned.stages):
        return
    gives = (*(node.name for stage in planned.stages for node in stage.gives), told(planned))
    thin = _example_size(planned.program, stride)
    for image in images:
        whole = image.shape[2:]
        for space in [whole] if math.prod(whole) <= LARGEST else strips_along(whole, thin[2:]):
            size = (*thin[:2], *space)
            if (gives, size) not in known.sizes:
                _require_same(planned, size, torch.clone)
                known.sizes.add((gives, size))
            part = _middle(image, space)
            for number in range(len(part)):
                _require_same(planned, size, strip(part[number : number + 1], space).to)


def _middle(image: Image, extents: Sequence[int]) -> Tensor:
    """Return the middle of an image, of these extents or as many pixels as there are."""
    spans = []
    for n, extent in zip(image.shape[2:], extents, strict=True):
        start = max(0, n - extent) // 2
        spans.append((start, min(n, start + extent)))
    return image.read(spans)


def _require_same(planned: Schedule, size: Sequence[int], made: Callable[[Tensor], Tensor]) -> None:
    """Compare blocks with the whole on an image of this size.

    Raises:
        NotInStages: NF325.
    """
    try:
        with exact_arithmetic():
            difference = _difference(planned, size, made)
    except refusals() as error:
        raise NotInStages("NF325", f"it does not run: {error}", where=f"size {size[2:]}") from error
    _require_exact(difference, f"size {size[2:]}")


def told(planned: Schedule) -> str:
    """Return what differs if values change that count for what was measured and proved of a schedule.

    They are those that stand beside the places of pixels, or that may say by number which pixels are read.
    """
    known = _KNOWN.setdefault(planned.program.body, _Known())
    image = planned.program.image
    return "".join(
        values_of(stage) for stage in planned.stages if stage.is_laid or not known.bounds(stage, image)
    )


def plans_of(program: Program) -> tuple[Plan, ...]:
    """Return what was proved of a program, in this process or as `recall_` was told."""
    return tuple(_KNOWN[program.body].plans.values()) if program.body in _KNOWN else ()


def recall_(program: Program, plans: Sequence[Plan]) -> None:
    """Take plans for proved whose stages and cuts a program turns out to have.

    Of what they state of a stage counts what its graph gives too; the rest is measured, and proved if it differs.
    """
    known = _KNOWN.setdefault(program.body, _Known())
    for plan in plans:
        known.plans[plan.cut] = plan
        known.stated.update(plan.stages)


@dataclass(slots=True)
class _Known:
    """What was measured of the stages of a program, by what they compute, what a file states, and proved of its cuts.

    `sizes` were proved of what stages give besides, `refused` says of stages why they have no reach. Most stages are
    the same whether statistics or outputs are wanted. `bounded` tells of stages, by their graphs, whether these bound
    what is read.
    """

    reaches: dict[str, Reach] = field(default_factory=dict)
    refused: dict[str, NotInStages] = field(default_factory=dict)
    stated: dict[str, Reach] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    sizes: set[tuple[tuple[str, ...], tuple[int, ...]]] = field(default_factory=set)
    bounded: WeakKeyDictionary[Any, bool] = field(default_factory=WeakKeyDictionary)

    def measured(self, name: str, measure: Callable[[], Reach]) -> Reach:
        """Return a stage's reach, or refuse it as the last time.

        Raises:
            NotInStages: as `measure_reach`.
        """
        if name not in self.refused:
            try:
                return measure()
            except NotInStages as error:
                self.refused[name] = error
        raise self.refused[name].with_traceback(None)

    def bounds(self, stage: Stage, image: Node) -> bool:
        """Tell whether a stage's graph bounds what it reads."""
        if stage.run not in self.bounded:
            self.bounded[stage.run] = is_bounded(stage, image)
        return self.bounded[stage.run]


_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def _name(planned: Schedule, stride: Sequence[int], rests: Collection[tuple[int, ...]]) -> str:
    """Return what differs if another program is cut, or this one elsewhere."""
    cuts = [
        (
            [
                [n.name for n in nodes]
                for nodes in (s.reads, s.whole, s.overviews, s.sizes, s.gives, s.stores, s.returns)
            ],
            [(site, node.name) for site, node in s.measures],
            s.run.code,
            reach,
            [node.name for node in s.pools],
            [bias.run.code for bias in s.biases],
            [] if s.before is None else [s.before.run.code],
            [(seen.run.code, [(site, node.name) for site, node in seen.measures]) for seen in s.after],
        )
        for s, reach in zip(planned.stages, planned.reaches, strict=True)
    ]
    resized = [(node.name, one.resizing) for node, one in planned.program.stretches.items()]
    parts = (planned.program.body.code, resized, str(planned.device.type), tuple(stride), sorted(rests), cuts)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _prove(planned: Schedule, stride: Sequence[int], rests: Collection[tuple[int, ...]]) -> None:
    """Compare blocks with the whole along each axis, on several images where the graph leaves a stage to be measured.

    It does where the stage knows a place or the size, and where the graph does not bound what it reads.

    Raises:
        NotInStages: NF325.
    """
    known, image = _KNOWN.setdefault(planned.program.body, _Known()), planned.program.image
    left = any(knows_places(stage, image) or not known.bounds(stage, image) for stage in planned.stages)
    for axis in range(len(stride)):
        for size in _probe_sizes(planned, stride, axis, rests):
            for made in NOISES if left else NOISES[:1]:
                _require_exact(_difference(planned, size, made), f"axis {axis}")


def _require_exact(difference: float, where: str) -> None:
    if not difference <= EXACT:
        raise NotInStages(
            "NF325",
            f"blocks differ from the whole by {difference:.1g} of the largest value (float64).",
            where=where,
        )


def _reach_of(stage: Stage, maps: ProgramMaps, shapes: Shapes, program: Program) -> Reach:
    """Measure a stage's reach on the program's device; what that refuses, or has no room for, the CPU decides."""
    if program.device.type == "cuda":
        with suppress(NotInStages, torch.OutOfMemoryError):
            return measure_reach(stage, maps, shapes, program.image, program.device)
    return measure_reach(stage, maps, shapes, program.image)


def _difference(
    planned: Schedule, size: Sequence[int], made: Callable[[Tensor], Tensor] = torch.clone
) -> float:
    """Return the largest difference on the program's device, which the CPU confirms if it is one."""
    if planned.device.type == "cuda":
        with suppress(NotInStages, torch.OutOfMemoryError):
            difference = largest_difference(planned, size, planned.device, made)
            if difference <= EXACT:
                return difference
    return largest_difference(planned, size, CPU, made)


def largest_difference(
    planned: Schedule,
    size: Sequence[int],
    device: torch.device = CPU,
    made: Callable[[Tensor], Tensor] = torch.clone,
) -> float:
    """Run blocks and the whole program in float64 on an image of this size (N, C, *space) that is made of noise.

    Returns:
        The largest difference of any value that a stage computes, relative to that value's largest entry.
    """
    image = torch.randn(tuple(size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = made(image.to(device))
    wide = replace(
        planned,
        device=device,
        stages=tuple(
            replace(
                stage,
                run=_without_floors(in_dtype(stage.run, torch.float64, device)),
                biases=tuple(_in_double(bias, device) for bias in stage.biases),
                before=None if stage.before is None else _in_double(stage.before, device),
                after=tuple(_in_double(overview, device) for overview in stage.after),
            )
            for stage in planned.stages
        ),
    )
    found: dict[Node, _Whole] = {}

    def sink(
        number: int, node: Node, shape: tuple[int, ...], dtype: torch.dtype, blocks: tuple[int, ...]
    ) -> Kept:
        found[node] = _Whole(shape, torch.float64 if dtype.is_floating_point else dtype, device)
        return found[node]

    tile = [-(-n // 3) for n in size[2:]]
    execute(wide, [TensorImage(image)], tile=tile, store=_WideStore(device=device), sink=sink)
    body = in_dtype(planned.program.body, torch.float64, device)
    expected = _Values(body, {n.name for n in found}).values(image)
    worst = 0.0
    for node, kept in found.items():
        a, b = kept.array.double(), expected[node.name].double()
        difference = float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def _without_floors(run: GraphModule) -> GraphModule:
    """Return a graph, changed in place, that takes images at which keys count that a mask sets to its floor.

    They do in no block and not in the whole, which are compared; images that are predicted are refused there.
    """
    for node in run.graph.nodes:
        if node.target is attend_to_stored_biased:
            node.update_arg(len(node.args) - 1, -math.inf)
    run.recompile()
    return run


def _in_double(overview: Overview, device: torch.device) -> Overview:
    return replace(overview, run=in_dtype(overview.run, torch.float64, device))


def _example_size(program: Program, stride: Sequence[int]) -> tuple[int, ...]:
    """Return a size (1, C, *space) that the program takes: the smallest power of two times the stride."""
    channels = int(program.image.meta["val"].shape[1])
    for factor in (1, 2, 4, 8, 16, 32):
        size = (1, channels, *(round_up(factor * 16, m) for m in stride))
        try:
            program.shapes(size)
        except refusals():
            continue
        return size
    raise NotInStages(
        "NF321", "the captured program takes none of the sizes tried.", where=program.image.name
    )


def _probe_sizes(
    planned: Schedule, stride: Sequence[int], axis: int, rests: Collection[tuple[int, ...]]
) -> Iterator[tuple[int, ...]]:
    """Yield sizes of images with inner blocks along one axis in every stage; those after the first are ragged."""
    size = list(_example_size(planned.program, stride))
    needed = max(3 * r.grid[axis] + sum(r.halo[axis]) for r in planned.reaches)
    size[axis + 2] = round_up(max(2 * needed, size[axis + 2]), stride[axis])
    yield tuple(size)
    for rest in sorted({rest[axis] for rest in rests} - {0}):
        yield (*size[: axis + 2], size[axis + 2] + rest, *size[axis + 3 :])


class _Whole:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        fill = torch.nan if dtype.is_floating_point else 0
        self.array = torch.full(shape, fill, dtype=dtype, device=device)

    def read(self, index: tuple[slice, ...]) -> Tensor:
        return self.array[index]

    def write(self, index: tuple[slice, ...], value: Tensor) -> None:
        self.array[index] = value


class _WideStore(Store):
    """Keeps in float64 what the schedule would keep in the network's dtype."""

    def create(self, name: str, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[int]) -> Kept:
        return super().create(name, shape, torch.float64 if dtype.is_floating_point else dtype, chunks)


class _Values(Unguarded):
    """Runs a graph and keeps the values of chosen nodes."""

    def __init__(self, body: GraphModule, names: set[str]) -> None:
        super().__init__(body)
        self._names = names
        self._kept: dict[str, Tensor] = {}

    def values(self, image: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.run(image)
        return self._kept

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self._names:
            self._kept[n.name] = result
        return result
