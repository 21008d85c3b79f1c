"""What is held out in turn: one image after another, or the halves of the only one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from normfix.choosing.bench import Sample
from normfix.errors import NormfixError
from normfix.images.collections import Images
from normfix.images.sources import whole
from normfix.tiling.grid import Geometry

__all__ = ["Fold", "folds_of", "samples_of", "tensors_of"]

_FOLDS = 5
"""Of several images: more folds cost more and say little more."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Constants are measured on some images, and judged on others."""

    measured: tuple[Sample, ...]
    judged: tuple[Sample, ...]


def samples_of(images: Images, labels: Any) -> list[Sample]:
    """Return the images, a batch one by one, each with its labels.

    Args:
        images: in memory.
        labels: none; of one image an array; of several one for each.

    Raises:
        NormfixError: NF556 for images that are read by window, NF557 if labels are not one for each.
    """
    if images.by_window:
        raise NormfixError(
            "NF556",
            "constants are compared by predictions of whole images, so give images, or parts of them, that fit into "
            "memory as tensors. What is chosen can then be measured on images of any size.",
            where="images",
        )
    pixels = [one[None] for image in images for one in whole(image)]
    if labels is None:
        return [Sample(f"image {number}", one) for number, one in enumerate(pixels)]
    listed = list(labels) if isinstance(labels, list | tuple) else [labels]
    if len(pixels) > 1 == len(listed) and np.ndim(listed[0]) > 2 and len(listed[0]) == len(pixels):
        listed = list(listed[0])
    if len(listed) != len(pixels):
        raise NormfixError(
            "NF557",
            f"there are {len(pixels)} images and {len(listed)} labels. Give labels for each image, in its order.",
            where="labels",
        )
    pairs = zip(pixels, listed, strict=True)
    return [Sample(f"image {number}", one, np.asarray(own)) for number, (one, own) in enumerate(pairs)]


def folds_of(samples: Sequence[Sample], geometry: Geometry) -> list[Fold]:
    """Return what is held out in turn.

    Raises:
        NormfixError: NF556 for one image that is too small to be halved.
    """
    if len(samples) == 1:
        one, other = _halves(samples[0], geometry)
        return [Fold((one,), (other,)), Fold((other,), (one,))]
    count = min(_FOLDS, len(samples))
    return [Fold(tuple(_without(samples, k, count)), tuple(samples[k::count])) for k in range(count)]


def _without(samples: Sequence[Sample], k: int, count: int) -> Iterator[Sample]:
    return (sample for number, sample in enumerate(samples) if number % count != k)


def _halves(sample: Sample, geometry: Geometry) -> tuple[Sample, Sample]:
    """Return both halves along the longest axis, cut on the stride grid: no pixel is in both."""
    space = sample.pixels.shape[2:]
    axis = max(range(len(space)), key=lambda a: space[a])
    step = max(geometry.multiple[axis], geometry.stride[axis])
    cut = space[axis] // 2 // step * step
    if not cut:
        raise NormfixError(
            "NF556",
            f"one image of {'x'.join(map(str, space))} is too small to measure on one half and judge on the other. "
            "Give several images, or a larger one.",
            where="images",
        )
    return (_part(sample, axis, slice(0, cut), 0), _part(sample, axis, slice(cut, None), 1))


def _part(sample: Sample, axis: int, span: slice, number: int) -> Sample:
    ndim = sample.pixels.dim() - 2
    pixels = sample.pixels[_index(axis, span, ndim)]
    labels: Any = sample.labels
    if labels is not None:
        labels = labels[_index(axis, span, ndim)]
    return Sample(f"{sample.name}, half {number}", pixels, labels)


def _index(axis: int, span: slice, ndim: int) -> Any:
    return (..., *(span if a == axis else slice(None) for a in range(ndim)))


def tensors_of(samples: Sequence[Sample]) -> list[Tensor]:
    """Return the pixels alone."""
    return [sample.pixels for sample in samples]
