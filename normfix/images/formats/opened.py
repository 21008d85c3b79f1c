"""An image file, opened and unread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from normfix.errors import NormfixError
from normfix.images.formats.placement import Placement

__all__ = ["ArrayLike", "ChangedError", "Choice", "Opened", "choose", "letters_of", "nothing"]


class ArrayLike(Protocol):
    """What numpy, zarr, h5py and dask arrays have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the extents."""

    @property
    def dtype(self) -> Any:
        """Return the numpy dtype."""

    def __getitem__(self, index: Any) -> Any:
        """Return a window as something that np.asarray takes."""


class ChangedError(Exception):
    """A file of an image is no longer what it was when the image was opened; `written` if its time says so too."""

    def __init__(self, name: str, *, written: bool) -> None:
        super().__init__(name)
        self.written = written


def nothing() -> None:
    """Close what needs no closing."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An array that is read by window, the letters of its axes if the file says them, and where its pixels lie.

    `part` is the folder of an array inside of a Zarr image, `listing` a digest of what its files were when it was
    opened, `notes` what a user should know of it.
    """

    array: ArrayLike
    axes: str | None = None
    placement: Placement = field(default_factory=Placement)
    close: Callable[[], None] = nothing
    part: str = ""
    listing: str = ""
    notes: tuple[str, ...] = ()

    def placed(self, named: str) -> Placement:
        """Return the placement for axes named so; nothing of it holds where they are not those of the file."""
        last = named.endswith("C")
        said = "".join(letter for letter in self.axes or named if letter in "ZYX")
        mine = "".join(letter for letter in named if letter != "C")
        if mine not in (said, said.removeprefix("Z"), said.removesuffix("Z")):
            return Placement(channels_last=last)
        placement = replace(self.placement.believed(), channels_last=last)
        dropped = len(said) - len(mine) if placement.spacing else 0
        if dropped:  # a single slice
            placement = replace(
                placement, spacing=placement.spacing[dropped:], origin=placement.origin[dropped:]
            )
        return placement


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of several images in a file: a name or number, and a level of its pyramid."""

    series: str | None = None
    level: int = 0

    def require_single(self, where: str) -> None:
        """Refuse a choice that means nothing in what holds one image without a pyramid.

        Raises:
            NormfixError: NF141 for another series than the first, NF101 for another level.
        """
        if self.series not in (None, "0"):
            raise NormfixError(
                "NF141", f"it holds one image, and no {self.series!r}. Leave --series out.", where=where
            )
        if self.level:
            raise NormfixError(
                "NF101",
                f"it has 1 level, and no level {self.level}: a pyramid is a TIFF or OME-Zarr. Leave --level out.",
                where=where,
            )


def choose(names: Sequence[str], shapes: Sequence[Sequence[int]], choice: str | None, path: Path) -> int:
    """Return the number of the series that is meant.

    Raises:
        NormfixError: NF141 if there are several and none, or no such one, was chosen.
    """
    if choice is None and len(names) == 1:
        return 0
    if choice is not None:
        if choice in names:
            return list(names).index(choice)
        if choice.isdecimal() and int(choice) < len(names):
            return int(choice)
    listed = ", ".join(
        f"{number} {name!r} {'x'.join(map(str, shape))}"
        for number, (name, shape) in enumerate(zip(names, shapes, strict=True))
    )
    what = (
        f"holds {len(names)} images and which is meant is not said"
        if choice is None
        else f"has no {choice!r}"
    )
    raise NormfixError(
        "NF141",
        f"the file {what}. Give --series with a name or number (series= in Python): {listed}.",
        where=str(path),
    )


def letters_of(axes: str | None) -> str:
    """Return the letters of space in the order of the file.

    >>> letters_of("YXS")
    'YX'
    """
    return "".join(letter for letter in axes or "" if letter in "ZYX")
