"""What a prediction is written as: the network's numbers, or the classes, probabilities or masks that they mean.

Logits are turned into probabilities by the softmax over channels, which exclude each other, or by the sigmoid of each.
Whether numbers are logits is asked of all of them: probabilities lie from 0 to 1, and of an image's logits some do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from normfix.errors import NormfixError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Logits", "Rendering"]

Kind = Literal["raw", "classes", "probabilities", "mask"]
Logits = Literal["softmax", "sigmoid", "none"]

_ROUNDING = 1e-5
"""By which a softmax in float32 may leave 0 to 1."""

_ON = 255
"""Of a mask, as Fiji has them."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """How the output of a network becomes what is written.

    `logits` is what makes probabilities of it: None is the softmax of several channels and the sigmoid of one, "none"
    says that it is probabilities already.
    """

    kind: Kind = "raw"
    logits: Logits | None = None
    threshold: float = 0.5

    @classmethod
    def parse(cls, text: str, logits: str | None = None) -> Rendering:
        """Read `raw`, `classes`, `probabilities` or `mask[:THRESHOLD]`, and softmax, sigmoid or none.

        Raises:
            NormfixError: NF534 for anything else, and for two that contradict each other.

        Example:
            >>> from normfix.images.rendering import Rendering
            >>> Rendering.parse("mask:0.3").threshold
            0.3
        """
        kind, _, number = text.partition(":")
        threshold = _threshold(number) if kind == "mask" and ":" in text else None if ":" in text else 0.5
        if kind not in get_args(Kind) or threshold is None:
            raise NormfixError(
                "NF534",
                "give raw, classes, probabilities, mask or mask:THRESHOLD with a probability above 0 and below 1.",
                where=f"as {text}",
            )
        if logits not in (None, *get_args(Logits)):
            raise NormfixError("NF534", "give softmax, sigmoid or none.", where=f"logits {logits}")
        if (kind, logits) == ("classes", "sigmoid") or (kind == "raw" and logits is not None):
            raise NormfixError(
                "NF534",
                f"{kind} and {logits} contradict each other: classes exclude each other, and raw numbers are not "
                "turned into anything.",
                where=f"as {text}",
            )
        return cls(cast(Kind, kind), cast("Logits | None", logits), threshold)

    @property
    def is_of_probabilities(self) -> bool:
        """Tell whether probabilities are made, so that the range of what they are made of says whether it fits."""
        return self.kind in ("probabilities", "mask")

    def channels(self, count: int) -> int:
        """Return how many channels there will be of so many.

        Raises:
            NormfixError: NF534 where so many channels have no such meaning.
        """
        several = count > 1
        if self.kind == "classes" and not several:
            raise self._meaningless(
                count, "Classes are the largest of several. For one, ask for mask or probabilities."
            )
        if self.kind == "mask" and several and self.logits not in ("sigmoid", "none"):
            raise self._meaningless(
                count,
                "A mask is of one. Ask for classes, or say that each is a mask by itself with logits sigmoid.",
            )
        if self.logits == "softmax" and not several and self.kind != "raw":
            raise self._meaningless(
                count, "The softmax of one is 1 everywhere. Leave it out, or say sigmoid."
            )
        return 1 if self.kind == "classes" else count

    def dtype(self, count: int, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a network's output of so many channels will have."""
        import torch

        match self.kind:
            case "classes":
                return torch.uint8 if count <= 256 else torch.uint16
            case "mask":
                return torch.uint8
            case "probabilities":
                return torch.float32
        return dtype

    def shown(self, count: int) -> tuple[float, float] | None:
        """Return the darkest and brightest value of an output of so many channels; None if they may be any."""
        ranges = {"classes": (0, max(count - 1, 1)), "mask": (0, 255), "probabilities": (0, 1)}
        return ranges.get(self.kind)

    def of(self, values: Tensor) -> Tensor:
        """Return what values (N, C, *space) mean."""
        count = values.shape[1]
        if self.kind == "raw":
            return values
        if self.kind == "classes":
            return values.argmax(1, keepdim=True).to(self.dtype(count, values.dtype))
        probabilities = values.float()
        if self.logits == "softmax" or (self.logits is None and count > 1):
            probabilities = probabilities.softmax(1)
        elif self.logits != "none":
            probabilities = probabilities.sigmoid()
        if self.kind == "probabilities":
            return probabilities
        return (probabilities > self.threshold).to(self.dtype(count, values.dtype)) * _ON

    def require_logits(self, least: float, most: float) -> None:
        """Refuse a prediction whose range says that it is probabilities where logits are meant, or the reverse.

        Raises:
            NormfixError: NF535.
        """
        if not self.is_of_probabilities:
            return
        within = least >= -_ROUNDING and most <= 1 + _ROUNDING
        if within and self.logits != "none":
            raise NormfixError(
                "NF535",
                f"its values lie from {least:.3g} to {most:.3g}, as probabilities do and an image's logits do not. If "
                "they are probabilities, say so: --logits none (in Python logits='none').",
                where="prediction",
            )
        if not within and self.logits == "none":
            raise NormfixError(
                "NF535",
                f"its values lie from {least:.3g} to {most:.3g}, so they are no probabilities. Say what makes "
                "probabilities of them: --logits softmax or sigmoid.",
                where="prediction",
            )

    def _meaningless(self, count: int, todo: str) -> NormfixError:
        return NormfixError(
            "NF534", f"the network gives {count} channel{'s' * (count > 1)}. {todo}", where=f"as {self.kind}"
        )


def _threshold(text: str) -> float | None:
    try:
        threshold = float(text)
    except ValueError:
        return None
    return threshold if 0 < threshold < 1 else None
