"""Accuracy untiled and tiled, tile mismatch and train/eval disparity, by arithmetic of the benchmark's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product

import torch
from torch import Tensor, nn

from .data import Region
from .networks import Setting

__all__ = ["disparity", "measured", "tiled_dice", "windows"]

_TOGETHER = 8
Network = Callable[[Tensor], nn.Module]
"""Return the network that predicts an image of (1, 1, *space): the same for all, or one with the image's statistics."""


def measured(network: Network, region: Region, setting: Setting) -> dict[str, float | None]:
    """Return Dice of the whole image and of its tiles, and how far two ways of tiling differ.

    The second tiling starts half a tile earlier. `mismatch` is 1 - Dice between the two predictions; `max_sd` is
    the largest difference of their logits in standard deviations. `untiled` is None where the network takes one size.
    """
    wholes, first, second = list[Tensor](), list[Tensor](), list[Tensor]()
    for image in region.images.split(1):
        model = network(image)
        if setting.dense:
            with torch.no_grad():
                wholes.append(model(image))
        first.append(tiled(model, image, setting))
        second.append(tiled(model, image, setting, shifted=True))
    one, other = torch.cat(first), torch.cat(second)
    return {
        "untiled": _dice(torch.cat(wholes) > 0, region.labels > 0) if wholes else None,
        "tiled": _dice(one > 0, region.labels > 0),
        "mismatch": 1 - _dice(one > 0, other > 0),
        "max_sd": float((one - other).abs().max() / one.std()),
    }


def tiled_dice(network: Network, region: Region, setting: Setting) -> float:
    """Return the Dice of stitched tiles."""
    logits = [tiled(network(image), image, setting) for image in region.images.split(1)]
    return _dice(torch.cat(logits) > 0, region.labels > 0)


def disparity(model: nn.Module, region: Region, setting: Setting, batch: int) -> float:
    """Return 1 - Dice between predictions in eval mode and on batch statistics, windows in order, `batch` together.

    Nothing is updated and dropout is off.
    """
    live = deepcopy(model).train()
    for module in live.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        if getattr(module, "momentum", None) is not None:
            module.momentum = 0.0
    parts = torch.cat([part for image in region.images.split(1) for part, _ in windows(image, setting)])
    parts = parts[: len(parts) // batch * batch]
    with torch.no_grad():
        trained = torch.cat([live(part) for part in parts.split(batch)])
        used = torch.cat([model(part) for part in parts.split(batch)])
    return 1 - _dice(trained > 0, used > 0)


def tiled(model: nn.Module, image: Tensor, setting: Setting, *, shifted: bool = False) -> Tensor:
    """Predict windows of the training size, crop what is context, and stitch."""
    stitched = torch.full_like(image, torch.nan)
    pairs = list(windows(image, setting, shifted=shifted))
    with torch.no_grad():
        for start in range(0, len(pairs), _TOGETHER):
            parts, places = zip(*pairs[start : start + _TOGETHER], strict=True)
            for logits, place in zip(model(torch.cat(parts)), places, strict=True):
                inner = tuple(slice(a - w, b - w) for w, a, b in place)
                outer = tuple(slice(a, b) for _, a, b in place)
                stitched[(0, slice(None), *outer)] = logits[(slice(None), *inner)]
    assert not stitched.isnan().any()
    return stitched


Place = tuple[tuple[int, int, int], ...]
"""Per axis: where the window starts, where its tile starts and where that ends."""


def windows(image: Tensor, setting: Setting, *, shifted: bool = False) -> Iterator[tuple[Tensor, Place]]:
    """Yield windows of one size that lie within the image, and what of them counts."""
    axes = list[list[tuple[int, int, int]]]()
    for size, window, halo in zip(image.shape[2:], setting.window, setting.halo, strict=True):
        tile = window - 2 * halo
        first = -(tile // 2) if shifted and window < size else 0
        spans = [(max(0, a), min(size, a + tile)) for a in range(first, size, tile)]
        axes.append(
            [(min(max(0, a - halo), size - window), a, b) for a, b in spans]
            if window < size
            else [(0, 0, size)]
        )
    for place in product(*axes):
        part = image
        for axis, ((start, _, _), window) in enumerate(zip(place, setting.window, strict=True)):
            part = part.narrow(axis + 2, start, window)
        yield part, place


def _dice(one: Tensor, other: Tensor) -> float:
    """Return Dice of two masks; 1 where both are empty."""
    total = int(one.sum() + other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0
