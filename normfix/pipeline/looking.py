"""scan and plan: sites from a survey of calls, geometry from a copy in which all of them are frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from torch import Tensor, nn

from normfix.calibration import measure_sites_
from normfix.calling import REFUSALS, Caller, require_network
from normfix.errors import NormfixError
from normfix.graph import graph_look
from normfix.layers import FrozenStatistic
from normfix.locality import Locality, cross_section, measure_locality, not_dense
from normfix.merging import GraphSeen, merge
from normfix.moments import Moments, pool
from normfix.numerics import exact_arithmetic
from normfix.pipeline.bases import base_of, class_of
from normfix.pipeline.examples import default_example
from normfix.planning import decide
from normfix.positions import Positions
from normfix.records import Action, Decision, Finding, Looked, Plan, Scan
from normfix.rewriting import copy_of, layer_of, rewrite, set_statistics_
from normfix.scanning import Survey, survey
from normfix.spreading import Dyed, confirmed, dye_look
from normfix.targets import NormTarget, StatisticTarget, Target
from normfix.tiles import Geometry, in_strides

__all__ = [
    "Look",
    "geometry_of",
    "look",
    "plan",
    "scan",
    "site_target",
    "thinnest",
]

_FAST = "the scan was asked to be fast"
_PROVED = "nothing was captured: what follows is proved, so the other looks are enough"


@dataclass(frozen=True, slots=True)
class Look:
    """A scan and the geometry in numbers."""

    scan: Scan
    geometry: Geometry | None


def scan(
    model: nn.Module,
    example: Tensor | None = None,
    *,
    forward_fn: Callable[[nn.Module, Tensor], Any] | None = None,
    output: str | int | None = None,
    as_trained: bool = False,
    fast: bool = False,
) -> Scan:
    """Find every statistic of the tile, and the geometry once they are frozen.

    Args:
        model: not modified.
        example: (N, C, *space); default: noise of the shape that the first convolution takes.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        as_trained: treat batch and instance norms as in train mode, where they are live.
        fast: skip the dye's confirmation; `Scan.looks` says so.

    Raises:
        NormfixError: NF109 if the network does not run on the example, NF110 if `output` names no tensor.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> found = normfix.scan(net)
        >>> [site.id for site in found.live], found.halo, found.tile_invariant
        (['1/0/instance_norm/0'], ((1, 1), (1, 1)), False)
    """
    caller = Caller(forward_fn, output)
    if example is None:
        require_network(model)
        example = default_example(model)
    return look(
        base_of(model, example, caller, as_trained=as_trained), example, caller, fast=fast, graph=True
    ).scan


def plan(scan: Scan, to: Literal["frozen", "batchrenorm"] = "frozen", keep: Sequence[str] = ()) -> Plan:
    """Decide what happens to each site of a scan.

    Args:
        scan: of the network.
        to: what normalising calls become.
        keep: shell-style patterns of owner paths to leave alone.

    Raises:
        NormfixError: NF204 if a pattern matches no site, NF205 for another `to`.
    """
    return decide(scan.sites, model=scan.model, to=to, keep=keep)


def look(
    base: nn.Module, example: Tensor, caller: Caller, *, fast: bool = False, graph: bool = False
) -> Look:
    """Scan a materialised network on CPU in float32 (geometry in float64 too); not modified.

    Args:
        base: as base_of gives it.
        example: (N, C, *space).
        caller: calls it.
        fast: leave out the dye and the graph.
        graph: capture its graph as well, which takes seconds.
    """
    probe = copy_of(base).cpu().float().eval()
    material = example[:1].detach().cpu().float()
    positions = Positions()
    with exact_arithmetic():
        found = survey(probe, caller, material, positions.follow)
        dyed = _dyed(probe, caller, material, found, fast=fast)
        merged = merge(
            found.sites,
            dyed,
            _graph(probe, caller, material, found, skipped=_FAST if fast else "" if graph else _PROVED),
            lambda seen: not seen.recorded or seen.id in found.reaching,
            guessed=found.other is None,
        )
        everything = decide(merged.sites, model=class_of(base), to="frozen")
        locality = _locality(probe, everything, found, material, caller, may_wrap=positions.may_wrap())
    geometry = locality.geometry
    live = any(site.live for site in merged.sites)
    unknown = any(finding.code == "NF242" for finding in merged.findings)
    branches = any(finding.code == "NF244" for finding in merged.findings)
    captured = any(seen.name == "graph" and seen.status == "done" for seen in merged.looks)
    agreed = geometry is not None and captured and not branches
    placed = positions.findings(two_sizes=found.other is not None, agreed=agreed)
    sized = bool(placed) or branches
    return Look(
        Scan(
            model=class_of(base),
            example=tuple(example.shape),
            sites=merged.sites,
            uncalled=found.uncalled,
            dense=found.dense,
            tile_invariant=geometry is not None and not live and not unknown and not sized,
            stride=geometry.stride if geometry else None,
            halo=geometry.halo if geometry else None,
            scale=tuple(map(str, geometry.scale)) if geometry else None,
            exact_sizes=geometry.multiple if geometry else None,
            smallest_tile=locality.smallest_tile,
            halo_rounded=in_strides(geometry.halo, geometry.stride) if geometry else None,
            looks=merged.looks,
            findings=found.findings + merged.findings + placed + locality.findings,
        ),
        geometry,
    )


def _graph(
    probe: nn.Module, caller: Caller, example: Tensor, found: Survey, *, skipped: str
) -> GraphSeen | Looked:
    if skipped:
        return Looked(name="graph", status="skipped", note=skipped)
    return graph_look(probe, caller, example, found.sites, one_size=found.other is None)


def _dyed(probe: nn.Module, caller: Caller, example: Tensor, found: Survey, *, fast: bool) -> Dyed | Looked:
    """Run the dye at the smaller of two sizes; at the other too where it contradicts the census."""
    if fast:
        return Looked(name="dye", status="skipped", note=_FAST)
    sizes = found.sizes(example)
    try:
        dyed = dye_look(probe, caller, sizes[0])
        live = {site.id for site in found.sites if site.live}
        if len(sizes) > 1 and live != {s.id for s in dyed.found if s.id in found.reaching or not s.recorded}:
            known = frozenset(live)
            dyed = confirmed(dyed, dye_look(probe, caller, sizes[1]), known)
    except REFUSALS as error:
        return Looked(name="dye", status="failed", note=str(error))
    return dyed


def geometry_of(scan: Scan) -> Geometry | None:
    """Return a scan's geometry in numbers, or None where it has none."""
    if scan.stride is None or scan.halo is None or scan.scale is None or scan.exact_sizes is None:
        return None
    return Geometry(
        stride=scan.stride, halo=scan.halo, scale=tuple(map(Fraction, scan.scale)), multiple=scan.exact_sizes
    )


