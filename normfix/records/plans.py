"""What becomes of each site: the plan, a decision per site, to be read and edited before anything is rewritten."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from normfix.records.choices import StrEnum
from normfix.records.encoding import SCHEMA, Record
from normfix.records.sites import Site
from normfix.records.tables import Shown, Table, counted

__all__ = ["Action", "Decision", "Means", "Plan", "matches"]


class Action(StrEnum):
    """What a plan does with a site."""

    FREEZE = "freeze"
    BATCHRENORM = "batchrenorm"
    KEEP = "keep"
    REFUSE = "refuse"


class Means(StrEnum):
    """How a decision is carried out in the user's model."""

    SWAP = "swap"
    INTERCEPT = "intercept"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Decision(Shown, Record):
    """What happens to one site, why, and how.

    An intercepted site is call number `position` of its function among the `visible` ones that are still
    made inside the anchor's forward once everything deeper is converted; `target` is the path of its new
    layer.
    """

    site: Site
    action: Action
    means: Means
    reason: str
    target: str
    position: int
    visible: int = 1

    @property
    def converts(self) -> bool:
        """Tell whether the site gets a new layer."""
        return self.action in (Action.FREEZE, Action.BATCHRENORM)

    @property
    def measured(self) -> bool:
        """Tell whether the new layer's constants come from images, not from the original."""
        carries = self.site.layer is not None and self.site.layer.carries
        return self.converts and not carries

    @property
    def headline(self) -> str:
        """Return what happens to the site."""
        return (
            f"{self.site.id}: {self.action} ({self.reason})"
            if self.reason
            else f"{self.site.id}: {self.action}"
        )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan(Shown, Record):
    """The reviewable decisions for one network."""

    to: Literal["frozen", "batchrenorm"]
    model: str
    decisions: tuple[Decision, ...]
    schema: int = SCHEMA

    @property
    def converted(self) -> tuple[Decision, ...]:
        """Return the decisions that put a new layer in place, in the order of the calls."""
        return tuple(d for d in self.decisions if d.converts)

    @property
    def left_live(self) -> tuple[Decision, ...]:
        """Return the decisions that leave a live statistic in the network."""
        return tuple(d for d in self.decisions if d.site.live and not d.converts)

    @property
    def headline(self) -> str:
        """Return how many sites are converted, and how many stay live."""
        converted = f"{len(self.converted)} of {counted(len(self.decisions), 'site')} converted"
        left = f", {len(self.left_live)} left live" if self.left_live else ""
        return f"{self.model} to {self.to}: {converted}{left}"

    def table(self) -> Table:
        """Return the decisions."""
        rows = [(d.site.id, str(d.action), str(d.means), d.reason) for d in self.decisions]
        return Table(("site", "action", "means", "reason"), rows)


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether a module path matches one of the shell-style patterns.

    >>> matches("head.0.norm", ("head.*",))
    True
    """
    return any(fnmatchcase(path, pattern) for pattern in patterns)
