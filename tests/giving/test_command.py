"""normfix give-back and convert --give-back write what give_back writes, and say so."""

import json

import numpy as np
import pytest
import switchable
import tifffile
import torch
from originals import bundle

import normfix
from normfix.records.returns import GivenBack

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own

PIXELS = np.random.default_rng(0).random((64, 64), dtype=np.float32)


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    """Stand in a folder with an image."""
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("image.tif", PIXELS)


CONVERT = ("convert", "bundle", "image.tif", "--scale", "zscore", "--to", "frozen", "-o", "fixed")


@pytest.mark.slow
def test_a_converted_folder_is_given_back(run, tmp_path):
    """The record on stdout is that of the folder written, and its README states the scaling."""
    bundle(tmp_path / "bundle")
    assert run(*CONVERT)[0] == 0
    code, out, _ = run("give-back", "fixed", "-o", "back", "--original", "bundle", "--format", "json")
    record = GivenBack.loads(out)
    assert (code, record.format, record.folder) == (0, "MONAI bundle", "back")
    assert "zscore" in (tmp_path / "back" / "README.md").read_text()
    assert (
        json.loads((tmp_path / "back/configs/inference.json").read_text())["network_def"]["norm"] == "batch"
    )


@pytest.mark.zoo
def test_convert_gives_back_in_one_step(run, tmp_path):
    """With --give-back, MODEL is the original."""
    bundle(tmp_path / "bundle")
    code, _, err = run(*CONVERT, "--give-back", "back")
    assert code == 0, err
    assert (tmp_path / "fixed" / "normfix.json").exists()
    assert (tmp_path / "back" / "models" / "model.pt").exists()


def test_a_folder_that_exists_is_refused_before_anything_is_computed(run, tmp_path):
    """Where the folder to give back to exists, nothing is converted: NF114."""
    bundle(tmp_path / "bundle")
    (tmp_path / "back").mkdir()
    code, _, err = run(*CONVERT, "--give-back", "back")
    assert (code, err.startswith("NF114")) == (2, True)
    assert not (tmp_path / "fixed").exists()


@pytest.mark.zoo
def test_a_switch_without_a_value_is_refused(run, tmp_path):
    """--switch takes NAME=VALUE."""
    bundle(tmp_path / "bundle")
    assert run(*CONVERT)[0] == 0
    code, _, err = run("give-back", "fixed", "-o", "back", "--switch", "norm")
    assert code == 2
    assert "NAME=VALUE" in err
    assert run("give-back", "fixed", "-o", "back", "--switch", 'norm=["batch", {"affine": false}]')[0] == 0


@pytest.mark.slow
def test_giving_back_again_says_that_it_was_done(run, tmp_path):
    """Repeated, the command exits 0 and writes nothing; where the folder holds something else by then, it is NF114."""
    done = normfix.convert(switchable.generator(), torch.from_numpy(PIXELS)[None, None])
    normfix.save(done, "fixed", "switchable:generator")
    give = ("give-back", "fixed", "-o", "back", "--arch", "switchable:generator")
    assert run(*give)[0] == 0
    code, _, err = run(*give)
    assert (code, "Done before" in err, (tmp_path / "back (1)").exists()) == (0, True, False)
    (tmp_path / "back" / "arguments.json").write_text("{}")
    code, _, err = run(*give)
    assert (code, "NF114" in err) == (2, True)
