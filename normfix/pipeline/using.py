"""What people do with a network: predict with it, check it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from normfix.calling import Caller, evaluating, home_of
from normfix.checking import Network, compare, undecided
from normfix.errors import NormfixError
from normfix.images import Items
from normfix.numerics import exact_arithmetic, settings
from normfix.pipeline.cropping import check_pipeline
from normfix.pipeline.engines import engine_of
from normfix.pipeline.looking import base_of, fitting_example, geometry_of, look, site_target, thinnest
from normfix.pipeline.opening import Wholes
from normfix.pipeline.streamed import (
    NOT_IN_STAGES,
    Resources,
    measure_streamed_,
    predict_in_stages,
)
from normfix.programs import require_free
from normfix.provenance import is_current, provenance_of
from normfix.records import Scan, Verdict
from normfix.rewriting import copy_of
from normfix.stitching import tile_extents, tiled
from normfix.streaming import OutputFile, Source, TensorSource, Watch, resumable
from normfix.tiles import Geometry, round_up

__all__ = [
    "Known",
    "assert_tile_invariant",
    "check",
    "compare_with",
    "known_of",
    "predict",
    "write_prediction",
]

ForwardFn = Callable[[nn.Module, Tensor], Any]


def predict(
    model: nn.Module,
    image: Tensor | Source,
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

    Returns:
        (N, C', *out) in the model's dtype, on its device.

    Raises:
        NormfixError: NF409 if the network has live statistics or no halo is enough, NF402 for a tile that is
            off the stride grid, NF410 for a halo that is not enough or an engine, NF32x where stages are asked for
            and not possible, NF326 to NF336 of the store and the cluster, and codes of the image.
    """
    job = _Prediction.of(model, image, tile, halo, engine, statistics, forward_fn, output)
    crew = engine_of(engine, scheduler, store, workers)
    with resumable(store):
        result = job.run(Resources(tile=job.tile, budget=budget, store=store, engine=crew, watch=watch))
    assert result is not None
    return result


def write_prediction(
    model: nn.Module,
    image: Tensor | Source,
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
) -> tuple[tuple[int, ...], str]:
    """Predict one image into a new file, block by block; in stages where the network can. See `predict`.

    Args:
        model: as for `predict`.
        image: of a batch of one.
        out: ends in .npy, .tif, .zarr (OME-Zarr) or .nii; must not exist, and appears when it is whole. Size of
            pixels, their place and the order of channels are those of the image, as far as the format holds them.
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

    Returns:
        Shape (C, *space) and dtype of what was written.

    Raises:
        NormfixError: NF114 for a file that cannot be written, and codes of `predict`.
    """
    crew = engine_of(engine, scheduler, store, workers)
    with resumable(store), OutputFile(out) as file:
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


def check(
    model: nn.Module | Callable[..., Any],
    image: Any,
    tile: int | Sequence[int] = 256,
    *,
    halo: int | Literal["auto"] = "auto",
    threshold: float | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    stride: int = 32,
    margin: int | None = None,
) -> Verdict:
    """Compare stitched tiles with the whole image, in sd of the whole-image output.

    Args:
        model: any network, not modified; or a pipeline, a function predict(image) -> array. A pipeline has no
            whole-image reference: it is compared with itself on crops (normfix.pipeline.cropping).
        image: (N, C, *space), larger than a window on at least one axis; for a pipeline what it takes.
        tile: pixels per axis, multiples of the stride.
        halo: pixels of context on every side; "auto" is what the network needs once nothing is live.
        threshold: largest difference, in sd, that still passes with a warning; default 100 times the
            measured noise floor.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        stride: of a pipeline's network; crops are multiples of it.
        margin: of a pipeline, pixels from a crop's cut that do not count; at least its network's halo.

    Returns:
        The verdict: passed, failed or inconclusive, with findings.

    Raises:
        NormfixError: NF402 for a tile that is off the stride grid, and codes of `scan` and of the image.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> normfix.check(net, torch.rand(1, 1, 128, 128), tile=32).status
        'failed'
    """
    if threshold is not None and not threshold >= 0:
        raise NormfixError(
            "NF410", "a threshold is a number of sd, 0 or more.", where=f"threshold={threshold}"
        )
    if not isinstance(model, nn.Module) and callable(model):
        return check_pipeline(model, image, tile, stride=stride, margin=margin, threshold=threshold)
    known = known_of(model, image, forward_fn, output)
    exact = geometry_of(known.scan)
    geometry = _with_halo(exact, halo)
    if geometry is None or exact is None:
        return undecided(known.scan)
    (item,) = Items.of(image, *home_of(model), like=known.scan.example)
    return compare_with(
        model,
        known.caller,
        item,
        geometry,
        tile=tile,
        threshold=threshold,
        exact_halo=exact.halo,
        live=known.live,
    )


