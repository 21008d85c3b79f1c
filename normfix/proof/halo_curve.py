"""halo_curve: what a shorter halo costs in accuracy and saves in pixels, measured on one image.

The exact halo can be many times what a tool's tiles can afford, above all in 3D. How much of it matters depends on the
weights and on the image, so it is measured: tiles with halos from 0 to the exact one, stitched, against the whole.
Halos are multiples of the stride, since tiles start on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.images.given import images_of
from normfix.images.sources import whole
from normfix.networks.calling import Caller
from normfix.networks.copying import twin_of
from normfix.networks.numerics import deviation, exact_arithmetic
from normfix.networks.provenance import provenance_of
from normfix.networks.surroundings import undisturbed
from normfix.records.halo_curves import HaloCurve, HaloPoint
from normfix.records.progress import Progress, logged
from normfix.records.spans import Spans, in_strides, round_up
from normfix.scanning.known import ForwardFn, known_of
from normfix.tiling.geometry import geometry_of
from normfix.tiling.grid import Geometry, grid
from normfix.tiling.recall import Recalling
from normfix.tiling.stitching import dividing, padded, require_fit, stitch, tile_extents

__all__ = ["halo_curve", "halos_between", "measured"]

_POINTS = 8
"""Halos between none and the exact one, at most."""


@undisturbed()
def halo_curve(
    model: nn.Module,
    image: Any,
    tile: int | Sequence[int] | None = None,
    *,
    tolerance: float | None = None,
    halo: int | Sequence[int] | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    progress: Progress = logged,
) -> HaloCurve:
    """Measure the error of stitched tiles against the halo that they are read with, on one image.

    Args:
        model: any network, not modified.
        image: (N, C, *space), larger than a window on at least one axis; also an array or a file.
        tile: pixels per axis, multiples of the stride; default: one that divides the image, at most 256.
        tolerance: in sd of the whole-image output: the smallest halo within it is named.
        halo: pixels before and after, one number or one per axis, in place of several: rounded up to the stride, and no
            longer than the exact one. The first point has it.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        progress: called with ("halo", done, total).

    Returns:
        Points for all axes together, and for each axis alone where their exact halos differ.

    Raises:
        NormfixError: NF595 for a network that has no exact halo, or an image that no window is smaller than; NF402,
            NF410, and codes of `scan` and of the image.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 5, padding=2), torch.nn.Conv2d(4, 1, 3, padding=1))
        >>> curve = normfix.halo_curve(net, torch.rand(1, 1, 64, 64), tile=16)
        >>> [point.halo[0] for point in curve.points], curve.points[-1].max_sd < 1e-5
        ([(0, 0), (1, 1), (2, 2), (3, 3)], True)
    """
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise NormfixError(
            "NF410", "a tolerance is a number of sd, 0 or more.", where=f"tolerance={tolerance}"
        )
    taken = images_of(image, model, caller=Caller.of(provenance_of(model), forward_fn, output))
    known = known_of(model, taken, forward_fn, output)
    geometry = geometry_of(known.scan)
    if geometry is None:
        raise NormfixError(
            "NF595",
            "no halo is exact for this network, so there is no whole that a longer halo leads to: "
            f"{'; '.join(f.message for f in known.scan.findings)[:300] or 'it has no geometry'}",
            where=known.scan.model,
        )
    item = whole(images_of(taken, model, like=known.scan.example).only())
    extents = dividing(item, geometry) if tile is None else tile_extents(tile, geometry)
    tested = Recalling(partial(known.caller, twin_of(model)))
    halos = list(halos_between(geometry) if halo is None else _stated(halo, geometry))
    with exact_arithmetic():
        trial = _Trial(tested, padded(item, geometry), geometry, extents)
        points = measured(halos, trial.point, progress)
    if not any(point.compared for point in points):
        raise NormfixError(
            "NF595",
            f"every window of tiles of {'x'.join(map(str, extents))} with its halo is the whole image, so nothing was "
            "compared. Give a larger image or a smaller tile.",
            where="x".join(map(str, item.shape)),
        )
    return HaloCurve(
        tile=extents,
        exact=geometry.halo,
        points=points,
        tolerance=tolerance,
        smallest=None if tolerance is None else _smallest(points, tolerance),
        live=known.live,
    )


def measured(
    halos: Sequence[tuple[int | None, Spans]],
    point: Callable[[int | None, Spans], HaloPoint],
    progress: Progress,
) -> tuple[HaloPoint, ...]:
    """Return the points of halos, each (axis that alone is this short, halo), by whatever measures one of them."""
    points = []
    for number, (axis, halo) in enumerate(halos):
        progress("halo", number, len(halos))
        points.append(point(axis, halo))
    progress("halo", len(halos), len(halos))
    return tuple(points)


@dataclass(frozen=True, slots=True)
class _Trial:
    """A network, an image that it takes whole, and tiles of one size."""

    run: Recalling
    image: Tensor
    geometry: Geometry
    extents: tuple[int, ...]

    def point(self, axis: int | None, halo: Spans) -> HaloPoint:
        """Return what tiles with this halo are off by, and cost."""
        expected = self.run(self.image)
        size = self.image.shape[2:]
        tiles = list(grid(size, self.extents, replace(self.geometry, halo=halo)))
        stitched = stitch(self.run, self.image, tiles)
        require_fit(stitched, expected)
        sd = float(expected.double().std(correction=0)) or 1.0
        largest, mean = deviation(stitched, expected, sd)
        pixels = sum(prod(span.stop - span.start for span in tile.read) for tile in tiles)
        cut = [d for d in range(len(size)) if not all(tile.covers(size)[d] for tile in tiles)]
        return HaloPoint(
            axis=axis,
            halo=halo,
            max_sd=largest,
            mean_sd=mean,
            cost=pixels / prod(size),
            compared=tuple(cut),
        )


def _stated(halo: int | Sequence[int], geometry: Geometry) -> Iterator[tuple[int | None, Spans]]:
    """Yield a halo of pixels per axis, in strides, and the exact one."""
    pixels = [halo] * len(geometry.stride) if isinstance(halo, int) else list(halo)
    if len(pixels) != len(geometry.stride) or min(pixels) < 0:
        raise NormfixError(
            "NF410",
            f"a halo is pixels, one number or one for each of {len(geometry.stride)} axes.",
            where=f"{halo}",
        )
    exact = in_strides(geometry.halo, geometry.stride)
    steps = [round_up(n, stride) for n, stride in zip(pixels, geometry.stride, strict=True)]
    yield (
        None,
        tuple((min(n, before), min(n, after)) for n, (before, after) in zip(steps, exact, strict=True)),
    )
    yield None, exact


def halos_between(geometry: Geometry) -> Iterator[tuple[int | None, Spans]]:
    """Yield halos from none to the exact one: of each axis alone where these differ, then of all together."""
    exact = in_strides(geometry.halo, geometry.stride)
    if len(set(exact)) > 1:
        for axis, stride in enumerate(geometry.stride):
            for part in _parts(max(exact[axis]) // stride)[:-1]:
                short = tuple(
                    _shortened(h, s, part) if a == axis else h
                    for a, (h, s) in enumerate(zip(exact, geometry.stride, strict=True))
                )
                yield axis, short
    steps = max(max(h) // s for h, s in zip(exact, geometry.stride, strict=True))
    seen = set()
    for part in _parts(steps):
        halo = tuple(_shortened(h, s, part) for h, s in zip(exact, geometry.stride, strict=True))
        if halo not in seen:
            seen.add(halo)
            yield None, halo


def _parts(steps: int) -> list[tuple[int, int]]:
    """Return fractions from 0 to 1: all of a number of steps, or as many as are measured."""
    count = min(steps, _POINTS) or 1
    return [(k, count) for k in range(count + 1)] if steps else [(1, 1)]


def _shortened(halo: tuple[int, int], stride: int, part: tuple[int, int]) -> tuple[int, int]:
    """Return a part of a halo, at most itself, rounded up to the stride."""
    numerator, denominator = part
    before, after = (min(h, round_up(-(-h * numerator // denominator), stride)) for h in halo)
    return before, after


def _smallest(points: Sequence[HaloPoint], tolerance: float) -> HaloPoint | None:
    """Return the cheapest halo within a tolerance, of those from which on every longer one is within it."""
    found = []
    for axis in {point.axis for point in points}:
        # each axis alone ends at the exact halo, which is the last point of all
        series = [point for point in points if point.axis == axis]
        for point in reversed(series):
            if not point.compared or point.max_sd > tolerance:
                break
            found.append(point)
    exact = points[-1]
    if not exact.compared or exact.max_sd > tolerance:
        return None
    return min(found, key=lambda point: point.cost)
