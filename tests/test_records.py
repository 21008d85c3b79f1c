"""Records turn into JSON and back without loss, and refuse what is not theirs by its path."""

import dataclasses
import json
import math
import types
from enum import StrEnum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normfix import records
from normfix.errors import NormfixError
from normfix.records import Finding, Means, Plan, Record, Saved, Scaling, Site, Verdict, matches

CLASSES = [
    getattr(records, name)
    for name in records.__all__
    if isinstance(getattr(records, name), type)
    and issubclass(getattr(records, name), Record)
    and getattr(records, name) is not Record
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
        fields["schema"] = st.just(records.SCHEMA)
    return st.builds(kind, **fields)


def plan() -> Plan:
    """Return a plan with one decision, as JSON would hold it."""
    site = Site(
        owner="bn",
        invocation=0,
        function="batch_norm",
        index=0,
        owner_class="BatchNorm2d",
        anchor="bn",
        within=("", "bn"),
        family=records.Family.BATCH,
        live=True,
        reduces="space",
        line="net.py:3",
        swappable=True,
        layer=records.LayerSpec(ndim=2, features=4, groups=4, eps=1e-5, affine=True, carries=False),
    )
    decision = records.Decision(
        site=site,
        action=records.Action.FREEZE,
        means=Means.SWAP,
        reason="it becomes a constant",
        target="bn",
        position=0,
    )
    return Plan(to="frozen", model="Net", decisions=(decision,))


def refusal(kind: type[Record], data: object, where: str = "") -> NormfixError:
    """Return the error that reading gives."""
    with pytest.raises(NormfixError) as caught:
        kind.from_json(data, where)
    return caught.value


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
    assert {kind.__name__ for kind in CLASSES} == {kind.__name__ for kind in Record.__subclasses__()}


def test_a_missing_field_is_named():
    """NF108 names the field that is missing."""
    error = refusal(Finding, {"code": "NF203", "where": "bn"})
    assert (error.code, "message" in error.message) == ("NF108", True)


def test_an_unknown_field_is_named():
    """NF108 names the field that does not belong."""
    error = refusal(Finding, {"code": "NF203", "where": "bn", "message": "", "extra": 1})
    assert (error.code, "extra" in error.message) == ("NF108", True)


def test_the_path_leads_to_the_field():
    """A wrong value deep inside is reported by its path from the file on."""
    data = plan().to_json()
    data["decisions"][0]["site"]["layer"]["eps"] = "small"
    assert refusal(Plan, data, "plan.json").where == "plan.json.decisions[0].site.layer.eps"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", True),
        ("schema", "1"),
        ("schema", None),
        ("to", "warm"),
        ("to", []),
        ("model", 3),
        ("decisions", {}),
        ("decisions", "abc"),
        ("decisions", [3]),
        ("decisions", [None]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(field, value):
    """Values are never converted: each wrong one is NF108 at its field."""
    error = refusal(Plan, {**plan().to_json(), field: value})
    assert (error.code, error.where.startswith(f"Plan.{field}")) == ("NF108", True)


@pytest.mark.parametrize("data", [None, 3, "text", [], [1, 2], True])
def test_what_is_no_object_is_refused(data):
    """A plan that is no JSON object is NF108."""
    assert refusal(Plan, data).code == "NF108"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 10**400, "1", True, None])
def test_a_number_that_is_not_finite_is_refused(number):
    """Python's JSON reads NaN, infinity and endless integers; records do not."""
    data = plan().to_json()
    data["decisions"][0]["site"]["layer"]["eps"] = number
    assert refusal(Plan, data).code == "NF108"


def test_an_integer_may_stand_for_a_number():
    """JSON writers drop the .0; the field is a float all the same."""
    assert Scaling.from_json({"kind": "fixed", "values": [0, 2], "function": ""}).values == (0.0, 2.0)


@pytest.mark.parametrize("kind", [Plan, Saved])
def test_a_newer_schema_asks_for_an_update(kind):
    """A file of a newer version is refused for its schema, before any field is missed."""
    error = refusal(kind, {"schema": records.SCHEMA + 1})
    assert (error.code, "Update normfix" in error.message) == ("NF108", True)


def test_a_tuple_of_the_wrong_length_is_refused():
    """A pair holds two."""
    data = {"site": "bn", "elements": 1, "spread": 0, "mean_shift": 0, "variance_ratio": [1, 1, 1]}
    assert refusal(records.SiteStatistics, data).code == "NF108"


def test_a_record_cannot_be_changed():
    """Records are frozen."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().to = "batchrenorm"


def test_text_beyond_ascii_stays_readable():
    """Names in any script are written as they are."""
    assert "Zellkörper" in Finding(code="NF203", where="Zellkörper", message="").dumps()


def test_numbers_that_json_lacks_are_not_written():
    """A NaN never leaves as text that other readers refuse."""
    with pytest.raises(ValueError, match="JSON"):
        Scaling(kind="fixed", values=(math.nan, 1.0)).dumps()


def test_an_inconclusive_verdict_is_not_passed():
    """Inconclusive is neither passed nor failed."""
    kinds = get_type_hints(Verdict)
    empty = {f.name: 0.0 if kinds[f.name] is float else () for f in dataclasses.fields(Verdict)}
    verdict = Verdict(**{**empty, "status": "inconclusive", "windows": 1, "tile_mismatch": None})
    assert (verdict.passed, verdict.inconclusive) == (False, True)


def test_a_proof_with_one_inconclusive_step_does_not_pass():
    """Nothing passes by default."""
    step = records.ProofStep(name="identity", claim="", status="inconclusive", value=None, bound=None)
    assert not records.Proof(steps=(step,), shifts=(), verdict=None).passed


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [("head.0", "head.*", True), ("header", "head.*", False), ("Head.0", "head.*", False), ("", "*", True)],
)
def test_patterns_match_paths_as_in_a_shell(path, pattern, expected):
    """Patterns are case-sensitive and match the whole path."""
    assert matches(path, (pattern,)) is expected
