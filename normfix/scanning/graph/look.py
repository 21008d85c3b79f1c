"""The graph's look at a network, held against the census: what both saw, and every disagreement.

Nodes and calls are paired by owner and function in order. A call that torch decomposes (F.normalize, attention
inside nn.MultiheadAttention) is paired by owner, source line and the number of the call instead. What remains
unpaired on either side is a finding. A graph of one size cannot tell space, so it denies norms only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from normfix.errors import reason_of
from normfix.networks.calling import failures
from normfix.networks.graph.capture import Captured, NotCaptured, capture, exported
from normfix.records.sites import Finding, Looked, Site
from normfix.scanning.graph.bounds import SizeLook, read_sizes
from normfix.scanning.graph.sites import NodeReading, NodeSite, read_sites

__all__ = ["GraphLook", "graph_look", "size_look", "sizes_of"]

_ALIASES = {
    "linalg_vector_norm": "norm",
    "linalg_norm": "norm",
    "vector_norm": "norm",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "amax": "max",
    "amin": "min",
}


_NO_GRAPH = SizeLook(conditions=(), unknown=("there is no graph of it",))


@dataclass(frozen=True, slots=True)
class GraphLook:
    """What the graph says of the census's sites.

    `looked` tells how the look went, with the reason where the network could not be captured. `seen` are the
    ids of sites that the graph holds too, `unseen` live ones that it does not; `surplus` are nodes that the census
    has no site for. `disputed` are ids of sites that one look calls live and the other does not.
    `unknown` are operators whose locality nobody knows, with how many nodes have them, `sizes` what the graph says of
    sizes. Findings say the same of all but the sizes in words. `captured` is the graph itself, where there is one.
    """

    looked: Looked
    free: tuple[int, ...] = ()
    seen: frozenset[str] = frozenset()
    unseen: tuple[str, ...] = ()
    surplus: tuple[NodeSite, ...] = ()
    disputed: tuple[str, ...] = ()
    unknown: tuple[tuple[str, int], ...] = ()
    sizes: SizeLook = _NO_GRAPH
    findings: tuple[Finding, ...] = ()
    captured: Captured | None = None


def graph_look(
    model: nn.Module,
    run: Callable[[nn.Module, Tensor], Any],
    example: Tensor,
    sites: Sequence[Site],
    *,
    one_size: bool = False,
    known: Sequence[tuple[Tensor, Tensor]] = (),
) -> GraphLook:
    """Capture a network and hold its graph against the sites the census found.

    Args:
        model: in eval mode; not modified.
        run: calls the model on one input and returns the output tensor that matters.
        example: (N, C, *space), the one the census ran on.
        sites: of the census, in the order of the calls.
        one_size: as for `capture`.
        known: as for `capture`.
    """
    captured = capture(model, run, example, one_size=one_size, known=known)
    if isinstance(captured, NotCaptured):
        finding = Finding(
            code="NF221", where="graph", message=f"{captured.reason}. The other looks carry on."
        )
        return GraphLook(Looked(name="graph", status="failed", note=captured.reason), findings=(finding,))
    try:
        return compare_looks(captured, read_sites(captured, model), sites)
    except failures() as error:  # one look never takes the others with it
        reason = f"reading the graph failed: {reason_of(error)}"
        finding = Finding(code="NF229", where="graph", message=f"{reason}. The other looks carry on.")
        return GraphLook(Looked(name="graph", status="failed", note=reason), findings=(finding,))


def size_look(
    model: nn.Module,
    run: Callable[[nn.Module, Tensor], Any],
    example: Tensor,
    *,
    one_size: bool = False,
) -> SizeLook:
    """Read what a network's graph says of sizes, and nothing else; arguments as for `graph_look`."""
    program = exported(model, run, example, one_size=one_size)
    return _NO_GRAPH if isinstance(program, NotCaptured) else sizes_of(program)


def sizes_of(program: ExportedProgram) -> SizeLook:
    """Read what a captured graph says of sizes; where that fails, that there is none."""
    try:
        return read_sizes(program)
    except failures():
        return _NO_GRAPH


