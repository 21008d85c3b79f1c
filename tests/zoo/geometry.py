"""The geometry of one architecture alone: the graph's bound, the dye within it, and brute force within that.

    bound >= measured >= brute force        on every side of every axis, in whole strides

Brute force is the zoo's own: on a strip as thin as the example, in float64, the derivative of one step of tiles by
every pixel, and, from the bound inwards, one changed column after the other where the derivative is zero (a
comparison, a pool that chose another pixel, a dead ReLU).
"""

from __future__ import annotations

import itertools
import math
import time
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normfix.networks.calling import Caller
from normfix.records.sites import Scan
from normfix.records.spans import Spans, in_strides
from normfix.scanning.base import base_of
from normfix.scanning.scan import look
from normfix.tiling.geometry import BoundExceededError

from .entry import Entry
from .preparing import material, prepared

__all__ = ["GEOMETRIES", "against", "attends", "brute_force", "examine_geometry", "reach_of_tiles"]

GEOMETRIES = {
    "bounded": "the graph bounds the halo, and both witnesses lie within",
    "unbounded": "an operator has no bound, or there is no graph: the halo is measured",
    "no geometry": "none was measured",
    "broken": "a witness lies outside: a rule or a measurement is wrong",
    "failed": "the package failed on it",
    "timeout": "stopped after the time limit",
}

COLUMNS = 12
"""Columns on each side, from the bound inwards, that are changed one by one where the derivative shows nothing."""

_PHASES = 4
"""Tiles within a lattice step that are looked at: the first ones and the last."""


def examine_geometry(
    entry: Entry, report: Callable[[dict[str, Any]], None] = lambda row: None
) -> dict[str, Any]:
    """Return one row; `report` is given what is known before each long step."""
    row: dict[str, Any] = {"name": entry.name, "library": entry.library}
    try:
        _examine(entry, row, report)
    except Exception as error:  # noqa: BLE001 - a network of the zoo may fail in any way, and the run goes on
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        row["category"] = "broken" if isinstance(error, BoundExceededError) else "failed"
        row["cause"] = f"{row['step']}: {type(error).__name__}: {error} ({place})"[:600]
    return row


