"""Random weights under which every site of a network matters.

Freshly built networks hide sites: last layers initialised to zero, layer scales of 1e-6, BatchNorms whose
running statistics fit no input. So, with a seed made from the network's name:

1. every parameter whose values are all equal is redrawn: ones from U(0.5, 1.5); zeros of matrices and kernels
   from N(0, 1/fan in), of biases from N(0, 0.1²), other zeros (gains) from N(0, 0.5²); any other constant
   (layer scales) from U(0.2, 1);
2. every BatchNorm takes its running statistics from one batch of two noise images, as training would.
"""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor, nn

from .entry import Entry

__all__ = ["material", "prepared", "seed_of"]


def seed_of(name: str) -> int:
    """Return a seed that depends on the name alone."""
    return crc32(name.encode())


def prepared(entry: Entry) -> nn.Module:
    """Build the network in eval mode with weights that hide nothing."""
    torch.manual_seed(seed_of(entry.name))
    model = entry.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _redraw_(name, parameter)
        _settle_batch_norms_(model, entry)
    return model.requires_grad_(False)


def material(shape: tuple[int, ...], name: str) -> Tensor:
    """Return noise on a ramp along every axis, so that no two parts of it have the same statistics."""
    generator = torch.Generator().manual_seed(seed_of(name))
    ramp = torch.zeros(shape[2:])
    for axis, n in enumerate(shape[2:]):
        view = [1] * (len(shape) - 2)
        view[axis] = n
        ramp = ramp + torch.linspace(0, 1, n).reshape(view)
    return torch.randn(shape, generator=generator) * (0.5 + ramp) + ramp


def _redraw_(name: str, parameter: Tensor) -> None:
    if (
        not parameter.is_floating_point()
        or parameter.numel() == 0
        or bool((parameter != parameter.flatten()[0]).any())
    ):
        return
    value = float(parameter.flatten()[0])
    matrix = sum(n > 1 for n in parameter.shape) > 1
    if value == 1:
        parameter.uniform_(0.5, 1.5)
    elif value != 0:
        parameter.uniform_(0.2, 1)
    elif matrix:
        parameter.normal_(0, (parameter.numel() / parameter.shape[0]) ** -0.5)
    else:
        parameter.normal_(0, 0.1 if name.endswith("bias") else 0.5)


def _settle_batch_norms_(model: nn.Module, entry: Entry) -> None:
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    norms = [m for m in norms if m.running_mean is not None]
    momenta = [m.momentum for m in norms]
    images = torch.cat([material(entry.shape, entry.name + side) for side in ("left", "right")])
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        if norms:
            entry.call(model, images) if entry.call else model(images)
    except (RuntimeError, ValueError):
        pass  # one value per channel, or a batch of one only: its running statistics stay as they were built
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
