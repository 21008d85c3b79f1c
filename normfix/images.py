"""Images as networks take them: files read with named axes, scaled over the whole image, checked.

Scaling is part of the statistic: constants measured on an image scaled 255 times too large reproduce the
original on that image and are wrong on every other. So integer images need a stated scaling, it runs over
the whole image, never per tile, and it is stored with the model.
"""

from __future__ import annotations

import glob
import importlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfix.errors import NormfixError
from normfix.records import Scaling

__all__ = [
    "ImageFiles",
    "Items",
    "find_images",
    "parse_scaling",
    "read_image",
    "require_new_image",
    "scaled",
    "to_tensor",
    "write_image",
]

Array = NDArray[Any]
_SUFFIXES = (".tif", ".tiff", ".png", ".npy")


@dataclass(frozen=True, slots=True)
class Items:
    """Re-iterable images for a network, each checked, on one device, in one dtype."""

    images: Iterable[Tensor]
    device: torch.device
    dtype: torch.dtype
    prepare: Callable[[Tensor], Tensor] = lambda image: image

    def __iter__(self) -> Iterator[Tensor]:
        """Yield (N, C, *space) tensors.

        Raises:
            NormfixError: NF104 for NaN or infinity, NF106 for what is no such tensor.
        """
        for number, image in enumerate(self.images):
            yield self.prepare(_checked(image, f"image {number}", self.dtype).to(self.device))

    def __len__(self) -> int:
        return len(self.images) if isinstance(self.images, Sized) else sum(1 for _ in self.images)

    @classmethod
    def of(cls, images: Tensor | Iterable[Tensor], device: torch.device, dtype: torch.dtype) -> Items:
        """Take a tensor (one item) or a re-iterable of tensors.

        Raises:
            NormfixError: NF103 for a generator, which could be read only once, for an empty collection and for
                what cannot be iterated.
        """
        if isinstance(images, Tensor):
            images = [images]
        try:
            iterator = iter(images)
        except TypeError as error:
            raise NormfixError(
                "NF103",
                f"expected tensors (N, C, *space), got {type(images).__name__}. Give a tensor or a list of them.",
                where="images",
            ) from error
        if iterator is images:
            raise NormfixError(
                "NF103",
                "images were given as a generator, but they are read several times. Give a list, a dataset or "
                "another object that can be iterated again.",
                where="images",
            )
        items = cls(images, device, dtype)
        if len(items) == 0:
            raise NormfixError(
                "NF103", "no image was given, and statistics need at least one.", where="images"
            )
        return items


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Image files as a re-iterable of (1, C, *space) tensors, each read and scaled when its turn comes."""

    paths: Sequence[Path]
    ndim: int
    channels: int
    scaling: Scaling | None
    axes: str | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        for path in self.paths:
            array = read_image(path, ndim=self.ndim, channels=self.channels, axes=self.axes)
            yield to_tensor(scaled(array, self.scaling, str(path)))


def write_image(path: Path, array: Array) -> None:
    """Write (C, *space) as .npy or TIFF (single channels without the axis), whole or not at all.

    Raises:
        NormfixError: NF114 for another kind of file, one that exists, or a folder that cannot be written.
    """
    require_new_image(path)
    suffix = path.suffix.lower()
    draft = path.with_name(f".{path.stem}-draft{path.suffix}")
    try:
        if suffix == ".npy":
            np.save(draft, array)
        else:
            import tifffile

            axes = "ZYX"[-(array.ndim - 1) :]
            data, named = (array[0], axes) if array.shape[0] == 1 else (array, f"C{axes}")
            grey = "minisblack" if data.ndim > 1 else None  # else 3 or 4 channels would become RGB
            tifffile.imwrite(draft, data, photometric=grey, metadata={"axes": named})
        draft.rename(path)
    except OSError as error:
        raise NormfixError("NF114", f"cannot write it: {error.strerror}.", where=str(path)) from error
    finally:
        draft.unlink(missing_ok=True)


def require_new_image(path: Path) -> None:
    """Refuse an output that `write_image` would refuse, before anything is computed for it.

    Raises:
        NormfixError: NF114 for another kind of file, one that exists, or a folder that does not.
    """
    if path.suffix.lower() not in (".npy", ".tif", ".tiff") or path.exists():
        raise NormfixError(
            "NF114", "give a new file ending in .npy or .tif; nothing is overwritten.", where=str(path)
        )
    if not path.parent.is_dir():
        raise NormfixError("NF114", f"there is no folder {path.parent} to write it to.", where=str(path))


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Return the image files that files, folders and globs name, sorted within each.

    Raises:
        NormfixError: NF101 if one of them names nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        try:
            matched = _matched(pattern)
        except OSError:  # no file can have such a name
            matched = []
        if not matched:
            raise NormfixError(
                "NF101",
                f"there is no such image file, and no {', '.join(_SUFFIXES)} file in it.",
                where=pattern,
            )
        found += matched
    return found


def _matched(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
    if path.exists():
        return [path]
    return sorted(Path(p) for p in glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute globs


def read_image(path: Path, *, ndim: int, channels: int, axes: str | None = None) -> Array:
    """Read an image file as (C, *space) in its own dtype, space in the order Z, Y, X.

    Args:
        path: TIFF, PNG or npy.
        ndim: number of spatial axes the network takes.
        channels: number of channels the network takes.
        axes: one letter per array axis: C for channels, Z Y X for space. Default: what the file says, or
            what the shape leaves no doubt about.

    Raises:
        NormfixError: NF101 if the file cannot be read, NF106 if its axes or dtype do not fit the network.
    """
    array, said = _read(path)
    where = str(path)
    if array.dtype.kind not in "biuf":
        raise NormfixError(
            "NF106",
            f"its values are {array.dtype}; networks take real numbers. Convert it first.",
            where=where,
        )
    named = (axes or said or _guess(array.shape, ndim, channels, where)).upper().replace("S", "C")
    if len(named) != array.ndim or len(set(named)) != len(named) or not set(named) <= set("CZYX"):
        raise NormfixError(
            "NF106",
            f"axes {named!r} do not name the {array.ndim} axes of an array of shape {array.shape}. "
            "Give --axes with one letter per axis, such as YX, CYX, YXC or ZYX.",
            where=where,
        )
    space = [letter for letter in named if letter != "C"]
    if len(space) != ndim:
        raise NormfixError(
            "NF106",
            f"the network takes {ndim} spatial axes, the image has {len(space)} ({named}, {array.shape}). "
            "Give --axes if they are named wrongly, or cut the image.",
            where=where,
        )
    array = array.transpose([named.index(letter) for letter in "CZYX" if letter in named])
    if "C" not in named:
        array = array[np.newaxis]
    if 0 in array.shape:
        raise NormfixError("NF106", f"the image has no pixels: its shape is {array.shape}.", where=where)
    if array.shape[0] != channels:
        raise NormfixError(
            "NF106",
            f"the network takes {channels} channels, the image has {array.shape[0]} ({named}). "
            "Give --axes if they are named wrongly, or select channels first.",
            where=where,
        )
    return array


def scaled(array: Array, scaling: Scaling | None, where: str = "image") -> Array:
    """Return a whole image (C, *space) as float32 or float64, scaled; None means: not stated.

    Raises:
        NormfixError: NF104 for NaN or infinity, NF107 if the scaling does not fit the image, or is not stated
            for an integer image.
    """
    if scaling is None:
        if array.dtype.kind != "f":
            raise NormfixError(
                "NF107",
                f"the image is {array.dtype}, and what the network takes is not known. State it: --scale unit, "
                "zscore, percentile:1,99.8, MEAN,STD or none, as it was trained with.",
                where=where,
            )
        scaling = Scaling()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _not_finite(where)
    wide = array.astype(np.float64)
    match scaling.kind:
        case "none":
            result = wide
        case "unit":
            if array.dtype.kind not in "iu":
                raise NormfixError(
                    "NF107", f"'unit' is for integer images; this one is {array.dtype}.", where=where
                )
            result = wide / np.iinfo(array.dtype).max
        case "zscore":
            _positive(wide.max() - wide.min(), where)  # the deviation of a constant can round to more than 0
            result = (wide - wide.mean()) / _positive(wide.std(), where)
        case "percentile":
            low, high = np.percentile(wide, _two(scaling))
            result = (wide - low) / _positive(high - low, where)
        case "fixed":
            mean, sd = _two(scaling)
            result = (wide - mean) / sd
        case "preprocess":
            result = _preprocessed(array, scaling.function, where)
    return result.astype(np.float64 if array.dtype == np.float64 else np.float32)


def parse_scaling(text: str) -> Scaling:
    """Read `none`, `unit`, `zscore`, `percentile:LOW,HIGH` or `MEAN,STD`.

    Raises:
        NormfixError: NF107 for anything else.
    """
    if text in ("none", "unit", "zscore"):
        return Scaling(kind=cast(Literal["none", "unit", "zscore"], text))
    kind, numbers = (
        ("percentile", text.removeprefix("percentile:"))
        if text.startswith("percentile:")
        else ("fixed", text)
    )
    try:
        low, high = (float(n) for n in numbers.split(","))
    except ValueError as error:
        raise NormfixError(
            "NF107", "give none, unit, zscore, percentile:LOW,HIGH or MEAN,STD.", where=f"--scale {text}"
        ) from error
    scaling = Scaling(kind=cast(Literal["percentile", "fixed"], kind), values=(low, high))
    _two(scaling)
    return scaling


def to_tensor(array: Array) -> Tensor:
    """Return (C, *space) as a tensor (1, C, *space) of the same dtype."""
    return torch.from_numpy(np.ascontiguousarray(array))[None]


def _read(path: Path) -> tuple[Array, str | None]:
    """Return the array and the axes that the file itself names, if any."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return np.load(path, allow_pickle=False), None
        if suffix in (".tif", ".tiff"):
            return _read_tiff(path)
        import imageio.v3 as iio

        array = np.asarray(iio.imread(path, plugin="pillow"))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        hint = "pip install imagecodecs" if "imagecodecs" in reason else "check that it exists and is whole"
        raise NormfixError(
            "NF101",
            f"cannot read this file as {', '.join(_SUFFIXES)}: {reason}. Next: {hint}.",
            where=str(path),
        ) from error
    return array, "YX" if array.ndim == 2 else "YXC"


