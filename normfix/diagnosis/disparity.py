"""Train/eval disparity: eval mode against the same network with batch statistics in use.

Running statistics are not updated and dropout stays off, so the two differ in nothing but the statistics.
What train mode predicts depends on which patches share a batch, so that is stated: patches of the tile size,
taken from the image in row-major order, `batch` at a time; a last batch that is not full is left out, and so is a
number of patches of which train mode takes no statistics, such as one of a single pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from normfix.networks.calling import refusals
from normfix.proof.indicators import Accumulator
from normfix.records.diagnoses import Kind, TrainEval
from normfix.tiling.grid import at

__all__ = ["disparity", "patches"]

Function = Callable[[Tensor], Tensor]
Score = Callable[[Tensor, Sequence[tuple[slice, ...]]], float | None]


def patches(size: Sequence[int], tile: Sequence[int], stride: Sequence[int]) -> list[tuple[slice, ...]]:
    """Return the full patches of an image in row-major order, at most half the image on every axis."""
    axes = []
    for n, t, s in zip(size, tile, stride, strict=True):
        extent = max(s, min(t, n // 2) // s * s)
        axes.append([slice(a, a + extent) for a in range(0, n - extent + 1, extent)])
    return list(itertools.product(*axes))


def disparity(
    evaluated: Function,
    trained: Function,
    image: Tensor,
    places: Sequence[tuple[slice, ...]],
    batches: Sequence[int],
    kind: Kind,
    sd: float,
    score: Score = lambda output, places: None,
    refused: Callable[[int, str], None] = lambda batch, why: None,
) -> tuple[TrainEval, ...]:
    """Compare both modes on the same patches, for each batch size.

    Args:
        evaluated: the network in eval mode.
        trained: the network with batch statistics in use.
        image: (1, C, *space).
        places: of the patches.
        batches: sizes; those larger than the number of patches are left out.
        kind: of the output.
        sd: unit of differences.
        score: Dice of a batch of outputs at these places, or None without labels.
        refused: is told of a size of which the network takes no batch statistics, and why.
    """
    found = []
    for batch in batches:
        gathered, changes = Accumulator(kind, sd), []
        for chosen in _grouped(places, batch):
            together = torch.cat([image[at(place)] for place in chosen])
            other = evaluated(together)
            try:
                one = trained(together)
            except refusals() as error:
                refused(batch, " ".join(str(error).split())[-160:])
                break
            gathered.add(one, other)
            scores = score(one, chosen), score(other, chosen)
            if scores[0] is not None and scores[1] is not None:
                changes.append(scores[0] - scores[1])
        mismatch = gathered.result()
        if mismatch is not None:
            extents = "x".join(str(s.stop - s.start) for s in places[0])
            how = "single patches" if batch == 1 else f"{batch} consecutive patches"
            composition = f"{how} of {extents} in row-major order, without context"
            change = sum(changes) / len(changes) if changes else None
            found.append(
                TrainEval(batch=batch, composition=composition, mismatch=mismatch, accuracy_change=change)
            )
    return tuple(found)


def _grouped(places: Sequence[tuple[slice, ...]], batch: int) -> Iterator[Sequence[tuple[slice, ...]]]:
    yield from (places[i : i + batch] for i in range(0, len(places) - batch + 1, batch))
