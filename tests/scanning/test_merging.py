"""Merging: what one look sees and another does not is a finding, and never settled towards "not live"."""

from dataclasses import dataclass

import pytest

from normfix.records.sites import Family, Finding, Looked, Site
from normfix.scanning.merging import merge
from normfix.scanning.sightings import Dyed, Sighting

SKIPPED = Looked(name="dye", status="skipped", note="asked to")
NO_GRAPH = Looked(name="graph", status="skipped", note="none")


DONE = Looked(name="graph", status="done")


@dataclass(frozen=True)
class Graph:
    looked: Looked = DONE
    seen: frozenset = frozenset()
    findings: tuple = ()


def _site(owner, function="instance_norm", family=Family.INSTANCE, live=True):
    return Site(
        owner=owner,
        invocation=0,
        function=function,
        index=0,
        owner_class="Net",
        anchor="",
        holder="",
        within=("", owner),
        family=family,
        live=live,
        reduces="space",
        line="net.py:1",
        swappable=False,
    )


def _sighting(owner, function="instance_norm", kind="global", **changes):
    given = {
        "kind": kind,
        "op": "aten::op",
        "owner": owner,
        "invocation": 0,
        "function": function,
        "index": 0,
        "owner_class": "Net",
        "within": ("", owner),
        "line": "net.py:1",
        "recorded": True,
        "position": 0,
        "over": (32, 32),
    }
    return Sighting(**(given | changes))


def _dyed(*sightings):
    return Dyed(sightings=sightings, calls=(), invocations={"": 1}, size=(1, 1, 32, 32))


def test_agreement_is_no_finding():
    """A site that all looks see carries their names and nothing is reported."""
    merged = merge([_site("a")], _dyed(_sighting("a")), Graph(seen=frozenset({"a/0/instance_norm/0"})))
    assert merged.sites[0].looks == ("census", "graph", "dye")
    assert merged.findings == ()
    assert [look.status for look in merged.looks] == ["done", "done", "done"]


def test_what_only_the_dye_sees_becomes_a_refused_live_site():
    """Nothing that the dye sees is missing from a plan."""
    merged = merge([_site("a")], _dyed(_sighting("a"), _sighting("b", "cumsum")), NO_GRAPH)
    (added,) = merged.sites[1:]
    assert (added.id, added.family, added.live, added.convertible) == ("b/0/cumsum/0", "other", True, False)
    assert added.looks == ("dye",)
    assert added.refusal.startswith("seen by the dye only")
    assert [(f.code, f.where) for f in merged.findings] == [("NF240", "b/0/cumsum/0")]


def test_a_final_pool_that_only_the_dye_sees_is_not_live():
    """Global by dye, but its result never meets a map: listed, not live, no finding."""
    merged = merge([], _dyed(_sighting("pool", "mean")), NO_GRAPH, lambda sighting: False)
    assert [site.live for site in merged.sites] == [False]
    assert merged.findings == ()


def test_a_live_site_the_dye_does_not_confirm_is_a_finding():
    """It stays live all the same."""
    merged = merge([_site("a")], _dyed(), NO_GRAPH)
    assert merged.sites == (_site("a"),)
    assert [f.code for f in merged.findings] == ["NF241"]


def test_a_site_the_census_holds_for_idle_but_the_dye_does_not_is_live():
    """The dye outvotes "weights, not the image", and the site is refused rather than trusted."""
    merged = merge([_site("a", live=False)], _dyed(_sighting("a")), NO_GRAPH)
    (site,) = merged.sites
    assert (site.live, site.convertible) == (True, False)
    assert [f.code for f in merged.findings] == ["NF241"]


def test_an_idle_site_whose_result_meets_no_map_stays_idle():
    """A classifier's final pool: the dye sees it too, and that is no disagreement."""
    merged = merge([_site("a", live=False)], _dyed(_sighting("a")), NO_GRAPH, lambda sighting: False)
    assert [site.live for site in merged.sites] == [False]
    assert merged.findings == ()


def test_the_parts_of_an_attention_are_one_site():
    """Softmax and second product inside an attention's owner, or a child of it, confirm the attention."""
    attention = _site("a", "matmul", Family.ATTENTION)
    parts = (
        _sighting("a.softmax", "softmax", within=("", "a", "a.softmax")),
        _sighting("a", "matmul", index=1),
    )
    merged = merge([attention], _dyed(*parts), NO_GRAPH)
    assert [(site.id, site.looks) for site in merged.sites] == [("a/0/matmul/0", ("census", "dye"))]
    assert merged.findings == ()


@pytest.mark.parametrize(("function", "word"), [("matmul", "as in attention"), ("roll", "by the dye only")])
def test_what_only_the_dye_sees_is_refused_by_what_it_is(function, word):
    """A product over the extent is refused as attention is; control: other functions are not called so."""
    (site,) = merge([], _dyed(_sighting("a", function)), NO_GRAPH).sites
    assert word in site.refusal


def test_a_softmax_elsewhere_is_not_that_attention():
    """Negative control: another owner's softmax is its own site."""
    merged = merge([_site("a", "matmul", Family.ATTENTION)], _dyed(_sighting("b", "softmax")), NO_GRAPH)
    assert [site.owner for site in merged.sites] == ["a", "b"]


@pytest.mark.parametrize(("kind", "code"), [("unknown", "NF242"), ("lost", "NF243")])
def test_what_the_dye_cannot_tell_is_said(kind, code):
    """An operation that could not be judged is a finding by name, never local."""
    merged = merge([], _dyed(_sighting("a", "deform", kind)), NO_GRAPH)
    assert [(f.code, f.where) for f in merged.findings] == [(code, "a/0/deform/0")]


def test_a_skipped_look_confirms_nothing_and_says_so():
    """Without the dye there is no disagreement to report, and the record tells why."""
    merged = merge([_site("a")], SKIPPED, NO_GRAPH)
    assert merged.sites[0].looks == ("census",)
    assert merged.findings == ()
    assert [(look.name, look.status) for look in merged.looks] == [
        ("census", "done"),
        ("graph", "skipped"),
        ("dye", "skipped"),
    ]


def test_a_failed_graph_carries_its_reason_and_findings():
    """Where export fails, the other looks carry on and the scan says so."""
    failed = Looked(name="graph", status="failed", note="data-dependent branch")
    finding = Finding(code="NF221", where="graph", message="no graph")
    merged = merge([_site("a")], _dyed(_sighting("a")), Graph(looked=failed, findings=(finding,)))
    assert merged.looks[1] == failed
    assert merged.findings == (finding,)


def test_what_the_census_guessed_at_one_size_the_dye_decides():
    """Without a second size a norm over channels looks live; the dye does not see it, and it is left alone."""
    (site,) = merge([_site("norm")], _dyed(), NO_GRAPH, guessed=True).sites
    assert not site.live
    assert not site.convertible


@pytest.mark.parametrize("kind", ["global", "lost", "unknown"])
def test_a_guess_that_the_dye_saw_or_could_not_judge_stays_live(kind):
    """Negative control: what the dye sees, swallows or does not know is live for all that."""
    (site, *_) = merge([_site("norm")], _dyed(_sighting("norm", kind=kind)), NO_GRAPH, guessed=True).sites
    assert site.live
