"""check for pipelines: functions that a user tiles with, compared with themselves on crops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfix.errors import NormfixError
from normfix.networks.numerics import IDENTITY, exact_arithmetic, settings
from normfix.proof.comparison import EXCUSED
from normfix.proof.crops import Crop, Difference, crops, disagreement, predicted, put_back
from normfix.proof.indicators import differences, recognise, spread_of
from normfix.proof.views import Viewer, viewed
from normfix.records.sites import Finding
from normfix.records.spans import per_axis
from normfix.records.verdicts import Verdict
from normfix.reporting.maps import Maps

__all__ = ["check_pipeline", "space_of"]

Pipeline = Callable[..., Any]


def check_pipeline(
    predict: Pipeline,
    image: Any,
    tile: int | Sequence[int],
    *,
    stride: int = 32,
    margin: int | None = None,
    threshold: float | None = None,
    viewer: Viewer | None = None,
) -> Verdict:
    """Compare predict(image) with predict(crops of image), away from the cuts.

    Args:
        predict: takes and returns arrays or tensors; (H, W), (C, *space) or (N, C, *space).
        image: what it takes.
        tile: about how large its tiles are, so that crops move them by half of one.
        stride: of the network; crops are multiples of it.
        margin: pixels from a cut that do not count; default: a quarter of the smallest axis, at most 64. It must
            be at least the network's halo, else a correct pipeline differs too.
        threshold: largest difference in sd that passes; default 1e-3.
        viewer: is given the whole prediction and that of the worst crop, put back into it.

    Raises:
        NormfixError: NF402 for a tile of no whole numbers, NF605 if the function fails, answers other extents, or
            another time something else.
    """
    space = space_of(image)
    size = tuple(image.shape[-space:])
    cut = min(64, min(size) // 4) if margin is None else margin
    extents = per_axis(tile, space)
    if extents is None:
        raise NormfixError("NF402", f"give 1 or {space} whole numbers of pixels, not {tile!r}.", where="tile")
    with exact_arithmetic():
        whole = predicted(predict, image, space)
        again = predicted(predict, image, space)
        kind = recognise(whole)
        sd = spread_of(whole, kind)
        noise = float(differences(again, whole, kind, sd).max()) if sd > 0 else 0.0
        if noise > EXCUSED:
            raise NormfixError(
                "NF605",
                f"two runs on one image differ by {noise:.2g} sd, so nothing can be compared. Switch random "
                "augmentation and dropout off.",
                where="the pipeline",
            )
        found = [
            disagreement(predict, image, space, whole, crop, cut)
            for crop in crops(size, extents, stride, cut)
        ]
        worst = max(found, key=lambda d: d.max_sd, default=None)
        if viewer is not None and worst is not None:
            viewer(_view(predict, image, space, whole, worst.crop))
    return _verdict(found, sd, noise, threshold, extents, stride, cut, space)


def _view(predict: Pipeline, image: Any, space: int, whole: Tensor, crop: Crop) -> Maps:
    """Return the arrays of a crop that was predicted by itself, put back into the whole prediction."""
    pixels = torch.as_tensor(np.asarray(image)).reshape(1, -1, *whole.shape[2:])
    back, border = put_back(predict, image, space, whole, crop)
    cuts = tuple((border,) if axis == crop.axis else () for axis in range(space))
    view = viewed(pixels, whole, back, cuts)
    return replace(view, names=("image predicted whole", "a crop predicted by itself, put back"))


def space_of(image: Any) -> int:
    """Return the number of spatial axes: all but (N, C) of a tensor, all but C of an array, two at least."""
    axes = image.ndim - 2 if isinstance(image, Tensor) else max(2, image.ndim - 1)
    if not 1 <= axes <= 3:
        raise NormfixError(
            "NF106", f"an image of shape {tuple(image.shape)} has no 1 to 3 spatial axes.", where="image"
        )
    return axes


def _verdict(
    found: Sequence[Difference],
    sd: float,
    noise: float,
    threshold: float | None,
    tile: tuple[int, ...],
    stride: int,
    margin: int,
    space: int,
) -> Verdict:
    limit = EXCUSED if threshold is None else threshold
    tolerance = min(IDENTITY[torch.float32], limit)
    worst = max(found, key=lambda d: d.max_sd, default=None)
    largest = worst.max_sd if worst else 0.0
    reasons = [
        Finding(code="NF608", where=str(d.crop), message=f"the prediction moves by up to {d.max_sd:.2g} sd.")
        for d in found
        if d.max_sd > limit
    ]
    if worst and tolerance < largest <= limit:
        reasons.append(
            Finding(code="NF408", where=str(worst.crop), message=f"{largest:.1e} sd, within {limit:.1e}.")
        )
    if not found:
        message = f"nothing is left {margin} pixels from the cuts of any crop. Give a larger image or a smaller margin."
        reasons.append(Finding(code="NF407", where="image", message=message))
    if not sd > 0:
        reasons.append(Finding(code="NF606", where="output", message="it is constant or not finite."))
    compared = bool(found) and sd > 0
    known = [d.dice for d in found if d.dice is not None]
    return Verdict(
        status="inconclusive" if not compared else "failed" if largest > limit else "passed",
        max_sd=largest,
        mean_sd=max((d.mean_sd for d in found), default=0.0),
        tile_mismatch=max(known, default=None),
        noise=noise,
        tolerance=tolerance,
        threshold=limit,
        sd=sd,
        tile=tile,
        halo=((margin, margin),) * space,
        stride=(stride,) * space,
        padding=(0,) * space,
        axes=tuple(sorted({d.crop.axis for d in found})),
        windows=len(found),
        interference=(),
        findings=tuple(reasons),
        settings=(
            *settings(torch.device("cpu"), torch.float32),
            ("margin", str(margin)),
            ("compared", "crops"),
        ),
    )
