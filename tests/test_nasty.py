"""The zoo of nasty networks, each converted and proved or refused by name, and planted mistakes."""

import pytest
import torch
from nasty import ALONE, FROZEN, REFUSED

import normfix
from normfix.records import Action

NETWORKS = pytest.mark.parametrize("kind", FROZEN, ids=lambda kind: kind.__name__)


def image(*size):
    return torch.rand(1, 1, *(size or (96, 128)), generator=torch.Generator().manual_seed(7))


def sites(done):
    return [d.site.id for d in done.plan.converted]


@NETWORKS
def test_converted_and_proved(kind):
    """Every statistic is frozen; identity, residual, tiles, use and the rest pass."""
    done = normfix.convert(kind(), image())
    assert done.plan.left_live == ()
    assert sites(done)
    assert done.proof.passed, done.proof.steps


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused_by_name(kind):
    """What no constant can replace is live, refused with its reason, and the tiles fail."""
    done = normfix.convert(kind(), image())
    refused = [d for d in done.plan.left_live if d.action is Action.REFUSE]
    assert any(REFUSED[kind] in d.reason for d in refused), [d.reason for d in done.plan.decisions]
    assert done.proof.step("tiles").status == "failed"


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.__name__)
def test_left_alone(kind):
    """What is no statistic of the image is not live."""
    scan = normfix.scan(kind(), image())
    assert scan.live == ()
    assert scan.tile_invariant
