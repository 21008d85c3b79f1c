"""Bring three looks at one network together: what they agree on, and each disagreement as a finding.

The census names the sites. The graph and the dye confirm them, or add what the census missed: a site seen by
the dye alone is live and refused, so that nothing it sees is missing from a plan. A disagreement is never
settled in silence, and never towards "not live"; only where the census had to guess, at a single image size, the
dye's word stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from normfix.records.sites import Family, Finding, Looked, Site
from normfix.scanning.census import LEAVES
from normfix.scanning.sightings import Dyed, Sighting

__all__ = ["GraphSeen", "Merged", "merge"]

_ATTENDING = frozenset({"softmax", "matmul", "bmm", "baddbmm", "__matmul__", "einsum"})

DYE_ONLY = "seen by the dye only: its output depends on the whole extent, and no rule names what it computes"
ATTENDS = "every pixel takes from all others, as in attention; there is no constant that could replace that"


class GraphSeen(Protocol):
    """What a captured graph shows: how the look went, the ids it has nodes for, what it disputes."""

    @property
    def looked(self) -> Looked:
        """Tell how the look went."""

    @property
    def seen(self) -> frozenset[str]:
        """Return the ids of sites that the graph holds too."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Return each disagreement with the census, and each operator the graph has no name for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """All sites in the order of the calls, how each look went, and what they disagree on."""

    sites: tuple[Site, ...]
    looks: tuple[Looked, ...]
    findings: tuple[Finding, ...]


def merge(
    sites: Sequence[Site],
    dyed: Dyed | Looked,
    graph: GraphSeen | Looked,
    meets_map: Callable[[Sighting], bool] = lambda sighting: True,
    *,
    guessed: bool = False,
) -> Merged:
    """Merge what the looks saw.

    Args:
        sites: of the census, in the order of the calls.
        dyed: what the dye saw, or why it saw nothing.
        graph: what the graph shows, or why it was not asked.
        meets_map: tells whether the result of an operation reaches a spatial map again.
        guessed: the network ran at one size only, so the census could not tell space from channels; what the
            dye then does not see to be global is not live.
    """
    findings: list[Finding] = []
    looks = [Looked(name="census", status="done")]
    merged = [*sites]
    if isinstance(graph, Looked):
        looks.append(graph)
    else:
        looks.append(graph.looked)
        merged = [_seen(site, "graph") if site.id in graph.seen else site for site in merged]
        findings += graph.findings
    if isinstance(dyed, Looked):
        looks.append(dyed)
    else:
        looks.append(Looked(name="dye", status="done"))
        if guessed:
            seen = {s.id for s in dyed.sightings}
            # a value that leaves tensors may be of any pixel, and the dye is on one
            sure = seen | {site.id for site in merged if site.function in LEAVES or not site.live}
            merged = [site if site.id in sure else _judged(site) for site in merged]
        merged, disputes = _with_dye(merged, dyed, meets_map)
        findings += disputes
    return Merged(sites=tuple(merged), looks=tuple(looks), findings=tuple(findings))


_UNKNOWN = "an operation normfix does not know; it is not taken for local."


def _with_dye(
    sites: Sequence[Site], dyed: Dyed, meets_map: Callable[[Sighting], bool]
) -> tuple[list[Site], list[Finding]]:
    findings: list[Finding] = []
    seen = {s.id: s for s in dyed.found}
    merged = [_confirmed(site, seen.pop(site.id, None), meets_map, findings) for site in sites]
    merged, strangers = _attended(merged, [*seen.values()])
    for sighting in strangers:
        live = meets_map(sighting)
        merged.append(_site_of(sighting, dyed.invocations, live=live))
        if live:
            over = "x".join(map(str, sighting.over)) or "all"
            findings.append(
                _finding(
                    "NF240",
                    sighting.id,
                    f"{sighting.op} at {sighting.line} depends on a whole extent ({over}) and has no rule, so it stays "
                    "live. If it is a statistic, write it with a function of torch that is known (mean, var, amax).",
                )
            )
    unclear = {s.id for s in (*dyed.lost, *dyed.unknown)}
    findings += [
        _finding("NF241", site.id, "live in the census, but the dye does not confirm that it is global.")
        for site in merged
        if site.live and "dye" not in site.looks and site.id not in unclear
    ]
    findings += [_finding("NF242", s.id, f"{s.op} at {s.line}: {_UNKNOWN}") for s in dyed.unknown]
    findings += [
        _finding(
            "NF243", s.id, f"{s.op} at {s.line} swallows the dye, so what its result depends on is not seen."
        )
        for s in dyed.lost
    ]
    return _in_order(merged, dyed), findings


def _judged(site: Site) -> Site:
    """Take the dye's word for a site whose dimensions the census had to guess, and that the dye never met."""
    reduces = "no extent of the image, as the dye shows"
    return replace(site, live=False, reduces=reduces, refusal="", layer=None, statistic=None)


def _confirmed(
    site: Site,
    sighting: Sighting | None,
    meets_map: Callable[[Sighting], bool],
    findings: list[Finding],
) -> Site:
    if sighting is None:
        return site
    site = _seen(site, "dye")
    if site.live or not meets_map(sighting):
        return site
    reason = f"not live for the census ({site.reduces}), but its result depends on the whole image."
    findings.append(_finding("NF241", site.id, reason))
    return replace(
        site,
        live=True,
        reduces="the whole extent, as the dye shows",
        refusal=reason,
        layer=None,
        statistic=None,
    )


def _attended(sites: Sequence[Site], strangers: Sequence[Sighting]) -> tuple[list[Site], list[Sighting]]:
    """Count the later parts of an attention, its softmax and second product, as the attention they belong to."""
    heads = {(s.owner, s.invocation): s.id for s in sites if s.family is Family.ATTENTION}
    credited, left = set(), []
    for sighting in strangers:
        parts = _is_part_of_attention(sighting)
        head = next((heads[key] for key in heads if parts and key[0] in sighting.within[-2:]), None)
        if head is None:
            left.append(sighting)
        else:
            credited.add(head)
    return [_seen(site, "dye") if site.id in credited else site for site in sites], left


def _is_part_of_attention(sighting: Sighting) -> bool:
    return sighting.function.removeprefix("hidden.") in _ATTENDING


def _site_of(sighting: Sighting, invocations: Mapping[str, int], *, live: bool) -> Site:
    anchor = next((p for p in reversed(sighting.within) if invocations.get(p) == 1), "")
    extents = "x".join(map(str, sighting.over)) or "all of them"
    return Site(
        owner=sighting.owner,
        invocation=sighting.invocation,
        function=sighting.function,
        index=sighting.index,
        owner_class=sighting.owner_class,
        anchor=anchor,
        holder=anchor,
        within=sighting.within,
        family=Family.OTHER,
        live=live,
        reduces=f"an extent ({extents}), as the dye shows",
        line=sighting.line,
        swappable=False,
        refusal=ATTENDS if _is_part_of_attention(sighting) else DYE_ONLY,
        looks=("dye",),
    )


def _in_order(sites: Sequence[Site], dyed: Dyed) -> list[Site]:
    """Put sites in the order of their calls; positions are compared after planning, which counts calls."""
    positions = {call.id: i for i, call in enumerate(dyed.calls)}
    positions |= {s.id: s.position for s in dyed.found if not s.recorded}
    return sorted(sites, key=lambda site: positions.get(site.id, len(dyed.calls)))


def _seen(site: Site, look: str) -> Site:
    return site if look in site.looks else replace(site, looks=(*site.looks, look))


def _finding(code: str, where: str, message: str) -> Finding:
    return Finding(code=code, where=where, message=message)
