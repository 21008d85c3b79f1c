"""Examples to scan with: noise of the shape a network takes, or the middle of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfix.calling import Caller, home_of, refusals
from normfix.errors import NormfixError
from normfix.graph import Program
from normfix.pipeline.bases import class_of
from normfix.rewriting import twin_of

__all__ = ["default_example", "fitting_example", "input_of"]

_EXAMPLE_EXTENT = {1: 1024, 2: 256, 3: 64}


def input_of(model: nn.Module) -> tuple[int, int]:
    """Return (channels, spatial axes) that the first convolution takes.

    Raises:
        NormfixError: NF109 if the network has none.
    """
    if isinstance(model, Program):
        return model.shape[1] or 1, len(model.shape) - 2
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
            channels = 0 if isinstance(module, nn.modules.lazy.LazyModuleMixin) else module.in_channels
            return channels or 1, len(module.kernel_size)
    raise NormfixError(
        "NF109",
        "the network has no convolution to tell its input's shape from. Give one: --input NxCxHxW on the "
        "command line, `example` in Python.",
        where=class_of(model),
    )


def default_example(model: nn.Module) -> Tensor:
    """Return seeded noise of the shape the first convolution takes."""
    channels, ndim = input_of(model)
    shape = (1, channels, *(_EXAMPLE_EXTENT[ndim],) * ndim)
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
    probe = twin_of(model)
    try:
        with torch.no_grad():
            caller(probe, middle.to(*home_of(probe)))
    except refusals():
        return image[:1]
    return middle


def _middle(image: Tensor) -> Tensor:
    limit = _EXAMPLE_EXTENT[min(3, image.dim() - 2)]
    for axis in range(2, image.dim()):
        n = min(image.shape[axis], limit)
        n = n // 64 * 64 or n // 32 * 32 or n
        image = image.narrow(axis, (image.shape[axis] - n) // 2, n)
    return image[:1]
