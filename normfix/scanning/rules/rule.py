"""What a rule says of one call, and the protocol all rules follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from normfix.records.sites import Family, LayerSpec
from normfix.scanning.census import Call

__all__ = ["Reading", "Rule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A rule's answer: is the statistic live, what does it reduce, and what could replace it."""

    live: bool
    reduces: str
    layer: LayerSpec | None = None
    refusal: str = ""


class Rule(Protocol):
    """One family of normalising calls."""

    @property
    def family(self) -> Family:
        """Return the kind of statistic."""
        ...

    @property
    def functions(self) -> frozenset[str]:
        """Return the names it reads, from census.NORMS and census.DIRECT."""
        ...

    @property
    def modules(self) -> tuple[type[nn.Module], ...]:
        """Return the exact classes whose whole forward is the call, so that they may be replaced."""
        ...

    def read(self, call: Call, space: frozenset[int], owner: nn.Module) -> Reading:
        """Read one call.

        Args:
            call: its `arguments` are bound by name.
            space: dimensions of the operand whose extent follows the image's.
            owner: the innermost module around the call.
        """
        ...
