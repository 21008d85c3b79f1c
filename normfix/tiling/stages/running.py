"""A schedule on its way over images: one stage after the other, of each what its journal does not have yet."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfix.errors import NormfixError
from normfix.images.sources import Image
from normfix.networks.devices import bytes_of
from normfix.tiling.grid import Geometry, grid
from normfix.tiling.stages.biases import Bias, Numbers
from normfix.tiling.stages.bins import Merging, Partial
from normfix.tiling.stages.blocks import Block, Given, ImageWork, Read, Told, Work
from normfix.tiling.stages.cutting import Stage, windowed
from normfix.tiling.stages.engines import Crew
from normfix.tiling.stages.journal import SEALS, Journal, Measured
from normfix.tiling.stages.masks import mask_of
from normfix.tiling.stages.overviews import Overview
from normfix.tiling.stages.program import Program, Shapes, extent_of
from normfix.tiling.stages.schedule import Schedule, block_extents
from normfix.tiling.stages.store import Kept, Store
from normfix.tiling.stages.stretches import Stretched
from normfix.tiling.stages.tokens import Tokens

__all__ = ["Run", "Sink", "Statistic", "kept_name"]

Sink = Callable[[int, Node, tuple[int, ...], torch.dtype, tuple[int, ...]], Kept | None]
"""Called with (image, value, its shape, its dtype, the blocks it comes in); gives the place it goes to, or None."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """What becomes of a site's operand.

    `dims` are the operand's dimensions it runs over, None if blocks of it cannot be put together. `measure`
    reduces the operand of one block; `settle` receives what was measured, per image in the order of the blocks,
    and sets the statistic.
    """

    site: str
    dims: tuple[int, ...] | None
    measure: Callable[[Tensor], Any]
    settle: Callable[[list[list[Any]]], None]


def kept_name(image: int, node: Node) -> str:
    """Return the name under which the store holds a value that was to be kept."""
    return f"{image}-{node.name}-whole"


@dataclass(slots=True)
class Run:
    """A schedule on its way over images."""

    schedule: Schedule
    images: Sequence[Image]
    tile: tuple[int, ...]
    store: Store
    statistics: dict[str, Statistic]
    settled: Callable[[], None]
    sink: Sink
    keep: frozenset[Node]
    journal: Journal
    shapes: list[Shapes] = field(init=False)
    extents: list[tuple[int, ...]] = field(init=False)
    earlier: dict[str, list[tuple[Given, ImageWork, Block]]] = field(init=False)
    pools: dict[tuple[int, Node], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        known: dict[tuple[int, ...], Shapes] = {}
        for image in self.images:
            if image.shape not in known:
                known[image.shape] = self.schedule.program.shapes(image.shape)
        self.shapes = [known[image.shape] for image in self.images]
        self.extents = block_extents(self.schedule, self.tile)
        self.earlier, self.pools = {}, {}

    def stage(self, stage: Stage, crew: Crew, tick: Callable[[int, int, int], None]) -> None:
        """Run what is left of a stage, settle its statistics and free what no later stage reads.

        After each block `tick` is called with (stage, blocks done, blocks).
        """
        work = self._work(stage)
        pools = self.schedule.program.pools
        shares = _Shares(work, {_pool(node): pools[node].bins for node in stage.pools})
        noted = self.journal.blocks(stage.number)
        measured = {number: shares.add(number, found) for number, found in noted.items()}
        self._remember(work, stage, measured)
        digest = self.journal.settled(stage.number)
        if digest is None:
            self._require_earlier()
            waiting = [number for number in range(len(work.blocks)) if number not in measured]
            for number, found in crew.run(work, waiting):
                self.journal.note(stage.number, number, found)
                self.store.seal(found.get(SEALS, {}))
                measured[number] = shares.add(number, found)
                tick(stage.number, len(measured), len(work.blocks))
        self._settle(stage, work, measured, shares)
        if self.journal.lasts:
            self._compare(stage, digest)
        for node in self.schedule.done_after(stage):
            for image in range(len(self.images)):
                self.earlier.pop(_name(image, node), None)
                self.store.free(_name(image, node))

    def _compare(self, stage: Stage, digest: str | None) -> None:
        """Write the statistics' digest down, or compare it with what an earlier process wrote."""
        now = _digest(self.schedule.program)
        if digest is None:
            self.journal.settle(stage.number, now)
        elif digest != now:
            raise NormfixError(
                "NF329",
                "its statistics are not those that were measured before. Delete the unfinished run to start anew.",
                where=f"stage {stage.number}",
            )

    def count(self, stage: Stage) -> int:
        """Return how many blocks a stage has at most, without making them."""
        extents = self.extents[stage.number]
        return sum(
            math.prod(math.ceil(n / extent) for n, extent in zip(image.shape[2:], extents, strict=True))
            for image in self.images
        )

    def blocks(self, stage: Stage) -> list[Block]:
        """Return the blocks of a stage, image by image."""
        reach = self.schedule.reaches[stage.number]
        ones = (1,) * len(reach.grid)
        geometry = Geometry(
            stride=reach.grid, halo=reach.halo, scale=tuple(map(Fraction, ones)), multiple=ones
        )
        found = []
        for number, image in enumerate(self.images):
            size = image.shape[2:]
            covered = self._covered(stage, number)
            for tile in grid(covered, self.extents[stage.number], geometry):
                # what a valid convolution left out at the end belongs to the last block
                read = (
                    n if s.stop >= c else s.stop for s, c, n in zip(tile.read, covered, size, strict=True)
                )
                window = tuple((s.start, stop) for s, stop in zip(tile.read, read, strict=True))
                ends = (n if s.stop is None else s.stop for s, n in zip(tile.write, size, strict=True))
                interior = tuple((s.start, end) for s, end in zip(tile.write, ends, strict=True))
                found.append(Block(number, window, interior))
        return found

    def _covered(self, stage: Stage, image: int) -> tuple[int, ...]:
        """Return as many pixels per axis as every map of the stage has positions for.

        Convolutions without padding give fewer positions than there are pixels, and a block at the end must not be
        one that has none.
        """
        covered = list(self.images[image].shape[2:])
        for node in (*stage.reads, *stage.gives):
            found = self.schedule.maps.maps[node]
            for axis, (dim, scale) in enumerate(zip(found.dims, found.scale, strict=True)):
                covered[axis] = min(covered[axis], int(self.shapes[image][node][dim] / scale))
        return tuple(max(1, n) for n in covered)

    def _settle(self, stage: Stage, work: Work, measured: dict[int, Measured], shares: _Shares) -> None:
        parts: list[list[Measured]] = [[] for _ in self.images]
        for number, block in enumerate(work.blocks):
            parts[block.image].append(measured[number])
        for site in work.measures:
            self.statistics[site].settle([[block[site] for block in image] for image in parts])
        for node in stage.pools:
            for image in range(len(self.images)):
                self.pools[image, node] = self._pooled(node, image, shares.parts[image, _pool(node)])
        self.settled()
        for overview in stage.after:
            self._settle_overview(overview)

    def _pooled(self, node: Node, image: int, parts: Sequence[Partial]) -> Tensor:
        """Return the bins of an image."""
        pool = self.schedule.program.pools[node]
        extents = self.shapes[image][pool.operand][-len(pool.bins.counts) :]
        return pool.bins.merged(parts, extents, node.name).to(self.schedule.device)

    def _settle_overview(self, overview: Overview) -> None:
        """Measure sites whose operands are of the whole image already."""
        values = [self._seen(overview, image) for image in range(len(self.images))]
        for site, node in overview.measures:
            if site in self.statistics:
                measure = self.statistics[site].measure
                self.statistics[site].settle([[measure(value[node])] for value in values])
        self.settled()

    def _seen(self, overview: Overview | None, image: int) -> dict[Node, Tensor]:
        """Return overviews of an image."""
        if overview is None:
            return {}
        pools = [self.pools[image, node] for node in overview.pools]
        told = overview.told(self.shapes[image])
        with torch.no_grad():
            return dict(zip(overview.gives, overview.run(*pools, *told), strict=True))

    def _work(self, stage: Stage) -> Work:
        """Return a stage as work on blocks, with room for what it computes."""
        measures = {
            site: (stage.gives.index(node), self._measure(site))
            for site, node in stage.measures
            if site in self.statistics
        }
        program = self.schedule.program
        pools = {
            _pool(node): (stage.gives.index(program.pools[node].operand), program.pools[node].bins)
            for node in stage.pools
        }
        parts = tuple(self._part(stage, image) for image in range(len(self.images)))
        blocks = tuple(self.blocks(stage))
        return Work(stage.number, stage.run, parts, measures, blocks, self.schedule.device, pools)

    def _measure(self, site: str) -> Callable[[Tensor], Any]:
        """Return what measures a site's operand, as the network has it."""
        measure, flat = self.statistics[site].measure, self.schedule.program.flat.get(site)
        return measure if flat is None else partial(_of_tokens, measure, *flat)

    def _part(self, stage: Stage, image: int) -> ImageWork:
        shapes, maps = self.shapes[image], self.schedule.maps.maps
        lying = windowed(stage) if self.schedule.device.type == "cuda" else frozenset()
        seen = self._seen(stage.before, image)
        reads = (
            Read(self.images[image], None, shapes[node])
            if node is self.schedule.program.image
            else Read(self._kept(image, node, seen), maps[node], shapes[node], node in lying)
            for node in stage.reads
        )
        whole: tuple[Tokens | Bias | Tensor, ...] = (
            *(self._tokens(image, node) for node in stage.whole),
            *(Bias(one.run, one.told(shapes)) for one in stage.biases),
            *(seen[node] for node in stage.overviews),
        )
        told = (Told(maps[of], shapes[of], dim) for of, dim in map(extent_of, stage.sizes))
        gives = (Given(n.name, maps[n], shapes[n], self._places(stage, image, n)) for n in stage.gives)
        source = self.images[image]
        return ImageWork(source.shape[2:], tuple(reads), whole, tuple(told), tuple(gives), mask_of(source))

    def _kept(self, image: int, node: Node, seen: Mapping[Node, Tensor]) -> Kept:
        """Return where a value that a stage reads is kept, or what computes it from what is."""
        program, shapes = self.schedule.program, self.shapes[image]
        stretch = program.stretches.get(node)
        if node in program.numbers:
            return Numbers(shapes[node], self.schedule.device)
        if stretch is None:
            return self.store[_name(image, node)]
        source = stretch.source
        pixels = self.images[image] if source is program.image else None
        kept = (
            seen[source]
            if source in seen
            else None
            if pixels is not None
            else self.store[_name(image, source)]
        )
        given, taken = shapes[source], shapes[node]
        return Stretched(kept, stretch.resizing, given, taken, self.schedule.device, pixels)

    def _tokens(self, image: int, node: Node) -> Tokens:
        space = len(self.schedule.maps.maps[node].dims)
        return Tokens(self.store[_name(image, node)], self.shapes[image][node], space, self.schedule.device)

    def _places(self, stage: Stage, image: int, node: Node) -> tuple[Kept, ...]:
        """Return where a value goes that a stage computes."""
        shape, dtype, found = self.shapes[image][node], node.meta["val"].dtype, self.schedule.maps.maps[node]
        blocks = list(shape)
        for dim, n, scale in zip(found.dims, self.extents[stage.number], found.scale, strict=True):
            blocks[dim] = int(n * scale)
        places: list[Kept] = []
        if node in stage.stores:
            places.append(self.store.create(_name(image, node), shape, dtype, blocks))
        if node in self.keep:
            places.append(self.store.create(kept_name(image, node), shape, dtype, blocks))
        wanted = self.sink(image, node, shape, dtype, tuple(blocks))
        return (*places, wanted) if wanted is not None else tuple(places)

    def _remember(self, work: Work, stage: Stage, measured: dict[int, Measured]) -> None:
        """Note what the journal says is in the store."""
        for number in measured:
            self.store.seal(measured[number].get(SEALS, {}))
            block = work.blocks[number]
            part = work.parts[block.image]
            for node, given in zip(stage.gives, part.gives, strict=True):
                names = {
                    _name(block.image, node): node in stage.stores,
                    kept_name(block.image, node): node in self.keep,
                }
                for name in (name for name, stored in names.items() if stored):
                    self.earlier.setdefault(name, []).append((given, part, block))

    def _require_earlier(self) -> None:
        """Refuse to go on from blocks that are no longer in the store; once, before the first block is computed."""
        for name, written in self.earlier.items():
            for given, part, block in written:
                if not self.store.whole(name, given.index(block, part.size)):
                    raise NormfixError(
                        "NF330",
                        "a part of it that was written is gone or cut short. Delete the unfinished run to start anew.",
                        where=name,
                    )
        self.earlier = {}


