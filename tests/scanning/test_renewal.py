"""Geometry under new statistics: a branch that a statistic opens brings its halo and stride."""

import copy

import pytest
import torch
from branching import BY_STATISTIC, LOCAL

import normfix
from normfix.networks.calling import Caller
from normfix.networks.provenance import provenance_of
from normfix.scanning.renewal import renewed

BRIGHT = BY_STATISTIC["far where bright"].images()[1]


def converted(case):
    return normfix.convert(case.network(), case.image()).model


@pytest.mark.slow
def test_calibration_renews_the_halo_of_an_open_branch():
    """The far side of a branch that no graph holds reaches forty pixels: the copy says so, the original as it was."""
    model = converted(BY_STATISTIC["far if bright"])
    fresh = normfix.calibrate(model, BRIGHT).model
    assert provenance_of(model).scan.halo[1][0] < 40 <= provenance_of(fresh).scan.halo[1][0]
    assert "NF262" in {finding.code for finding in provenance_of(fresh).scan.findings}


@pytest.mark.slow
def test_calibration_in_place_renews_it_too():
    """The same module object says the new halo: that a network decides is kept, what it decides is measured anew."""
    model = converted(BY_STATISTIC["far if bright"])
    normfix.calibrate_(model, BRIGHT)
    assert provenance_of(model).scan.halo[1][0] >= 40


def test_a_network_of_norms_keeps_its_scan():
    """Control: nothing is measured where no constant can switch anything."""
    model = converted(LOCAL["plain"])
    known = provenance_of(model)
    assert renewed(model, known, BRIGHT, Caller(None, None)) is known.scan


def test_what_decides_nothing_is_found_out_once():
    """The first calibration runs a network to see that it decides nothing; a later one, of a copy, runs it no more."""
    case = LOCAL["plain"]
    runs = []

    def count(module, given):
        runs.append(module)

    model = converted(case)
    known = provenance_of(model)
    with torch.nn.modules.module.register_module_forward_pre_hook(count):
        renewed(model, known, BRIGHT, Caller(None, None))
        runs.clear()
        renewed(copy.deepcopy(model), known, BRIGHT, Caller(None, None))
    assert not runs


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tiles", "auto"])
def test_per_image_statistics_bring_their_geometry(engine):
    """An image that opens the branch is predicted as the network predicts it whole."""
    case = BY_STATISTIC["far where bright"]
    result = normfix.predict(converted(case), BRIGHT, tile=32, engine=engine, statistics="per-image")
    with torch.no_grad():
        torch.testing.assert_close(result, case.network()(BRIGHT), atol=1e-4, rtol=1e-4)
