"""Images as networks take them: (N, C, *space), read as often as passes over them are made, each checked.

Statistics are measured in several passes, so a generator is refused; files are read and scaled once in each pass, one
at a time, and the one that was read last is kept: a single image is decoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from normfix.errors import NormfixError
from normfix.images.axes import to_tensor
from normfix.images.contents import Contents
from normfix.images.draws import Draws
from normfix.images.files import read_all
from normfix.images.scaling import not_finite, overflown, scaled
from normfix.images.sources import Image, TensorImage, middle_of, whole
from normfix.images.views import Part
from normfix.images.windows import Unread
from normfix.records.saved import Scaling

__all__ = ["ImageFiles", "Images", "is_by_window"]


Padding = Callable[[Sequence[int]], Sequence[int]]
"""From the extents of an image to the pixels that it is extended by at its end."""


@dataclass(frozen=True, slots=True)
class Images:
    """Re-iterable images for a network: tensors, each checked, on one device and in one dtype, or read by window.

    `like` is a shape whose channels and axes tensors have; `padding` extends each image; `read` makes tensors of what
    is none, given its number.
    """

    images: Iterable[Any]
    device: torch.device
    dtype: torch.dtype
    count: int
    like: tuple[int, ...] | None = None
    padding: Padding | None = None
    read: Callable[[int, object], object] = lambda number, given: given
    _draws: Draws = field(default_factory=Draws)

    def __iter__(self) -> Iterator[Image]:
        """Yield the images; a tensor is loaded when its turn comes.

        Raises:
            NormfixError: NF104 for NaN or infinity, NF106 for what is no image (N, C, *space), NF331 if it is none
                of the first pass.
        """
        draw = self._draws.begin()
        for number, given in enumerate(self.images):
            image: Image
            if is_by_window(given):
                image = given
            else:
                tensor = self._taken(self.read(number, given), f"image {number}")
                draw.note(tensor, f"image {number}")
                image = TensorImage(tensor.to(self.device))
            yield image if self.padding is None else image.padded(self.padding(image.shape[2:]))
        draw.end()

    def __len__(self) -> int:
        return self.count

    @property
    def by_window(self) -> bool:
        """Tell whether one of them is read by window: as a rule it does not fit."""
        return isinstance(self.images, Sequence) and any(map(is_by_window, self.images))

    def excerpt(self) -> Tensor:
        """Return what whole forward passes are made on: the first image, of one read by window its middle."""
        return (middle_of if self.by_window else whole)(next(iter(self)))

    def only(self) -> Image:
        """Return the image where one is taken.

        Raises:
            NormfixError: NF530 if there are several.
        """
        if self.count != 1:
            raise NormfixError(
                "NF530",
                f"one image is taken here, and these are {self.count}. Give them one by one.",
                where="image",
            )
        return next(iter(self))

    def _taken(self, given: object, where: str) -> Tensor:
        checked = _checked(given, where, self.dtype)
        if self.like is not None:
            _require_like(checked, self.like, where)
        return checked

    @classmethod
    def of(
        cls,
        images: Tensor | Image | Iterable[Any],
        device: torch.device,
        dtype: torch.dtype,
        like: tuple[int, ...] | None = None,
        read: Callable[[int, object], object] = lambda number, given: given,
    ) -> Images:
        """Take one image or a re-iterable of them.

        Raises:
            NormfixError: NF103 for a generator, which could be read only once, for an empty collection and for
                what cannot be iterated.
        """
        given: Any = [images] if isinstance(images, Tensor) or is_by_window(images) else images
        try:
            iterator = iter(given)
        except TypeError as error:
            raise NormfixError(
                "NF103",
                f"expected tensors (N, C, *space), got {type(images).__name__}. Give a tensor or a list of them.",
                where="images",
            ) from error
        if iterator is given:
            raise NormfixError(
                "NF103",
                "images were given as a generator, but they are read several times. Give a list, a dataset or "
                "another object that can be iterated again.",
                where="images",
            )
        count = len(given) if isinstance(given, Sized) else sum(1 for _ in given)
        if count == 0:
            raise NormfixError(
                "NF103", "no image was given, and statistics need at least one.", where="images"
            )
        return cls(given, device, dtype, count, like, read=read)


def is_by_window(given: object) -> TypeGuard[Image]:
    """Tell whether it is read by window."""
    return not isinstance(given, Tensor) and hasattr(given, "read") and hasattr(given, "padded")


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Image files as a re-iterable of (1, C, *space) tensors, each read and scaled when its turn comes.

    `open` opens one (normfix.images.files.open_windows). The last is kept, and not to be written to. A file that is
    read again must hold the same values again. `tell` is told once what a user should know of one. `part` is what of
    each is meant; the planes of a stack are N of (N, C, *space), each scaled by itself.
    """

    paths: Sequence[Path]
    open: Callable[..., Unread]
    scaling: Scaling | None
    tell: Callable[[str], None] = lambda text: None
    part: Part = field(default_factory=Part)
    _contents: dict[tuple[int, int], Contents | None] = field(default_factory=dict)
    _last: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield tensors.

        Raises:
            NormfixError: NF331 if a file holds other values than before, NF107 of the scaling, and codes of
                `read_image`.
        """
        for number, path in enumerate(self.paths):
            yield self.read(number, path)

    def unscaled(self) -> ImageFiles:
        """Return the same images as they are in their files, for pictures of them."""
        return replace(self, scaling=Scaling(), tell=lambda text: None, _contents={}, _last={})

    def read(self, number: int, path: Path) -> Tensor:
        """Return the image of that number; raises as iterating does."""
        if number not in self._last:
            self._last.clear()  # before the next is there, too
            self._last[number] = self._read(number, path)
        return self._last[number]

    def _read(self, number: int, path: Path) -> Tensor:
        first, planes = self._plane(number, path, 0)
        others = (self._plane(number, path, plane)[0] for plane in range(1, planes))
        return first if planes == 1 else torch.cat([first, *others])

    def _plane(self, number: int, path: Path, plane: int) -> tuple[Tensor, int]:
        """Read a plane, or all that there is; return how many planes there are too."""
        key, where = (number, plane), f"{path}, plane {plane}" if self.part.slices else str(path)
        with self.open(path, part=replace(self.part, plane=plane)) as window:
            if key in self._contents:
                window = replace(window, contents=self._contents[key])
            elif not plane:
                for text in window.notes:
                    self.tell(f"{path}: {text}")
            array = read_all(window, path)
            self._contents[key] = window.contents
        return to_tensor(scaled(array, self.scaling, where)), window.planes


def _require_like(image: Tensor, like: tuple[int, ...], where: str) -> None:
    """Refuse an image of another number of channels or axes than the network was scanned with."""
    if image.dim() != len(like) or image.shape[1] != like[1]:
        raise NormfixError(
            "NF106",
            f"the network takes (N, {like[1]}, *space) with {len(like) - 2} spatial axes, the image is "
            f"{tuple(image.shape)}. Select channels or move axes first.",
            where=where,
        )


def _checked(image: object, where: str, dtype: torch.dtype) -> Tensor:
    """Return the image in `dtype`, in which it must be finite too."""
    if not isinstance(image, Tensor) or image.layout != torch.strided or image.is_meta:
        kind = f"{image.layout} on {image.device}" if isinstance(image, Tensor) else type(image).__name__
        raise _no_image(kind, where)
    if image.dim() < 3 or not image.numel() or not image.is_floating_point():
        raise _no_image(f"{image.dtype} of shape {tuple(image.shape)}", where)
    if not torch.isfinite(image).all():
        raise not_finite(where)
    cast = image.to(dtype)
    if cast is not image and not torch.isfinite(cast).all():
        raise overflown(where, str(dtype).removeprefix("torch."))
    return cast


def _no_image(what: str, where: str) -> NormfixError:
    return NormfixError(
        "NF106",
        f"expected a floating tensor (N, C, *space) with its values, got {what}. Convert and scale it first.",
        where=where,
    )
