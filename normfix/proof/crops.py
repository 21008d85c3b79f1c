"""Test a pipeline from outside: cropping the image must not change what is predicted far from the crop.

A pipeline has no whole-image or float64 reference. But if its answer at a pixel does not depend on where
tiles fall, then

    predict(image)[inside] == predict(crop of image)

for pixels further than `margin` from where the crop cut. Crops start and end on multiples of the network's
stride, so phase is not what differs; they move the pipeline's tiles over the image, so everything else is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfix.errors import NormfixError, reason_of
from normfix.networks.calling import failures
from normfix.proof.indicators import compare, differences, recognise, spread_of

__all__ = ["Crop", "Difference", "Predicts", "crops", "disagreement", "predicted", "put_back"]

Predicts = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Crop:
    """How much is cut off one axis, at its start or at its end."""

    axis: int
    pixels: int
    at_end: bool

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.pixels} pixels off the {'end' if self.at_end else 'start'} of axis {self.axis}"


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a crop's prediction is from the image's, in sd; `pixels` were compared."""

    crop: Crop
    max_sd: float
    mean_sd: float
    dice: float | None
    pixels: int


def crops(size: Sequence[int], tile: Sequence[int], stride: int, margin: int) -> Iterator[Crop]:
    """Yield crops by one stride and by half a tile, at both ends of every axis that leaves something."""
    for axis, (n, t) in enumerate(zip(size, tile, strict=True)):
        half = max(stride, t // 2 // stride * stride)
        for pixels in dict.fromkeys((stride, half)):
            if n - pixels > 2 * margin:
                yield Crop(axis, pixels, at_end=False)
                yield Crop(axis, pixels, at_end=True)


def predicted(predict: Predicts, image: Any, space: int) -> Tensor:
    """Return the pipeline's answer for an image as a tensor (1, C, *space).

    Raises:
        NormfixError: NF605 if it fails or answers something else.
    """
    given = image.clone() if isinstance(image, Tensor) else np.array(image)
    try:
        answer = predict(given)
    except NormfixError:
        raise
    except failures() as error:
        reason = reason_of(error).rstrip(".")
        raise _unfit(f"it failed on an image of shape {tuple(image.shape)}: {reason}") from error
    output = answer.detach().cpu() if isinstance(answer, Tensor) else _tensor(answer)
    size = tuple(image.shape[-space:])
    if tuple(output.shape[-space:]) != size:
        raise _unfit(f"it answered {tuple(output.shape)} to an image of {size}")
    return output.reshape(1, -1, *size)


def disagreement(
    predict: Predicts, image: Any, space: int, whole: Tensor, crop: Crop, margin: int
) -> Difference:
    """Compare the prediction of a crop with that of the image, away from the cut."""
    start, here = _of_crop(predict, image, space, whole, crop)
    length = here.shape[crop.axis + 2]
    kind = recognise(whole)
    sd = spread_of(whole, kind)
    skip = 0 if crop.at_end else margin
    inner = length - margin
    a = whole.narrow(crop.axis + 2, start + skip, inner)
    b = here.narrow(crop.axis + 2, skip, inner)
    found = differences(a, b, kind, sd)
    same = compare(a, b, kind, sd)
    return Difference(
        crop, float(found.max()), float(found.mean()), same.dice if same else None, found.numel()
    )


def put_back(predict: Predicts, image: Any, space: int, whole: Tensor, crop: Crop) -> tuple[Tensor, int]:
    """Return the whole prediction with that of a crop in its place, and where the crop was cut."""
    start, here = _of_crop(predict, image, space, whole, crop)
    back, length = whole.clone(), here.shape[crop.axis + 2]
    back.narrow(crop.axis + 2, start, length).copy_(here)
    return back, length if crop.at_end else start


def _of_crop(predict: Predicts, image: Any, space: int, whole: Tensor, crop: Crop) -> tuple[int, Tensor]:
    """Return where a crop starts, and its prediction."""
    n, dim = whole.shape[crop.axis + 2], image.ndim - space + crop.axis
    start, length = (0 if crop.at_end else crop.pixels), n - crop.pixels
    part = image[tuple(slice(start, start + length) if d == dim else slice(None) for d in range(image.ndim))]
    return start, predicted(predict, part, space)


def _tensor(answer: Any) -> Tensor:
    try:
        return torch.as_tensor(np.asarray(answer))
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unfit(f"it answered a {type(answer).__name__}, which is no array") from error


def _unfit(reason: str) -> NormfixError:
    return NormfixError(
        "NF605",
        f"{reason}. Give predict(image) -> array with the image's spatial extents.",
        where="the pipeline",
    )
