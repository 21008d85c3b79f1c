"""What shows on images that a converted network is tile-exact: stitched tiles, and its layers counted at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from normfix.networks.calling import Caller, NotTaken, refusals
from normfix.networks.numerics import deviation
from normfix.proof.check import compare_with
from normfix.proof.steps import used
from normfix.proof.values import differing_from_original, differing_layers
from normfix.records.plans import Plan
from normfix.records.sites import Site
from normfix.records.sizes import ProvedSizes
from normfix.records.verdicts import ProofStep, Verdict
from normfix.scanning.sites import survey
from normfix.tiling.geometry import thinnest
from normfix.tiling.grid import Geometry
from normfix.tiling.material import strip
from normfix.tiling.recall import Recalling
from normfix.tiling.stitching import tiled
from normfix.tiling.strips import longer_than_windows

__all__ = ["Subject"]

Judge = Callable[[Tensor, Sequence[Site]], Sequence[Site]]

_UNIT = 32
"""Grid and context, in pixels, of the tiles that are tried where no halo is enough."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A converted network on the bench, in eval mode.

    `geometry` is None where it has none; `extents` are those of the example it was scanned with; `tile` is the size
    to compare with, None for a third of the image. `original` is what it was converted from, where that is there.
    `cross` and `double` are the thinnest strip that it runs on and the network in float64, where the scan left them.
    `sizes` are those that the scan speaks for. What it gave on the last inputs is recalled.
    """

    model: nn.Module
    caller: Caller
    plan: Plan
    geometry: Geometry | None
    extents: tuple[int, ...]
    tile: int | tuple[int, ...] | None = None
    original: nn.Module | None = None
    cross: tuple[int, ...] = ()
    double: nn.Module | None = None
    sizes: ProvedSizes | None = None
    _recalling: Recalling = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_recalling", Recalling(partial(self.caller, self.model)))

    def run(self, image: Tensor) -> Tensor:
        """Return what the network gives, not to be written to."""
        return self._recalling(image)

    def verdict(self, image: Tensor) -> Verdict | None:
        """Compare on the image, and, along axes that windows cover there, on strips made from it.

        The verdict is the first that did not pass, else the image's own if it compared anything.
        """
        geometry = self.geometry
        if geometry is None or self.plan.left_live:
            return None
        verdict = self._compared(image, geometry, self.tile or geometry.third(image.shape[2:]))
        verdicts = [verdict] if verdict.axes else []
        uncut = sorted(set(range(len(geometry.stride))) - set(verdict.axes))
        thin = (self.cross or thinnest(self.run, image, geometry)) if uncut else ()
        for axis in uncut:
            long, tile = longer_than_windows(image, geometry, axis, thin)
            verdicts.append(self._compared(long, geometry, tile))
        return next((v for v in verdicts if not v.passed), verdicts[0])

    def mismatch(self, image: Tensor, whole: Tensor) -> tuple[float, str] | None:
        """Say how far tiles are from the whole while sites stay live: tiles of a third, some context around.

        None where the network is not dense, does not run on tiles, or its output is constant.
        """
        spread, space = float(whole.double().std()), image.shape[2:]
        if whole.dim() != image.dim() or not spread > 0 or min(space) < 2 * _UNIT:
            return None
        scale = tuple(Fraction(a, b) for a, b in zip(whole.shape[2:], space, strict=True))
        units = (_UNIT,) * len(space)
        geometry = Geometry(stride=units, halo=((_UNIT, _UNIT),) * len(space), scale=scale, multiple=units)
        tile = geometry.third(image.shape[2:])
        try:
            parts = tiled(self.run, image, tile, geometry)
        except refusals():
            return None
        if parts.shape != whole.shape:
            return None
        largest, mean = deviation(parts, whole, spread)
        size = "x".join(map(str, tile))
        return largest, f"tiles of {size} with {_UNIT} pixels of context are {mean:.2g} sd off on average"

    def other(self, image: Tensor) -> Tensor:
        """Return a mirrored, dimmed and roughened version of the image, of the example's extents.

        On the image that was measured a live statistic and its frozen value are the same; here they differ.
        """
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return strip(image.flip(-1) * 0.5 + noise.to(image) * image.std() * 0.2, self.extents)

    def used(self, image: Tensor, judge: Judge) -> ProofStep:
        """Count the converted layers' calls on another version of the image, and compare what they give.

        Where the census finds anything live there, `judge` is asked which of it the scan has found not to be.
        """
        other = self.other(image)
        exact = self.geometry.multiple if self.geometry else ()
        found = survey(self.model, self.caller, other, exact=exact, stacked=False)
        judged = judge(other, found.sites) if any(site.live for site in found.sites) else ()
        differing = self._differing(other, found.result)
        return used(found.invocations, found.sites, self.plan, judged, differing)

    def _differing(self, image: Tensor, actual: Tensor) -> list[str]:
        """Return where the network does not give what its statistics say."""
        if self.original is None:
            return differing_layers(self.model, self.plan, partial(self.caller, self.model, image))
        return differing_from_original(self.original, self.model, self.plan, self.caller, image, actual)

    def _compared(self, image: Tensor, geometry: Geometry, tile: int | tuple[int, ...]) -> Verdict:
        """Compare tiles with the whole; tiles nobody asked for are enlarged while the network takes none so small.

        Up to half of the image first, as windows of more than that may each cover all of it.
        """
        while True:
            try:
                return compare_with(
                    self.model,
                    self.caller,
                    image,
                    geometry,
                    tile=tile,
                    run=self.run,
                    cross=self.cross,
                    double=self.double,
                    sizes=self.sizes,
                )
            except NotTaken:
                small = isinstance(tile, tuple) and any(
                    t < n for t, n in zip(tile, image.shape[2:], strict=True)
                )
                if tile == self.tile or not small:
                    raise
            assert isinstance(tile, tuple)
            halves = (n // 2 // s * s for n, s in zip(image.shape[2:], geometry.stride, strict=True))
            tile = tuple(half if t < half else 2 * t for t, half in zip(tile, halves, strict=True))
