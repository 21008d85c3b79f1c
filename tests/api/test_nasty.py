"""The zoo of nasty networks, each converted and proved or refused by name, and planted mistakes."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from nasty import ALONE, FROZEN, REFUSED, Fourier, HiddenExtent, SpatialSoftmax
from torch import nn
from torch.testing import assert_close

import normfix
from normfix.api import conversion
from normfix.conversion import rewriting
from normfix.errors import NormfixError
from normfix.layers import ChannelNorm, FrozenStatistic
from normfix.records.plans import Action
from normfix.records.sites import Looked
from normfix.scanning import scan as looking
from normfix.scanning.sites import survey

NETWORKS = pytest.mark.parametrize("kind", FROZEN, ids=lambda kind: kind.__name__)
PLANTED = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.zoo if number % 3 else ()) for number, kind in enumerate(FROZEN)],
    ids=lambda kind: kind.__name__,
)
"""A mistake is planted in all of them by `pytest -m zoo`, in every third by each run."""


def image(*size):
    return torch.rand(1, 1, *(size or (96, 128)), generator=torch.Generator().manual_seed(7))


def sites(done):
    return [d.site.id for d in done.plan.converted]


@pytest.mark.slow
@NETWORKS
def test_converted_and_proved(kind):
    """Every statistic is frozen; identity, residual, tiles, use and the rest pass."""
    done = normfix.convert(kind(), image())
    assert done.plan.left_live == ()
    assert sites(done)
    assert done.proof.passed, done.proof.steps


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused_by_name(kind):
    """What no constant can replace is live, refused with its reason, and tile exactness is not claimed."""
    done = normfix.convert(kind(), image())
    refused = [d for d in done.plan.left_live if d.action is Action.REFUSE]
    assert any(REFUSED[kind] in d.reason for d in refused), [d.reason for d in done.plan.decisions]
    assert done.proof.step("tiles").status == "refused"
    assert done.proof.partial
    assert not done.proof.passed
    assert done.verdict is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.__name__)
def test_left_alone(kind):
    """What is no statistic of the image is not live."""
    scan = normfix.scan(kind(), image())
    assert scan.live == ()
    assert scan.tile_invariant


def test_nothing_but_refusals_is_no_conversion():
    """A network none of whose sites can be converted fails, rather than being called partly converted."""
    model = Fourier()
    model.norm = nn.Identity()
    done = normfix.convert(model, image())
    assert not done.proof.partial
    assert done.proof.step("tiles").status == "failed"


def test_refusal_names_the_mismatch():
    """A partly converted network says how far its tiles are from the whole; that is not nothing here."""
    step = normfix.convert(SpatialSoftmax(), image(128, 160)).proof.step("tiles")
    assert step.value > 1e-3
    assert "tiles of" in step.note


def test_an_extent_hidden_in_a_tensor_fails_the_tiles():
    """Dividing a frozen sum by a tensor of the tile's extent passes T1, and T2 catches it."""
    done = normfix.convert(HiddenExtent(), image())
    assert done.proof.step("identity").status == "passed"
    assert done.proof.step("tiles").status == "failed"
    assert not done.proof.partial


# planted mistakes, and which step catches each


@pytest.mark.slow
@PLANTED
def test_a_site_the_scan_missed_is_caught(kind, monkeypatch):
    """Without the dye, a live site missing from the plan is found live by the proof, or stops the network by name."""

    def blind(*given, **options):
        found = survey(*given, **options)
        last = [site for site in found.sites if site.live][-1]
        return replace(found, sites=tuple(site for site in found.sites if site is not last))

    monkeypatch.setattr(looking, "survey", blind)
    monkeypatch.setattr(looking, "_dyed", lambda *given, **options: looking._Dyes(UNDYED))
    with suppress(Stopped):
        assert converted(kind).proof.step("used").status == "failed"


UNDYED = Looked(name="dye", status="skipped", note="blinded")