class _Shares:
    """What blocks of a stage give of pools, put together in their order as they come; what comes too early waits."""

    def __init__(self, work: Work, bins: Mapping[str, Merging]) -> None:
        self.parts: dict[tuple[int, str], list[Partial]] = defaultdict(list)
        self._work, self._bins = work, bins
        self._early: dict[int, Measured] = {}
        self._next = 0

    def add(self, number: int, found: Measured) -> Measured:
        """Take what a block gives of pools; return what else was measured of it."""
        self._early[number] = {name: found[name] for name in self._bins}
        while self._next in self._early:
            image = self._work.blocks[self._next].image
            for name, part in self._early.pop(self._next).items():
                self._bins[name].join_(self.parts[image, name], part)
            self._next += 1
        return {name: value for name, value in found.items() if name not in self._bins}


def _of_tokens(measure: Callable[[Tensor], Any], first: int, last: int, operand: Tensor) -> Any:
    return measure(operand.flatten(first, last))


def _digest(program: Program) -> str:
    """Return a digest of the statistics that the program holds."""
    found = hashlib.sha256()
    for name, value in program.body.named_buffers():
        found.update(name.encode())
        found.update(bytes_of(value))
    return found.hexdigest()


def _name(image: int, node: Node) -> str:
    return f"{image}-{node.name}"


def _pool(node: Node) -> str:
    """Return the name under which what a block gives of bins is noted; no module has this path."""
    return f".pool.{node.name}"
