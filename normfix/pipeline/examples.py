"""Examples to scan with: noise of the shape a network takes, or the middle of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfix.calling import REFUSALS, Caller, home_of
from normfix.errors import NormfixError
from normfix.graph import Program
from normfix.pipeline.intake import Intake
from normfix.rewriting import copy_of

__all__ = ["default_example", "fitting_example"]

_EXAMPLE_EXTENT = {1: 1024, 2: 256, 3: 64}


def default_example(model: nn.Module, caller: Caller) -> Tensor:
    """Return seeded noise of a shape that the network takes.

    Raises:
        NormfixError: NF109 if it has no convolution to tell the shape from.
    """
    intake = Intake(model, caller)
    ndim = intake.ndim
    shape = (1, intake.channels, *(_EXAMPLE_EXTENT[ndim],) * ndim)
    if isinstance(model, Program):
        shape = tuple(n or free for n, free in zip(model.shape, shape, strict=True))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def fitting_example(model: nn.Module, image: Tensor, caller: Caller) -> Tensor:
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
    middle = _middle(image)
    if middle.shape == image.shape:
        return image[:1]
    probe = copy_of(model).eval()
    try:
        with torch.no_grad():
            caller(probe, middle.to(*home_of(probe)))
    except REFUSALS:
        return image[:1]
    return middle


def _middle(image: Tensor) -> Tensor:
    limit = _EXAMPLE_EXTENT[min(3, image.dim() - 2)]
    for axis in range(2, image.dim()):
        n = min(image.shape[axis], limit)
        n = n // 64 * 64 or n // 32 * 32 or n
        image = image.narrow(axis, (image.shape[axis] - n) // 2, n)
    return image[:1]