class Stopped(Exception):  # noqa: N818 - not an error of the test
    """The converted network stopped and named the site."""


def converted(kind):
    try:
        return normfix.convert(kind(), image())
    except NormfixError as error:
        if error.code != "NF207":
            raise
        raise Stopped from error


@PLANTED
def test_an_interception_lost_after_calibration_is_caught(kind, monkeypatch):
    """Where live equals frozen identity cannot show it; the proof on another input does."""
    calibrate = conversion._calibrate_

    def careless(model, *given):
        summary = calibrate(model, *given)
        for module in model.modules():
            if module.__dict__.pop("_normfix_intercepts", None) is not None:
                module.__class__ = type(module).__mro__[1]
            for name, child in list(module.named_children()):
                if isinstance(child, ChannelNorm):
                    setattr(module, name, nn.InstanceNorm2d(child.num_features))
        return summary

    monkeypatch.setattr(conversion, "_calibrate_", careless)
    assert normfix.convert(kind(), image()).proof.step("used").status == "failed"


class TokensOfOneSize(nn.Module):
    """A patch embedding with learned positions, so that the census sees one size and suspects every token norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, 4)
        self.positions = nn.Parameter(torch.rand(1, 64, 8))
        self.tokens = nn.LayerNorm(8)
        self.up = nn.ConvTranspose2d(8, 4, 4, 4)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.head = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        tokens = self.tokens(self.embed(x).flatten(2).transpose(1, 2) + self.positions)
        seen = torch.einsum("nqk,nkc->nqc", torch.einsum("nqc,nkc->nqk", tokens, tokens).softmax(-1), tokens)
        return self.head(self.norm(self.up(seen.transpose(1, 2).unflatten(2, (8, 8)))))


@pytest.mark.slow
def test_token_norms_of_a_one_size_network_do_not_fail_its_proof(monkeypatch):
    """What the scan has judged not live is no surplus; a norm left live still is."""
    x = torch.rand(1, 1, 32, 32)
    done = normfix.convert(TokensOfOneSize(), x)
    assert done.proof.partial
    assert done.proof.step("used").status == "passed"
    assert {d.site.owner for d in done.plan.converted} == {"norm"}
    calibrate = conversion._calibrate_

    def careless(model, *given):
        summary = calibrate(model, *given)
        model.norm = nn.InstanceNorm2d(4)
        return summary

    monkeypatch.setattr(conversion, "_calibrate_", careless)
    assert normfix.convert(TokensOfOneSize(), x).proof.step("used").status == "failed"


@pytest.mark.slow
def test_batch_norms_beside_attention_are_calibrated():
    """Attention stays live whatever is done, so it is no reason to refuse; a norm that can be converted is."""
    net, images = TokensOfOneSize(), [torch.rand(1, 1, 32, 32) for _ in range(2)]
    with pytest.raises(NormfixError, match=r"NF302.*norm/0/instance_norm"):
        normfix.calibrate_(net, images)
    net.norm = nn.BatchNorm2d(4)
    summary = normfix.calibrate_(net.eval(), images)
    with torch.no_grad():
        before = []
        net.norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))
        for image in images:
            net(image)
    assert [site.site for site in summary.sites] == ["norm/0/batch_norm/0"]
    assert_close(net.norm.running_var, torch.cat(before).var((0, 2, 3), correction=0))


@PLANTED
def test_a_wrong_constant_is_caught(kind, monkeypatch):
    """A value stored 1 % too large fails the residual."""
    honest, honest_norm = FrozenStatistic.set_values_, rewriting._store

    def wrong(self, *values):
        honest(self, *(value * 1.01 for value in values))

    def wrong_norm(layer, m):
        honest_norm(layer, replace(m, mean=m.mean * 1.01 + 0.01))

    monkeypatch.setattr(FrozenStatistic, "set_values_", wrong)
    monkeypatch.setattr(rewriting, "_store", wrong_norm)
    assert normfix.convert(kind(), image()).proof.step("residual").status == "failed"
