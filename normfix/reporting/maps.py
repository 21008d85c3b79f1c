"""The arrays that pictures are drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from normfix.records.diagnoses import Kind

__all__ = ["Maps"]


@dataclass(frozen=True, slots=True)
class Maps:
    """The arrays behind a diagnosis or a check, for pictures: (C, *space), float32; `gradient` is (*space).

    `fixed` is predicted with every cause fixed, `cuts` is where new tiles start in the output, per axis, `kind` what
    the output means, `names` what the two predictions are called. What was not computed is None.
    """

    image: NDArray[Any]
    whole: NDArray[Any]
    stitched: NDArray[Any]
    fixed: NDArray[Any] | None
    difference: NDArray[Any]
    gradient: NDArray[Any] | None
    cuts: tuple[tuple[int, ...], ...]
    kind: Kind
    names: tuple[str, str] = ("whole image", "tiles as they are")
