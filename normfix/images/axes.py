"""Images of files, whole: their axes brought into the order C, Z, Y, X.

Axes are those the caller names, else those the file names, else those the shape leaves no doubt about; doubt
is refused, since channels taken for slices would give statistics of something else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfix.errors import NormfixError
from normfix.images.drafts import cannot_write, drafting, require_unnamed, reserve, sweep
from normfix.images.endings import suffix_of
from normfix.images.formats import create, finish
from normfix.images.formats.placement import Placement
from normfix.images.names import require_image_name

__all__ = [
    "KEEPING",
    "Channels",
    "Taking",
    "changed_meanwhile",
    "digest_of_array",
    "laid_out",
    "named_axes",
    "require_new_image",
    "settled_axes",
    "to_tensor",
    "write_image",
]

Array = NDArray[Any]


class Taking(Protocol):
    """Knows which images (C, *space) a network takes."""

    def runs(self, shape: Sequence[int]) -> bool:
        """Tell whether the network runs with as many channels."""
        ...

    def refusal(self, shape: Sequence[int]) -> str:
        """Return why it is no image for the network, or nothing."""
        ...


Channels = int | Taking
"""How many channels a network takes, or what knows it."""

KEEPING = (".npy", ".zarr")
"""Endings of the files that have an axis for a single channel too."""


def digest_of_array(values: Array) -> bytes:
    """Return the SHA-256 of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8).data).digest()


def changed_meanwhile(path: Path, *, gone: bool = False) -> NormfixError:
    """Return the error (NF331) for an image that is another than when it was opened or read before."""
    what = "is gone" if gone else "changed"
    return NormfixError(
        "NF331",
        f"the image {what} while it was read, so parts of it would be of another image. Put it back as it was, "
        "or start anew on the new one.",
        where=str(path),
    )


def settled_axes(
    shape: tuple[int, ...],
    said: str | None,
    dtype: np.dtype[Any],
    *,
    ndim: int,
    channels: Channels,
    axes: str | None = None,
    where: str = "image",
) -> tuple[str, tuple[int, ...]]:
    """Return one letter of C, Z, Y, X per axis that is kept, and the axes that are not.

    Axes of extent 1 need no letter. `axes` names all axes of the file, or all but those; the file's own letters
    count where it does not. An axis of another letter, such as T, is let go if its extent is 1, and may be missing.

    Raises:
        NormfixError: NF106 if axes, channels or dtype do not fit the network.
    """
    space = "ZYX"[-ndim:]
    letters = (axes or said or "").upper().replace("S", "C")
    if axes is None and letters and len(letters) != len(shape):
        raise NormfixError(
            "NF106",
            f"the file names the axes {letters!r}, and its array has {len(shape)} ({shape}). Give --axes with one "
            "letter per axis, such as YX, CYX, YXC or ZYX.",
            where=where,
        )
    if axes is not None and len(letters) > len(shape):  # the file left out what has extent 1
        letters = "".join(letter for letter in letters if letter in "CZYX")
    if axes is not None and len(letters) != len(shape):
        known = (said or "").upper()
        spare = [i for i, n in enumerate(shape) if n == 1 and (not known or known[i] not in "YX")]
        fixed = tuple(spare[: max(0, len(shape) - len(letters))])
    elif letters:
        fixed = tuple(
            i
            for i, (letter, n) in enumerate(zip(letters, shape, strict=True))
            if n == 1 and letter not in space
        )
        letters = "".join(letter for i, letter in enumerate(letters) if i not in fixed)
        if axes is None and set(letters) & set("QI"):  # unknown, or a plain sequence of pages
            letters = ""
    else:
        fixed = ()
    kept = tuple(n for i, n in enumerate(shape) if i not in fixed)
    return named_axes(kept, dtype, ndim=ndim, channels=channels, axes=letters or None, where=where), fixed


