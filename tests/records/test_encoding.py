"""Records are read strictly: what is not theirs is refused by its path."""

import dataclasses
import json
import math

import pytest

from normfix.errors import NormfixError
from normfix.records import sites
from normfix.records.encoding import SCHEMA, Record
from normfix.records.measurements import SiteStatistics
from normfix.records.plans import Action, Decision, Means, Plan
from normfix.records.saved import Saved, Scaling
from normfix.records.sites import Finding, Site


def plan() -> Plan:
    """Return a plan with one decision, as JSON would hold it."""
    site = Site(
        owner="bn",
        invocation=0,
        function="batch_norm",
        index=0,
        owner_class="BatchNorm2d",
        anchor="bn",
        holder="bn",
        within=("", "bn"),
        family=sites.Family.BATCH,
        live=True,
        reduces="space",
        line="net.py:3",
        swappable=True,
        layer=sites.LayerSpec(ndim=2, features=4, groups=4, eps=1e-5, affine=True, carries=False),
    )
    decision = Decision(
        site=site,
        action=Action.FREEZE,
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
    error = refusal(kind, {"schema": SCHEMA + 1})
    assert (error.code, "Update normfix" in error.message) == ("NF108", True)


def test_a_tuple_of_the_wrong_length_is_refused():
    """A pair holds two."""
    data = {"site": "bn", "elements": 1, "spread": 0, "mean_shift": 0, "variance_ratio": [1, 1, 1]}
    assert refusal(SiteStatistics, data).code == "NF108"


def test_a_record_cannot_be_changed():
    """Records are frozen."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().to = "batchrenorm"


def test_text_beyond_ascii_stays_readable():
    """Names in any script are written as they are."""
    assert "Zellkörper" in Finding(code="NF203", where="Zellkörper", message="").dumps()


@pytest.mark.parametrize("text", ["\x9b31m", "a\u202eb", "\x7f\u2028", "\U000e0041", "b\udcff"])
def test_json_steers_no_terminal(text):
    """Controls, marks of direction and bytes of names that are no UTF-8 are written by number and read back."""
    written = Scaling(function=f"é{text}").dumps()
    assert all(line.isprintable() for line in written.split("\n"))
    assert "é" in written
    assert json.loads(written)["function"] == f"é{text}"


def test_numbers_that_json_lacks_are_not_written():
    """A NaN never leaves as text that other readers refuse."""
    with pytest.raises(ValueError, match="JSON"):
        Scaling(kind="fixed", values=(math.nan, 1.0)).dumps()
