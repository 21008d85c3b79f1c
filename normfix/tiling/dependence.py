"""What a tile depends on where NaN cannot tell: the dye followed through everything, and changes of ordinary size.

Comparisons, selections and casts swallow NaN, and operators from outside of torch must not see it. Three
measurements stand in for it, each of which fails in another way:

    followed  the dye goes through a twin of every operator. Behind a pointwise one all that stands in the place of
              dye is dyed, whatever its value; what takes the dye away otherwise, or takes it for an address, is
              dyed all over; an operator from outside of torch is run on changed numbers instead
    steady    tiles keep their value while everything beyond the halo is made huge, negative, zero or noise, on
              images of several magnitudes
    far       windows far along a long strip are cut from it as they are from a short one

An operation that nobody knows, or that looks as if it knew the whole extent, is local if all three say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from normfix.networks import operators
from normfix.networks.numerics import EXACT
from normfix.records.spans import round_up
from normfix.tiling.dye.operators import Stain, tensors_in, written_in
from normfix.tiling.dye.twins import holds_nan
from normfix.tiling.grid import Geometry
from normfix.tiling.halo import DyeRefused
from normfix.tiling.material import CHANGES, MAGNITUDES, TEXTURES, VARIANTS, Change, ranged, strip, textured

__all__ = [
    "FAR",
    "agrees",
    "alike",
    "borders_hold",
    "far",
    "followed",
    "hides_no_place",
    "is_isolated",
    "is_steady",
    "keeps_borders_apart",
    "shortest",
]

FAR = 4096
"""Pixels of the longest strip on which windows are compared, if that is no more than 2^18 pixels in all."""

_MOST, _TILE, _SEA = 1 << 18, 32, 128
_APART, _APART_COARSE, _FINE = 37, 7, 4
"""Strides between two windows, primes so that no lattice hides them; the second above a stride of so many pixels."""

Function = Callable[[Tensor], Tensor]


def followed(f: Function, x: Tensor, axis: int, first: int, extent: int) -> Tensor:
    """Return which pixels of the output depend on a region of the input, true at least where they do.

    Args:
        f: the network, on CPU with oneDNN.
        x: (N, C, *space), every value finite.
        axis: spatial axis, from 0.
        first: the region begins here along the axis, and spans all others.
        extent: of the region along the axis.

    Returns:
        A boolean map of the output's shape.

    Raises:
        DyeRefused: a value that depends on the region leaves tensors, or their kind cannot be dyed.
    """
    with np.errstate(all="ignore"):
        reached, foreign = _follow(f, x, axis, first, extent)
        for image in VARIANTS[1:] if foreign else ():
            reached = reached | _follow(f, image(x), axis, first, extent)[0]
    return reached


def keeps_borders_apart(
    f: Function, example: Tensor, axis: int, reach: tuple[int, int], grid: int, cross: Sequence[int]
) -> bool:
    """Tell whether the first and the last tile depend on nothing beyond their halo, whatever its values are.

    Args:
        f: at scale 1, on CPU with oneDNN.
        example: (1, C, *space), the material of the strip.
        axis: spatial axis, from 0.
        reach: pixels before and after a tile that it reads.
        grid: of tiles along the axis.
        cross: extents of the thinnest strip.
    """
    tile, size = round_up(_TILE, grid), [*cross]
    size[axis] = length = 2 * tile + round_up(max(_SEA, *reach), grid)
    x = strip(example, size)
    ends = ((tile + reach[1], length, 0, tile), (0, length - tile - reach[0], length - tile, length))
    for first, last, start, end in ends:
        reached = followed(f, x, axis, first, last - first)
        end = min(end, reached.shape[axis + 2])  # what ends before the strip does gives nothing there
        if start < end and bool(reached.narrow(axis + 2, start, end - start).any()):
            return False
    return True


def is_steady(
    f: Function, example: Tensor, geometry: Geometry, cross: Sequence[int], *, thorough: bool = True
) -> bool:
    """Tell whether tiles hold their values whatever is beyond the halo, and far along a strip.

    Args:
        f: the network in float64.
        example: (1, C, *space) in float64, the material of the strips.
        geometry: as measured.
        cross: extents of the thinnest strip.
        thorough: try every change on every kind of image; else two of each, where the dye could be followed through
            known operators.
    """
    images, changes = (VARIANTS, CHANGES) if thorough else (VARIANTS[:2], CHANGES[:2])
    with np.errstate(all="ignore"):  # an operator written in numpy overflows where it is meant to
        return all(
            _holds(f, example, axis, geometry, cross, images, changes)
            and agrees(f, example, axis, geometry, far(geometry, cross, axis))
            for axis in range(len(geometry.stride))
        )


def is_isolated(f: Function, example: Tensor, geometry: Geometry, cross: Sequence[int]) -> bool:
    """Tell whether tiles hold their values while everything beyond the halo is made huge: a first look.

    Arguments as for is_steady.
    """
    return all(
        _holds(f, example, axis, geometry, cross, VARIANTS[:1], CHANGES[:2])
        for axis in range(len(geometry.stride))
    )


def far(geometry: Geometry, cross: Sequence[int], axis: int, limit: int = _MOST) -> tuple[int, ...]:
    """Return the extents of the longest strip that is at most FAR long and has at most `limit` pixels."""
    stride, size = geometry.stride[axis], [*cross]
    size[axis] = 1
    least = round_up(2 * sum(_reads(geometry, axis)), stride)
    size[axis] = max(least, min(FAR, limit // math.prod(size)) // stride * stride)
    return tuple(size)


def shortest(geometry: Geometry, cross: Sequence[int], axis: int, tile: int = _TILE) -> tuple[int, ...]:
    """Return the extents of the shortest strip that two windows, each with a cut, make up."""
    length = _second(geometry, axis, tile) + sum(_reads(geometry, axis, tile))
    return (*cross[:axis], length, *cross[axis + 1 :])


def hides_no_place(f: Function, example: Tensor, geometry: Geometry, cross: Sequence[int]) -> bool:
    """Tell whether windows of short strips that give what the strip gives there do so on images of other magnitudes.

    Arguments as for is_steady. What is computed with a place or the size behind a gate (a ReLU, a comparison) shows on
    images that open it, by their values or by being flat. One on which the last bit counts (the sine of a large number)
    tells nothing.
    """

    def agree(axis: int, image: Change) -> bool:
        stride = geometry.stride[axis]
        tile = stride * (_APART if stride <= _FINE else _APART_COARSE)
        size = shortest(geometry, cross, axis, tile)
        if agrees(f, example, axis, geometry, size, tile, image=image):
            return True
        x = image(textured(example, size))
        return not alike(f(x), f(x * (1 + 2**-48)))

    with np.errstate(all="ignore"):
        axes = [axis for axis in range(len(geometry.stride)) if agree(axis, VARIANTS[0])]
        return all(agree(axis, image) for axis in axes for image in (*MAGNITUDES, ranged, *TEXTURES))


def agrees(
    f: Function,
    example: Tensor,
    axis: int,
    geometry: Geometry,
    size: Sequence[int],
    tile: int = _TILE,
    *,
    image: Change = lambda x: x,
) -> bool:
    """Compare windows at the front, in the middle and at the end of a strip of some extents with the strip.

    Of the shortest strips two windows make up the whole. `image` is what becomes of the strip before.
    """
    stride, scale, length = geometry.stride[axis], geometry.scale[axis], size[axis]
    before, tile, after = _reads(geometry, axis, tile)
    reads = before + tile + after
    x = image(textured(example, size))
    whole = f(x)
    last = (length - reads) // stride * stride
    starts = [0, last // 2 // stride * stride, last]
    if last == _second(geometry, axis, tile):
        starts, reads = [0, last], before + last + after
    for start in starts:
        extent = length - start if start == last else reads
        part = f(x.narrow(axis + 2, start, extent))
        first = before if start else 0
        width = int(((extent if start == last else reads - after) - first) * scale)
        a = whole.narrow(axis + 2, int((start + first) * scale), width)
        if not alike(a, part.narrow(axis + 2, int(first * scale), width)):
            return False
    return True


def _second(geometry: Geometry, axis: int, tile: int = _TILE) -> int:
    """Return where the second window of the shortest strip starts: an odd number of strides, which shows a lattice."""
    stride = geometry.stride[axis]
    return (_reads(geometry, axis, tile)[1] // stride | 1) * stride


def _reads(geometry: Geometry, axis: int, tile: int = _TILE) -> tuple[int, int, int]:
    """Return what a small tile reads: before, itself, after, in whole strides."""
    stride, (before, after) = geometry.stride[axis], geometry.halo[axis]
    return round_up(before, stride), round_up(tile, stride), round_up(after, stride)


def _holds(
    f: Function,
    example: Tensor,
    axis: int,
    geometry: Geometry,
    cross: Sequence[int],
    images: Sequence[Change],
    changes: Sequence[Change],
) -> bool:
    scale, (before, tile, after) = geometry.scale[axis], _reads(geometry, axis)
    sea, size = round_up(max(_SEA, before, after), geometry.stride[axis]), [*cross]
    size[axis] = sea + before + tile + after + sea
    window = (axis + 2, sea, before + tile + after)
    kept = (axis + 2, int((sea + before) * scale), int(tile * scale))
    material = textured(example, size)
    for image in images:
        x = image(material)
        if not _is_held(f, x, f(x), window, kept, changes):
            return False
    return True


def borders_hold(f: Function, example: Tensor, axis: int, geometry: Geometry, cross: Sequence[int]) -> bool:
    """Tell whether the first and the last tile hold their values while everything beyond their halo is made huge.

    A tile inside does not show what looks past a border to the other one, nor do images of ordinary numbers if a gate
    (a ReLU, a comparison, a maximum) hides it. Arguments as for is_steady, and the spatial axis, from 0.
    """
    stride, scale = geometry.stride[axis], geometry.scale[axis]
    before, tile, after = _reads(geometry, axis, max(_TILE, *geometry.halo[axis]))
    size = [*cross]
    size[axis] = length = 2 * tile + max(before, after) + round_up(max(_SEA, before, after), stride)
    material = textured(example, size)
    first, last = int(tile * scale), int((length - tile) * scale)
    for x in (material, ranged(material)):
        quiet = f(x)
        ends = (
            ((axis + 2, 0, tile + after), (axis + 2, 0, min(first, quiet.shape[axis + 2]))),
            (
                (axis + 2, length - tile - before, tile + before),
                (axis + 2, last, quiet.shape[axis + 2] - last),
            ),
        )
        # a network that crops its end gives nothing there
        if not all(_is_held(f, x, quiet, window, kept, CHANGES[:2]) for window, kept in ends if kept[2] > 0):
            return False
    return True


def _is_held(
    f: Function,
    x: Tensor,
    whole: Tensor,
    window: tuple[int, int, int],
    kept: tuple[int, int, int],
    changes: Sequence[Change],
) -> bool:
    """Tell whether a part of what f gave for x stays while all but a window of x is changed; see Tensor.narrow."""
    quiet = whole.narrow(*kept)
    for change in changes:
        loud = change(x)
        loud.narrow(*window).copy_(x.narrow(*window))
        if not alike(quiet, f(loud).narrow(*kept)):
            return False
    return True


def alike(a: Tensor, b: Tensor) -> bool:
    """Compare relative to the larger; what is not finite must be so in both, in the same places."""
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    a, b = a.masked_fill(~finite, 0), b.masked_fill(~finite, 0)
    extent = float(torch.maximum(a.abs().max(), b.abs().max()))
    return bool((a - b).abs().max() <= EXACT * max(extent, 1e-300))


def _follow(f: Function, x: Tensor, axis: int, first: int, extent: int) -> tuple[Tensor, bool]:
    watch = _Follow(x.dim())
    watch.seed_region(x, axis, first, extent)
    with watch:
        output = f(x)
    return watch.reached(output), watch.foreign


class _Follow(Stain):  # type: ignore[no-untyped-call]
    """Lets the dye spread as it does: nothing shrinks or is put back, and what swallows dye is dyed all over."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.foreign = False

    def seed_region(self, x: Tensor, axis: int, first: int, extent: int) -> None:
        """Dye a region of a twin of x."""
        dyed = x.clone()
        dyed.narrow(axis + 2, first, extent).fill_(torch.nan)
        self._shadows.put(x, dyed)

    def reached(self, output: Tensor) -> Tensor:
        """Return which elements of the output are dyed."""
        return self._mask(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = tensors_in((args, kwargs))
        dyed = [t for t in operands if self._shadows.dye(t).count]
        if not isinstance(func, OpOverload) or operators.is_view(func) or operators.is_blank(func):
            return func(*args, **kwargs)
        writes = written_in(func, args, kwargs)
        touched = [t for t in operands if self._shadows.of(t) is not None]
        if not dyed and not (writes and touched):
            return func(*args, **kwargs)
        place = operators.looked_up(func, args)
        if place is not None and not writes and all(t is place for t in dyed):
            return self._looked_up(func, args, kwargs, place)
        risky = tensors_in((operators.at_risk(func, args), kwargs if operators.is_foreign(func) else ()))
        if any(self._shadows.dye(t).count for t in risky):
            if operators.is_foreign(func) and not operators.takes_coordinates(func) and not writes:
                return self._changed(func, args, kwargs)
            return self._flooded(func, args, kwargs, writes)
        if operators.chooses(func) and not writes:
            return self._chosen(func, args, kwargs)
        if operators.reorders(func):
            return self._flooded(func, args, kwargs, writes)
        if any(not holds_nan(t) for t in dyed) and not operators.is_pointwise(func):
            moves = operators.is_shuffle(func) and not any(map(holds_nan, operands))
            return self._moved(func, args, kwargs) if moves else self._flooded(func, args, kwargs, writes)
        return self._twice(func, args, kwargs, touched, [self._shadows.dye(t) for t in touched], writes)

    def _judge(self, func: OpOverload, outputs: list[Tensor], touched: list[Tensor], before: Any) -> None:
        """Dye all of an output that came out clean; indices beside values are dyed where these are."""
        values = [t for t in outputs if holds_nan(t) and self._shadows.dye(t).count]
        for clean in outputs:
            if holds_nan(clean):
                if not self._shadows.dye(clean).count:
                    self._flood(clean)
                continue
            like = [t for t in values if t.shape == clean.shape]
            self._shadows.put(clean, self._mask(like[0])) if like else self._flood(clean)

    def _unseen(
        self, func: OpOverload, outputs: list[Tensor], touched: list[Tensor], writes: list[Tensor]
    ) -> None:
        for clean in (*outputs, *writes):
            self._flood(clean)

    def _flooded(self, func: OpOverload, args: Any, kwargs: Any, writes: list[Tensor]) -> Any:
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        if not outputs and not writes:
            raise DyeRefused(operators.name_of(func))
        for clean in (*outputs, *writes):
            self._flood(clean)
        return result

    def _flood(self, clean: Tensor) -> None:
        if not clean.numel():
            return
        dyed = (
            torch.full_like(clean, torch.nan)
            if holds_nan(clean)
            else torch.ones(clean.shape, dtype=torch.bool)
        )
        self._shadows.put(clean, dyed)
        if not self._shadows.dye(clean).full:  # sparse or quantised: it holds no twin
            raise DyeRefused("a tensor that is not dense")

    def _changed(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Run an operator from outside of torch on changed numbers, and dye what differs."""
        self.foreign = True
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        differs = [torch.zeros(t.shape, dtype=torch.bool) for t in outputs]
        for change in CHANGES:
            changed = self._spoiled((args, kwargs), change)
            others = tensors_in(func(*changed[0], **changed[1]))
            if [t.shape for t in others] != [t.shape for t in outputs]:
                raise DyeRefused(operators.name_of(func))
            differs = [d | ~_same_or_nan(a, b) for d, a, b in zip(differs, outputs, others, strict=True)]
        for clean, mask in zip(outputs, differs, strict=True):
            self._shadows.put(clean, clean.masked_fill(mask, torch.nan) if holds_nan(clean) else mask)
        return result

    def _looked_up(self, func: OpOverload, args: Any, kwargs: Any, place: Tensor) -> Any:
        """Dye what is taken from a clean table in the place of a dyed element."""
        result, mask = func(*args, **kwargs), self._mask(place)
        for clean in tensors_in(result):
            reached = mask.reshape(*mask.shape, *(1,) * (clean.dim() - mask.dim())).expand(clean.shape)
            self._shadows.put(clean, clean.masked_fill(reached, torch.nan) if holds_nan(clean) else reached)
        return result

    def _chosen(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Dye the place of the largest value where any of the values is dyed."""
        dims = [args[1]] if len(args) > 1 and args[1] is not None else []
        if kwargs or not dims or not holds_nan(args[0]):
            return self._flooded(func, args, kwargs, [])
        result = func(*args)
        self._shadows.put(result, self._twin(args[0]).amax(dims, *args[2:]).isnan())
        return result

    def _moved(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Move marks as the operator moves the numbers they belong to."""
        marks = tree_map(lambda v: self._mask(v).to(v.dtype) if isinstance(v, Tensor) else v, (args, kwargs))
        result = func(*args, **kwargs)
        for clean, moved in zip(tensors_in(result), tensors_in(func(*marks[0], **marks[1])), strict=True):
            self._shadows.put(clean, moved != 0)
        return result

    def _spoiled(self, values: Any, change: Change) -> Any:
        """Change the dyed elements of all arguments; numbers that are no floats take on other small values."""

        def spoiled(value: Any) -> Any:
            if not isinstance(value, Tensor) or not self._shadows.dye(value).count:
                return value
            if holds_nan(value):
                return torch.where(self._mask(value), change(value), value)
            return torch.where(self._mask(value), (value == 0).to(value.dtype), value)

        return tree_map(spoiled, values)


def _same_or_nan(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | ((a != a) & (b != b))
