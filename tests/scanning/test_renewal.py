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


class Weighted(torch.nn.Module):
    """Adds what a weight says where an image is wide, and blurs as far as another weight says."""

    def __init__(self, *, sized):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.InstanceNorm2d(2)
        self.gain = torch.nn.Parameter(torch.zeros(()))
        self.radius = torch.nn.Parameter(torch.ones(()))
        self.sized = sized

    def forward(self, x):
        y = self.norm(self.stem(x))
        if self.sized:
            return y + self.gain * torch.tanh(y) if x.shape[3] > 100 else y
        radius = int(self.radius)
        return torch.nn.functional.avg_pool2d(y, 2 * radius + 1, 1, radius)


WIDE = torch.rand(1, 1, 48, 160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reweighted(*, sized):
    """Return a converted network whose weights were changed since, and one whose weights were not."""
    model = normfix.convert(Weighted(sized=sized).double().eval(), WIDE[..., :96]).model
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.gain.fill_(3)
        trained.radius.fill_(9)
    return model, trained


def predicted(model, image=WIDE):
    """Predict in tiles, and assert that they are the whole."""
    with torch.no_grad():
        whole = model(image)
    torch.testing.assert_close(normfix.predict(model, image, tile=16, engine="tiles"), whole)


@pytest.mark.zoo
def test_weights_renew_what_no_graph_tells(tmp_path):
    """A weight that is read as a setting widens the halo, also in the file that is saved; others keep their scan."""
    model, trained = reweighted(sized=False)
    narrow = WIDE[..., :96]
    for one in (model, trained):
        predicted(one, narrow)
    normfix.save(trained, tmp_path / "trained", partial=True)
    again = normfix.load(tmp_path / "trained", model=Weighted(sized=False).double())
    assert provenance_of(again).scan.halo[1][0] > 9
    predicted(again, narrow)


@pytest.mark.slow
def test_weights_may_part_the_sides_of_a_branch():
    """Both sides gave the same under the weights of then; under others the other is refused, in tiles and stages."""
    model, trained = reweighted(sized=True)
    predicted(model)
    for engine in ("tiles", "stages"):
        with pytest.raises(normfix.NormfixError, match=r"NF260 .*W > 100"):
            normfix.predict(trained, WIDE, tile=16, engine=engine)


def test_weights_of_a_network_that_hangs_on_none_are_free():
    """Control: after training a network of norms is not looked at again."""
    model = converted(LOCAL["plain"])
    with torch.no_grad():
        model.stem.weight.mul_(2)
    known = provenance_of(model)
    assert renewed(model, known, BRIGHT, Caller(None, None), reweighted=True) is known.scan
