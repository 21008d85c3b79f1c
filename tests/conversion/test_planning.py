"""Plans: what is decided, and that an edited plan is followed or refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfix
from normfix.conversion.planning import replay
from normfix.records.plans import Action, Means


class Deep(nn.Module):
    """Calls the same function itself and through a child that does so too."""

    def __init__(self):
        super().__init__()
        self.conv, self.child = nn.Conv2d(1, 4, 3, padding=1), Child()

    def forward(self, x):
        x = F.instance_norm(self.conv(x))
        x = self.child(x) + 1
        return F.instance_norm(self.child(x)) * 2


class Child(nn.Module):
    """Normalises by a function call; run twice by its parent."""

    def forward(self, x):
        return F.instance_norm(x * x)


@pytest.fixture
def image():
    return torch.rand(1, 1, 96, 128) ** 3


@pytest.fixture
def planned(image):
    return normfix.plan(normfix.scan(Deep(), image))


def test_calls_of_a_shared_child_are_numbered_in_their_anchor(planned):
    """A child that runs twice is intercepted in its parent, in the order of all calls there."""
    found = [(d.site.owner, d.site.invocation, d.site.anchor, d.position) for d in planned.converted]
    assert found == [("", 0, "", 0), ("child", 0, "", 1), ("child", 1, "", 2), ("", 0, "", 3)]


def test_shared_child_converts(image):
    """All four calls get their own statistic, and the proof passes."""
    done = normfix.convert(Deep(), image)
    assert done.proof.passed
    assert done.calibration is not None
    assert len(done.calibration.summary.sites) == 4


@pytest.mark.slow
def test_edited_action_is_followed(planned, image):
    """A reviewer may turn one decision to keep: the other calls are renumbered, and that one stays live."""
    torch.manual_seed(0)
    model = Deep()
    first, *others = planned.decisions
    edited = replace(planned, decisions=(replace(first, action=Action.KEEP, reason="by hand"), *others))
    done = normfix.convert(model, image, to=edited)
    assert [d.site.id for d in done.plan.left_live] == [first.site.id]
    assert done.proof.step("identity").status == "passed"
    assert done.proof.step("used").status == "passed"
    assert done.proof.step("tiles").status == "failed"


@pytest.mark.slow
def test_means_and_targets_are_decided_anew(planned, image):
    """A plan whose means or targets were spoiled by hand is carried out right all the same."""
    spoiled = tuple(replace(d, means=Means.SWAP, target="conv", position=7) for d in planned.decisions)
    assert normfix.convert(Deep(), image, to=replace(planned, decisions=spoiled)).proof.passed


@pytest.mark.slow
@pytest.mark.parametrize("action", [Action.KEEP, Action.REFUSE])
def test_the_reason_follows_the_action(planned, action):
    """A site that a reviewer spares is kept as the plan says, not "refused" nor "made a constant"."""
    sites = [d.site for d in planned.decisions]
    first, *others = planned.decisions
    edited = replace(planned, decisions=(replace(first, action=action), *others))
    decision = replay(edited, sites, model="").decisions[0]
    assert decision.action is Action.KEEP
    assert "reviewed plan" in decision.reason


@pytest.mark.slow
@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("reason", ["by hand", "its statistic becomes a constant? Never."])
def test_words_decide_nothing(planned, action, reason):
    """The same action is carried out whatever the reviewer wrote beside it, and the words stay."""
    sites = [d.site for d in planned.decisions]
    first, *others = planned.decisions
    decisions = [
        replay(replace(planned, decisions=(changed, *others)), sites, model="").decisions[0]
        for changed in (replace(first, action=action), replace(first, action=action, reason=reason))
    ]
    assert replace(decisions[0], reason=reason) == decisions[1]


def test_a_plan_is_called_what_its_actions_are(planned):
    """Where a reviewer changes every action, kind and reasons of the plan follow."""
    sites = [d.site for d in planned.decisions]
    edited = tuple(replace(d, action=Action.BATCHRENORM) for d in planned.decisions)
    followed = replay(replace(planned, decisions=edited), sites, model="")
    assert followed.to == "batchrenorm"
    assert all("BatchRenorm" in d.reason for d in followed.decisions)


@pytest.mark.slow
def test_two_decisions_on_one_site_are_refused(planned):
    """A plan that says two things of one site is not followed in either."""
    first, *others = planned.decisions
    twice = replace(planned, decisions=(first, *others, replace(first, action=Action.KEEP)))
    with pytest.raises(normfix.NormfixError, match=r"NF205.*2 decisions"):
        replay(twice, [d.site for d in planned.decisions], model="")


@pytest.mark.slow
def test_impossible_action_is_refused(image):
    """An edit that freezes what has no statistic to freeze is refused with its site."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LocalResponseNorm(2), nn.InstanceNorm2d(4))
    planned = normfix.plan(normfix.scan(model, image))
    edited = tuple(replace(d, action=Action.FREEZE) for d in planned.decisions)
    with pytest.raises(normfix.NormfixError, match="NF205 1/0/local_response_norm/0"):
        normfix.convert(model, image, to=replace(planned, decisions=edited))


@pytest.mark.slow
def test_edited_site_is_refused(planned, image):
    """A plan that describes a site otherwise than the network is, is refused."""
    first, *others = planned.decisions
    changed = replace(first, site=replace(first.site, anchor="child"))
    with pytest.raises(normfix.NormfixError, match="NF205"):
        normfix.convert(Deep(), image, to=replace(planned, decisions=(changed, *others)))


@pytest.mark.slow
def test_keep_patterns_must_match(planned, image):
    """A pattern that matches nothing is an error that lists the owners, not a silent no-op."""
    with pytest.raises(normfix.NormfixError, match=r"NF204.*child"):
        normfix.plan(normfix.scan(Deep(), image), keep=("decoder.*",))


@pytest.mark.slow
def test_a_plan_leaves_nothing_to_keep(planned, image):
    """Patterns beside a plan would be ignored, so they are refused."""
    with pytest.raises(normfix.NormfixError, match=r"NF205 keep=.*says already"):
        normfix.convert(Deep(), image, planned, keep=("child",))
