"""Compare stitched tiles with the whole image, against the network's own rounding, and say what it means.

Two looks that fail in different ways. The comparison on the real image catches live statistics, phase and
size; it says nothing along axes that every window covers. Interference on a long strip, amplified and in
float64, catches a halo that is too short, which ordinary images hide. Passing needs both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normfix.networks.numerics import BOUNDLESS, IDENTITY, deviation
from normfix.records.sites import Finding, Scan
from normfix.records.spans import in_strides, round_up
from normfix.records.verdicts import Verdict
from normfix.tiling.domain import SizeVerdict
from normfix.tiling.grid import Geometry, Tile, at, cuts_of
from normfix.tiling.halo import interference
from normfix.tiling.stitching import in_tiles, padded, require_fit, tile_extents

__all__ = ["EXCUSED", "ISOLATED", "Cuts", "Look", "Network", "compare", "undecided"]

ISOLATED = 1e-11
"""Largest relative change of a tile under amplified interference in float64 that counts as none.

Measured on 17 networks: 0 to 4e-15 with the right halo, at least 1.5e-9 with one that is a stride short.
"""

EXCUSED = 1e-3
"""Largest difference in sd that a noise floor may excuse; above it only a repeat in float64 can.

In half precision, or where activations are far from zero, the noise floor itself is a large part of the output.
"""

Function = Callable[[Tensor], Tensor]

Cuts = tuple[tuple[int, ...], ...]

Look = Callable[[Tensor, Tensor, Tensor, Cuts], None]
"""Is shown an image, its prediction whole and stitched, and where tiles begin in it, per axis."""


_INSIDE = SizeVerdict()


@dataclass(frozen=True, slots=True)
class Network:
    """A network in the precision under test and in float64, the reference for its rounding."""

    tested: Function
    double: Function
    dtype: torch.dtype


def compare(
    network: Network,
    image: Tensor,
    geometry: Geometry,
    *,
    tile: int | Sequence[int],
    cross: Sequence[int],
    threshold: float | None = None,
    exact_halo: Sequence[tuple[int, int]] | None = None,
    live: Sequence[str] = (),
    settings: tuple[tuple[str, str], ...] = (),
    judgement: SizeVerdict = _INSIDE,
    look: Look = lambda image, whole, stitched, cuts: None,
) -> Verdict:
    """Compare tiles with the whole image.

    Args:
        network: functions (1, C, *space) -> (1, C', *out).
        image: (N, C, *space) in the tested dtype.
        geometry: its halo is the one under test.
        tile: pixels per axis, multiples of the stride.
        cross: extents of the strips for interference.
        threshold: largest difference, in sd, that still passes with a warning; None means 100 times the
            noise floor, at most 1e-3.
        exact_halo: the measured halo, where the halo under test is another.
        live: names of live sites, as the probable cause of a failure.
        settings: recorded in the verdict.
        judgement: of the image's size. Where the network is another at this size, agreement decides nothing.
        look: is shown what is compared.

    Raises:
        NormfixError: NF402 if the tile is not on the stride grid.
    """
    whole_image = padded(image, geometry)
    extents = tile_extents(tile, geometry)
    whole = network.tested(whole_image)
    stitched, tiles = in_tiles(network.tested, whole_image, extents, geometry)
    require_fit(stitched, whole)
    look(whole_image, whole, stitched, cuts_of(tiles))
    spread = float(whole.double().std().nan_to_num(0, 0, 0))
    findings: list[Finding] = []
    if spread > 0:
        max_sd, mean_sd = deviation(stitched, whole, spread)
        noise = _noise(network, whole_image, tiles, spread)
    else:
        max_sd = mean_sd = noise = 0.0
        findings.append(
            Finding(
                code="NF404", where="output", message="the output is constant or not finite on this image."
            )
        )
    axes = _cut_axes(tiles, whole_image.shape[2:])
    if not axes:
        findings.append(_covering(tiles[0], whole_image, extents))
    tolerance = min(4 * noise, EXCUSED)
    limit = min(100 * noise, EXCUSED) if threshold is None else threshold
    changes = _interference(network, image, geometry, cross)
    # measured in float64 both: a confirmation as well
    leaking = any(change > ISOLATED for change in changes) or any(_short_axes(geometry, exact_halo))
    differs = max_sd > max(limit, tolerance) and (
        leaking or _confirmed(network, whole_image, tiles, stitched, whole, findings)
    )
    if tolerance < max_sd <= limit:
        findings.append(_rounding(max_sd, tolerance, limit))
    findings += _leaks(changes, geometry, exact_halo, extents)
    if differs or leaking:
        findings += [
            Finding(code="NF401", where=site, message="its statistic is computed from the tile.")
            for site in live
        ]
    findings += judgement.outside + judgement.unproved + judgement.elsewhere
    return Verdict(
        status=_status(
            failed=differs or leaking, compared=bool(axes), varies=spread > 0 and not judgement.outside
        ),
        max_sd=max_sd,
        mean_sd=mean_sd,
        tile_mismatch=_mismatch(stitched, whole),
        noise=noise,
        tolerance=tolerance,
        threshold=limit,
        sd=spread,
        tile=extents,
        halo=geometry.halo,
        stride=geometry.stride,
        padding=geometry.padding(image.shape[2:]),
        axes=axes,
        windows=len(tiles),
        interference=changes,
        findings=tuple(findings),
        settings=settings,
        halo_rounded=in_strides(geometry.halo, geometry.stride),
    )


def undecided(scan: Scan) -> Verdict:
    """Return the verdict on a network whose geometry a scan could not measure, with the scan's reasons.

    Dye that reached everywhere, or no shift that the output follows, is a proof against tiling; a network
    that runs on no strip, or whose output is not dense, leaves the question open.
    """
    against = {"NF211", "NF212", "NF213", "NF215"} & {finding.code for finding in scan.findings}
    return Verdict(
        status="failed" if against else "inconclusive",
        max_sd=0.0,
        mean_sd=0.0,
        tile_mismatch=None,
        noise=0.0,
        tolerance=0.0,
        threshold=0.0,
        sd=0.0,
        tile=(),
        halo=(),
        stride=(),
        padding=(),
        axes=(),
        windows=0,
        interference=(),
        findings=scan.findings,
        settings=(),
    )


def _status(*, failed: bool, compared: bool, varies: bool) -> Literal["passed", "failed", "inconclusive"]:
    """Decide; a check that compared nothing is inconclusive, whatever interference found beside it."""
    if not compared:
        return "inconclusive"
    if failed:
        return "failed"
    return "passed" if varies else "inconclusive"


def _noise(network: Network, image: Tensor, tiles: Sequence[Tile], spread: float) -> float:
    """Return the noise floor n: largest |tested - float64| on the middle window, in sd."""
    if network.dtype == torch.float64:
        return IDENTITY[torch.float64] / 4
    window = image[at(tiles[len(tiles) // 2].read)]
    rounded, _ = deviation(network.tested(window), network.double(window.double()), spread)
    return rounded if rounded < BOUNDLESS else 0.0  # a window without finite output excuses nothing


def _cut_axes(tiles: Sequence[Tile], size: Sequence[int]) -> tuple[int, ...]:
    """Return the axes along which at least one window is smaller than the image."""
    covered = [tile.covers(size) for tile in tiles]
    return tuple(axis for axis in range(len(size)) if not all(c[axis] for c in covered))


def _confirmed(
    network: Network,
    image: Tensor,
    tiles: Sequence[Tile],
    stitched: Tensor,
    whole: Tensor,
    findings: list[Finding],
) -> bool:
    """Repeat the worst tile in float64: a structural difference stays, rounding goes."""
    worst = max(tiles, key=lambda t: float((stitched[at(t.write)] - whole[at(t.write)]).abs().max()))
    precise = image.double()
    expected = network.double(precise)
    actual = network.double(precise[at(worst.read)])[at(worst.keep)]
    largest, _ = deviation(actual, expected[at(worst.write)], float(expected.double().std()) or 1.0)
    bound = 100 * IDENTITY[torch.float64]
    if largest <= bound:
        message = f"the difference shrinks to {largest:.1e} sd in float64: it is rounding."
        findings.append(Finding(code="NF405", where="noise", message=message))
        return False
    message = f"the tile that differs most is still {largest:.2g} sd away in float64."
    where = "tile at " + ", ".join(str(s.start) for s in worst.write)
    findings.append(Finding(code="NF406", where=where, message=message))
    return True


def _interference(
    network: Network, image: Tensor, geometry: Geometry, cross: Sequence[int]
) -> tuple[float, ...]:
    """Return the change of a tile under amplification outside its window, per axis, in float64."""
    precise = image[:1].double()
    return tuple(
        interference(
            network.double,
            precise,
            axis,
            stride,
            scale,
            (round_up(before, stride), round_up(after, stride)),
            cross,
        )
        for axis, (stride, scale, (before, after)) in enumerate(
            zip(geometry.stride, geometry.scale, geometry.halo, strict=True)
        )
    )


def _leaks(
    changes: Sequence[float],
    geometry: Geometry,
    exact: Sequence[tuple[int, int]] | None,
    tile: Sequence[int],
) -> list[Finding]:
    found = []
    for axis, (change, short) in enumerate(zip(changes, _short_axes(geometry, exact), strict=True)):
        stride, reasons = geometry.stride[axis], []
        if short and exact is not None:
            given, reach, need = (
                "/".join(map(str, pair))
                for pair in (geometry.halo[axis], exact[axis], (round_up(n, stride) for n in exact[axis]))
            )
            reasons.append(f"the halo is {given}, the network reaches {reach}")
            reasons.append(f"no tile of {tile[axis]} can be exact with it; read at least {need} around each")
        elif change > ISOLATED:
            reasons.append(f"no tile of {tile[axis]} can be exact with this halo")
        if change > ISOLATED:
            reasons.append(
                f"a tile changes by {change:.1e} of its output when everything beyond the halo is amplified"
            )
        if reasons:
            found.append(Finding(code="NF403", where=f"axis {axis}", message="; ".join(reasons) + "."))
    return found


def _short_axes(geometry: Geometry, exact: Sequence[tuple[int, int]] | None) -> tuple[bool, ...]:
    """Tell per axis whether the halo under test, in whole strides, is shorter than the measured one."""
    if exact is None:
        return (False,) * len(geometry.halo)
    return tuple(
        any(round_up(h, stride) < round_up(e, stride) for h, e in zip(given, need, strict=True))
        for given, need, stride in zip(geometry.halo, exact, geometry.stride, strict=True)
    )


def _covering(tile: Tile, image: Tensor, extents: Sequence[int]) -> Finding:
    size = "x".join(map(str, image.shape[2:]))
    window = "x".join(str(s.stop - s.start) for s in tile.read)
    return Finding(
        code="NF407",
        where="tile",
        message=f"every window ({window} for a tile of {'x'.join(map(str, extents))}) covers the whole image ({size}), "
        "so nothing was compared. Use a larger image or a smaller tile.",
    )


def _rounding(max_sd: float, tolerance: float, limit: float) -> Finding:
    return Finding(
        code="NF408",
        where="noise",
        message=f"the largest difference, {max_sd:.1e} sd, is above 4 times the noise floor ({tolerance:.1e}) "
        f"but within {limit:.1e}.",
    )


def _mismatch(stitched: Tensor, whole: Tensor) -> float | None:
    """Return 1 - Dice at 0.5, for outputs that are probabilities; 0 where both are empty."""
    if float(whole.min()) < 0 or float(whole.max()) > 1:
        return None
    a, b = stitched > 0.5, whole > 0.5
    total = int(a.sum()) + int(b.sum())
    return 1 - 2 * int((a & b).sum()) / total if total else 0.0
