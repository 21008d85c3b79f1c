"""check: stitched tiles against the whole image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypedDict

from torch import Tensor, nn
from typing_extensions import Unpack

from normfix.errors import NormfixError
from normfix.images.given import images_of
from normfix.images.sources import whole
from normfix.networks.calling import Caller, home_of
from normfix.networks.copying import double_of, twin_of
from normfix.networks.numerics import exact_arithmetic, settings
from normfix.networks.provenance import provenance_of
from normfix.networks.surroundings import undisturbed
from normfix.proof.comparison import Network, compare, undecided
from normfix.proof.cropping import check_pipeline
from normfix.proof.views import Viewer, viewed
from normfix.records.sites import Scan
from normfix.records.sizes import ProvedSizes
from normfix.records.verdicts import Verdict
from normfix.reporting.sentences import explanation
from normfix.scanning.known import ForwardFn, known_of, with_halo
from normfix.tiling.domain import judge_size
from normfix.tiling.geometry import geometry_of, thinnest
from normfix.tiling.grid import Geometry
from normfix.tiling.recall import Recalling
from normfix.tiling.stitching import dividing, tile_extents

__all__ = ["CheckOptions", "assert_tile_invariant", "check", "compare_with", "with_reach"]


class CheckOptions(TypedDict, total=False):
    """Options of `check`."""

    halo: int | Sequence[int] | Literal["auto"]
    threshold: float | None
    forward_fn: ForwardFn | None
    output: str | int | None
    stride: int
    margin: int | None
    viewer: Viewer | None


_TILE = 256
"""Pixels of a pipeline's tiles per axis, where nobody stated them."""


@undisturbed()
def check(
    model: nn.Module | Callable[..., Any],
    image: Any,
    tile: int | Sequence[int] | None = None,
    *,
    halo: int | Sequence[int] | Literal["auto"] = "auto",
    threshold: float | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    stride: int = 32,
    margin: int | None = None,
    viewer: Viewer | None = None,
) -> Verdict:
    """Compare stitched tiles with the whole image, in sd of the whole-image output.

    Args:
        model: any network, not modified; or a pipeline, a function predict(image) -> array. A pipeline has no
            whole-image reference: it is compared with itself on crops (normfix.proof.cropping).
        image: (N, C, *space), larger than a window on at least one axis; also an array or a file, see
            normfix.convert; for a pipeline what it takes.
        tile: pixels per axis, multiples of the stride; default: at most 256, and smaller where windows would cover
            the image. The verdict's settings say so.
        halo: pixels of context on every side; "auto" is what the network needs once nothing is live; one number,
            or one per axis.
        threshold: largest difference, in sd, that still passes with a warning; default 100 times the
            measured noise floor.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        stride: of a pipeline's network; crops are multiples of it.
        margin: of a pipeline, pixels from a crop's cut that do not count; at least its network's halo.
        viewer: is given the arrays that a report draws: image, whole, stitched, difference.

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
    if threshold is not None and not 0 <= threshold < math.inf:
        raise NormfixError(
            "NF410", "a threshold is a finite number of sd, 0 or more.", where=f"threshold={threshold}"
        )
    if not isinstance(model, nn.Module) and callable(model):
        return check_pipeline(
            model, image, tile or _TILE, stride=stride, margin=margin, threshold=threshold, viewer=viewer
        )
    taken = images_of(image, model, caller=Caller.of(provenance_of(model), forward_fn, output))
    known = known_of(model, taken, forward_fn, output)
    exact = geometry_of(known.scan)
    geometry = with_halo(exact, halo)
    if geometry is None or exact is None:
        return undecided(known.scan)
    item = whole(images_of(taken, model, like=known.scan.example).only())
    extents = dividing(item, geometry) if tile is None else tile
    verdict = compare_with(
        twin_of(model),
        known.caller,
        item,
        geometry,
        tile=extents,
        threshold=threshold,
        exact_halo=exact.halo,
        live=known.live,
        sizes=known.scan.sizes,
        viewer=viewer,
    )
    if tile is None:
        verdict = replace(verdict, settings=(*verdict.settings, ("tile", "chosen to divide the image")))
    return with_reach(verdict, known.scan)


def with_reach(verdict: Verdict, scan: Scan) -> Verdict:
    """Return a verdict that says where the halo of its scan is from."""
    return verdict if scan.reach is None else replace(verdict, reach=scan.reach.words)


def assert_tile_invariant(
    model: nn.Module | Callable[..., Any],
    image: Any,
    tile: int | Sequence[int] | None = None,
    **options: Unpack[CheckOptions],
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
        raise AssertionError(explanation(verdict))
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
    run: Callable[[Tensor], Tensor] | None = None,
    cross: Sequence[int] = (),
    double: nn.Module | None = None,
    sizes: ProvedSizes | None = None,
    viewer: Viewer | None = None,
) -> Verdict:
    """Run `comparison.compare` on a model and a copy of it in float64.

    Args:
        model: a copy in eval mode.
        caller: calls it.
        image: as for `compare`, as are the others up to `live`.
        geometry: its halo is the one under test.
        tile: pixels per axis.
        threshold: largest difference, in sd.
        exact_halo: the measured halo.
        live: names of live sites.
        run: runs the model, and may recall what it gave.
        cross: extents of the thinnest strip that it runs on; default: they are tried.
        double: a copy of it in float64; default: one is made.
        sizes: that the geometry is said of; the verdict says where these are outside.
        viewer: is given what is compared.
    """
    double = double_of(model) if double is None else double
    device, dtype = home_of(model)
    tested = Recalling(partial(caller, model)) if run is None else run

    def look(*parts: Any) -> None:
        if viewer is not None:
            viewer(viewed(*parts))

    network = Network(tested, partial(caller.in_double, double), dtype)
    with exact_arithmetic():
        return compare(
            network,
            image,
            geometry,
            tile=tile,
            cross=cross or thinnest(network.double, image.double(), geometry),
            threshold=threshold,
            exact_halo=exact_halo,
            live=live,
            settings=(
                ("network", type(model).__name__),
                ("image", "x".join(map(str, image.shape))),
                *settings(device, dtype),
            ),
            judgement=judge_size(
                sizes, image.shape[2:], tile_extents(tile, geometry), geometry, image.shape[0]
            ),
            look=look,
        )
