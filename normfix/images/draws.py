"""Whether each pass over images reads the same ones, in any order, by digests of what it reads.

Statistics are measured site by site, in a pass each. A data set that augments at random gives other images in each, and
constants of one network would be of different images. The first whole pass says which images there are; a loader may
give them in another order later, and in other batches.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from torch import Tensor

from normfix.errors import NormfixError
from normfix.networks.devices import bytes_of

__all__ = ["Draws", "Pass"]


class Draws:
    """The images of the first whole pass, each of a batch by itself."""

    def __init__(self) -> None:
        self.first: Counter[bytes] | None = None

    def begin(self) -> Pass:
        """Begin a pass."""
        return Pass(self)


class Pass:
    """One pass over images, which may end before all are read."""

    def __init__(self, draws: Draws) -> None:
        self._draws, self._read = draws, Counter[bytes]()
        self._first = draws.first

    def note(self, batch: Tensor, where: str) -> None:
        """Take note of a batch (N, C, *space) that is read now.

        Raises:
            NormfixError: NF331 if the first pass did not read one of its images, or not as often.
        """
        for image in batch:
            digest = hashlib.sha256(f"{image.dtype} {tuple(image.shape)}".encode())
            digest.update(bytes_of(image))
            found = digest.digest()
            self._read[found] += 1
            if self._first is not None and self._read[found] > self._first[found]:
                raise _drawn_anew("gave an image that the first did not give", where)

    def end(self) -> None:
        """End a pass that read all there is.

        Raises:
            NormfixError: NF331 if it read fewer images than the first.
        """
        if self._first is not None and self._read.total() < self._first.total():
            raise _drawn_anew(
                f"gave {self._read.total()} images, and the first {self._first.total()}", "images"
            )
        if self._draws.first is None:
            self._draws.first = self._read


def _drawn_anew(what: str, where: str) -> NormfixError:
    return NormfixError(
        "NF331",
        f"a later pass over the images {what}, so constants would be of different images. Where they are drawn at "
        "random (augmentation, crops, noise), switch that off or draw them once: list(images).",
        where=where,
    )
