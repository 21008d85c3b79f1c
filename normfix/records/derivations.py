"""What was derived of a network's reach from its graph, and what was measured beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from normfix.records.encoding import Record
from normfix.records.spans import Spans

__all__ = ["Obstacle", "PathStep", "Reach", "masked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle(Record):
    """An operator that a rule cannot bound, or that reads the opposite border: its name, its module's path and why."""

    operator: str
    where: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PathStep(Record):
    """An operator on the way from the farthest pixel to the output, and how many pixels of the image it adds there."""

    operator: str
    where: str
    adds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach(Record):
    """Two witnesses of how far an output reaches: the graph's bound and the dye's measurement.

    `used` names the one that the halo of the scan is; "measured" where there is no graph, where an operator is not
    bounded or reads the opposite border, or where it was chosen, which `chosen` says. `bound` and `measured` are
    (before, after) per axis in pixels for tiles that start on the stride grid; a bound is None where it is infinite
    along some axis, with `obstacles` that say why. `lattice` are the pixels per axis at which sizes and places were
    followed, `scale` and `offset` say that the output has scale n + offset pixels. `wraps` read the opposite
    border, which is measured, not bounded; `shifts` are cyclic ones whose masks hide it, as was measured: the bound
    holds for the rest. `paths` holds for each axis the widest way before and after a tile.
    `extent` is how far measuring looked, in pixels per axis. `note` says why there is no graph.
    """

    used: Literal["graph", "measured"]
    chosen: bool = False
    bound: Spans | None = None
    measured: Spans | None = None
    lattice: tuple[int, ...] = ()
    scale: tuple[str, ...] = ()
    offset: tuple[int, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()
    wraps: tuple[Obstacle, ...] = ()
    shifts: tuple[Obstacle, ...] = ()
    paths: tuple[tuple[tuple[PathStep, ...], tuple[PathStep, ...]], ...] = ()
    extent: tuple[int, ...] = ()
    note: str = ""

    @property
    def words(self) -> str:
        """Return which witness the halo is, and how far it looked, in words."""
        if self.used == "graph":
            bounded = "bounded by the network's graph"
            return f"{bounded}; {masked(self.shifts)}" if self.shifts else bounded
        looked = f"measured up to {max(self.extent, default=0)} pixels"
        if self.chosen:
            return f"{looked}, as was asked for"
        if self.obstacles:
            first = self.obstacles[0]
            return f"{looked}: {first.operator} in {first.where} has no bound, {first.why}"
        if self.wraps:
            return f"{looked}: {self.wraps[0].operator} in {self.wraps[0].where} reads the opposite border"
        return f"{looked}: no graph ({self.note})" if self.note else looked


def masked(shifts: Sequence[Obstacle]) -> str:
    """Say what holds of cyclic shifts by measurement alone."""
    first, more = shifts[0], len(shifts) - 1
    others = f" and {more} more like it" if more else ""
    return f"that masks hide what {first.operator} in {first.where}{others} brings around the border was measured"
