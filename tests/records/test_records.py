"""Records turn into JSON and back without loss, and pass nothing by default."""

import dataclasses
import json
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normfix.records import sites
from normfix.records.choices import StrEnum
from normfix.records.encoding import SCHEMA, Record
from normfix.records.plans import matches
from normfix.records.verdicts import Proof, ProofStep, Verdict

CLASSES = [
    getattr(sites, name)
    for name in sites.__all__
    if isinstance(getattr(sites, name), type) and issubclass(getattr(sites, name), Record)
]
LEAVES = {
    str: st.text(max_size=8),
    int: st.integers(-(10**6), 10**6),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
}


def values(kind: Any) -> st.SearchStrategy:
    """Return a strategy for what an annotation allows."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Union or origin is types.UnionType:
        return st.one_of(*(st.none() if k is type(None) else values(k) for k in inner))
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return st.lists(values(inner[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, inner))
    if origin is Literal:
        return st.sampled_from(inner)
    if dataclasses.is_dataclass(kind):
        return examples(kind)
    if issubclass(kind, StrEnum):
        return st.sampled_from(list(kind))
    return LEAVES[kind]


def examples(kind: type) -> st.SearchStrategy:
    """Return a strategy for a record class; a schema is the current one."""
    hints = get_type_hints(kind)
    fields = {field.name: values(hints[field.name]) for field in dataclasses.fields(kind)}
    if "schema" in fields:
        fields["schema"] = st.just(SCHEMA)
    return st.builds(kind, **fields)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_record_survives_json(kind):
    """For every record class: through JSON text and back gives an equal record."""

    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(examples(kind))
    def run(record):
        assert kind.from_json(json.loads(record.dumps())) == record

    run()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_equal_records_give_equal_bytes(kind):
    """For every record class: reading and dumping again gives the same text."""

    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(examples(kind))
    def run(record):
        assert kind.from_json(json.loads(record.dumps())).dumps() == record.dumps()

    run()


def test_every_record_class_is_exported():
    """The classes tested above are all there are."""
    known = {kind.__name__ for kind in Record.__subclasses__() if kind.__module__ == "normfix.records.sites"}
    assert {kind.__name__ for kind in CLASSES} == known


def test_an_inconclusive_verdict_is_not_passed():
    """Inconclusive is neither passed nor failed."""
    kinds = get_type_hints(Verdict)
    empty = {f.name: 0.0 if kinds[f.name] is float else () for f in dataclasses.fields(Verdict)}
    verdict = Verdict(**{**empty, "status": "inconclusive", "windows": 1, "tile_mismatch": None})
    assert (verdict.passed, verdict.inconclusive) == (False, True)


def test_a_proof_with_one_inconclusive_step_does_not_pass():
    """Nothing passes by default."""
    step = ProofStep(name="identity", claim="", status="inconclusive", value=None, bound=None)
    assert not Proof(steps=(step,), shifts=(), verdict=None).passed


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [("head.0", "head.*", True), ("header", "head.*", False), ("Head.0", "head.*", False), ("", "*", True)],
)
def test_patterns_match_paths_as_in_a_shell(path, pattern, expected):
    """Patterns are case-sensitive and match the whole path."""
    assert matches(path, (pattern,)) is expected
