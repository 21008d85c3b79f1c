"""How long a scan and a conversion will take, told from one forward pass of the example.

Everything that is measured is a forward pass of some extent, so seconds are those of one pass times a number of
passes. The numbers are what `python benchmarks/scan.py` and conversions of the networks in it took; a forecast is
right within a factor of three or so, which is enough to decide whether to wait.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normfix.networks.calling import Caller, evaluating, home_of
from normfix.reporting.sentences import duration_text
from normfix.tiling.grid import Geometry

__all__ = ["Durations", "tell_notable"]

_LOG = logging.getLogger("normfix")

_NOTABLE = 20.0
"""Seconds from which on a stage is told of."""

_SCAN, _EXPORT = 20.0, 4.0
"""Passes of a scan (measured: 8 to 22), and seconds that capturing the graph takes beside it (3 to 5)."""
_FREEZE, _COMPARE, _TILES, _AROUND = 2.0, 3.0, 1.2, 10.0
"""Passes over an image to freeze and re-measure; over it to compare; over its tiles with their halo; of the example
beside them, on strips and other inputs."""


def tell_notable(stage: str, duration: Callable[[], float]) -> None:
    """Log what a stage that takes long will take, before it starts, where anybody listens at level INFO.

    Nobody who does not listen pays for `duration`, which returns seconds.
    """
    if _LOG.isEnabledFor(logging.INFO) and (seconds := duration()) > _NOTABLE:
        _LOG.info("%s: about %s", stage, duration_text(seconds))


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of one forward pass of the example, and its pixels."""

    seconds: float
    pixels: int

    @classmethod
    def of(cls, model: nn.Module, example: Tensor, caller: Caller) -> Durations:
        """Time a forward pass of a network that has run on the example before, so that nothing is set up."""
        image = example.to(*home_of(model))
        with evaluating(model), torch.no_grad():
            start = time.perf_counter()
            caller(model, image)
            seconds = time.perf_counter() - start
        return cls(seconds, math.prod(example.shape[2:]))

    def scan(self, *, graph: bool) -> float:
        """Return the seconds of a scan, with the capture of the graph or without."""
        return _SCAN * self.seconds + (_EXPORT if graph else 0.0)

    def calibration(self, sizes: Sequence[Sequence[int]], sites: int) -> float:
        """Return the seconds of whole passes over images of these extents.

        One image is frozen as it goes; several take a pass per site, which ends where the site is.
        """
        passes = _FREEZE if len(sizes) == 1 else sites / 2 + 1
        return passes * sum(map(self._pass, sizes)) if sites else 0.0

    def proof(
        self, sizes: Sequence[Sequence[int]], geometry: Geometry | None, tile: int | Sequence[int] | None
    ) -> float:
        """Return the seconds of a proof on the first image, and of one comparison on each other."""
        first, *others = sizes
        overlap = 1.0
        if geometry is not None:
            sides = (tile,) * len(first) if isinstance(tile, int) else tile or geometry.third(first)
            for n, side, halo in zip(first, sides, geometry.halo, strict=True):
                overlap *= min(n, side + sum(halo)) / min(n, side)
        compared = (_COMPARE + _TILES * overlap) * self._pass(first) + _AROUND * self.seconds
        return compared + 2 * sum(map(self._pass, others)) + (_FREEZE * self._pass(first) if others else 0.0)

    def _pass(self, extents: Sequence[int]) -> float:
        return self.seconds * math.prod(extents) / self.pixels
