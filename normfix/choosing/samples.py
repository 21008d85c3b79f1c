"""What is held out in turn: one image after another, the halves of the only one, or parts of what is too large."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfix.choosing.bench import Sample
from normfix.errors import NormfixError
from normfix.images.axes import digest_of_array
from normfix.images.collections import Images
from normfix.images.sources import Image, Span, TensorImage, whole
from normfix.tiling.grid import Geometry

__all__ = ["Fold", "folds_of", "samples_of", "tensors_of"]

_FOLDS = 5
"""Of several images: more folds cost more and say little more."""

_LARGE = 1 << 24
"""Values of an image that is read by window from which parts of it stand for all of it."""

_EXTENT = {1: 1 << 14, 2: 512, 3: 96}
"""Pixels per axis of such a part, by the number of axes, as of the middle that a conversion is proved on."""

_PARTS = 8
"""Parts that are drawn, of all images together: with four and more a recommendation can be sure."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Constants are measured on some images, and judged on others."""

    measured: tuple[Sample, ...]
    judged: tuple[Sample, ...]


def samples_of(images: Images, labels: Any, window: Sequence[int] = ()) -> list[Sample]:
    """Return the images, a batch one by one, each with its labels; of one too large for that, parts drawn at random.

    Parts share no pixel, cover the image like tiles, and are larger than `window`; the generator that draws them has a
    seed of its own. Labels of such an image are read where its parts lie.

    Args:
        images: in memory, or read by window.
        labels: none; of one image an array; of several one for each.
        window: extents of the windows in training, one number or one per axis.

    Raises:
        NormfixError: NF557 if labels are not one for each, NF604 for labels that do not cover a large image.
    """
    wholes = list(_singles(images))
    listed = [None] * len(wholes) if labels is None else _listed(labels, len(wholes))
    most = max(2, _PARTS // len(wholes))
    pairs = enumerate(zip(wholes, listed, strict=True))
    return [s for n, (image, own) in pairs for s in _sampled(f"image {n}", image, own, window, most)]


def _singles(images: Images) -> Iterator[Image]:
    for image in images:
        if isinstance(image, TensorImage):
            yield from (TensorImage(one[None]) for one in whole(image))
        else:
            yield image


def _listed(labels: Any, count: int) -> list[Any]:
    listed = list(labels) if isinstance(labels, list | tuple) else [labels]
    if count > 1 == len(listed) and np.ndim(listed[0]) > 2 and len(listed[0]) == count:
        listed = list(listed[0])
    if len(listed) != count:
        raise NormfixError(
            "NF557",
            f"there are {count} images and {len(listed)} labels. Give labels for each image, in its order.",
            where="labels",
        )
    return listed


def _sampled(name: str, image: Image, labels: Any, window: Sequence[int], most: int) -> Iterator[Sample]:
    """Yield an image whole, or parts of it."""
    space = image.shape[2:]
    if isinstance(image, TensorImage) or math.prod(image.shape) <= _LARGE:
        yield Sample(name, whole(image), None if labels is None else np.asarray(labels))
        return
    if labels is not None and np.shape(labels)[-len(space) :] != tuple(space):
        raise NormfixError(
            "NF604",
            f"labels of shape {np.shape(labels)} are of no image of extents {tuple(space)}.",
            where=name,
        )
    tiles = _tiles(space, window)
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0)).tolist()
    for spans in (tiles[number] for number in sorted(order[:most])):
        own = None if labels is None else np.asarray(labels[(..., *(slice(*span) for span in spans))])
        place = ", ".join(f"{start}:{stop}" for start, stop in spans)
        yield Sample(f"{name} at {place}", image.read(spans), own, part=True)


def _tiles(space: Sequence[int], window: Sequence[int]) -> list[tuple[Span, ...]]:
    """Return what covers an image without overlap, in parts of at least two windows and of whole multiples of 32."""
    sizes = window if len(window) == len(space) else (tuple(window) or (0,)) * len(space)
    axes = []
    for extent, size in zip(space, sizes, strict=True):
        count = max(1, extent // max(_EXTENT[len(space)], 2 * size))
        step = extent // count
        step -= step % 32 if count > 1 else 0
        axes.append([(n * step, (n + 1) * step) for n in range(count)])
    return list(product(*axes))


def folds_of(samples: Sequence[Sample], geometry: Geometry) -> list[Fold]:
    """Return what is held out in turn; an image that is there twice is held out with its copies.

    Raises:
        NormfixError: NF556 for one image that is too small to be halved.
    """
    images = _distinct(samples)
    if len(images) == 1:
        halves = [_halves(sample, geometry) for sample in samples]
        one, other = tuple(first for first, _ in halves), tuple(second for _, second in halves)
        return [Fold(one, other), Fold(other, one)]
    count = min(_FOLDS, len(images))
    parts = [tuple(sample for copies in images[k::count] for sample in copies) for k in range(count)]
    return [Fold(tuple(_without(parts, k)), judged) for k, judged in enumerate(parts)]


def _distinct(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Return the images, each with its copies: under another name a file is the same image."""
    images: dict[tuple[torch.Size, bytes], list[Sample]] = {}
    for sample in samples:
        pixels = sample.pixels.detach().cpu()
        digest = digest_of_array(pixels.double().numpy())  # numpy has no bfloat16
        images.setdefault((pixels.shape, digest), []).append(sample)
    return list(images.values())


def _without(parts: Sequence[Sequence[Sample]], k: int) -> Iterator[Sample]:
    return (sample for number, part in enumerate(parts) if number != k for sample in part)


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
