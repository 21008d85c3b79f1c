"""The arrays that pictures are drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

__all__ = ["Maps"]


@dataclass(frozen=True, slots=True)
class Maps:
    """The arrays behind a diagnosis, for pictures: (C, *space), float32; `gradient` is (*space)."""

    image: NDArray[Any]
    whole: NDArray[Any]
    stitched: NDArray[Any]
    fixed: NDArray[Any]
    difference: NDArray[Any]
    gradient: NDArray[Any]
    cuts: tuple[tuple[int, ...], ...]
