"""How the dimensions of a value lie over the image.

A dimension is a product of factors, the outermost first: (n c) (h) (w) of a map, (h w) of tokens, (n h' w') of windows.
A factor over space advances by `step` positions per lattice step along its axis; everything else (batch, channels, the
inside of a window) has no place in the image.

    position p of a space factor     belongs to pixels around    p / step * S
"""

from __future__ import annotations

from dataclasses import dataclass

from normfix.tiling.reach.extents import Sizes, Vector

__all__ = ["Factor", "Frame", "Layout", "Opaque", "Rest", "Space", "frame_of", "is_plain", "joined"]


@dataclass(frozen=True, slots=True)
class Space:
    """Positions along an axis of the image."""

    axis: int
    step: int
    extent: Vector


@dataclass(frozen=True, slots=True)
class Rest:
    """Positions that lie nowhere: batch, channels, the inside of windows."""

    extent: Vector


@dataclass(frozen=True, slots=True)
class Opaque:
    """Positions that follow the image, but nobody knows how."""

    extent: Vector


Factor = Space | Rest | Opaque
Frame = tuple[Factor, ...]
Layout = tuple[Frame, ...]


def frame_of(extent: Vector, sizes: Sizes) -> Frame:
    """Return the frame of a dimension by its extent alone."""
    if sizes.is_constant(extent):
        return (Rest(extent),)
    growth = sizes.growth(extent)
    return (Opaque(extent),) if growth is None else (Space(growth.axis, growth.step, extent),)


def is_plain(frame: Frame) -> bool:
    """Tell whether no position of a dimension lies in the image."""
    return all(isinstance(factor, Rest) for factor in frame)


def joined(factors: list[Factor]) -> Frame:
    """Join each space factor with the constant ones inside it: (h')(8) is h again.

    Factors without extent are gone.
    """
    frame: list[Factor] = []
    for factor in factors:
        if set(factor.extent) == {1}:
            continue
        last = frame[-1] if frame else None
        if isinstance(factor, Rest) and last is not None and not isinstance(last, Opaque):
            constant = set(factor.extent) == {factor.extent[0]}
            if isinstance(last, Rest) or constant:
                frame[-1] = _scaled(last, factor)
                continue
        frame.append(factor)
    return tuple(frame)


def _scaled(outer: Space | Rest, inner: Rest) -> Factor:
    extent = tuple(a * b for a, b in zip(outer.extent, inner.extent, strict=True))
    if isinstance(outer, Rest):
        return Rest(extent)
    return Space(outer.axis, outer.step * inner.extent[0], extent)
