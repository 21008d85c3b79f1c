"""One rule per family of norms, in one explicit order: the first that names the function reads the call."""

from __future__ import annotations

from normfix.rules.batch import BatchRule
from normfix.rules.group import GroupRule
from normfix.rules.instance import InstanceRule
from normfix.rules.layer import LayerRule, OverChannelsRule, channel_affine
from normfix.rules.reading import Reading, Rule
from normfix.rules.statistics import family_of, refusal_of, specify

__all__ = [
    "RULES",
    "Reading",
    "Rule",
    "channel_affine",
    "family_of",
    "refusal_of",
    "rule_of",
    "specify",
]

RULES: tuple[Rule, ...] = (BatchRule(), InstanceRule(), GroupRule(), LayerRule(), OverChannelsRule())


def rule_of(function: str) -> Rule | None:
    """Return the rule that reads this function, or None."""
    return next((rule for rule in RULES if function in rule.functions), None)
