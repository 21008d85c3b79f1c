"""Images as a caller has them: files, folders, arrays and tensors, each read when its turn comes.

A tensor (N, C, *space) is what a network takes. Arrays and files hold pixel values: their axes are those that the file
names, or that the network leaves no doubt about, and they are scaled as its images were when it was converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from normfix.images.axes import Channels, to_tensor
from normfix.images.collections import ImageFiles, Images, is_by_window
from normfix.images.files import open_windows
from normfix.images.formats.opened import ArrayLike
from normfix.images.names import find_images
from normfix.images.opening import open_image, scaling_of
from normfix.images.scaling import scaled
from normfix.images.sources import Image
from normfix.images.views import Part
from normfix.images.windows import windowed
from normfix.networks.calling import Caller, home_of
from normfix.networks.intake import Intake
from normfix.records.saved import Scaling
from normfix.records.scalings import parse_scaling

__all__ = ["Given", "GivenImages", "files_of", "images_of", "opened", "read_images"]

Given: TypeAlias = Tensor | Image | ArrayLike | str | PathLike[str]
"""One image; a name may be that of a folder or a pattern, which are several."""

GivenImages: TypeAlias = Given | Iterable[Given]
"""One image, or several that can be iterated again."""


def images_of(
    images: GivenImages | Images,
    model: nn.Module,
    *,
    like: tuple[int, ...] | None = None,
    caller: Caller | None = None,
) -> Images:
    """Return images for a model: on its device, in its dtype, each checked and read when its turn comes.

    Args:
        images: one or a re-iterable of tensors (N, C, *space), images read by window, arrays ((N, C, *space), or one
            image with or without channels), files, folders and patterns; or what this returned before.
        model: says what it takes and how its images were scaled.
        like: shape of what it was scanned with; default: what it takes is found by running it.
        caller: calls it.

    Raises:
        NormfixError: NF101 for a name of nothing, NF103 for what cannot be read twice; iterating raises the codes of
            reading and scaling.
    """
    if isinstance(images, Images):
        return replace(images, like=like)
    reader = _Reader(model, like, caller or Caller())
    return Images.of(_listed(images), *home_of(model), like, reader.read)


def read_images(
    images: str | PathLike[str] | Sequence[str | PathLike[str]],
    model: nn.Module,
    *,
    axes: str | None = None,
    level: int = 0,
    series: str | None = None,
    scaling: Scaling | str | None = None,
    channels: Sequence[int] = (),
    slices: Literal["", "Z", "T"] = "",
) -> ImageFiles:
    """Return the images of files, folders and patterns, scaled for a model, each read whole when its turn comes.

    Args:
        images: one name or several; sorted within each.
        model: says how many channels and axes it takes.
        axes: one letter per array axis, C for channels, Z Y X for space.
        level: of a pyramid, 0 is the finest.
        series: name or number of the image, where a file holds several.
        scaling: such as "unit", "zscore" or "percentile:1,99.8"; default: what travels with the model. `convert` lets
            it travel with the result.
        channels: numbers of those to take, in this order; default: all.
        slices: axis of a stack whose planes are images of their own, N of (N, C, *space), each scaled by itself.

    Returns:
        A re-iterable of tensors (1, C, *space), which everything takes that takes images.

    Raises:
        NormfixError: NF101 for a name of nothing, NF107 for a scaling that is none; iterating raises the codes of
            reading and scaling, NF532 and NF533 for channels and planes that a file has not.

    Example:
        >>> import normfix, numpy, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> numpy.save("cells.npy", numpy.arange(30, dtype="uint8").reshape(5, 6))
        >>> [tuple(x.shape) for x in normfix.read_images("cells.npy", net, scaling="unit")]
        [(1, 1, 5, 6)]
    """
    names = [images] if isinstance(images, str | PathLike) else images
    stated = parse_scaling(scaling) if isinstance(scaling, str) else scaling
    return files_of(
        [str(name) for name in names],
        model,
        axes=axes,
        level=level,
        series=series,
        scaling=stated or scaling_of(model),
        part=Part(tuple(channels), slices),
    )


def files_of(
    names: Sequence[str],
    model: nn.Module,
    *,
    axes: str | None,
    level: int,
    series: str | None,
    scaling: Scaling | None,
    part: Part,
    tell: Callable[[str], None] = lambda text: None,
) -> ImageFiles:
    """Return the images of files, folders and patterns; see `read_images`. `tell` is told what to say."""
    intake = Intake(model)
    opens = partial(open_windows, ndim=intake.ndim, channels=intake, axes=axes, level=level, series=series)
    return ImageFiles(find_images(names), opens, scaling, tell=tell, part=part)


@contextmanager
def opened(image: Given, model: nn.Module) -> Iterator[Tensor | Image]:
    """Give one image, one that is a file or an array outside of memory by window, until the block is left."""
    if not _is_name(image) and (isinstance(image, np.ndarray) or not _is_array(image)):
        yield image  # type: ignore[misc]
        return
    with open_image(image, model) as window:
        yield window


class _Reader:
    """Makes tensors of arrays and files; what else there is stays as it is."""

    def __init__(self, model: nn.Module, like: tuple[int, ...] | None, caller: Caller) -> None:
        self._model, self._like, self._caller = model, like, caller

    def read(self, number: int, given: object) -> object:
        """Return the image of that number; a file that is read again must hold the same."""
        if _is_name(given):
            return self._files.read(number, Path(given))
        if _is_array(given) and 0 not in given.shape:
            return self._tensor(given, f"image {number}")
        return given

    def _tensor(self, array: ArrayLike, where: str) -> Tensor:
        axes = f"C{'ZYX'[-self._ndim :]}"
        if len(array.shape) == self._ndim + 2:  # (N, C, *space)
            return torch.cat([self._image(array[n], axes, where) for n in range(array.shape[0])])
        return self._image(array, None, where)

    def _image(self, array: ArrayLike, axes: str | None, where: str) -> Tensor:
        window = windowed(array, ndim=self._ndim, channels=self._channels, axes=axes, where=where)
        return to_tensor(scaled(window.read([(0, n) for n in window.shape[1:]]), self._scaling, where))

    @cached_property
    def _files(self) -> ImageFiles:
        opens = partial(open_windows, ndim=self._ndim, channels=self._channels)
        return ImageFiles((), opens, self._scaling)

    @cached_property
    def _scaling(self) -> Scaling | None:
        return scaling_of(self._model)

    @cached_property
    def _intake(self) -> Intake:
        return Intake(self._model, self._caller)

    @property
    def _ndim(self) -> int:
        return self._intake.ndim if self._like is None else len(self._like) - 2

    @property
    def _channels(self) -> Channels:
        return self._intake if self._like is None else self._like[1]


def _listed(images: Any) -> Any:
    """Return images as a collection in which every name is that of one file."""
    if _is_name(images) or _is_array(images):
        images = [images]
    if isinstance(images, Sequence) and any(map(_is_name, images)):
        return [
            one for given in images for one in (find_images([str(given)]) if _is_name(given) else [given])
        ]
    return images


def _is_name(given: object) -> TypeGuard[str | PathLike[str]]:
    return isinstance(given, str | PathLike)


def _is_array(given: object) -> TypeGuard[ArrayLike]:
    """Tell whether it is an array of numpy, zarr, h5py, dask or the like."""
    if isinstance(given, Tensor) or is_by_window(given):
        return False
    return all(hasattr(given, name) for name in ("shape", "dtype", "__getitem__"))