def _read_tiff(path: Path) -> tuple[Array, str | None]:
    import tifffile

    with _complaints("tifffile") as complaints, tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes = series.axes
        array = series.asarray()
    if complaints:  # such as a page beyond the end of a truncated file, which is left out of the stack
        raise ValueError(complaints[0])
    singles = [
        i
        for i, (letter, n) in enumerate(zip(axes, array.shape, strict=True))
        if n == 1 and letter not in "YX"
    ]
    array = np.squeeze(array, tuple(singles))
    axes = "".join(letter for i, letter in enumerate(axes) if i not in singles)
    said = not set(axes) & set("QI")  # unknown, or a plain sequence of pages
    return array, axes if said else None


@contextmanager
def _complaints(name: str) -> Iterator[list[str]]:
    """Collect the errors that a library only logs."""
    found: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _guess(shape: tuple[int, ...], ndim: int, channels: int, where: str) -> str:
    space = "ZYX"[-ndim:]
    if len(shape) == ndim and channels == 1:
        return space
    if len(shape) == ndim + 1 and (shape[0] == channels) != (shape[-1] == channels):
        return f"C{space}" if shape[0] == channels else f"{space}C"
    raise NormfixError(
        "NF106",
        f"the axes of an array of shape {shape} are not certain for a network with {channels} channels and "
        f"{ndim} spatial axes. Name them with --axes, such as C{space} or {space}C.",
        where=where,
    )


