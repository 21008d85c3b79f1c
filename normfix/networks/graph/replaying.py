"""Run a captured program beside the network it was captured from, on other inputs than it was captured with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from normfix.layers.affine import as_in_graphs
from normfix.networks.calling import affordable, refusals, resized
from normfix.networks.graph.isolation import silence
from normfix.networks.numerics import IDENTITY, deviation
from normfix.networks.randomness import OwnRandomness

__all__ = ["once_replayed", "replay", "replays", "same"]


def replays(
    example: Tensor, free: Sequence[int], known: Sequence[Tensor], largest: int
) -> Iterator[list[Tensor]]:
    """Yield lists of inputs of which one has to be replayed: one image, another batch of another size.

    Half the size comes first: it costs a quarter. Where batches are replayed as well, the one image is of another size
    too, if the network ran on one before; it was captured at the example's. `largest` are the elements of the largest
    tensor there.
    """
    yield [*_of_other_sizes(known, example), example] if 0 in free else [example]
    images = []
    if any(dim >= 2 for dim in free):
        space = example.shape[2:]
        sizes = [[n // 64 * 32 if d in free else n for d, n in enumerate(space, start=2)]]
        # what is not another extent along every free axis shows nothing of that axis
        sizes = [size for size in sizes if all(size)]
        sizes += [[n + step * (d in free) for d, n in enumerate(space, start=2)] for step in (32, 64, 128)]
        sizes += [[2 * n for n in space]]
        for size in affordable([size for size in sizes if size != list(space)], space, largest):
            kept = [n if d in free else space[d - 2] for d, n in enumerate(size, start=2)]
            images.append(resized(example, kept))
    if 0 in free:
        # captured of two, replayed on one already
        images = [torch.cat([x, x.flip(-1)]) for x in (*images, example)]
    if images:
        yield images


def once_replayed(example: Tensor, free: Sequence[int], known: Sequence[Tensor]) -> list[Tensor]:
    """Return inputs of which one has to be replayed.

    One of another size that the network ran on before comes first, then half the example, then the example.
    """
    space = example.shape[2:]
    smaller = [n // 64 * 32 if d in free else n for d, n in enumerate(space, start=2)]
    halves = [resized(example, smaller)] if all(smaller) and smaller != list(space) else []
    return [*_of_other_sizes(known, example), *halves, example]


def _of_other_sizes(known: Sequence[Tensor], example: Tensor) -> list[Tensor]:
    return [image for image in known if image.shape[2:] != example.shape[2:] and len(image) == len(example)]


def replay(
    program: ExportedProgram, network: nn.Module, image: Tensor, known: Sequence[tuple[Tensor, Tensor]] = ()
) -> bool | None:
    """Tell whether program and network agree; None where one of them does not take the input.

    `known` are images that the network ran on before, and what it gave; it runs again where the program differs.
    """
    body = program.module()
    with silence(), as_in_graphs():
        try:
            # a network that draws must not move the caller's generator from here either
            with OwnRandomness():
                actual = body(image.clone())
            if any(_agree(actual, gave) for taken, gave in known if _is_equal(taken, image)):
                return True
            return _agree(actual, network(image.clone()))
        except refusals():
            return None


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _agree(actual: Any, expected: Any) -> bool:
    mine, theirs = tree_leaves(actual), tree_leaves(expected)
    return len(mine) == len(theirs) and all(
        same(a, b) for a, b in zip(mine, theirs, strict=True) if isinstance(b, Tensor)
    )


def same(actual: Any, expected: Tensor) -> bool:
    """Tell whether two outputs agree to rounding, in units of the spread of the second."""
    if not isinstance(actual, Tensor) or actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if torch.equal(actual, expected) or not expected.is_floating_point():
        return torch.equal(actual, expected)
    spread = float(expected.double().std(correction=0)) or 1.0  # of one value it is 0
    return deviation(actual, expected, spread)[0] <= IDENTITY[expected.dtype]
