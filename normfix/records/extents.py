"""Whether what a file says of a network's axes can be so: one number for each axis, and none out of all proportion.

Records come from files that anybody may have written. `predict` cuts windows by their strides and extends an image to
the sizes that are exact, so a stride of 0 divides by nothing, and exact sizes of 2**31 fill the memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from normfix.records.sites import Scan

__all__ = ["LARGEST", "WIDEST", "are_extents", "inconsistency"]

LARGEST = 1 << 24
"""Pixels of the least image that is exact, 4096 x 4096 or 256 x 256 x 256: an image of one pixel is extended to it."""
WIDEST = 1 << 16
"""Pixels of a halo on one side of one axis."""
_COUNTED = 1 << 31
"""What an extent of an input is below: torch counts with 64 bits, and multiplies."""
_SCALE = re.compile(r"[1-9]\d{0,3}(/[1-9]\d{0,3})?")
"""Output pixels per input pixel: a fraction of small numbers; `Fraction` reads 1e999999999, too."""


def inconsistency(scan: Scan) -> str:
    """Say which numbers of a scan no network has, or nothing.

    >>> import dataclasses
    >>> scan = Scan(model="Net", example=(1, 1, 64, 64), sites=(), uncalled=(), dense=True, tile_invariant=True,
    ...             stride=(2, 2), halo=((3, 3), (3, 3)), scale=("1", "1"), exact_sizes=(2, 2))
    >>> inconsistency(scan)
    ''
    >>> inconsistency(dataclasses.replace(scan, exact_sizes=(2,)))
    'exact sizes of (2,) for 2 axes'
    """
    return next(_inconsistencies(scan), "")


def are_extents(values: Sequence[int]) -> bool:
    """Tell whether numbers may be the extents of an input: positive, and no more than torch can count with."""
    return all(0 < n < _COUNTED for n in values)


def _inconsistencies(scan: Scan) -> Iterator[str]:
    ndim = len(scan.example) - 2
    if not are_extents(scan.example):
        yield f"an example of {_shown(scan.example)}"
    for name, values, least in _numbers(scan):
        if values is None:
            continue
        if len(values) != ndim:
            yield f"{name} of {_shown(values)} for {ndim} axes"
        if any(n < least for n in values):
            yield f"{name} of {_shown(values)}"
    for name, halo in (("a halo", scan.halo), ("a rounded halo", scan.halo_rounded)):
        sides = [side for pair in halo or () for side in pair]
        if halo is not None and (len(halo) != ndim or any(not 0 <= side <= WIDEST for side in sides)):
            yield f"{name} of {_shown(halo)} for {ndim} axes"
    for name, extents in (
        ("a stride", scan.stride),
        ("exact sizes", scan.exact_sizes),
        ("a smallest tile", scan.smallest_tile),
    ):
        if math.prod(extents or ()) > LARGEST:
            yield f"{name} of {_shown(extents)} pixels"
    if scan.scale is not None and not (len(scan.scale) == ndim and all(map(_SCALE.fullmatch, scan.scale))):
        yield f"a scale of {_shown(scan.scale)} for {ndim} axes"


def _numbers(scan: Scan) -> Iterator[tuple[str, Sequence[Any] | None, int]]:
    """Yield what stands for each axis: its name, the numbers and the least that each may be."""
    yield "a stride", scan.stride, 1
    yield "exact sizes", scan.exact_sizes, 1
    yield "padding inside", scan.padded_inside, 0
    yield "a smallest tile", scan.smallest_tile, 1
    if scan.sizes is not None:
        yield "sizes that were run", scan.sizes.extents, 0
        yield "names", [1] * len(scan.sizes.axes), 1


def _shown(values: object) -> str:
    return str(values)[:80]
