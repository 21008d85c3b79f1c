"""Tiles and comparisons of the zoo's own: nothing here comes from the package under test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Pencil", "distance", "in_float64", "stitched"]


class Pencil:
    """An image that is long on one axis: at least five tiles, and no window covers it."""

    def __init__(
        self,
        thin: Sequence[int],
        axis: int,
        stride: int,
        halo: tuple[int, int],
        scale: Fraction,
    ) -> None:
        self.axis, self.scale = axis, scale
        self.before, self.after = (-(-n // stride) * stride for n in halo)
        reach = self.before + self.after
        least = max(32, reach // 2, 2 * scale.denominator)
        self.tile = -(-least // stride) * stride
        self.length = -(-reach // self.tile) * self.tile + 4 * self.tile
        self.size = (*thin[:axis], self.length, *thin[axis + 1 :])


def stitched(f: Callable[[Tensor], Tensor], image: Tensor, pencil: Pencil) -> Tensor:
    """Apply f window by window along the pencil and put the windows' middles side by side."""
    pieces = []
    for start in range(0, pencil.length, pencil.tile):
        first = max(0, start - pencil.before)
        last = min(pencil.length, start + pencil.tile + pencil.after)
        if last - first >= pencil.length:
            raise AssertionError("a window covers the pencil")
        part = f(image.narrow(pencil.axis + 2, first, last - first))
        offset, width = int((start - first) * pencil.scale), int(pencil.tile * pencil.scale)
        width = min(width, part.shape[pencil.axis + 2] - offset)  # convolutions without padding end early
        if width > 0:
            pieces.append(part.narrow(pencil.axis + 2, offset, width))
    return torch.cat(pieces, pencil.axis + 2)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference in standard deviations of b; infinite where it is not a number."""
    if a.shape != b.shape:
        return float("inf")
    gap = (a.double() - b.double()).abs().max() / b.double().std()
    return float(gap) if bool(gap.isfinite()) else float("inf")


class _KeepsFloat64(TorchFunctionMode):
    """Counts and skips casts to float32 on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.casts = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        narrows = func is Tensor.float or (
            func in (Tensor.to, Tensor.type) and torch.float32 in (*args[1:], *kwargs.values())
        )
        if narrows and args[0].dtype == torch.float64:
            self.casts += 1
            return args[0]
        return func(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[_KeepsFloat64]:
    """Let a network that casts to float32 inside stay in float64; yields the count of such casts."""
    with torch.no_grad(), _KeepsFloat64() as mode:
        yield mode
