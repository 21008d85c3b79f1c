"""The bench: a network scanned and rewritten once, in which one kind of constants after another is put and tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normfix.api.conversion import stored_statistics
from normfix.choosing.references import blended_windows, side_by_side
from normfix.conversion.distillation import Distillation
from normfix.conversion.measuring import settle_sites_
from normfix.conversion.planning import decide
from normfix.conversion.pooling import blended_targets, parts_of, pooled_targets
from normfix.conversion.rewriting import rewrite, rewrite_
from normfix.conversion.targets import measured_targets
from normfix.errors import NormfixError
from normfix.images.sources import TensorImage
from normfix.networks.calling import Caller, in_eval_mode
from normfix.networks.numerics import deviation
from normfix.proof.indicators import recognise
from normfix.records.diagnoses import Kind
from normfix.records.plans import Plan
from normfix.records.spans import round_up
from normfix.records.statistics import Statistics
from normfix.scanning.base import base_of
from normfix.scanning.scan import look
from normfix.tiling.grid import Geometry
from normfix.tiling.stitching import cropped, padded, tiled

__all__ = ["Bench", "Sample"]

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Sample:
    """An image (1, C, *space), or a half of one, with its labels where there are any.

    `part` tells that it stands for a larger image, of which more was left out.
    """

    name: str
    pixels: Tensor
    labels: Any = None
    part: bool = False


@dataclass(slots=True)
class Bench:
    """The original, the converted network whose constants are changed, and what is known of both."""

    original: nn.Module
    converted: nn.Module
    plan: Plan
    caller: Caller
    geometry: Geometry
    stored: dict[str, tuple[Tensor, Tensor]]
    model: str
    kind: Kind = "probability"
    assumed: bool = False
    _windows: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        image: Tensor,
        caller: Caller,
        *,
        keep: Sequence[str] = (),
        as_trained: bool = False,
    ) -> Bench:
        """Scan and rewrite a network.

        Raises:
            NormfixError: NF555 if no constants of it are measured, NF556 if no tiles of it are exact.
        """
        ready = base_of(model, image, caller, as_trained=as_trained)
        seen = look(ready.copy, ready.example, ready.caller)
        plan = decide(seen.scan.sites, model=seen.scan.model, to="frozen", keep=keep)
        if not any(d.measured for d in plan.converted):
            raise NormfixError(
                "NF555",
                "it computes no statistic of the image that could be frozen: its norms use what is stored. If it is "
                "used in train mode, add --as-trained (as_trained=True).",
                where=seen.scan.model,
            )
        if seen.geometry is None or plan.left_live:
            why = "; ".join(f.message for f in seen.scan.findings) or "a site stays live"
            raise NormfixError(
                "NF556",
                f"no constants make its tiles exact, so there is nothing to choose: {why}",
                where=seen.scan.model,
            )
        converted = in_eval_mode(rewrite_(ready.copy(), plan))
        ready.network.eval()
        stored = stored_statistics(model, plan)
        return cls(ready.network, converted, plan, ready.caller, seen.geometry, stored, seen.scan.model)

    def live(self, pixels: Tensor) -> Tensor:
        """Return what the original gives for an image."""
        return self._fitted(self.run_original, pixels)

    def run_original(self, x: Tensor) -> Tensor:
        """Run the original on an input that it is exact at."""
        return self.caller.exactly(self.original, x)

    def frozen(self, pixels: Tensor) -> Tensor:
        """Return what the converted network gives with the constants of now."""
        return self.predicted(self.converted, pixels)

    def predicted(self, network: nn.Module, pixels: Tensor) -> Tensor:
        """Return what a converted network gives for an image."""
        return self._fitted(lambda x: self.caller.exactly(network, x), pixels)

    def settle_(self, statistics: Statistics, images: Sequence[Tensor]) -> None:
        """Give the converted network the constants of images."""
        targets = measured_targets(self.converted, self.plan, express=True)
        if statistics.pools:
            targets = pooled_targets(targets, statistics.law)
        if statistics.kind == "blend":
            targets = blended_targets(targets, self.stored, statistics.weight)
        settle_sites_(self.converted, targets, self._parts(statistics, images), self.caller.exactly)

    def distil_(self, statistics: Statistics, images: Sequence[Tensor]) -> None:
        """Give the converted network constants that are fitted to the original in windows of images."""
        self.settle_(statistics.start, images)
        fit = Distillation(
            self.converted,
            measured_targets(self.converted, self.plan),
            self.run_original,
            lambda x: self.caller.exactly(self.converted, x),
            self.kind,
        )
        fit.fit_(self._parts(statistics.start, images))

    def recalibrated(self, images: Sequence[Tensor]) -> nn.Module:
        """Return a BatchRenorm network, converted on the first image and calibrated on all."""
        plan = self.renorm_plan
        network = in_eval_mode(rewrite(self.original, plan))
        whole = Statistics()
        for express, measured in ((True, images[:1]), (False, images)):
            targets = measured_targets(network, plan, express=express)
            settle_sites_(network, targets, self._parts(whole, measured), self.caller.exactly)
        return network

    @property
    def renorm_plan(self) -> Plan:
        """Return the plan of BatchRenorm."""
        return decide([d.site for d in self.plan.decisions], model=self.plan.model, to="batchrenorm")

    @property
    def regroups(self) -> bool:
        """Tell whether BatchRenorm holds other constants than a frozen norm: per channel, where groups share one."""
        layers = [d.site.layer for d in self.plan.converted if d.measured and d.site.layer is not None]
        return any(layer.groups < layer.features for layer in layers)

    def own_windows(self, sample: Sample, size: tuple[int, ...]) -> Tensor:
        """Return what the original gives in windows, blended; once per sample."""
        key = (sample.name, size)
        if key not in self._windows:
            blended = lambda x: blended_windows(self.run_original, x, size, self.geometry)  # noqa: E731
            self._windows[key] = self._fitted(blended, sample.pixels)
        return self._windows[key]

    def live_tiles(self, pixels: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return what the original gives in tiles side by side."""
        return self._fitted(lambda x: side_by_side(self.run_original, x, size, self.geometry), pixels)

    def seams(self, network: nn.Module, pixels: Tensor, whole: Tensor, sd: float) -> float | None:
        """Return the largest difference in sd between two tiles and the whole; None if the image is not cut."""
        x = padded(pixels, self.geometry)
        space, strides = list(x.shape[2:]), self.geometry.stride
        axis = space.index(max(space))
        tile = list(space)
        tile[axis] = space[axis] // 2 // strides[axis] * strides[axis]
        tile = [round_up(n, s) for n, s in zip(tile, strides, strict=True)]
        if not tile[axis]:
            return None
        parts = tiled(lambda part: self.caller.exactly(network, part), pixels, tile, self.geometry)
        return deviation(parts, whole, sd)[0]

    def understand(self, kind: Kind | None, sample: Sample, *, masks: bool = False) -> None:
        """Take what the output means, or tell it by the values that the original gives.

        Args:
            kind: as it was stated.
            sample: what to tell it by.
            masks: it is compared with classes or masks, so numbers without bounds are scores, a channel for each class,
                or logits.
        """
        live = self.live(sample.pixels)
        self.kind = kind or recognise(live)
        if kind is None and masks and self.kind == "regression":
            per_class = live.shape[1] > 1 and np.squeeze(sample.labels).ndim == live.dim() - 2
            self.kind, self.assumed = "scores" if per_class else "logits", True

    def _fitted(self, run: Run, pixels: Tensor) -> Tensor:
        """Run on an image of any size, extended to one that the network is exact at."""
        with torch.no_grad():
            found = run(padded(pixels, self.geometry))
        return cropped(found, pixels.shape[2:], self.geometry.scale)

    def _parts(self, statistics: Statistics, images: Sequence[Tensor]) -> list[Any]:
        sources = [TensorImage(padded(image, self.geometry)) for image in images]
        return [part for image in sources for part in parts_of(image, statistics, self.geometry)]
