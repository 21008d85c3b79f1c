"""predict: one image in parts, exactly as the whole image would be predicted."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from normfix.conversion.staged import measure_streamed_
from normfix.conversion.targets import site_target
from normfix.errors import NormfixError
from normfix.images.collections import Items
from normfix.images.opening import Wholes
from normfix.images.sources import Image, TensorImage
from normfix.images.writing import OutputFile
from normfix.networks.calling import home_of
from normfix.networks.copying import copy_of, twin_of
from normfix.networks.numerics import exact_arithmetic, require_finite
from normfix.networks.provenance import provenance_of
from normfix.networks.surroundings import undisturbed
from normfix.proof.subject import middle_of
from normfix.records.sites import Scan
from normfix.records.spans import round_up
from normfix.scanning.known import ForwardFn, Known, known_of, with_halo
from normfix.scanning.renewal import renewed
from normfix.tiling.domain import judge_size
from normfix.tiling.geometry import geometry_of
from normfix.tiling.grid import Geometry
from normfix.tiling.stages.options import engine_of
from normfix.tiling.stages.outlook import Watch
from normfix.tiling.stages.prediction import predict_in_stages, tell_fallback
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.resources import Resources
from normfix.tiling.stages.resuming import resumable
from normfix.tiling.stitching import tile_extents, tiled

__all__ = ["predict", "write_prediction"]

_LOG = logging.getLogger("normfix")
_ENGINES = ("auto", "stages", "tiles", "dask")
_PAYS = 1 << 24
"""Pixels of halo from which stages are worth capturing the network for."""


@undisturbed()
def predict(
    model: nn.Module,
    image: Tensor | Image,
    tile: int | Sequence[int] = 256,
    *,
    halo: int | Literal["auto"] = "auto",
    engine: Literal["auto", "stages", "tiles", "dask"] = "auto",
    statistics: Literal["stored", "per-image"] = "stored",
    budget: int | None = None,
    store: Path | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    watch: Watch | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    allow_nonfinite: bool = False,
) -> Tensor:
    """Predict one image in parts, exactly as the whole image would be predicted.

    Two engines give the same result. "tiles" runs the whole network on each tile with the whole network's halo.
    "stages" runs the network once, stage by stage over all blocks, each with the stage's own small halo, and
    keeps the maps in between: nearly no work is done twice, which pays on large images and deep networks.

    Args:
        model: without live statistics; not modified.
        image: (N, C, *space), any size, or one that is read by window (normfix.open_image). Where
            the network is not exact at that size, the image is extended by its edge pixels to the next exact
            size and the result cut back.
        tile: pixels per axis, multiples of the stride.
        halo: pixels of context on every side; "auto" is what the network needs. A number asks for tiles.
        engine: "auto" takes stages where tiles would compute over 16 million pixels of halo and the network can
            be captured. "dask" runs stages on a cluster; needs `scheduler` and a `store` that all of it sees.
        statistics: "per-image" normalises the image by its own statistics, measured over all of it before it is
            predicted, as the network did before it was converted to frozen statistics.
        budget: bytes of memory for what stages keep in between; None is no limit.
        store: folder where values between stages are kept on disk; stages that were stopped go on from it.
        workers: blocks computed at a time in stages.
        scheduler: address of a dask scheduler.
        watch: is told what stages will take, and of each block.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        allow_nonfinite: take NaN and infinite values in the prediction for what the network means.

    Returns:
        (N, C', *out) in the model's dtype, on its device.

    Raises:
        NormfixError: NF409 if the network has live statistics or no halo is enough, NF402 for a tile that is
            off the stride grid, NF260 for an image at whose size the network is another, NF410 for a halo that is not
            enough or an engine, NF32x where stages are asked for and not possible, NF326 to NF336 of the store and the
            cluster, NF148 and NF149 for statistics and predictions that are not finite, and codes of the image.
    """
    crew = engine_of(engine, scheduler, store, workers, choices=_ENGINES)
    job = _Prediction.of(model, image, tile, halo, engine, statistics, forward_fn, output)
    with resumable(store):
        result = job.run(Resources(tile=job.tile, budget=budget, store=store, engine=crew, watch=watch))
    assert result is not None
    if not allow_nonfinite:
        require_finite(result, job.known.scan.model)
    return result


@undisturbed()
def write_prediction(
    model: nn.Module,
    image: Tensor | Image,
    out: Path,
    tile: int | Sequence[int] = 256,
    *,
    engine: Literal["auto", "stages", "tiles", "dask"] = "auto",
    statistics: Literal["stored", "per-image"] = "stored",
    budget: int | None = None,
    store: Path | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    watch: Watch | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    allow_nonfinite: bool = False,
) -> tuple[tuple[int, ...], str]:
    """Predict one image into a new file, block by block; in stages where the network can. See `predict`.

    Args:
        model: as for `predict`.
        image: of a batch of one.
        out: ends in .npy, .tif, .zarr (OME-Zarr), .nii or .nii.gz; must not exist, and appears when it is whole. Size
            of pixels, their place and the order of channels are those of the image, as far as the format holds them.
        tile: as for `predict`, as all that follow.
        engine: "auto" takes stages if the network can be captured.
        statistics: "stored" or "per-image".
        budget: bytes of memory for what stages keep in between.
        store: folder where values between stages are kept on disk; stages that were stopped go on from it.
        workers: blocks computed at a time.
        scheduler: address of a dask scheduler.
        watch: is told what stages will take, and of each block.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        allow_nonfinite: as for `predict`.

    Returns:
        Shape (C, *space) and dtype of what was written.

    Raises:
        NormfixError: NF114 for a file that cannot be written, and codes of `predict`.
    """
    crew = engine_of(engine, scheduler, store, workers, choices=_ENGINES)
    with resumable(store), OutputFile(out, allow_nonfinite=allow_nonfinite) as file:
        job = _Prediction.of(model, image, tile, "auto", engine, statistics, forward_fn, output)
        placement = getattr(image, "placement", None)
        if placement is not None:
            file.place(placement.scaled(job.geometry.scale))
        resources = Resources(tile=job.tile, budget=budget, store=store, engine=crew, watch=watch)
        result = job.run(resources, file)
        if result is not None:
            file.create(result.shape[1:], result.dtype, result.shape[2:])
            file.write(tuple(slice(0, n) for n in result.shape), result)
    return file.written


@dataclass(frozen=True, slots=True)
class _Prediction:
    """What to predict, checked."""

    model: nn.Module
    image: Image
    known: Known
    geometry: Geometry
    tile: tuple[int, ...]
    engine: str
    statistics: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        image: Tensor | Image,
        tile: int | Sequence[int],
        halo: int | Literal["auto"],
        engine: str,
        statistics: str,
        forward_fn: ForwardFn | None,
        output: str | int | None,
    ) -> _Prediction:
        _require_known(statistics)
        known = known_of(model, image, forward_fn, output)
        exact = geometry_of(known.scan)
        geometry = with_halo(exact, halo)
        if geometry is None or exact is None or known.live:
            reasons = [f"{site} is live" for site in known.live[:3]] or [
                f.message for f in known.scan.findings
            ]
            raise _not_tiled(known.scan, reasons)
        _require_enough(geometry, exact)
        if isinstance(image, Tensor):
            (item,) = Items.of(image, *home_of(model), like=known.scan.example)
            image = TensorImage(item)
        engine = engine if halo == "auto" else "tiles"
        extents = tile_extents(tile, geometry)
        _require_inside(known.scan, image.shape, extents, geometry)
        return cls(model, image, known, geometry, extents, engine, statistics)

    def run(self, resources: Resources, out: OutputFile | None = None) -> Tensor | None:
        """Predict by one engine; the result, or None if it went to `out`."""
        if self.statistics == "per-image":
            return replace(self._fitted(resources), statistics="stored").run(resources, out)
        model, caller, geometry = self.model, self.known.caller, self.geometry
        pays = out is not None or _pays(self.image.shape[2:], self.tile, geometry)
        if self.engine in ("stages", "dask") or (self.engine == "auto" and pays):
            try:
                return predict_in_stages(
                    model, self.image, caller, resources, geometry=geometry, sites=self.known.layers, out=out
                )
            except NotInStages as error:
                if self.engine in ("stages", "dask"):
                    raise
                tell_fallback("the image is read whole and predicted in tiles", error)
        (whole,) = Wholes([self.image])
        twin = twin_of(model)
        with exact_arithmetic():
            return tiled(lambda x: caller(twin, x), whole, self.tile, geometry)

    def _fitted(self, resources: Resources) -> _Prediction:
        """Return the prediction by a copy of the model that has the statistics of this image, and their geometry.

        Raises:
            NormfixError: NF409 if no geometry holds under them.
        """
        provenance = provenance_of(self.model)
        if provenance is None:
            raise NormfixError(
                "NF302",
                "only a converted network can take an image's own statistics.",
                where=self.known.scan.model,
            )
        model, caller = copy_of(self.model), self.known.caller
        targets = [site_target(model, d, express=False) for d in provenance.plan.converted if d.measured]
        if targets:
            measure_streamed_(model, targets, [self.image], caller, resources, geometry=self.geometry)
        scan = renewed(model, provenance, middle_of(self.image), caller)
        exact = geometry_of(scan)
        if scan is self.known.scan:
            return replace(self, model=model)
        if exact is None:
            raise _not_tiled(scan, [scan.findings[-1].message])
        tile = tile_extents(self.tile, exact)
        _require_inside(scan, self.image.shape, tile, exact)
        return replace(self, model=model, known=replace(self.known, scan=scan), geometry=exact, tile=tile)


def _not_tiled(scan: Scan, reasons: Sequence[str]) -> NormfixError:
    return NormfixError(
        "NF409",
        "tiles of this network do not give its prediction of the whole image: "
        f"{'; '.join(reasons)}. Convert it first.",
        where=scan.model,
    )


def _pays(size: Sequence[int], tile: Sequence[int], geometry: Geometry) -> bool:
    """Tell whether tiles would compute much more than the image."""
    tiles = math.prod(-(-n // t) for n, t in zip(size, tile, strict=True))
    window = (min(n, t + sum(h)) for n, t, h in zip(size, tile, geometry.halo, strict=True))
    return tiles * math.prod(window) - math.prod(size) > _PAYS


def _require_inside(scan: Scan, shape: Sequence[int], tile: Sequence[int], geometry: Geometry) -> None:
    """Refuse an image of a size at which the network is another than the one that was scanned; say what is unproved.

    Raises:
        NormfixError: NF260.
    """
    judgement = judge_size(scan.sizes, shape[2:], tile, geometry, shape[0])
    for finding in judgement.outside[:1]:
        raise NormfixError(finding.code, finding.message, where=scan.model)
    for finding in judgement.unproved:
        _LOG.warning("%s %s: %s", finding.code, finding.where, finding.message)


def _require_known(statistics: str) -> None:
    if statistics not in ("stored", "per-image"):
        raise NormfixError("NF410", "give stored or per-image.", where=f"statistics={statistics!r}")


def _require_enough(geometry: Geometry, exact: Geometry) -> None:
    """Refuse to predict with less context than the network needs."""
    pairs = zip(geometry.halo, exact.halo, strict=True)
    if any(
        round_up(h, s) < round_up(e, s)
        for (given, need), s in zip(pairs, exact.stride, strict=True)
        for h, e in zip(given, need, strict=True)
    ):
        raise NormfixError(
            "NF410",
            f"the network needs (before, after) {exact.halo}, so tiles would differ from the whole image. "
            "Use 'auto'.",
            where=f"halo={geometry.halo[0][0]}",
        )
