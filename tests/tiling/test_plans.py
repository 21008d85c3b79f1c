"""What was measured and proved of stages is kept beside a saved network, and believed only for what it is of."""

import json

import pytest
import torch
from cuda_networks import small, uneven

import normfix
from normfix.storage import saving
from normfix.tiling.stages import cache, plans, scheduling
from normfix.tiling.stages.reach import Reach

IMAGE = uneven(64, 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network that was calibrated in stages, and so saved with a plan."""
    place = tmp_path_factory.mktemp("plans") / "saved"
    done = normfix.calibrate(normfix.convert(small(), IMAGE).model, IMAGE, tile=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            saving, "_read_back", lambda *given: None
        )  # in a fresh process, which is another's test
        normfix.save(done, place, source="cuda_networks:small")
    return place


@pytest.fixture
def planned(folder, monkeypatch):
    """Load the folder as a fresh process would, run it in stages and return how much was measured and proved."""
    counts = []

    def counting(function):
        def counted(*given):
            counts.append(function.__name__)
            return function(*given)

        return counted

    for name in ("measure_reach", "largest_difference"):
        monkeypatch.setattr(scheduling, name, counting(getattr(scheduling, name)))

    def run(change=lambda model: None):
        monkeypatch.setattr(cache, "_CAPTURES", type(cache._CAPTURES)())
        counts.clear()
        model = normfix.load(folder, arch="cuda_networks:small")
        change(model)
        result = normfix.calibrate(model, IMAGE, tile=32)
        assert result.summary.engine == "stages"
        return len(counts)

    return run


@pytest.mark.slow
def test_a_later_process_plans_nothing(folder, planned):
    """The plan that was saved with a calibrated network serves the process that loads it."""
    assert (folder / plans.FILE).is_file()
    assert planned() == 0


@pytest.mark.slow
def test_a_loaded_folder_is_never_written_to(folder, planned):
    """Without a plan every process makes its own: a folder that was loaded is an input."""
    path = folder / plans.FILE
    text = path.read_text()
    path.unlink()
    try:
        assert planned() > 0
        assert not path.exists()
    finally:
        path.write_text(text)


@pytest.mark.slow
def test_what_is_loaded_and_saved_again_keeps_its_plan(folder, tmp_path):
    """A plan goes with the network from folder to folder, whether this process ran stages or not."""
    model = normfix.load(folder, arch="cuda_networks:small")
    cache.keep_plans(model, tmp_path)
    assert set(plans.kept(folder)) <= set(plans.kept(tmp_path))


def _edit(content):
    content["plans"][0]["stages"][1][2] = [[0, 0], [0, 0]]


def _other_release(content):
    content["made_by"][1] = "torch 2.6.0"
    content["sha256"] = plans._seal({name: value for name, value in content.items() if name != "sha256"})


def _no_plan(content):
    content["plans"] = 3
    content["sha256"] = plans._seal({name: value for name, value in content.items() if name != "sha256"})


@pytest.mark.parametrize("change", [_edit, _other_release, _no_plan])
def test_what_cannot_be_believed_is_as_none(tmp_path, change):
    """A file that was edited, is of another release or holds something else counts for nothing."""
    plan = plans.Plan(
        "cut", (("first", Reach((2, 2), ((3, 3), (4, 4)))), ("second", Reach((1, 1), ((1, 1),) * 2)))
    )
    plans.keep(tmp_path, [plan])
    assert plans.kept(tmp_path) == [plan]
    path = tmp_path / plans.FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert plans.kept(tmp_path) == []


def _forged(reach):
    return Reach(reach.grid, tuple((0, 0) for _ in reach.halo))


def _coarser(reach):
    return Reach(tuple(1 << 20 for _ in reach.grid), tuple((1 << 20, 1 << 20) for _ in reach.halo))


def _of_three_axes(reach):
    return Reach((*reach.grid, 1), (*reach.halo, (1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("forge", [_forged, _coarser, _of_three_axes])
def test_a_plan_that_was_forged_is_measured_anew(folder, planned, monkeypatch, forge):
    """One with every checksum right, that states another reach than the graph gives, changes no number."""
    real = plans.kept(folder)
    assert [reach for _, reach in real[0].stages if reach != forge(reach)]
    stated = [plans.Plan("cut", tuple((name, forge(reach)) for name, reach in real[0].stages))]
    monkeypatch.setattr(cache, "kept", lambda place: stated)
    monkeypatch.setattr(scheduling, "_name", lambda *given: "cut")
    assert planned() > 0


def test_a_file_of_infinite_numbers_is_as_none(tmp_path):
    """JSON names numbers that no integer is."""
    plans.keep(tmp_path, [plans.Plan("cut", (("first", Reach((2, 2), ((3, 3), (4, 4)))),))])
    content = json.loads((tmp_path / plans.FILE).read_text())
    content["plans"][0]["stages"][0][1] = [float("inf"), 2]
    content["sha256"] = plans._seal({name: value for name, value in content.items() if name != "sha256"})
    (tmp_path / plans.FILE).write_text(json.dumps(content))
    assert plans.kept(tmp_path) == []


@pytest.mark.slow
def test_other_weights_are_planned_anew(planned):
    """A plan is of the weights that it was proved with."""

    def change(model):
        with torch.no_grad():
            model.stem[0].weight.mul_(2)

    assert planned(change) > 0
