"""What people do with a network: predict with it, check it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from normfix.calling import Caller, evaluating, home_of
from normfix.checking import Network, compare, undecided
from normfix.errors import NormfixError
from normfix.images import Items
from normfix.numerics import exact_arithmetic, settings
from normfix.pipeline.cropping import check_pipeline
from normfix.pipeline.looking import base_of, fitting_example, geometry_of, look, thinnest
from normfix.programs import require_free
from normfix.provenance import is_current, provenance_of
from normfix.records import Scan, Verdict
from normfix.rewriting import copy_of
from normfix.stitching import tiled
from normfix.tiles import Geometry, round_up

__all__ = ["assert_tile_invariant", "check", "compare_with", "predict"]

ForwardFn = Callable[[nn.Module, Tensor], Any]


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
            off the stride grid, NF410 for a halo that is not enough, and codes of the image.
    """
    known = _known(model, image, forward_fn, output)
    exact = geometry_of(known.scan)
    geometry = _with_halo(exact, halo)
    if geometry is None or exact is None or known.live:
        reasons = [f"{site} is live" for site in known.live[:3]] or [f.message for f in known.scan.findings]
        raise NormfixError(
            "NF409",
            f"tiles of this network do not give its prediction of the whole image: {'; '.join(reasons)}. "
            "Convert it first.",
            where=known.scan.model,
        )
    _require_enough(geometry, exact)
    (item,) = Items.of(image, *home_of(model), like=known.scan.example)
    with evaluating(model), exact_arithmetic():
        return tiled(lambda x: known.caller(model, x), item, tile, geometry)


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
    known = _known(model, image, forward_fn, output)
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


@dataclass(frozen=True, slots=True)
class _Known:
    """How to call a model, its scan and which of its sites are live."""

    caller: Caller
    scan: Scan
    live: tuple[str, ...]


def _known(model: nn.Module, image: Tensor, forward_fn: ForwardFn | None, output: str | int | None) -> _Known:
    """Take what travels with the model, or scan it where that is of other modules or of another output."""
    require_free(model)
    known = provenance_of(model)
    if known is not None and is_current(model) and output in (None, known.output, _as_index(known.output)):
        left = tuple(d.site.id for d in known.plan.left_live)
        return _Known(Caller(forward_fn, known.output), known.scan, left)
    caller = Caller(forward_fn, output if output is not None or known is None else known.output)
    (item,) = Items.of(image, *home_of(model))
    example = fitting_example(model, item, caller)
    scan = look(base_of(model, example, caller), example, caller).scan
    return _Known(caller, scan, tuple(site.id for site in scan.live))


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
