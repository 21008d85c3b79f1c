"""What makes a network look as if it knew the whole image, or the size, and may not: put to the measurement, and said.

A name is a suspicion: a flip mixes the whole extent unless it is turned back, attention looks at all it is given,
which may be a block of fixed size. So is an operator that nobody knows, a roll, a branch on the size. The
geometry is measured as if all of them were unfounded; only where it is steady (normfix.tiling.dependence) are they.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from normfix.records.sites import Finding, Site
from normfix.records.sizes import Condition
from normfix.tiling.dependence import FAR

__all__ = ["Doubts"]

_MEASURED = (
    "Measured, it is harmless here: tiles equal the whole in float64 whatever is beyond the halo, for images of "
    f"several magnitudes and on strips of up to {FAR} pixels."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubts:
    """The suspicions of one scan.

    `sites` are ids of sites that are global by their name or growth only, `operations` ids of calls that nobody
    knows, `placed` the findings about calls that take place or size into account, `bounds` the conditions on the
    size by which the network branches. `causes` are findings that count only where there is no geometry.
    `swallowed` and `compared` tell that NaN may show too short a halo, `wraps` that a call shifts a map around its
    border; `rolled` are the findings about such calls among those of `placed`.
    """

    sites: frozenset[str]
    operations: Sequence[str]
    placed: tuple[Finding, ...]
    bounds: tuple[Condition, ...] = ()
    causes: tuple[Finding, ...] = ()
    swallowed: bool = False
    compared: bool = False
    wraps: bool = False
    rolled: tuple[Finding, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether there is any."""
        return bool(self.sites or self.operations or self.placed or self.bounds)

    def but_shifts(self) -> Doubts:
        """Return them without shifts around the border, where the graph tells all of these but what masks hide."""
        return replace(self, placed=tuple(f for f in self.placed if f not in self.rolled), rolled=())

    def settled(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """Return the sites with those in doubt not live."""
        return tuple(_local(site) if site.id in self.sites else site for site in sites)

    def findings(self, *, unplaced: bool) -> tuple[Finding, ...]:
        """Return what is said of places and sizes where nothing was settled; `unplaced`: and no geometry was found."""
        return self.placed + tuple(map(_bound, self.bounds)) + (self.causes if unplaced else ())

    def explained(self, findings: Sequence[Finding], open_bounds: Sequence[Condition]) -> tuple[Finding, ...]:
        """Return the findings of a network whose geometry is steady: what was settled is said to be.

        Args:
            findings: of the looks.
            open_bounds: the bounds that could not be crossed.
        """
        known = self.sites | {*self.operations}
        kept = tuple(f for f in findings if f.where not in known)
        settled = [
            Finding(
                code="NF252", where=name, message=f"it looks as if it saw the whole image{more}. {_MEASURED}"
            )
            for name, more in _grouped(sorted(self.sites))
        ]
        settled += [
            Finding(
                code="NF252", where=name, message=f"an operation normfix does not know{more}. {_MEASURED}"
            )
            for name, more in _grouped(self.operations)
        ]
        crossed = [_bound(bound) for bound in self.bounds if bound not in open_bounds]
        settled += [
            replace(f, code="NF252", message=f"{f.message} {_MEASURED}") for f in (*self.placed, *crossed)
        ]
        return kept + tuple(settled) + tuple(map(_bound, open_bounds))


def _grouped(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the first of the calls of one function by one owner, and how many there are."""
    calls: dict[tuple[str, str], list[str]] = {}
    for name in names:
        owner, _, function, _ = name.rsplit("/", 3)
        calls.setdefault((owner, function), []).append(name)
    return [(same[0], f" ({len(same)} calls)" * (len(same) > 1)) for same in calls.values()]


def _local(site: Site) -> Site:
    reduces = "a neighbourhood only, as measured"
    return replace(site, live=False, reduces=reduces, refusal="", layer=None, statistic=None)


def _bound(bound: Condition) -> Finding:
    return Finding(
        code="NF244",
        where="input size",
        message=f"the network branches on the image's size at {bound.line or 'an unknown line'}: what was scanned "
        f"holds while {bound.text}, and an image of another size runs something else than its tiles. Take the branch "
        "out.",
    )
