"""scan and plan: sites from a survey of calls, geometry from a copy in which all of them are frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from normfix.conversion.measuring import freeze_sites_
from normfix.conversion.planning import decide
from normfix.conversion.rewriting import rewrite_
from normfix.conversion.targets import Target, measured_targets
from normfix.images.given import Given, images_of
from normfix.images.sources import middle_of
from normfix.networks.behaviour import behaviour_of
from normfix.networks.calling import Caller, NotTaken, Unreached, class_of, is_halved, refusals, resized
from normfix.networks.copying import copy_of
from normfix.networks.graph.capture import Captured
from normfix.networks.graph.replaying import same
from normfix.networks.numerics import exact_arithmetic
from normfix.networks.surroundings import undisturbed
from normfix.records.derivations import masked
from normfix.records.plans import Means, Plan
from normfix.records.sites import Finding, Looked, Scan, Site
from normfix.records.sizes import Condition, ProvedSizes
from normfix.records.spans import in_strides
from normfix.scanning.base import base_of, require_the_same
from normfix.scanning.crossings import Crossings
from normfix.scanning.doubts import Doubts
from normfix.scanning.durations import Durations, tell_notable
from normfix.scanning.graph.bounds import AXES, SizeLook
from normfix.scanning.graph.look import GraphLook, graph_look, size_look, sizes_of
from normfix.scanning.merging import Merged, merge
from normfix.scanning.positions import Positions
from normfix.scanning.sightings import Dyed, confirmed, dye_look
from normfix.scanning.sites import Survey, survey
from normfix.scanning.witnesses import HaloSource, Witness, witness_of
from normfix.tiling.geometry import BoundExceededError, Locality, held_beyond, measure_locality, not_dense
from normfix.tiling.grid import Geometry
from normfix.tiling.lengths import differing, is_compared_whole
from normfix.tiling.reach.bounds import Bound
from normfix.tiling.recall import Recalling
from normfix.tiling.stitching import padded, tiled

__all__ = ["Scanned", "look", "plan", "scan"]

_ELSEWHERE = "it makes other calls at one size, and no graph says at which others"
_FAST = "the scan was asked to be fast"
_PROVED = "nothing was captured: what follows is proved, so the other looks are enough"


@dataclass(frozen=True, slots=True)
class Scanned:
    """A scan, the geometry in numbers, and what it was measured on.

    `cross` are the extents of the thinnest strip that the network runs on, () where they are not those of its strides;
    `double` the network in float64 with every site frozen, for who can use it again.
    """

    scan: Scan
    geometry: Geometry | None
    cross: tuple[int, ...] = ()
    double: nn.Module | None = None


@undisturbed()
def scan(
    model: nn.Module,
    example: Given | None = None,
    *,
    forward_fn: Callable[[nn.Module, Tensor], Any] | None = None,
    output: str | int | None = None,
    as_trained: bool = False,
    fast: bool = False,
    halo: HaloSource = "graph",
) -> Scan:
    """Find every statistic of the tile, and the geometry once they are frozen.

    Args:
        model: not modified.
        example: (N, C, *space); default: noise of a shape that the network runs on. Of an array, a file or an image
            read by window its middle is taken.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        as_trained: treat batch and instance norms as in train mode, where they are live.
        fast: skip the dye's confirmation; `Scan.looks` says so.
        halo: "graph" takes the bound that the network's graph gives, where it gives one; "measured" takes what the dye
            shows, which `Scan.reach` says.

    Raises:
        NormfixError: NF109 if the network does not run on the example, NF110 if `output` names no tensor, NF251 if the
            dye shows more than the graph's bound.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> found = normfix.scan(net)
        >>> [site.id for site in found.live], found.halo, found.tile_invariant
        (['1/0/instance_norm/0'], ((1, 1), (1, 1)), False)
    """
    caller = Caller(forward_fn, output)
    if example is not None and not isinstance(example, Tensor):
        example = middle_of(images_of(example, model, caller=caller).only())
    base = base_of(model, None, caller, example=example, as_trained=as_trained)
    if not fast:
        timed = (base.network, base.example, base.caller)
        tell_notable("scan", lambda: Durations.of(*timed).scan(graph=True))
    return look(base.copy, base.example, base.caller, fast=fast, graph=True, halo=halo).scan


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
    copied: Callable[[], nn.Module],
    example: Tensor,
    caller: Caller,
    *,
    fast: bool = False,
    graph: bool = False,
    halo: HaloSource = "graph",
    keys: int | None = None,
) -> Scanned:
    """Scan a materialised network on CPU in float32 (geometry in float64 too).

    Norms are replaced. Where a network then does not run or leaves one out, as it may that asks for their class, their
    calls are intercepted.

    Args:
        copied: gives a copy of what base_of gives; it is moved and rewritten, and nobody's after that.
        example: (N, C, *space).
        caller: calls it.
        fast: leave out the dye and the graph.
        graph: hold its graph against the census as well, which takes seconds.
        halo: which witness of the reach is taken.
        keys: how many keys of attention shall be held of all images together, 0 for all; None to leave attention live.
    """
    options: dict[str, Any] = {"fast": fast, "graph": graph, "halo": halo, "keys": keys}
    try:
        return _look(copied(), example, caller, swap=True, **options)
    except _OtherOnceReplacedError:
        return _look(copied(), example, caller, swap=False, **options)


class _OtherOnceReplacedError(Exception):
    """A network does not run as before once its norms are replaced and frozen."""


def _look(
    probe: nn.Module,
    example: Tensor,
    caller: Caller,
    *,
    fast: bool,
    graph: bool,
    halo: HaloSource,
    keys: int | None,
    swap: bool,
) -> Scanned:
    name = class_of(probe)
    halved = is_halved(probe)
    probe.cpu().float().eval()
    material = example[:1].detach().cpu().float()
    if halved:
        caller = caller.widened(probe, material)
    with exact_arithmetic():
        found, positions = _surveyed(probe, caller, material, keys=keys, swap=swap)
        material = found.runs[0][0]
        dyed = _dyed(probe, caller, material, found, fast=fast)
        graph_seen = _graph(
            probe, caller, material, found, skipped=_FAST if fast else "" if graph else _PROVED
        )
        merged = merge(
            found.sites,
            dyed.merged,
            graph_seen,
            lambda seen: not seen.recorded or seen.id in found.reaching,
            guessed=found.other is None,
        )
        doubts = Doubts(
            sites=frozenset(s.id for s in merged.sites if s.live and s.refusal) & dyed.doubtful,
            operations=dyed.unknown,
            placed=positions.findings(two_sizes=found.other is not None),
            causes=positions.causes(two_sizes=found.other is not None),
            swallowed=dyed.swallowed,
            compared=dyed.compared,
            wraps=positions.may_wrap(),
            rolled=positions.shifts(),
        )
        # as if every doubt were unfounded
        trial = decide(doubts.settled(merged.sites), model=name, to="frozen")
        bench = None
        if not trial.left_live and found.dense:
            bench = _bench(probe, trial, found, caller, material, halo, graph_seen)
        sizes = _sizes(probe, caller, material, found, graph_seen, bench, fast=fast)
        stretches = bench.witness.stretches if bench else ()
        parted = tuple(_parted(found.apart, AXES[material.dim()], sizes.conditions))
        bounds = (*sizes.conditions, *parted)
        doubts = replace(doubts, bounds=bounds, placed=doubts.placed + stretches)
        seen = _measured(
            trial, bench, doubts, merged, found, material, tried=sizes, fast=fast, whole=graph and not fast
        )
        if bench is not None:
            bench.require_no_memory(name.rpartition(".")[2])
        run = seen.largest
        proved = ProvedSizes(
            axes=AXES[material.dim()],
            conditions=(*seen.bounds, *seen.differing),
            crossed=tuple(bound for bound in bounds if bound not in seen.bounds),
            unknown=(*sizes.unknown, *_unknown(doubts, seen.bench), *(_ELSEWHERE for _ in parted)),
            extents=tuple(map(max, material.shape[2:], run.extents)),
            pixels=max(math.prod(material.shape[2:]), run.pixels),
        )
    geometry, locality = seen.locality.geometry, seen.locality
    return Scanned(
        Scan(
            model=name,
            example=(example.shape[0], *material.shape[1:]),
            sites=seen.sites,
            uncalled=found.uncalled,
            dense=found.dense,
            tile_invariant=geometry is not None and seen.invariant,
            stride=geometry.stride if geometry else None,
            halo=geometry.halo if geometry else None,
            scale=tuple(map(str, geometry.scale)) if geometry else None,
            exact_sizes=geometry.multiple if geometry else None,
            padded_inside=geometry.padded_inside if geometry else None,
            smallest_tile=locality.smallest_tile,
            halo_rounded=in_strides(geometry.halo, geometry.stride) if geometry else None,
            reach=seen.bench.witness.reach(locality) if seen.bench else None,
            sizes=proved,
            looks=merged.looks,
            findings=found.findings + seen.findings + locality.findings,
            draws=caller.draws,
        ),
        geometry,
        locality.cross if geometry is not None and geometry.stride == locality.grid else (),
        seen.bench.twin if seen.bench else None,
    )


def _surveyed(
    probe: nn.Module, caller: Caller, example: Tensor, *, keys: int | None, swap: bool
) -> tuple[Survey, Positions]:
    """Survey a network on the example, or on a part of another size if the example's is one of its own.

    A network that keeps a mask of one size makes other calls there than anywhere else. Most images are of other sizes,
    and it is at these that space is told from channels.
    """

    def of(x: Tensor) -> tuple[Survey, Positions]:
        positions = Positions()
        return survey(probe, caller, x, positions.follow, keys=keys, swap=swap), positions

    here = of(example)
    if here[0].elsewhere is None:
        return here
    there, positions = of(resized(example, here[0].elsewhere))
    if there.other is None:
        return here
    return replace(there, apart=tuple(example.shape[2:])), positions


def _parted(apart: Sequence[int] | None, names: str, known: Sequence[Condition]) -> Iterator[Condition]:
    """Yield that an image shares no extent with the size at which it is another, unless a condition says it.

    Which of the extents decides is not known.
    """
    if apart is None:
        return
    extents = {"N": 1, **dict(zip(names, apart, strict=True))}
    if not any(condition.excludes(extents) for condition in known):
        text = " and ".join(f"{name} != {n}" for name, n in zip(names, apart, strict=True))
        yield Condition(text=text, line="", strict=True)


@dataclass(frozen=True, slots=True)
class _Measured:
    """Sites, findings and conditions on the size after the doubts among them were put to the measurement.

    `differing` are conditions that should be harmless, and by which tiles differ all the same; `largest` the sizes that
    the measurement speaks for, which may be less than what the bench was run at.
    """

    sites: tuple[Site, ...]
    locality: Locality
    findings: tuple[Finding, ...]
    invariant: bool
    bounds: tuple[Condition, ...]
    differing: tuple[Condition, ...]
    largest: _Largest
    bench: _Bench | None


def _measured(
    trial: Plan,
    bench: _Bench | None,
    doubts: Doubts,
    merged: Merged,
    found: Survey,
    material: Tensor,
    *,
    tried: SizeLook,
    fast: bool,
    whole: bool,
) -> _Measured:
    """Measure the geometry as if every doubt were unfounded, and settle those that the measurement shows to be.

    `whole` has tiles of the example held against all of it, too, which a proof does anyway: what hides its branches on
    the size from every graph shows there, if the example's size is one of them.
    """
    sites, every = doubts.settled(merged.sites), doubts
    if bench is None:
        locality = _unmeasured(trial, found, material)
    else:
        doubts = _beside(every, bench.witness.bound)
        try:
            locality = bench.measured(found.dilution, doubts, fast=fast)
        except BoundExceededError:
            if not (doubts.bounds or tried.built or tried.numbers or tried.lattice):
                raise
            # strips are of other sizes, for which the network is not that of the graph
            bench = replace(bench, witness=bench.witness.of_other_sizes())
            doubts = _beside(every, bench.witness.bound)
            locality = bench.measured(found.dilution, doubts, fast=fast)
    beyond = () if bench is None else bench.witness.findings(locality)
    crossings = None if bench is None or locality.geometry is None else bench.crossings(locality, found.apart)
    # what did not hold on longer strips is believed of the example only
    largest = _Largest(material.dim() - 2)
    broken = () if crossings is None else crossings.differing(tried)
    if bench is not None and crossings is not None and tried.unknown and not fast:
        broken += replace(crossings, double=Recalling(bench.unnoted)).fitting()
    if bench is not None and crossings is not None and whole and not broken:
        differing_at = bench.differing_at(crossings.geometry)
        broken += tuple(_parted(differing_at, AXES[material.dim()], doubts.bounds))
    if bench is not None and (locality.steady or not doubts):
        largest = bench.largest
    if locality.steady and crossings is not None:
        open_bounds = tuple(bound for bound in doubts.bounds if not crossings.crossed(bound))
        findings = doubts.explained(merged.findings, (*open_bounds, *broken)) + beyond
        sound = not any(site.live for site in sites) and not open_bounds and not broken
        return _Measured(sites, locality, findings, sound, open_bounds, broken, largest, bench)
    everything = decide(merged.sites, model=trial.model, to="frozen")
    if everything.left_live:
        locality = _unmeasured(everything, found, material)
    doubts = replace(doubts, bounds=(*doubts.bounds, *broken))
    unsettled = doubts.findings(
        unplaced=locality.geometry is None and not everything.left_live and found.dense
    )
    live = any(site.live for site in merged.sites)
    sound = not live and not doubts.operations and not doubts.placed and not doubts.bounds
    bounds = tuple(bound for bound in doubts.bounds if bound not in broken)
    return _Measured(
        merged.sites,
        locality,
        merged.findings + unsettled + beyond,
        sound,
        bounds,
        broken,
        largest,
        bench,
    )


def _beside(doubts: Doubts, bound: Bound | None) -> Doubts:
    """Return what is in doubt beside what a graph bounds."""
    return doubts if bound is None else doubts.but_shifts()


def _unknown(doubts: Doubts, bench: _Bench | None) -> Iterator[str]:
    """Yield what no condition on the size tells."""
    bound = None if bench is None else bench.witness.bound
    yield from (f"{f.where}: {f.message}" for f in _beside(doubts, bound).placed)
    if bound is not None and bound.shifts:
        yield masked(bound.shifts)


def _graph(
    probe: nn.Module, caller: Caller, example: Tensor, found: Survey, *, skipped: str
) -> GraphLook | Looked:
    if skipped:
        return Looked(name="graph", status="skipped", note=skipped)
    return graph_look(probe, caller, example, found.sites, one_size=found.other is None, known=found.runs)


def _free(graph: GraphLook | Looked) -> Captured | None:
    """Return the graph of the network as it is, where that leaves sizes free."""
    if isinstance(graph, GraphLook) and any(dim >= 2 for dim in graph.free):
        return graph.captured
    return None


def _sizes(
    probe: nn.Module,
    caller: Caller,
    example: Tensor,
    found: Survey,
    graph: GraphLook | Looked,
    bench: _Bench | None,
    *,
    fast: bool,
) -> SizeLook:
    """Return what a graph says of sizes: of the network where it was looked at for more, else of the frozen one."""
    if isinstance(graph, GraphLook):
        return graph.sizes
    if fast:
        return SizeLook(conditions=(), unknown=(_FAST,))
    if bench is not None and bench.witness.program is not None:
        return sizes_of(bench.witness.program)
    return size_look(bench.network if bench else probe, caller, example, one_size=found.other is None)


@dataclass(frozen=True, slots=True)
class _Dyes:
    """What the dye showed, to be merged; what it could not watch; the sites that it does not show to be global.

    The last are those that make maps of maps and are dyed throughout at one size only, or at none.
    """

    merged: Dyed | Looked
    unknown: tuple[str, ...] = ()
    doubtful: frozenset[str] = frozenset()
    swallowed: bool = False
    compared: bool = False


def _dyed(probe: nn.Module, caller: Caller, example: Tensor, found: Survey, *, fast: bool) -> _Dyes:
    """Run the dye at the smaller of two sizes; at the other too where it contradicts the census."""
    if fast:
        return _Dyes(Looked(name="dye", status="skipped", note=_FAST))
    sizes = found.sizes(example)
    doubtful: frozenset[str] = frozenset()
    try:
        dyed = dye_look(probe, caller, sizes[0])
        live = {site.id for site in found.sites if site.live}
        mapping = found.mapping & live
        agree = live == {s.id for s in dyed.found if s.id in found.reaching or not s.recorded}
        if len(sizes) > 1 and (mapping or not agree):
            other = dye_look(probe, caller, sizes[1])
            shown = {s.id for s in confirmed(dyed, other, frozenset()).found}
            doubtful = mapping - shown - {s.id for s in (*dyed.lost, *dyed.unknown)}
            dyed = confirmed(dyed, other, frozenset(live))
    except refusals() as error:
        return _Dyes(Looked(name="dye", status="failed", note=str(error)))
    return _Dyes(dyed, tuple(s.id for s in dyed.unknown), doubtful, dyed.swallowed, dyed.compared)


def _unmeasured(everything: Plan, found: Survey, example: Tensor) -> Locality:
    """Say why no geometry can be measured."""
    if not found.dense:
        return not_dense(found.output, found.follows, example.dim())
    left = everything.left_live
    return Locality(None, tuple(Finding(code="NF215", where=d.site.id, message=d.reason) for d in left))


class _Largest:
    """The largest sizes at which tiles were compared with the whole: extents by axis, and pixels."""

    def __init__(self, axes: int) -> None:
        self.extents = (0,) * axes
        self.pixels = 0

    def noted(self, x: Tensor) -> Tensor:
        """Return what the network is run on, with its size noted."""
        self.extents = tuple(map(max, x.shape[2:], self.extents))
        self.pixels = max(self.pixels, math.prod(x.shape[2:]))
        return x


@dataclass(frozen=True, slots=True)
class _Bench:
    """A network in which all that can be is frozen, in two precisions, and the material of its strips.

    `network` is the one in float32, `largest` notes the sizes that the other is run at, to be compared; `unnoted` is
    the other without that. `shown` is what it was run on before its strips and what it gave, `held` its behaviour then.
    """

    network: nn.Module
    single: Callable[[Tensor], Tensor]
    double: Callable[[Tensor], Tensor]
    unnoted: Callable[[Tensor], Tensor]
    twin: nn.Module
    example: Tensor
    witness: Witness
    largest: _Largest
    shown: tuple[Tensor, Tensor]
    held: object

    def require_no_memory(self, name: str) -> None:
        """Run it once more on what it ran on before its strips, if it keeps something of them: it must give the same.

        What is kept for each size, and another once a larger one was seen, is no memory as long as sizes are alike.

        Raises:
            NormfixError: NF246.
        """
        if behaviour_of(self.network) == self.held:
            return
        given, output = self.shown
        require_the_same(output, self.single(given), name)

    def measured(self, dilution: Sequence[int], doubts: Doubts, *, fast: bool) -> Locality:
        """Measure its geometry as if no doubt were founded."""
        bound = self.witness.bound
        found = measure_locality(
            self.single,
            self.double,
            self.example,
            dilution,
            doubtful=bool(doubts) and not fast,
            trial=bool(doubts.sites),
            foreign=bool(doubts.operations),
            swallowed=doubts.swallowed,
            compared=doubts.compared,
            both_ends=doubts.wraps,
            bound=bound,
        )
        return held_beyond(self.unnoted, self.example, found, bound)

    def differing_at(self, geometry: Geometry) -> tuple[int, ...] | None:
        """Return the example's size, or that of a part of it, if tiles differ from the whole there.

        Tiles are as large as leaves those of the corners shorter than the image: half of it, where the halo is short.
        Of what differs float64 decides.
        """
        image = padded(self.example, geometry)
        size = image.shape[2:]
        sides = zip(size, geometry.stride, geometry.halo, strict=True)
        tile = [max(stride, min(n // 2, n - max(halo) - 1) // stride * stride) for n, stride, halo in sides]
        try:
            if is_compared_whole(size, geometry) and same(
                tiled(self.single, image, tile, geometry), self.single(image)
            ):
                return None
            return differing(self.unnoted, image.double(), size, tile, geometry)
        except refusals():  # it takes no tile, which says nothing of them
            return None

    def crossings(self, locality: Locality, apart: Sequence[int] | None) -> Crossings:
        """Return what tries conditions on the size; `apart` is one at which the network makes other calls."""
        assert locality.geometry is not None
        sizes = () if apart is None else (tuple(apart),)
        return Crossings(self.double, self.example, locality.geometry, locality.cross, sizes)


def _bench(
    probe: nn.Module,
    everything: Plan,
    found: Survey,
    caller: Caller,
    example: Tensor,
    halo: HaloSource,
    graph: GraphLook | Looked,
) -> _Bench:
    frozen = rewrite_(probe, everything)
    captured = None if everything.converted else _free(graph)
    targets = measured_targets(frozen, everything)
    known = found.runs
    if targets:
        small = found.sizes(example)[0]
        known = ((small, _frozen_output(frozen, everything, targets, small, caller)),)
    double = copy_of(frozen).double()
    largest = _Largest(example.dim() - 2)
    return _Bench(
        frozen,
        lambda x: caller(frozen, x),
        lambda x: caller.in_double(double, largest.noted(x)),
        lambda x: caller.in_double(double, x),
        double,
        example,
        witness_of(frozen, caller, example, halo, known, captured),
        largest,
        known[0],
        behaviour_of(frozen),
    )


def _frozen_output(
    frozen: nn.Module, everything: Plan, targets: Sequence[Target], image: Tensor, caller: Caller
) -> Tensor:
    """Freeze targets on an image and return what the network gives for it.

    Raises:
        _OtherOnceReplacedError: norms were replaced, and it runs otherwise than before.
        NormfixError: it runs otherwise although none was.
    """
    try:
        return freeze_sites_(frozen, targets, image, caller)
    except (NotTaken, Unreached) as error:
        if any(decision.means is Means.SWAP for decision in everything.converted):
            raise _OtherOnceReplacedError from error
        raise