def _examine(entry: Entry, row: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    row["step"] = "build"
    report(row)
    model = prepared(entry)
    row["step"] = "scan"
    report(row)
    row["attends"] = attends(model, entry)
    caller = Caller(entry.call, entry.output)
    start = time.process_time()
    base = base_of(model, None, caller, example=material(entry.shape, entry.name))
    scanned = look(base.copy, base.example, base.caller, fast=True)
    scan, double = scanned.scan, scanned.double
    row["scan_s"] = round(time.process_time() - start, 1)
    row |= {"stride": scan.stride, "halo": scan.halo, "findings": sorted({f.code for f in scan.findings})}
    if scan.halo is None or scan.stride is None or scan.reach is None or double is None:
        row |= {"category": "no geometry", "cause": "; ".join(f.line for f in scan.findings)[:600]}
        return
    row |= {"bound": scan.reach.bound, "measured": scan.reach.measured, "lattice": scan.reach.lattice}
    row["step"] = "brute force"
    report(row)
    row["brute"] = brute_force(lambda x: base.caller.in_double(double, x), entry, scan)
    outside = against(row)
    bounded = scan.reach.used == "graph"
    row["category"] = "broken" if outside else "bounded" if bounded else "unbounded"
    row["cause"] = outside or ("" if bounded else scan.reach.words)


def attends(model: nn.Module, entry: Entry) -> bool:
    """Tell whether positions attend to positions anywhere in a network, be it inside windows."""
    x, watch = material(entry.shape, entry.name), _Attention()
    with torch.no_grad(), watch:
        entry.call(model, x) if entry.call else model(x)
    return watch.seen


class _Attention(TorchFunctionMode):
    """Sees attention: torch's own, or a softmax along the last dimension, where the products with all keys lie."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            self.seen = True
        if name == "softmax":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            self.seen |= dim in (-1, args[0].dim() - 1)
        return func(*args, **kwargs)


def against(row: dict[str, Any]) -> str:
    """Say which witness lies outside the one above it, in whole strides; a bound holds to the pixel."""
    order = [(name, row[name]) for name in ("bound", "measured", "brute") if row[name] is not None]
    for (upper, more), (lower, less) in itertools.pairwise(order):
        if _outside(in_strides(less, row["stride"]), in_strides(more, row["stride"])):
            return f"{lower} {less} exceeds {upper} {more}"
    if row["bound"] is not None and _outside(row["brute"], row["bound"]):
        return f"brute {row['brute']} exceeds bound {row['bound']}"
    return ""


def _outside(inner: Spans, outer: Spans) -> bool:
    return any(
        a > b for less, more in zip(inner, outer, strict=True) for a, b in zip(less, more, strict=True)
    )


def brute_force(f: Callable[[Tensor], Tensor], entry: Entry, scan: Scan) -> Spans:
    """Return what tiles on the stride depend on (before, after) per axis, on strips as thin as the example."""
    assert scan.stride is not None
    assert scan.halo is not None
    assert scan.scale is not None
    assert scan.exact_sizes is not None
    lattice = (scan.reach.lattice if scan.reach else ()) or scan.stride
    spans = []
    for axis in range(entry.ndim):
        step = [math.lcm(*numbers) for numbers in zip(scan.stride, scan.exact_sizes, lattice, strict=True)]
        size = [-(-n // s) * s for n, s in zip(entry.shape[2:], step, strict=True)]
        before, after = (-(-n // step[axis]) * step[axis] for n in scan.halo[axis])
        size[axis] = before + after + 3 * step[axis]
        x = material((*entry.shape[:2], *size), entry.name).double()
        spans.append(
            reach_of_tiles(
                f,
                x,
                axis,
                before + step[axis],
                scan.stride[axis],
                lattice[axis],
                Fraction(scan.scale[axis]),
                scan.halo[axis],
            )
        )
    return tuple(spans)


def reach_of_tiles(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    axis: int,
    start: int,
    stride: int,
    lattice: int,
    scale: Fraction,
    halo: tuple[int, int],
) -> tuple[int, int]:
    """Return (before, after) in pixels along an axis of the tiles of one lattice step.

    Args:
        f: the network in float64.
        x: (1, C, *space), the strip.
        axis: along which it is long.
        start: pixel at which the first tile begins.
        stride: extent of a tile.
        lattice: extent of the step.
        scale: output pixels per pixel.
        halo: beyond which nothing is changed.
    """
    phases = range(lattice // stride)
    chosen = [*phases[:_PHASES], *phases[max(_PHASES, len(phases) - 1) :]]
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        output = f(leaf.clone())
    before = after = 0
    for phase in chosen:
        first = start + phase * stride
        kept = (axis + 2, math.floor(first * scale), math.ceil((first + stride) * scale))
        columns = _derived(output, leaf, kept)
        found = [max(0, first - columns[0]), max(0, columns[1] - (first + stride - 1))] if columns else [0, 0]
        for end in (0, 1):
            for distance in range(halo[end], max(found[end], halo[end] - COLUMNS), -1):
                column = first - distance if end == 0 else first + stride - 1 + distance
                if 0 <= column < x.shape[axis + 2] and _is_felt(f, x, output.detach(), axis, column, kept):
                    found[end] = distance
                    break
        before, after = max(before, found[0]), max(after, found[1])
    return before, after


def _tile(output: Tensor, kept: tuple[int, int, int]) -> Tensor:
    dim, first, last = kept
    return output.narrow(dim, first, min(last, output.shape[dim]) - first)


def _derived(output: Tensor, leaf: Tensor, kept: tuple[int, int, int]) -> tuple[int, int] | None:
    """Return the first and the last column by which the derivative of a tile is not zero, None if there is none."""
    tile = _tile(output, kept)
    if not tile.requires_grad:
        return None
    weights = torch.randn(tile.shape, dtype=tile.dtype, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((tile * weights).sum(), leaf, retain_graph=True, allow_unused=True)
    if slope is None:
        return None
    seen = (slope != 0).movedim(kept[0], 0).flatten(1).any(1).nonzero().flatten().tolist()
    return (seen[0], seen[-1]) if seen else None


def _is_felt(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    quiet: Tensor,
    axis: int,
    column: int,
    kept: tuple[int, int, int],
) -> bool:
    """Tell whether a tile changes with one column of pixels."""
    for change in (lambda v: v + 1, lambda v: -1e3 * v.abs() - 1e3, lambda v: 1e3 * v.abs() + 1e3):
        loud = x.clone()
        pixels = loud.narrow(axis + 2, column, 1)
        pixels.copy_(change(pixels))
        with torch.no_grad():
            tile = _tile(f(loud), kept)
        if not torch.equal(tile, _tile(quiet, kept)):
            return True
    return False