def _checked(image: object, where: str, dtype: torch.dtype) -> Tensor:
    """Return the image in `dtype`, in which it must be finite too."""
    if not isinstance(image, Tensor) or image.dim() < 3 or not image.numel() or not image.is_floating_point():
        what = (
            f"{image.dtype} of shape {tuple(image.shape)}"
            if isinstance(image, Tensor)
            else type(image).__name__
        )
        raise NormfixError(
            "NF106",
            f"expected a floating tensor (N, C, *space), got {what}. Convert and scale it first.",
            where=where,
        )
    image = image.to(dtype)
    if not torch.isfinite(image).all():
        raise _not_finite(where)
    return image


def _not_finite(where: str) -> NormfixError:
    return NormfixError(
        "NF104",
        "the image has NaN or infinite values, which would spread through every statistic. Replace or "
        "mask them first.",
        where=where,
    )


def _positive(spread: float, where: str) -> float:
    if not 0 < spread < math.inf:
        raise NormfixError(
            "NF107",
            f"the image's spread is {spread:g} (0: constant), so it cannot be scaled by it.",
            where=where,
        )
    return spread


def _two(scaling: Scaling) -> tuple[float, float]:
    """Return the two numbers of a percentile or fixed scaling."""
    low, high = scaling.values if len(scaling.values) == 2 else (math.nan, math.nan)
    sane = (
        0 <= low < high <= 100 if scaling.kind == "percentile" else math.isfinite(low) and 0 < high < math.inf
    )
    if not sane:
        raise NormfixError(
            "NF107",
            "percentiles run from 0 to 100, low before high; a mean is finite and a deviation positive.",
            where=f"--scale {scaling.kind} {','.join(map(str, scaling.values))}",
        )
    return low, high


def _preprocessed(array: Array, name: str, where: str) -> Array:
    function = _function(name)
    try:
        result = np.asarray(function(array.copy()))
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise NormfixError(
            "NF107", f"{name} failed on an array {array.shape} of {array.dtype}: {reason}.", where=where
        ) from error
    if result.shape != array.shape or result.dtype.kind not in "biuf":
        raise NormfixError(
            "NF107",
            f"{name} made {result.dtype} {result.shape} of {array.shape}; it must keep (C, *space) and give "
            "real numbers.",
            where=where,
        )
    return result


def _function(name: str) -> Callable[[Array], Array]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise NormfixError(
            "NF107", f"cannot import it: {error}. Give pkg.mod:function.", where=f"--preprocess {name}"
        ) from error
    return cast(Callable[[Array], Array], function)
