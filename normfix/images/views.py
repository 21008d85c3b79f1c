"""Parts of an array as arrays that are read by window: chosen channels in an order, and one plane of a stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normfix.errors import NormfixError
from normfix.images.formats.opened import ArrayLike

__all__ = ["Part", "part_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """What of a file is meant: channels by their numbers, in this order; a plane along the axis Z or T.

    Empty means all channels, and no axis to be cut along.
    """

    channels: tuple[int, ...] = ()
    slices: str = ""
    plane: int = 0


def part_of(
    array: ArrayLike, axes: str | None, part: Part, *, ndim: int, where: str
) -> tuple[ArrayLike, str | None, int]:
    """Return a part of an array, the letters of its axes, and the number of planes along the axis to be cut along.

    Raises:
        NormfixError: NF532 for channels that it has not, NF533 for planes that it has not or the network takes whole.
    """
    planes = 1
    if part.slices:
        axis, named = _axis_of_planes(array, axes, part.slices, ndim, where)
        planes = array.shape[axis]
        axes = named[:axis] + named[axis + 1 :]
        array = _Plane(array, axis, part.plane)
    if part.channels:
        array = _Channels(array, _axis_of_channels(array, axes, part.channels, where), part.channels)
    return array, axes, planes


def _axis_of_planes(
    array: ArrayLike, axes: str | None, letter: str, ndim: int, where: str
) -> tuple[int, str]:
    """Return which axis is cut along, and the letters with its own; pages that a file does not name are meant too."""
    named = (axes or "").upper()
    if letter not in ("Z", "T") or (letter == "Z" and ndim != 2) or ndim < 2:
        raise NormfixError(
            "NF533",
            f"planes along {letter} are for networks that do not take that axis, and this one takes {ndim} axes of "
            "space. Give --slices Z or T for a network of 2 axes, T for one of 3, or leave it out.",
            where=where,
        )
    pages = [i for i, other in enumerate(named) if other in "QI"]
    if letter not in named and len(pages) == 1:
        named = named[: pages[0]] + letter + named[pages[0] + 1 :]
    if named.count(letter) != 1 or len(named) != len(array.shape):
        raise NormfixError(
            "NF533",
            f"it has no axis {letter} to be cut along: its axes are {named or 'not named'}, its shape {array.shape}. "
            f"Name them with --axes, such as {letter}YX, or leave --slices out.",
            where=where,
        )
    return named.index(letter), named


def _axis_of_channels(array: ArrayLike, axes: str | None, channels: Sequence[int], where: str) -> int:
    named = (axes or "").upper().replace("S", "C")
    if named.count("C") != 1 or len(named) != len(array.shape):
        raise NormfixError(
            "NF532",
            f"which axis has its channels is not said: its axes are {named or 'not named'}, its shape {array.shape}. "
            "Name them with --axes, such as CYX or YXC, or leave --channels out.",
            where=where,
        )
    axis = named.index("C")
    count = array.shape[axis]
    if not 0 <= min(channels) <= max(channels) < count:
        raise NormfixError(
            "NF532",
            f"it has {count} channels, 0 to {count - 1}, and --channels names {','.join(map(str, channels))}.",
            where=where,
        )
    return axis


@dataclass(frozen=True, slots=True)
class _Plane:
    """An array without one of its axes, at one place of it."""

    array: ArrayLike
    axis: int
    place: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the extents of the other axes."""
        return (*self.array.shape[: self.axis], *self.array.shape[self.axis + 1 :])

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array."""
        return self.array.dtype

    def __getitem__(self, index: tuple[Any, ...]) -> Any:
        return self.array[(*index[: self.axis], self.place, *index[self.axis :])]


@dataclass(frozen=True, slots=True)
class _Channels:
    """An array of which some channels are read, in an order."""

    array: ArrayLike
    axis: int
    channels: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the extents, with as many channels as are chosen."""
        return (*self.array.shape[: self.axis], len(self.channels), *self.array.shape[self.axis + 1 :])

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array."""
        return self.array.dtype

    def __getitem__(self, index: tuple[Any, ...]) -> Any:
        wanted = np.asarray(self.channels)[index[self.axis]]
        if wanted.ndim == 0:  # a single channel, whose axis is left out
            return self.array[(*index[: self.axis], int(wanted), *index[self.axis + 1 :])]
        first = int(wanted.min())
        within = slice(first, int(wanted.max()) + 1)
        read = np.asarray(self.array[(*index[: self.axis], within, *index[self.axis + 1 :])])
        left_out = sum(isinstance(place, int) for place in index[: self.axis])
        return read.take(wanted - first, axis=self.axis - left_out)
