"""Calibrate without the pixels that a mask ignores: masks are brought to their images, statistics checked for sense.

In stages a block knows which of its positions count (normfix.tiling.stages.blocks); passes over whole images know no
masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfix.conversion.keys import KeysTarget
from normfix.conversion.targets import StatisticTarget, Target
from normfix.errors import NormfixError
from normfix.images.files import open_windows as open_file
from normfix.images.sources import Image, TensorImage, slabs
from normfix.images.windows import ScaledImage
from normfix.tiling.stages.masks import Masked, mask_of

__all__ = ["ESTIMATED", "Mask", "ignored_pixels", "masked", "open_mask", "require_maskable"]

Mask = Tensor | np.ndarray[Any, Any] | Path | str | Image
"""Nonzero where a pixel is ignored; of the image's extents, with or without leading axes of extent 1."""

ESTIMATED = frozenset({"mean", "variance", "deviation", "variance_mean", "deviation_mean"})
"""Laws whose value over a part of the pixels estimates that over all."""

_LAWS = ESTIMATED | {"maximum", "minimum", "extremes"}
"""Laws of values that do not grow with the number of pixels."""


def masked(images: Sequence[Image], mask: Mask | Sequence[Mask], opened: ExitStack) -> list[Masked]:
    """Give each image its mask; files are closed with `opened`.

    Raises:
        NormfixError: NF137 for another number of masks or other extents than the images', NF138 for an image that
            is ignored altogether, NF101 for a file that cannot be read.
    """
    masks = [_taken(one, number) for number, one in enumerate(_listed(mask))]
    if len(masks) != len(images):
        raise NormfixError(
            "NF137",
            f"{len(masks)} masks were given for {len(images)} images. Give one for each, in their order.",
            where="mask",
        )
    found = []
    for number, (image, one) in enumerate(zip(images, masks, strict=True)):
        where = str(one) if isinstance(one, Path | str) else f"mask {number}"
        source = _source(one, len(image.shape) - 2, opened)
        if source.shape != (1, 1, *image.shape[2:]) or image.shape[0] != 1:
            raise NormfixError(
                "NF137",
                f"the mask is {tuple(source.shape)} and its image {tuple(image.shape)} (N, C, *space). A mask has the "
                "extents of one image, without channels.",
                where=where,
            )
        both = Masked(image, source)
        if ignored_pixels(both) == math.prod(image.shape[2:]):
            raise NormfixError(
                "NF138",
                "it ignores every pixel of its image. Nonzero means ignored: leave the image out, or invert the mask.",
                where=where,
            )
        found.append(both)
    return found


def _listed(mask: Mask | Sequence[Mask]) -> list[Any]:
    """Return masks as a list of them; what is no collection is one."""
    single = isinstance(mask, Tensor | Path | str) or hasattr(mask, "padded") or _is_array(mask)
    return [mask] if single or not isinstance(mask, Iterable) else list(mask)


def _taken(mask: Any, number: int) -> Mask:
    """Return a mask as a tensor of truth values, or as the name or window that it is."""
    if isinstance(mask, Path | str) or hasattr(mask, "padded"):
        return mask  # type: ignore[no-any-return]
    if isinstance(mask, Tensor):
        return (mask.to_dense() if mask.layout != torch.strided else mask) != 0
    if _is_array(mask):
        array = np.asarray(mask)
        if array.dtype.kind in "buifcO":
            return torch.as_tensor(np.asarray(array != 0, dtype=bool))
    raise NormfixError(
        "NF137",
        f"a mask is a tensor, an array of numbers or a file, not {type(mask).__name__}; of an image without one give "
        "a mask of zeros.",
        where=f"mask {number}",
    )


def _is_array(mask: object) -> bool:
    """Tell whether it is an array of numpy, zarr, h5py, dask or the like."""
    return all(hasattr(mask, name) for name in ("shape", "dtype", "__array__"))


def open_mask(path: Path, ndim: int, axes: str | None = None) -> ScaledImage:
    """Open a mask file to be read by window; `axes` names its axes, without channels.

    Raises:
        NormfixError: NF101 and NF106 of the file.
    """
    return ScaledImage(open_file(path, ndim=ndim, channels=1, axes=axes), dtype=torch.float64)


def ignored_pixels(image: Image) -> int:
    """Return how many pixels of an image its mask ignores, read in slabs."""
    mask = mask_of(image)
    if mask is None:
        return 0
    return sum(int((mask.read(spans) != 0).sum()) for spans in slabs(mask.shape[2:]))


def require_maskable(targets: Sequence[Target], images: Sequence[Image]) -> None:
    """Refuse statistics that have no meaning for a part of the image.

    Raises:
        NormfixError: NF139 with the site.
    """
    if not any(mask_of(image) is not None for image in images):
        return
    for target in targets:
        if isinstance(target, KeysTarget):
            raise NormfixError(
                "NF139",
                "the keys of an image are all of its positions, so that none can be ignored. Calibrate without a mask.",
                where=target.name,
            )
        if isinstance(target, StatisticTarget) and (target.dims is None or target.spec.law not in _LAWS):
            law = "quotient" if target.spec.quotient else target.spec.law
            raise NormfixError(
                "NF139",
                f"a mask cannot be brought to it: its value ({law}) depends on how many pixels there are, or has no "
                "law. Calibrate without a mask, or crop the images instead.",
                where=target.name,
            )


def _source(mask: Mask, ndim: int, opened: ExitStack) -> Image:
    """Return a mask as (1, 1, *space) to be read by window."""
    if isinstance(mask, Path | str):
        return opened.enter_context(open_mask(Path(mask), ndim))
    if isinstance(mask, Tensor):
        space = mask.shape[max(0, mask.dim() - ndim) :]
        fits = len(space) == ndim and math.prod(space) == mask.numel()
        return TensorImage(mask.reshape(1, 1, *space) if fits else mask)
    return mask  # type: ignore[return-value]
