"""Examples to scan with: noise of the shape a network takes, or the middle of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.networks.graph.program import ProgramNetwork
from normfix.networks.intake import Intake

__all__ = ["EXTENT", "default_example", "fitting_example", "half_of", "middle", "probing_part"]

EXTENT = {1: 1024, 2: 256, 3: 64}
"""Pixels per axis of the larger of an example and what the network makes of it, per number of axes."""
_LEAST = {1: 128, 2: 32, 3: 16}
"""Pixels of an example that is enlarged much: what most networks still run on."""
_PROBE = {1: 256, 2: 64, 3: 32}
"""Pixels that the enlargement is measured on."""


def default_example(model: nn.Module, intake: Intake) -> Tensor:
    """Return seeded noise of a shape that the network takes, the smaller the more it enlarges.

    Raises:
        NormfixError: NF109 if it has no convolution to tell the shape from.
    """
    ndim = intake.ndim
    shape = (1, intake.channels, *(EXTENT[ndim],) * ndim)
    if isinstance(model, ProgramNetwork):
        shape = tuple(n or free for n, free in zip(model.shape, shape, strict=True))
    return _affordable(intake, torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def fitting_example(model: nn.Module, image: Tensor, intake: Intake) -> Tensor:
    """Return the middle of an image, small enough to scan with, or the whole where the network takes no less.

    Raises:
        NormfixError: NF106 if no convolution of the network takes as many spatial axes as the image has.
    """
    known = {len(m.kernel_size) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    if known and image.dim() - 2 not in known:
        raise NormfixError(
            "NF106",
            f"the network convolves over {' or '.join(map(str, sorted(known)))} spatial axes, the image "
            f"{tuple(image.shape)} read as (N, C, *space) has {image.dim() - 2}.",
            where="image",
        )
    smaller = _affordable(intake, _middle(image, EXTENT[min(3, image.dim() - 2)]))
    if smaller.shape == image[:1].shape or intake.ratio(smaller.shape[1:]) is not None:
        return smaller
    return image[:1]


def middle(image: Tensor, extents: Sequence[int]) -> Tensor:
    """Return the middle of an image that has these extents."""
    for axis, extent in enumerate(extents, start=2):
        image = image.narrow(axis, (image.shape[axis] - extent) // 2, extent)
    return image[:1]


def half_of(example: Tensor) -> Tensor:
    """Return the middle of an example, of half the extent that one has at most, where less of it tells as much."""
    return _middle(example, EXTENT[min(3, example.dim() - 2)] // 2)


def probing_part(example: Tensor) -> Tensor:
    """Return the middle of an example, small enough to try what a network does at little cost."""
    return _middle(example, _PROBE[min(3, example.dim() - 2)])


def _affordable(intake: Intake, example: Tensor) -> Tensor:
    """Return the middle of an example of a network that enlarges, so that its output is no larger than others' are."""
    ndim = min(3, example.dim() - 2)
    ratio = intake.ratio(probing_part(example).shape[1:])
    if ratio is None or ratio <= 1:
        return example
    smaller = _middle(example, max(_LEAST[ndim], int(EXTENT[ndim] / ratio)))
    return smaller if intake.ratio(smaller.shape[1:]) is not None else example


def _middle(image: Tensor, most: int) -> Tensor:
    shorter = [min(n, most) for n in image.shape[2:]]
    return middle(image, [n // 64 * 64 or n // 32 * 32 or n for n in shorter])
