"""What images are read from: one protocol, by window, for tensors in memory and for files and arrays that are not."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from normfix.networks.devices import bytes_of

__all__ = [
    "Cut",
    "Image",
    "Span",
    "TensorImage",
    "confirm",
    "digest_of",
    "each_of",
    "is_constant",
    "middle_of",
    "slabs",
    "values_digest",
    "whole",
]

Span = tuple[int, int]
"""First and past-the-last position along one axis."""

_SLAB = 1 << 22


class Image(Protocol):
    """An image (N, C, *space) that gives windows of itself."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the extents of all dimensions."""

    def read(self, window: Sequence[Span]) -> Tensor:
        """Return (N, C, *window) in the dtype and on the device the network computes in."""

    def padded(self, padding: Sequence[int]) -> Image:
        """Return the same image extended at its end by its edge pixels, by so many more per axis."""

    def fingerprint(self) -> str:
        """Return what differs if anything that `read` returns does."""


class TensorImage:
    """A tensor that is in memory anyway, extended at its end by its edge pixels."""

    def __init__(self, image: Tensor, padding: Sequence[int] = ()) -> None:
        self._image = image
        self._padding = tuple(padding) or (0,) * (image.dim() - 2)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the extents, padding included."""
        space = (n + p for n, p in zip(self._image.shape[2:], self._padding, strict=True))
        return (*self._image.shape[:2], *space)

    def padded(self, padding: Sequence[int]) -> TensorImage:
        """Return the same image extended by so many pixels more per axis."""
        return TensorImage(self._image, tuple(map(sum, zip(self._padding, padding, strict=True))))

    def read(self, window: Sequence[Span]) -> Tensor:
        """Return a window."""
        x = self._image
        for axis, (start, stop) in enumerate(window, start=2):
            n = x.shape[axis]
            if stop <= n:
                x = x.narrow(axis, start, stop - start)
            else:
                x = x.index_select(axis, torch.arange(start, stop, device=x.device).clamp_max(n - 1))
        return x

    def fingerprint(self) -> str:
        """Return a digest of the values; see Image."""
        return f"tensor {self._image.dtype} {self.shape} {values_digest(TensorImage(self._image))}"


class Cut:
    """A window of an image, or of one of a batch, as an image of its own."""

    def __init__(self, image: Image, spans: Sequence[Span], number: int | None = None) -> None:
        self._image, self._spans, self._number = image, tuple(spans), number

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the extents."""
        batch, channels, *_ = self._image.shape
        space = (stop - start for start, stop in self._spans)
        return (batch if self._number is None else 1, channels, *space)

    def padded(self, padding: Sequence[int]) -> Image:
        """Return the same window, extended by its edge pixels."""
        return TensorImage(whole(self)).padded(padding) if any(padding) else self

    def read(self, window: Sequence[Span]) -> Tensor:
        """Return a part of the window."""
        pairs = zip(window, self._spans, strict=True)
        found = self._image.read([(first + start, first + stop) for (start, stop), (first, _) in pairs])
        return found if self._number is None else found.narrow(0, self._number, 1)

    def fingerprint(self) -> str:
        """Return that of the image, and where the window lies in it; see Image."""
        where = self._spans if self._number is None else (self._number, *self._spans)
        return f"{where} of {self._image.fingerprint()}"

    def confirm(self) -> None:
        """Make sure that the image is what was read of it; see `confirm`."""
        confirm(self._image)


def confirm(image: Image | Tensor) -> None:
    """Make sure, when work on it is done, that an image that is read by window was one image all the while.

    Raises:
        NormfixError: NF331 if it lies in a file which is now another than was read.
    """
    ask = getattr(image, "confirm", None)
    if ask is not None:
        ask()


def each_of(image: Image) -> list[Image]:
    """Return the images of a batch, each as an image of its own."""
    count, _, *space = image.shape
    whole_of = [(0, n) for n in space]
    return [image] if count == 1 else [Cut(image, whole_of, number) for number in range(count)]


def whole(image: Image) -> Tensor:
    """Return all of an image."""
    return image.read([(0, n) for n in image.shape[2:]])


def middle_of(image: Image) -> Tensor:
    """Return the middle of an image that is read by window, small enough for whole forward passes."""
    limit = {1: 1 << 14, 2: 512, 3: 96}[len(image.shape) - 2]
    starts = [max(0, (n - limit) // 2) for n in image.shape[2:]]
    return image.read(
        [(start, min(n, start + limit)) for start, n in zip(starts, image.shape[2:], strict=True)]
    )


def is_constant(image: Image) -> bool:
    """Tell whether an image is one constant per channel; read no further than to the first value that differs."""
    space = image.shape[2:]
    pixel = image.read([(0, 1)] * len(space))
    return all(bool((image.read(spans) == pixel).all()) for spans in slabs(space))


def values_digest(source: Image) -> str:
    """Return the digest of all values of a source, read by window."""
    batch, channels, *space = source.shape
    return digest_of(lambda window: _bytes(source.read(window)), space, batch * channels)


def digest_of(read: Callable[[Sequence[Span]], bytes], space: Sequence[int], values: int) -> str:
    """Return the SHA-256 of an image that is read in slabs of about four million values.

    Args:
        read: returns the bytes of a window.
        space: extents of the image.
        values: per pixel.
    """
    found = hashlib.sha256()
    for spans in slabs(space, values):
        found.update(read(spans))
    return found.hexdigest()


def slabs(space: Sequence[int], values: int = 1) -> Iterator[tuple[Span, ...]]:
    """Yield windows along the first axis that cover an image, each of about four million values.

    Args:
        space: extents of the image.
        values: per pixel.
    """
    first, *rest = space
    step = max(1, _SLAB // max(1, values * math.prod(rest)))
    for start in range(0, first, step):
        yield ((start, min(first, start + step)), *((0, n) for n in rest))


def _bytes(x: Tensor) -> bytes:
    return bytes_of(x).tobytes()
