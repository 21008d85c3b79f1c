"""Accuracy beside invariance: Dice with labels, and the user's own metric, of several predictions.

Invariance is not quality. A converted network predicts on tiles what the original predicts on the whole
image, right or wrong; only labels tell which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfix.errors import NormfixError, reason_of
from normfix.networks.calling import failures
from normfix.proof.indicators import foregrounds
from normfix.records.diagnoses import AccuracyRow, Kind
from normfix.tiling.grid import at

__all__ = ["Labels"]

Metric = Callable[[NDArray[Any], NDArray[Any]], float]


@dataclass(frozen=True, slots=True)
class Labels:
    """True labels (*space) of class numbers, or masks (C, *space), with the kind of output they judge."""

    values: Tensor
    kind: Kind
    metric: Metric | None

    @classmethod
    def of(
        cls, given: Any, size: Sequence[int], kind: Kind, metric: Metric | None, *, channels: int = 1
    ) -> Labels:
        """Take an array or tensor with the image's extents; a leading batch of one is dropped.

        Args:
            given: class numbers, or masks, one per channel of the output.
            size: extents of the image.
            kind: what the output means.
            metric: the caller's own.
            channels: of the output.

        Raises:
            NormfixError: NF604 if the extents differ, class numbers shall judge several channels that are each a
                mask of their own, or Dice is asked of what are no whole numbers.
        """
        values = _numbers(given)
        if metric is None and kind != "regression":
            _require_classes(values)
        if values.dim() == len(size) + 2 and values.shape[0] == 1:
            values = values[0]
        if tuple(values.shape[-len(size) :]) != tuple(size) or values.dim() not in (len(size), len(size) + 1):
            raise NormfixError(
                "NF604",
                f"labels of shape {tuple(values.shape)} do not lie on an image of {tuple(size)}.",
                where="labels",
            )
        values = values if values.dim() > len(size) else values[None]
        if kind in ("probability", "logits") and channels > 1 == values.shape[0]:
            raise NormfixError(
                "NF604",
                f"as {kind} each of the output's {channels} channels is a mask of its own, and the labels are one "
                "array of class numbers. If the largest channel is the class, say kind 'scores' (--kind scores); else "
                "give a mask per channel.",
                where="labels",
            )
        return cls(values, kind, metric)

    def row(self, name: str, prediction: Tensor) -> AccuracyRow:
        """Judge one prediction (1, C, *space).

        Raises:
            NormfixError: NF557 for a metric that fails or gives no number.
        """
        own = None
        if self.metric is not None:
            own = _scored(self.metric, prediction[0].float().cpu().numpy(), self.values.numpy())
        return AccuracyRow(prediction=name, dice=self._dice(prediction, self.values), metric=own)

    def dice_of_patches(
        self, predictions: Tensor, places: Sequence[tuple[slice, ...]], scale: Sequence[Fraction]
    ) -> float | None:
        """Judge predictions of patches of the image; None where output and image differ in scale."""
        if any(s != 1 for s in scale):
            return None
        there = torch.stack([self.values[at(place)] for place in places])
        if predictions.shape[2:] != there.shape[2:]:
            return None
        scores = [self._dice(p[None], truth) for p, truth in zip(predictions, there, strict=True)]
        known = [s for s in scores if s is not None]
        return sum(known) / len(known) if known else None

    def _dice(self, prediction: Tensor, truth: Tensor) -> float | None:
        """Return Dice of the foregrounds, 1 where both are empty; None for regression."""
        found = foregrounds(prediction, self.kind)
        if found is None or tuple(prediction.shape[2:]) != tuple(truth.shape[1:]):
            return None
        truth = truth.to(found.device)
        if self.kind in ("probability", "logits"):
            mine, true = found[0] > 0, truth > 0
            if mine.shape != true.shape:
                true = true.expand_as(mine)
            both = int((mine & true).sum())
        else:
            mine, true = found[0], truth
            both = int(((mine == true) & (mine > 0)).sum())
        total = int((mine > 0).sum()) + int((true > 0).sum())
        return 2 * both / total if total else 1.0


def _numbers(given: Any) -> Tensor:
    """Return labels in a type that torch compares: it only holds unsigned integers of more than 8 bits.

    Raises:
        NormfixError: NF604 for what are no real numbers, or no array of them.
    """
    if isinstance(given, Tensor) and (given.layout is not torch.strided or given.is_meta):
        raise NormfixError(
            "NF604",
            f"labels are an array of numbers, and these are a tensor of layout {given.layout} on {given.device}. Give "
            "labels.to_dense(), or values.",
            where="labels",
        )
    values = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    if values.dtype.kind not in "biuf":
        raise NormfixError(
            "NF604", f"labels are class numbers or masks, and these are {values.dtype}.", where="labels"
        )
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:
        largest = np.asarray(np.iinfo(np.int64).max, np.uint64)
        values = np.minimum(values, largest).astype(np.int64)
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return torch.as_tensor(np.require(native, requirements="W"))


def _require_classes(values: Tensor) -> None:
    """Refuse fractions and NaN: as masks all above 0 would be foreground, as class numbers they would equal none.

    Raises:
        NormfixError: NF604.
    """
    if not values.is_floating_point():
        return
    odd = values[values != values.round()]
    if odd.numel():
        raise NormfixError(
            "NF604",
            f"labels are class numbers or masks, and {odd.numel():,} of these are none, such as {float(odd[0]):.3g}. "
            "Round them, of probabilities labels > 0.5, or give a metric that takes them.",
            where="labels",
        )


def _scored(metric: Metric, prediction: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return what the caller's metric gives, which may change its arguments: others are judged by them too."""
    where = f"metric {getattr(metric, '__name__', type(metric).__name__)}"
    try:
        found = float(metric(prediction.copy(), labels.copy()))
    except NormfixError:
        raise
    except failures() as error:
        reason = reason_of(error)
        raise NormfixError(
            "NF557",
            f"it is to return one number for prediction and labels, arrays {prediction.shape} and {labels.shape}, and "
            f"failed: {reason}.",
            where=where,
        ) from error
    if not math.isfinite(found):
        raise NormfixError("NF557", f"the metric gave {found}, which is no score.", where=where)
    return found
