"""One rule per family of norms, in one explicit order: the first that names the function reads the call."""

from __future__ import annotations

from normfix.conversion.rewriting import channel_affine
from normfix.scanning.rules.batch import BatchRule
from normfix.scanning.rules.group import GroupRule
from normfix.scanning.rules.instance import InstanceRule
from normfix.scanning.rules.layer import LayerRule, OverChannelsRule
from normfix.scanning.rules.rule import Reading, Rule
from normfix.scanning.rules.statistics import family_of, refusal_of, specify

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