def assert_tile_invariant(
    model: nn.Module | Callable[..., Any], image: Any, tile: int | Sequence[int] = 256, **options: Any
) -> Verdict:
    """Raise AssertionError unless `check` passes; an inconclusive check does not.

    Takes what `check` takes and returns its verdict.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4))
        >>> normfix.assert_tile_invariant(net, torch.rand(1, 1, 128, 128), tile=32).status
        'passed'
    """
    verdict = check(model, image, tile, **options)
    if not verdict.passed:
        reasons = "; ".join(f"{f.code} {f.where}: {f.message}" for f in verdict.findings)
        raise AssertionError(
            f"{verdict.status}, tiles are up to {verdict.max_sd:.2g} sd from the whole image. {reasons}"
        )
    return verdict


def compare_with(
    model: nn.Module,
    caller: Caller,
    image: Tensor,
    geometry: Geometry,
    *,
    tile: int | Sequence[int],
    threshold: float | None = None,
    exact_halo: Sequence[tuple[int, int]] | None = None,
    live: Sequence[str] = (),
) -> Verdict:
    """Run `checking.compare` on copies of a model in its own dtype and in float64."""
    tested = copy_of(model).eval()
    double = copy_of(tested).double()
    device, dtype = home_of(tested)
    network = Network(lambda x: caller(tested, x), lambda x: caller.in_double(double, x), dtype)
    with exact_arithmetic():
        return compare(
            network,
            image,
            geometry,
            tile=tile,
            cross=thinnest(network.double, image.double(), geometry),
            threshold=threshold,
            exact_halo=exact_halo,
            live=live,
            settings=settings(device, dtype),
        )


_PAYS = 1 << 24
"""Pixels of halo from which stages are worth capturing the network for."""


