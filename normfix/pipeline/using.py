"""What people do with a network: calibrate it, predict with it, check it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normfix.calibration import Calibration, Target, measure_sites_
from normfix.calling import Caller, evaluating, home_of
from normfix.checking import Network, compare, undecided
from normfix.errors import NormfixError
from normfix.images import Items
from normfix.moments import Moments
from normfix.numerics import exact_arithmetic, settings
from normfix.pipeline.looking import base_of, fitting_example, geometry_of, look, site_target, thinnest
from normfix.provenance import provenance_of
from normfix.records import CalibrationSummary, Family, Scan, Verdict
from normfix.rewriting import copy_of
from normfix.scanning import survey
from normfix.stitching import padded, tiled
from normfix.tiles import Geometry

__all__ = ["assert_tile_invariant", "calibrate", "calibrate_", "check", "compare_with", "predict"]

Progress = Callable[[int, int], None]
ForwardFn = Callable[[nn.Module, Tensor], Any]


def calibrate(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    tile: int | None = None,
    *,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """Return a copy of a network whose statistics are measured anew on whole images.

    Args:
        model: converted by normfix, or any network with batch norms on running statistics; not modified.
        images: re-iterable of (N, C, *space) tensors, or one tensor.
        tile: has no influence on the statistics, which are those of whole images; this version holds each
            image in memory whole.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        progress: called with (passes done, passes in all).

    Raises:
        NormfixError: NF302 if the network has live statistics, or none at all; NF301 and codes of the images.
    """
    copied = copy_of(model)
    return Calibration(
        copied, calibrate_(copied, images, tile, forward_fn=forward_fn, output=output, progress=progress)
    )


def calibrate_(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    tile: int | None = None,
    *,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    progress: Progress = lambda done, total: None,
) -> CalibrationSummary:
    """Measure a network's statistics anew in place, on the same module objects; see `calibrate`.

    Optimizers, compiled and distributed wrappers keep their model. On any error the old statistics are back.
    """
    known = provenance_of(model)
    items = Items.of(images, *home_of(model), like=known.scan.example if known else None)
    caller = Caller(forward_fn, output if output is not None else known.output if known else None)
    if known is not None:
        geometry = geometry_of(known.scan)
        if geometry is not None:
            items = replace(items, prepare=partial(padded, geometry=geometry))
        targets = [site_target(model, decision, express=False) for decision in known.plan.converted]
    else:
        targets = _batch_norms(model, fitting_example(model, next(iter(items)), caller), caller)
    return measure_sites_(model, targets, items, caller, progress)


def predict(
    model: nn.Module,
    image: Tensor,
    tile: int | Sequence[int] = 256,
    *,
    halo: int | Literal["auto"] = "auto",
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
) -> Tensor:
    """Predict one image tile by tile, exactly as the whole image would be predicted.

    Args:
        model: without live statistics; not modified.
        image: (N, C, *space), any size. Where the network is not exact at that size, the image is extended
            by its edge pixels to the next exact size and the result cut back.
        tile: pixels per axis, multiples of the stride.
        halo: pixels of context on every side; "auto" is what the network needs.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.

    Returns:
        (N, C', *out) in the model's dtype, on its device.

    Raises:
        NormfixError: NF409 if the network has live statistics or no halo is enough, NF402 for a tile that is
            off the stride grid, and codes of the image.
    """
    caller, scan = _known(model, image, forward_fn, output)
    geometry = _with_halo(geometry_of(scan), halo)
    if geometry is None or (scan.live and provenance_of(model) is None):
        reasons = [f"{site.id} is live" for site in scan.live[:3]] or [f.message for f in scan.findings]
        raise NormfixError(
            "NF409",
            f"tiles of this network do not give its prediction of the whole image: {'; '.join(reasons)}. "
            "Convert it first.",
            where=scan.model,
        )
    (item,) = Items.of(image, *home_of(model), like=scan.example)
    with evaluating(model), exact_arithmetic():
        return tiled(lambda x: caller(model, x), item, tile, geometry)


def check(
    model: nn.Module,
    image: Tensor,
    tile: int | Sequence[int] = 256,
    *,
    halo: int | Literal["auto"] = "auto",
    threshold: float | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
) -> Verdict:
    """Compare stitched tiles with the whole image, in sd of the whole-image output.

    Args:
        model: any network; not modified.
        image: (N, C, *space), larger than a window on at least one axis.
        tile: pixels per axis, multiples of the stride.
        halo: pixels of context on every side; "auto" is what the network needs once nothing is live.
        threshold: largest difference, in sd, that still passes with a warning; default 100 times the
            measured noise floor.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.

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
    caller, scan = _known(model, image, forward_fn, output)
    exact = geometry_of(scan)
    geometry = _with_halo(exact, halo)
    if geometry is None or exact is None:
        return undecided(scan)
    (item,) = Items.of(image, *home_of(model), like=scan.example)
    live = [] if provenance_of(model) is not None else [site.id for site in scan.live]
    return compare_with(
        model, caller, item, geometry, tile=tile, threshold=threshold, exact_halo=exact.halo, live=live
    )


def assert_tile_invariant(
    model: nn.Module,
    image: Tensor,
    tile: int | Sequence[int] = 256,
    *,
    halo: int | Literal["auto"] = "auto",
    threshold: float | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
) -> Verdict:
    """Raise AssertionError unless `check` passes; an inconclusive check does not.

    Takes what `check` takes and returns its verdict.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4))
        >>> normfix.assert_tile_invariant(net, torch.rand(1, 1, 128, 128), tile=32).status
        'passed'
    """
    verdict = check(model, image, tile, halo=halo, threshold=threshold, forward_fn=forward_fn, output=output)
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
    network = Network(lambda x: caller(tested, x), lambda x: caller(double, x), dtype)
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


def _known(
    model: nn.Module, image: Tensor, forward_fn: ForwardFn | None, output: str | int | None
) -> tuple[Caller, Scan]:
    """Return how to call the model and its scan: the one that travels with it, or a new one."""
    known = provenance_of(model)
    if known is not None:
        return Caller(forward_fn, output if output is not None else known.output), known.scan
    caller = Caller(forward_fn, output)
    (item,) = Items.of(image, *home_of(model))
    example = fitting_example(model, item, caller)
    return caller, look(base_of(model, example, caller), example, caller).scan


def _with_halo(geometry: Geometry | None, halo: int | Literal["auto"]) -> Geometry | None:
    if geometry is None or halo == "auto":
        return geometry
    return replace(geometry, halo=((halo, halo),) * len(geometry.stride))


def _batch_norms(model: nn.Module, example: Tensor, caller: Caller) -> list[Target]:
    """Describe the batch norms of a network that normfix did not convert."""
    copied = copy_of(model).eval()
    sites = survey(copied, caller, example).sites
    live = [site for site in sites if site.live]
    batch = [s for s in sites if s.family is Family.BATCH and s.layer is not None and s.layer.carries]
    if live or not batch:
        reason = f"{live[0].id} is live" if live else "it has no normalisation with running statistics"
        raise NormfixError(
            "NF302",
            f"there is nothing to calibrate before it is converted: {reason}.",
            where=type(model).__name__,
        )
    return [_batch_target(site.id, model.get_submodule(site.owner)) for site in batch]


def _batch_target(name: str, norm: nn.Module) -> Target:
    def store(moments: Moments) -> None:
        with torch.no_grad():
            norm.running_mean.copy_(moments.mean)  # type: ignore[operator]
            norm.running_var.copy_(moments.var)  # type: ignore[operator]

    return Target(name, norm, norm, store, lambda moments: moments)