def named_axes(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    ndim: int,
    channels: Channels,
    axes: str | None = None,
    where: str = "image",
) -> str:
    """Return one letter of C, Z, Y, X per axis of an array, as named or as its shape leaves no doubt.

    Raises:
        NormfixError: NF106 if axes, channels or dtype do not fit the network.
    """
    if dtype.kind not in "biuf":
        raise NormfixError(
            "NF106", f"its values are {dtype}; networks take real numbers. Convert it first.", where=where
        )
    named = (axes or _guess(shape, ndim, channels, where)).upper().replace("S", "C")
    if len(named) != len(shape) or len(set(named)) != len(named) or not set(named) <= set("CZYX"):
        raise NormfixError(
            "NF106",
            f"axes {named!r} do not name the {len(shape)} axes of an array of shape {shape}. "
            "Give --axes with one letter per axis, such as YX, CYX, YXC or ZYX.",
            where=where,
        )
    space = [letter for letter in named if letter != "C"]
    if len(space) != ndim:
        raise NormfixError(
            "NF106",
            f"the network takes {ndim} spatial axes, the image has {len(space)} ({named}, {shape}). "
            "Give --axes if they are named wrongly, or --slices Z or T to run over the planes of a stack.",
            where=where,
        )
    ordered = tuple(shape[named.index(letter)] for letter in "CZYX" if letter in named)
    ordered = ordered if "C" in named else (1, *ordered)
    if min(ordered) < 1:
        raise NormfixError("NF106", f"the image has no pixels: its shape is {ordered}.", where=where)
    if problem := _refusal(ordered, channels):
        raise NormfixError(
            "NF106",
            f"{problem} ({named}). Give --axes if they are named wrongly, or choose channels with --channels.",
            where=where,
        )
    return named


def to_tensor(array: Array) -> Tensor:
    """Return (C, *space) as a tensor (1, C, *space) of the same dtype."""
    return torch.from_numpy(np.ascontiguousarray(array))[None]


def write_image(path: Path, array: Array, placement: Placement | None = None) -> None:
    """Write (C, *space) as .npy, TIFF, OME-Zarr or NIfTI, whole or not at all.

    Args:
        path: must not exist.
        array: the image.
        placement: where its pixels lie; a .npy cannot hold it.

    Raises:
        NormfixError: NF114 for another kind of file, one that exists, or a folder that cannot be written.
    """
    require_new_image(path)
    placement = placement or Placement()
    array, axes = laid_out(array, placement, keep=suffix_of(path) in KEEPING)
    with drafting(path) as draft:
        try:
            room = create(draft, array.shape, array.dtype, axes, placement)
            reserve(draft)
            room[...] = array
            del room
            finish(draft)
        except OSError as error:
            raise cannot_write(path, error) from error


def laid_out(array: Array, placement: Placement, *, keep: bool = False) -> tuple[Array, str]:
    """Return (C, *space) with its channels where the image has them, and the letters of its axes.

    A single channel has no axis, unless `keep`.
    """
    space = "ZYX"[-(array.ndim - 1) :]
    if array.shape[0] == 1 and not keep:
        return array[0], space
    return (np.moveaxis(array, 0, -1), f"{space}C") if placement.channels_last else (array, f"C{space}")


def require_new_image(path: Path) -> None:
    """Refuse an output that `write_image` would refuse, before anything is computed for it.

    Raises:
        NormfixError: NF114 for another kind of file, one that exists, or a folder that does not.
    """
    require_image_name(path)
    sweep(path.parent)
    require_unnamed(path)


def _guess(shape: tuple[int, ...], ndim: int, channels: Channels, where: str) -> str:
    space = "ZYX"[-ndim:]
    readings: dict[str, tuple[int, ...]] = {}
    if len(shape) == ndim:
        readings = {space: (1, *shape)}
    elif len(shape) == ndim + 1:
        readings = {f"C{space}": shape, f"{space}C": (shape[-1], *shape[:-1])}
    fitting = [named for named, ordered in readings.items() if _runs(ordered, channels)]
    if len(fitting) == 1:
        return fitting[0]
    if readings and not fitting and not isinstance(channels, int):
        refused = list(filter(None, (channels.refusal(ordered) for ordered in readings.values())))
        if not refused:  # it runs with no channels at all: whoever runs it is told why
            return next(iter(readings))
    taken = f"{channels} channels and " if isinstance(channels, int) else ""
    doubt = "the network runs on it either way" if fitting else "the network runs on it in no order"
    start = "Name"
    if not fitting and len(shape) == ndim + 1 and _runs((1, *shape[1:]), channels):
        start = "If it is a stack, take its planes one by one with --slices Z (or T); else name"
    raise NormfixError(
        "NF106",
        f"the axes of an array of shape {shape} are not certain for a network with {taken}{ndim} spatial axes: "
        f"{doubt}. {start} them with --axes, such as C{space} or {space}C.",
        where=where,
    )


def _runs(ordered: tuple[int, ...], channels: Channels) -> bool:
    return channels == ordered[0] if isinstance(channels, int) else channels.runs(ordered)


def _refusal(ordered: tuple[int, ...], channels: Channels) -> str:
    if not isinstance(channels, int):
        return channels.refusal(ordered)
    if ordered[0] == channels:
        return ""
    return f"the network takes {channels} channels, the image has {ordered[0]}"