def _pays(size: Sequence[int], tile: Sequence[int], geometry: Geometry) -> bool:
    """Tell whether tiles would compute much more than the image."""
    tiles = math.prod(-(-n // t) for n, t in zip(size, tile, strict=True))
    window = (min(n, t + sum(h)) for n, t, h in zip(size, tile, geometry.halo, strict=True))
    return tiles * math.prod(window) - math.prod(size) > _PAYS


@dataclass(frozen=True, slots=True)
class _Prediction:
    """What to predict, checked."""

    model: nn.Module
    image: Source
    known: Known
    geometry: Geometry
    tile: tuple[int, ...]
    engine: str
    statistics: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        image: Tensor | Source,
        tile: int | Sequence[int],
        halo: int | Literal["auto"],
        engine: str,
        statistics: str,
        forward_fn: ForwardFn | None,
        output: str | int | None,
    ) -> _Prediction:
        _require_known(engine=engine, statistics=statistics)
        known = known_of(model, image, forward_fn, output)
        exact = geometry_of(known.scan)
        geometry = _with_halo(exact, halo)
        if geometry is None or exact is None or known.live:
            reasons = [f"{site} is live" for site in known.live[:3]] or [
                f.message for f in known.scan.findings
            ]
            raise NormfixError(
                "NF409",
                "tiles of this network do not give its prediction of the whole image: "
                f"{'; '.join(reasons)}. Convert it first.",
                where=known.scan.model,
            )
        _require_enough(geometry, exact)
        if isinstance(image, Tensor):
            (item,) = Items.of(image, *home_of(model), like=known.scan.example)
            image = TensorSource(item)
        engine = engine if halo == "auto" else "tiles"
        return cls(model, image, known, geometry, tile_extents(tile, geometry), engine, statistics)

    def run(self, resources: Resources, out: OutputFile | None = None) -> Tensor | None:
        """Predict by one engine; the result, or None if it went to `out`."""
        model, caller, geometry = self.model, self.known.caller, self.geometry
        if self.statistics == "per-image":
            model = self._fitted(resources)
        pays = out is not None or _pays(self.image.shape[2:], self.tile, geometry)
        if self.engine in ("stages", "dask") or (self.engine == "auto" and pays):
            try:
                return predict_in_stages(
                    model, self.image, caller, resources, geometry=geometry, sites=self.known.layers, out=out
                )
            except NormfixError as error:
                if self.engine in ("stages", "dask") or error.code not in NOT_IN_STAGES:
                    raise
        (whole,) = Wholes([self.image])
        with evaluating(model), exact_arithmetic():
            return tiled(lambda x: caller(model, x), whole, self.tile, geometry)

    def _fitted(self, resources: Resources) -> nn.Module:
        """Return a copy of the model with the statistics of this image."""
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
        return model


def _require_known(*, engine: str, statistics: str) -> None:
    for name, given, choices in (
        ("engine", engine, ("auto", "stages", "tiles", "dask")),
        ("statistics", statistics, ("stored", "per-image")),
    ):
        if given not in choices:
            raise NormfixError("NF410", f"give {' or '.join(choices)}.", where=f"{name}={given!r}")


@dataclass(frozen=True, slots=True)
class Known:
    """How to call a model, its scan, which of its sites are live and the paths of its converted layers."""

    caller: Caller
    scan: Scan
    live: tuple[str, ...]
    layers: tuple[str, ...] = ()


def known_of(
    model: nn.Module, image: Tensor | Source, forward_fn: ForwardFn | None, output: str | int | None
) -> Known:
    """Take what travels with the model, or scan it where that is of other modules or of another output."""
    require_free(model)
    known = provenance_of(model)
    if known is not None and is_current(model) and output in (None, known.output, _as_index(known.output)):
        left = tuple(d.site.id for d in known.plan.left_live)
        layers = tuple(d.target for d in known.plan.converted)
        return Known(Caller(forward_fn, known.output), known.scan, left, layers)
    caller = Caller(forward_fn, output if output is not None or known is None else known.output)
    if not isinstance(image, Tensor):
        image = image.read([(0, min(n, 1024)) for n in image.shape[2:]])
    (item,) = Items.of(image, *home_of(model))
    example = fitting_example(model, item, caller)
    scan = look(base_of(model, example, caller), example, caller).scan
    return Known(caller, scan, tuple(site.id for site in scan.live))


def _as_index(output: str | None) -> int | None:
    return int(output) if output is not None and output.isdigit() else None


def _with_halo(geometry: Geometry | None, halo: object) -> Geometry | None:
    """Return the geometry with a halo of the caller's on every side.

    Raises:
        NormfixError: NF410 for what is neither "auto" nor a number of pixels.
    """
    if halo == "auto":
        return geometry
    if not isinstance(halo, int) or isinstance(halo, bool) or halo < 0:
        raise NormfixError("NF410", "give 'auto' or a number of pixels, 0 or more.", where=f"halo={halo!r}")
    return geometry and replace(geometry, halo=((halo, halo),) * len(geometry.stride))


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
