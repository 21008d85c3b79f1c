"""What the blocks of one stage need, free of the graph, so that any process can compute any of them.

Computing a block twice writes the same bytes to the same place, so a block that was cut short, or whose worker died,
is simply computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from normfix.images.sources import Image, Span
from normfix.networks.calling import refusals
from normfix.networks.devices import moved
from normfix.tiling.stages.biases import Bias
from normfix.tiling.stages.bins import Merging, Partial
from normfix.tiling.stages.chunks import Seals
from normfix.tiling.stages.journal import SEALS
from normfix.tiling.stages.maps import Map
from normfix.tiling.stages.masks import counted, selected
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.store import Kept
from normfix.tiling.stages.tokens import Tokens

__all__ = ["Block", "Given", "ImageWork", "Read", "Told", "Work"]

Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One block: its image, the pixels it reads and those it is responsible for, (start, stop) per axis."""

    image: int
    window: tuple[Span, ...]
    interior: tuple[Span, ...]

    @property
    def pixels(self) -> int:
        """Return how many pixels it reads."""
        return math.prod(stop - start for start, stop in self.window)


@dataclass(frozen=True, slots=True)
class Read:
    """A value that a stage reads: the image itself, or what was kept of an earlier stage.

    `lies` says that whoever reads a window takes it as it lies in the whole, so that it is not copied.
    """

    kept: Kept | Image
    map: Map | None
    shape: tuple[int, ...]
    lies: bool = False

    def window(self, block: Block, size: Sequence[int], device: torch.device) -> Tensor:
        """Return what a block reads of it, on a device."""
        if self.map is None:
            return moved(self.kept.read(block.window), device)  # type: ignore[arg-type]
        spans = self.map.taken(block.window, size, self.shape)
        kept = self.kept.read(self.map.index(spans, len(self.shape)))  # type: ignore[arg-type]
        value = moved(kept, device)
        return value if self.lies else value.contiguous()


@dataclass(frozen=True, slots=True)
class Told:
    """An extent that a stage is told: of one dimension of a value."""

    map: Map
    shape: tuple[int, ...]
    dim: int

    def extent(self, block: Block, size: Sequence[int]) -> int:
        """Return the extent as it is in the window."""
        if self.dim not in self.map.dims:
            return self.shape[self.dim]
        start, stop = self.map.taken(block.window, size, self.shape)[self.map.dims.index(self.dim)]
        return stop - start


@dataclass(frozen=True, slots=True)
class Given:
    """A value that a stage computes, and the places it is written to."""

    name: str
    map: Map
    shape: tuple[int, ...]
    places: tuple[Kept, ...]

    def index(self, block: Block, size: Sequence[int]) -> Index:
        """Return where a block's interior goes."""
        return self.map.index(self.map.window(block.interior, size, self.shape), len(self.shape))

    def interior(self, result: Tensor, block: Block, size: Sequence[int], stage: int) -> Tensor:
        """Return the part of a block's value that it is responsible for.

        Raises:
            NormfixError: NF325 if the value has another extent than the whole has there.
        """
        outer = self.map.window(block.window, size, self.shape)
        inner = self.map.window(block.interior, size, self.shape)
        crop = tuple(
            (start - first, stop - first) for (start, stop), (first, _) in zip(inner, outer, strict=True)
        )
        ends = (stop == n for (_, stop), n in zip(block.window, size, strict=True))
        for dim, (_, stop), end, (first, last) in zip(self.map.dims, crop, ends, outer, strict=True):
            if result.shape[dim] < stop or (end and result.shape[dim] != last - first):
                raise NotInStages(
                    "NF325",
                    f"a block of {[b - a for a, b in block.window]} pixels gave {tuple(result.shape)} where the whole "
                    f"image has {self.shape}; the network treats this size otherwise than its parts.",
                    where=f"stage {stage}, {self.name}",
                )
        return result[self.map.index(crop, result.dim())]

    def binned(self, value: Tensor, block: Block, size: Sequence[int], bins: Merging) -> Partial:
        """Return what a block's interior gives of bins."""
        spans = dict(zip(self.map.dims, self.map.window(block.interior, size, self.shape), strict=True))
        dims = sorted(spans)
        return bins.partial(value, [spans[d] for d in dims], [self.shape[d] for d in dims])


@dataclass(frozen=True, slots=True)
class ImageWork:
    """What a stage reads of one image of `size` pixels, is told and gives; which of them to ignore."""

    size: tuple[int, ...]
    reads: tuple[Read, ...]
    whole: tuple[Tokens | Bias | Tensor, ...]
    told: tuple[Told, ...]
    gives: tuple[Given, ...]
    mask: Image | None = None

    def counting(self, position: int, value: Tensor, block: Block) -> Tensor:
        """Return what counts of a block's interior of one of the values."""
        if self.mask is None:
            return value
        given = self.gives[position]
        spans = given.map.window(block.interior, self.size, given.shape)
        return selected(value, given.map.dims, counted(self.mask, given.map, spans))


@dataclass(frozen=True, slots=True)
class Work:
    """A stage to be run over blocks; call it with the number of a block.

    `run` computes the values of a block on `device`, `parts` are by image, `measures` tell which of the values is
    measured how, by site, `pools` which of them are put together to bins.
    """

    stage: int
    run: GraphModule
    parts: tuple[ImageWork, ...]
    measures: dict[str, tuple[int, Callable[[Tensor], Any]]]
    blocks: tuple[Block, ...]
    device: torch.device
    pools: dict[str, tuple[int, Merging]] = field(default_factory=dict)

    def __call__(self, number: int) -> dict[str, Any]:
        """Compute one block, write its interior and return what was measured of it, and the seals of its chunks."""
        block = self.blocks[number]
        part = self.parts[block.image]
        values = [read.window(block, part.size, self.device) for read in part.reads]
        told = [one.extent(block, part.size) for one in part.told]
        results = self._computed(block, (*values, *part.whole, *told))
        del values
        kept = [
            given.interior(result, block, part.size, self.stage)
            for given, result in zip(part.gives, results, strict=True)
        ]
        seals: Seals = {}
        for given, value in zip(part.gives, kept, strict=True):
            for place in given.places:
                seals |= place.write(given.index(block, part.size), value) or {}
        measured = {
            site: measure(part.counting(position, kept[position], block))
            for site, (position, measure) in self.measures.items()
        }
        for pool, (position, bins) in self.pools.items():
            measured[pool] = part.gives[position].binned(kept[position], block, part.size, bins)
        return {**measured, SEALS: seals} if seals else measured

    def _computed(self, block: Block, values: Sequence[Any]) -> Sequence[Tensor]:
        """Run the stage.

        Raises:
            NormfixError: NF325 if it does not run on what a block reads.
        """
        with torch.no_grad():
            try:
                results: Sequence[Tensor] = self.run(*values)
            except NotInStages:  # of the values it met
                raise
            except refusals() as error:
                raise NotInStages(
                    "NF325",
                    f"it does not run on a block of {[b - a for a, b in block.window]} pixels: {error}. Take larger "
                    "blocks, or tiles (engine tiles).",
                    where=f"stage {self.stage}",
                ) from error
        return results
