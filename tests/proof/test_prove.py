"""prove: a geometry that travels with a network and does not hold any more is no proof of tiles."""

from dataclasses import replace

import pytest
from branching import BY_STATISTIC

import normfix
from normfix.networks.provenance import attach_, provenance_of

DARK, BRIGHT = (BY_STATISTIC["far if bright"].image(), BY_STATISTIC["far where bright"].images()[1])


@pytest.fixture(scope="module")
def models():
    """A network whose far branch is shut, and the same after it was measured on an image that opens it."""
    model = normfix.convert(BY_STATISTIC["far if bright"].network(), DARK).model
    return model, normfix.calibrate(model, BRIGHT).model


@pytest.mark.slow
def test_a_stale_geometry_fails(models):
    """Measured anew elsewhere, the network is still said to have the halo of before: the tiles step names it."""
    shut, fresh = models
    attach_(fresh, replace(provenance_of(fresh), scan=provenance_of(shut).scan))
    step = normfix.prove(fresh, BRIGHT).step("tiles")
    assert step.status == "failed"
    assert "NF262" in step.note


@pytest.mark.slow
def test_a_geometry_that_holds_passes(models):
    """Control: under the statistics that it was measured with nothing is stale."""
    shut, _ = models
    assert normfix.prove(shut, DARK).step("tiles").status == "passed"


@pytest.mark.slow
def test_a_wider_geometry_covers_a_narrower_one(models):
    """Tiles may read more than they need, start on coarser lattices, and not the other way round."""
    geometry = normfix.tiling.geometry.geometry_of(provenance_of(models[0]).scan)
    wider = replace(
        geometry, halo=tuple((b + 4, a) for b, a in geometry.halo), stride=(8, 8), multiple=(8, 8)
    )
    assert wider.covers(geometry)
    assert not geometry.covers(wider)
