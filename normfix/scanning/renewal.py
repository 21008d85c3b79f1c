"""Geometry under new statistics and weights: a constant may open a branch that was shut when it was measured.

`where(x.mean() > 0, far, near)` is near or far by a frozen mean, and `relu(pool) * branch` is no branch while its pool
is negative. Norms alone shut nothing, so a network of norms that decides nothing by values keeps its geometry. One
that decides is measured anew whenever its statistics are; one that freezes other statistics, where the geometry does
not hold any more. Under new weights so is one without a graph, and one that branches on the size where both sides gave
the same.

Whether a network decides is found out once: what never looks at a value takes the same path whatever its values are,
as long as its modules, attributes and code are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from normfix.networks.behaviour import structure_of
from normfix.networks.calling import Caller, home_of, in_eval_mode, is_halved, refusals
from normfix.networks.copying import copy_of, twin_of
from normfix.networks.examples import fitting_example
from normfix.networks.intake import Intake
from normfix.networks.numerics import exact_arithmetic
from normfix.networks.operators import compares
from normfix.networks.provenance import attach_, is_current, provenance_of
from normfix.records.saved import Provenance
from normfix.records.sites import Finding, Scan
from normfix.scanning.base import base_of
from normfix.scanning.census import LEAVES
from normfix.scanning.scan import look
from normfix.tiling.dependence import is_isolated
from normfix.tiling.geometry import geometry_of, holds_stride, thinnest
from normfix.tiling.grid import Geometry

__all__ = ["keeps_geometry", "renew_", "renewed"]

_LOG = logging.getLogger("normfix")


def renew_(model: nn.Module, image: Tensor, caller: Caller) -> None:
    """Let what travels with a model say the geometry that it has under the statistics it has now.

    Args:
        model: converted; a geometry that travels with other modules than it has is left alone.
        image: (N, C, *space), the material of the strips.
        caller: calls it.
    """
    known = provenance_of(model)
    if known is None or not is_current(model):
        return
    scan = renewed(model, known, image, caller)
    attach_(model, replace(known, scan=scan))


def renewed(
    model: nn.Module, known: Provenance, image: Tensor, caller: Caller, *, reweighted: bool = False
) -> Scan:
    """Return the scan of a converted model with the geometry that holds now: the same object where nothing changed.

    Args:
        model: converted.
        known: what travels with it.
        image: (N, C, *space), the material of the strips.
        caller: calls it.
        reweighted: whether weights changed as well, and not statistics alone.
    """
    scan, geometry = known.scan, geometry_of(known.scan)
    if geometry is None or known.plan.left_live:
        return scan
    hangs = reweighted and _hangs_on_values(scan)
    decides = hangs or _is_deciding(model, image, caller)
    if not decides and not _freezes_others(known):
        return scan
    example = fitting_example(model, image, Intake(model, caller))
    with exact_arithmetic():
        if not decides and _holds(model, example[:1].detach(), caller, geometry):
            return scan
    base = base_of(model, example, caller)
    found = look(base.copy, base.example, base.caller).scan
    if geometry_of(found) != geometry or (hangs and _bounds(found) != _bounds(scan)):
        return _changed(scan, found)
    # what was run under other weights proves nothing of these
    return replace(scan, sizes=found.sizes) if hangs else scan


def _hangs_on_values(scan: Scan) -> bool:
    """Tell whether a comparison, and no graph, says how the network treats sizes."""
    return scan.sizes is not None and bool(scan.sizes.crossed or scan.sizes.unknown)


def _bounds(scan: Scan) -> tuple[frozenset[str], ...]:
    """Return the branches on the size, and those that make no difference."""
    sizes = scan.sizes
    return tuple(
        frozenset(c.text for c in s) for s in (() if sizes is None else (sizes.conditions, sizes.crossed))
    )


def keeps_geometry(model: nn.Module, known: Provenance, image: Tensor, caller: Caller) -> bool:
    """Tell whether the geometry of a converted model is that of its scan whatever its statistics are.

    Arguments as for `renew_`.
    """
    if geometry_of(known.scan) is None or known.plan.left_live:  # none that statistics could change
        return True
    return not _freezes_others(known) and not _is_deciding(model, image, caller)


def _freezes_others(known: Provenance) -> bool:
    """Tell whether statistics are frozen that are no norms."""
    return any(decision.site.statistic is not None for decision in known.plan.converted)


def _is_deciding(model: nn.Module, image: Tensor, caller: Caller) -> bool:
    """Tell whether the network decides by values, as it was found before or on a part of an image."""
    decision = (structure_of(model), caller, tuple(image.shape), image.dtype)
    decides = _DECIDES.get(decision)
    if decides is None:
        example = fitting_example(model, image, Intake(model, caller))
        with exact_arithmetic():
            decides = _decides(model, example[:1].detach(), caller)
        _remember(decision, decides)
    return decides


def _changed(scan: Scan, found: Scan) -> Scan:
    """Return a scan with the geometry of another, and a finding that says so."""
    reasons = "; ".join(finding.message for finding in found.findings) or "none was found"
    message = (
        f"under the statistics and weights of now the network's {_told(found)}; under those it was converted with: "
        f"{_told(scan)}. Something in it is switched by them."
        if found.halo is not None
        else "under the statistics and weights of now no geometry holds, so its tiles do not equal the whole: "
        f"{reasons}"
    )
    finding = Finding(code="NF262", where="statistics", message=message)
    _LOG.warning("%s", finding.line)
    return replace(
        scan,
        stride=found.stride,
        halo=found.halo,
        scale=found.scale,
        exact_sizes=found.exact_sizes,
        padded_inside=found.padded_inside,
        smallest_tile=found.smallest_tile,
        halo_rounded=found.halo_rounded,
        reach=found.reach,
        tile_invariant=scan.tile_invariant and found.tile_invariant,
        sizes=found.sizes,
        findings=(*(f for f in scan.findings if f.code != "NF262"), finding),
    )


def _told(scan: Scan) -> str:
    limits = " and ".join(() if scan.sizes is None else scan.sizes.limits())
    return f"stride is {scan.stride}, its halo {scan.halo}" + (
        f", and it is the same {limits}" if limits else ""
    )


def _holds(model: nn.Module, example: Tensor, caller: Caller, geometry: Geometry) -> bool:
    """Tell in float64 on the CPU whether windows may still be cut at the stride and see nothing beyond the halo."""
    double, material = in_eval_mode(copy_of(model).cpu().float()).double(), example.cpu().float().double()

    def f(x: Tensor) -> Tensor:
        return caller.in_double(double, x)

    try:
        cross = thinnest(f, material, geometry)
        return holds_stride(f, material, geometry, cross) and is_isolated(f, material, geometry, cross)
    except refusals():
        return False


_KNOWN = 64
"""Networks of which it is kept whether they decide; of one there are as many as shapes it was asked for."""

_DECIDES: dict[object, bool] = {}
"""Whether a network decides by values, by its structure, its call and the part of an image that showed it."""


def _remember(decision: tuple[str, Caller, tuple[int, ...], torch.dtype], decides: bool) -> None:
    if decision[1].forward_fn is not None:  # it may hold anything, as long as it is kept
        return
    while len(_DECIDES) >= _KNOWN:
        _DECIDES.pop(next(iter(_DECIDES)), None)
    _DECIDES[decision] = decides


def _decides(model: nn.Module, example: Tensor, caller: Caller) -> bool:
    """Tell whether the network compares numbers, or takes one out of tensors; it is run where it is."""
    device, dtype = home_of(model)
    values, names = _Comparisons(), _Departures()
    probe = in_eval_mode(copy_of(model).float()) if device.type == "cpu" else twin_of(model)
    given = example.to(device, torch.float32 if device.type == "cpu" else dtype)
    if device.type == "cpu" and is_halved(model):
        caller = caller.widened(probe, given)
    with torch.no_grad(), names, values:
        caller(probe, given)
    return values.seen or names.seen


class _Comparisons(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators that compare numbers, or make truth values or whole numbers of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = args[0] if args else None
        if isinstance(func, OpOverload) and isinstance(given, Tensor) and given.is_floating_point():
            whole = isinstance(result, Tensor) and not result.is_floating_point() and not result.is_complex()
            self.seen = self.seen or compares(func) or whole
        return result


class _Departures(TorchFunctionMode):
    """Notes functions by which a number leaves tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.seen = self.seen or getattr(func, "__name__", "") in LEAVES
        return func(*args, **(kwargs or {}))
