"""Decide for each site what happens to it, why and by which means: reviewable before anything is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Literal

from normfix.errors import NormfixError
from normfix.records.plans import Action, Decision, Means, Plan, matches
from normfix.records.sites import Site

__all__ = ["decide", "replay"]

_REASONS = {
    Action.FREEZE: "its statistic becomes a constant",
    Action.BATCHRENORM: "BatchRenorm: constants in eval, trainable at small batches",
}
_TARGETS: Mapping[Action, Literal["frozen", "batchrenorm"]] = {
    Action.FREEZE: "frozen",
    Action.BATCHRENORM: "batchrenorm",
}
_KEPT, _EDITED = "kept as asked", "left as the reviewed plan says"
_INTERCEPTABLE = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm"})


def decide(
    sites: Sequence[Site], *, model: str, to: Literal["frozen", "batchrenorm"], keep: Sequence[str] = ()
) -> Plan:
    """Return the plan for a network.

    Args:
        sites: as scanned, in the order of the calls.
        model: the network's class, for the record.
        to: what normalising calls become.
        keep: shell-style patterns of owner paths to leave alone.

    Raises:
        NormfixError: NF204 if a pattern matches no site, NF205 for another `to`.
    """
    if to not in ("frozen", "batchrenorm"):
        raise NormfixError("NF205", "a plan converts to 'frozen' or to 'batchrenorm'.", where=f"to={to!r}")
    keep = (keep,) if isinstance(keep, str) else keep
    for pattern in keep:
        if not any(matches(site.owner, (pattern,)) for site in sites):
            owners = ", ".join(dict.fromkeys(site.owner for site in sites)) or "none"
            raise NormfixError(
                "NF204", f"no site matches this pattern; the owners are: {owners}.", where=pattern
            )
    decisions = tuple(_decide(site, to, tuple(keep)) for site in sites)
    return Plan(to=to, model=model, decisions=tuple(_positioned(i, decisions) for i in range(len(decisions))))


def replay(plan: Plan, sites: Sequence[Site], *, model: str) -> Plan:
    """Return a reviewed plan carried over to the sites of a scan.

    Of the plan only the actions count, which a reviewer may have edited; how each is carried out is decided
    anew, so that the two cannot contradict each other. A reason of the reviewer's own stays.

    Raises:
        NormfixError: NF205 with the first site that differs or stands there twice, or with an action that the site
            does not allow.
    """
    planned = {d.site.id: d for d in plan.decisions}
    for name, count in Counter(d.site.id for d in plan.decisions).items():
        if count > 1:
            raise NormfixError("NF205", f"the plan has {count} decisions on this site. Keep one.", where=name)
    found = {site.id: site for site in sites}
    for name in sorted(planned.keys() ^ found.keys()):
        where = "the plan" if name in planned else "the network"
        raise NormfixError(
            "NF205", f"only {where} has this site. Make the plan anew for this network.", where=name
        )
    decisions = tuple(_replayed(planned[site.id], site) for site in sites)
    kinds = {d.action for d in decisions if d.converts and d.site.layer is not None}
    to = _TARGETS[kinds.pop()] if len(kinds) == 1 else plan.to
    return Plan(to=to, model=model, decisions=tuple(_positioned(i, decisions) for i in range(len(decisions))))


def _replayed(planned: Decision, site: Site) -> Decision:
    given = replace(planned.site, line=site.line, looks=site.looks)
    if differing := [f.name for f in fields(site) if getattr(given, f.name) != getattr(site, f.name)]:
        raise NormfixError(
            "NF205",
            f"the plan describes this site otherwise than the network is ({', '.join(differing)}). Make the plan "
            "anew; a module and the program exported from it have plans of their own.",
            where=site.id,
        )
    ours = {to: _decide(site, to, ()) for to in _TARGETS.values()}
    reasons = [decision.reason for decision in ours.values() if decision.converts]
    if planned.converts:
        decision = ours[_TARGETS[planned.action]]
        if not decision.converts:
            reason = f"the plan converts what cannot be: {decision.reason}."
            raise NormfixError("NF205", reason, where=site.id)
        generated = planned.reason in (*reasons, _KEPT, _EDITED)
        return decision if generated else replace(decision, reason=planned.reason)
    # to spare what could be converted is a choice, and no refusal
    action = Action.KEEP if reasons else planned.action
    return _leave(site, action, _EDITED if planned.reason in reasons else planned.reason)


def _decide(site: Site, to: Literal["frozen", "batchrenorm"], keep: tuple[str, ...]) -> Decision:
    if keep and matches(site.owner, keep):
        return _leave(site, Action.KEEP, _KEPT)
    if site.refusal:
        return _leave(site, Action.REFUSE if site.live else Action.KEEP, site.refusal)
    if site.statistic is not None:
        reason = _REASONS[Action.FREEZE]
        if site.statistic.law == "none":
            reason = f"{reason} (of one image: it has no population law)"
        elif site.statistic.law == "keys":
            kept = f", {site.statistic.kept} of them" if site.statistic.kept else ""
            reason = f"the keys and values of the images become constants{kept}"
        return Decision(
            site=site, action=Action.FREEZE, means=Means.INTERCEPT, reason=reason, target="", position=0
        )
    if site.layer is None:
        return _leave(site, Action.KEEP, f"reduces {site.reduces}")
    action = Action.FREEZE if to == "frozen" else Action.BATCHRENORM
    reason = _REASONS[action]
    if site.layer.carries:
        reason = f"{reason}; its running statistics are carried over as they are"
    if site.swappable:
        target = site.owner
        return Decision(site=site, action=action, means=Means.SWAP, reason=reason, target=target, position=0)
    if site.function not in _INTERCEPTABLE:
        action = Action.REFUSE if site.live else Action.KEEP
        return _leave(site, action, f"direct calls of {site.function} cannot be intercepted")
    return Decision(site=site, action=action, means=Means.INTERCEPT, reason=reason, target="", position=0)


def _leave(site: Site, action: Action, reason: str) -> Decision:
    return Decision(site=site, action=action, means=Means.NONE, reason=reason, target="", position=0)


def _positioned(index: int, decisions: tuple[Decision, ...]) -> Decision:
    """Return an intercepted site with its number among the calls its anchor still sees."""
    decision = decisions[index]
    if decision.means is not Means.INTERCEPT:
        return decision
    site = decision.site
    seen = [_visible(other, site.anchor, site.function) for other in decisions]
    before, others = site.others
    number = sum(
        d.means is Means.INTERCEPT and (d.site.holder, d.site.function) == (site.holder, site.function)
        for d in decisions[:index]
    )
    name = f"normfix_{site.function}_{number}"
    return replace(
        decision,
        position=before + sum(seen[:index]),
        visible=others + sum(seen),
        target=f"{site.holder}.{name}" if site.holder else name,
    )


def _visible(decision: Decision, anchor: str, function: str) -> bool:
    site = decision.site
    if site.function != function or anchor not in site.within:
        return False
    if decision.means is Means.SWAP:
        return False
    deeper = site.anchor != anchor and len(_path_to(site, site.anchor)) > len(_path_to(site, anchor))
    return not (decision.means is Means.INTERCEPT and deeper)


def _path_to(site: Site, path: str) -> tuple[str, ...]:
    return site.within[: site.within.index(path) + 1]
