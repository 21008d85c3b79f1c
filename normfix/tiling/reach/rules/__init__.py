"""The table: for each operator the rule that says what a position of its result is computed from.

A rule is a function of one call; it is found by the operator's name, overloads share it. What is in no table and not
pointwise has no rule: it counts as reading everything, and is named.
"""

from __future__ import annotations

from collections.abc import Mapping

from normfix.tiling.reach.calls import Call
from normfix.tiling.reach.rules.indices import INDICES
from normfix.tiling.reach.rules.mixing import MIXING
from normfix.tiling.reach.rules.moves import MOVES
from normfix.tiling.reach.rules.neighbours import NEIGHBOURS
from normfix.tiling.reach.rules.patches import PATCHES
from normfix.tiling.reach.rules.pointwise import is_pointwise, pointwise
from normfix.tiling.reach.rules.resizing import RESIZING
from normfix.tiling.reach.rules.rule import Rule
from normfix.tiling.reach.rules.shapes import SHAPES
from normfix.tiling.reach.rules.windows import WINDOWS

__all__ = ["RULES", "rule_of"]

RULES: Mapping[str, Rule] = {
    **WINDOWS,
    **RESIZING,
    **MOVES,
    **SHAPES,
    **MIXING,
    **PATCHES,
    **INDICES,
    **NEIGHBOURS,
}


def rule_of(call: Call) -> Rule | None:
    """Return the rule of a call, None where its operator has none."""
    found = RULES.get(call.name)
    if found is None and is_pointwise(call):
        return pointwise
    return found