def compare_looks(captured: Captured, reading: NodeReading, sites: Sequence[Site]) -> GraphLook:
    """Pair the nodes of a graph with the sites of a census."""
    pairs = _paired(reading.seen, sites)
    seen = frozenset(site.id for site in pairs.values())
    two_sizes = any(pair is not None for pair in captured.shapes().values())
    unseen = tuple(
        site.id
        for site in sites
        if site.live and site.id not in seen and (two_sizes or site.layer is not None)
    )
    # torch.export takes a size computed for an adaptive pool for a number: one of fixed size has a site
    surplus = tuple(s for s in reading.seen if s.node not in pairs and not s.function.startswith("adaptive_"))
    disputed = _disputed(reading.seen, pairs)
    sizes = "free" if any(d >= 2 for d in captured.free) else "fixed"
    sizes += "" if two_sizes else " at one, space told by position"
    note = f"sizes {sizes}, replayed on {len(captured.replayed)} inputs"
    return GraphLook(
        looked=Looked(name="graph", status="done", note=note),
        free=captured.free,
        seen=seen,
        unseen=unseen,
        surplus=surplus,
        disputed=disputed,
        unknown=reading.unknown,
        sizes=read_sizes(captured.program),
        findings=_findings(unseen, surplus, disputed, reading),
        captured=captured,
    )


def _paired(seen: Sequence[NodeSite], sites: Sequence[Site]) -> dict[str, Site]:
    """Return the site of each node that has one."""
    by_call: dict[tuple[str, str], list[Site]] = defaultdict(list)
    by_line: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in sites:
        by_call[site.owner, _canonical(site.function)].append(site)
        by_line[site.owner, site.line].append(site)
    numbers: dict[tuple[str, str], int] = defaultdict(int)
    calls: dict[tuple[str, str], list[str]] = defaultdict(list)
    pairs: dict[str, Site] = {}
    for node in seen:
        key, place = (node.owner, _canonical(node.function)), (node.owner, node.line)
        position = numbers[key]
        numbers[key] += 1
        if position < len(by_call[key]):
            pairs[node.node] = by_call[key][position]
        elif by_line[place] and node.line:
            if node.call not in calls[place]:
                calls[place].append(node.call)
            written = node.call.rpartition("_")[0]
            alike = [site for site in by_line[place] if site.function == written] or by_line[place]
            pairs[node.node] = alike[min(calls[place].index(node.call), len(alike) - 1)]
    return pairs


def _canonical(function: str) -> str:
    name = function.removeprefix("torch.").rstrip("_")
    return _ALIASES.get(name, name)


def _disputed(seen: Sequence[NodeSite], pairs: dict[str, Site]) -> tuple[str, ...]:
    """Return the sites that one look calls live and the other does not.

    The census calls a site dead if freezing another one behind it leaves nothing of it, which the graph alone
    cannot tell; so what is absorbed by another reduction is no dispute either way.
    """
    votes: dict[str, list[bool]] = defaultdict(list)
    sites = {}
    for node in seen:
        if node.node in pairs:
            site = pairs[node.node]
            sites[site.id] = site
            votes[site.id].append(node.live and (site.live or not node.absorbed))
    return tuple(name for name, live in votes.items() if any(live) != sites[name].live)


def _findings(
    unseen: Sequence[str], surplus: Sequence[NodeSite], disputed: Sequence[str], reading: NodeReading
) -> tuple[Finding, ...]:
    found = [
        Finding(
            code="NF222",
            where=name,
            message="the census saw this call, the exported graph has no node for it.",
        )
        for name in unseen
    ]
    found += [
        Finding(
            code="NF222",
            where=f"{s.owner or '(root)'} at {s.line or s.node}",
            message=f"the exported graph has {s.operator} over space here, the census no such call.",
        )
        for s in surplus
    ]
    found += [
        Finding(code="NF222", where=name, message="census and exported graph disagree whether it is live.")
        for name in disputed
    ]
    found += [
        Finding(
            code="NF223", where=name, message=f"{count} nodes of an operator whose locality is not known."
        )
        for name, count in reading.unknown
    ]
    return tuple(found)