def thinnest(f: Callable[[Tensor], Tensor], example: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """Return the extents of the thinnest strip the network runs on."""
    cross = cross_section(f, example[:1], geometry.stride)
    if cross is None:
        raise NormfixError("NF210", "the network runs on no strip, so its halo cannot be proved.")
    return cross


def site_target(model: nn.Module, decision: Decision, *, express: bool) -> Target:
    """Describe a converted site to calibration; `express` as in set_statistics_."""
    module, statistic = model.get_submodule(decision.target), decision.site.statistic
    if statistic is not None:
        assert isinstance(module, FrozenStatistic)
        return StatisticTarget(decision.site.id, module, statistic)
    layer, spec = layer_of(model, decision), decision.site.layer
    assert spec is not None
    grouped = decision.action is Action.FREEZE

    def expected(moments: Moments) -> Moments:
        return pool(moments, spec.groups) if grouped else moments

    def store(moments: Moments) -> None:
        set_statistics_(layer, decision, moments, express=express)

    return NormTarget(decision.site.id, module, layer, store, expected)


def _locality(
    probe: nn.Module, everything: Plan, found: Survey, example: Tensor, caller: Caller, *, may_wrap: bool
) -> Locality:
    if not found.dense:
        return not_dense(found.output, found.follows, example.dim())
    if everything.left_live:
        return Locality(
            None,
            tuple(Finding(code="NF215", where=d.site.id, message=d.reason) for d in everything.left_live),
        )
    frozen = rewrite(probe, everything)
    fresh = [d for d in everything.converted if d.measured]
    small = found.sizes(example)[:1]
    measure_sites_(frozen, [site_target(frozen, d, express=False) for d in fresh], small, caller)
    double = copy_of(frozen).double()
    return measure_locality(
        lambda x: caller(frozen, x),
        lambda x: caller.in_double(double, x),
        example,
        found.dilution,
        both_ends=may_wrap,
    )
