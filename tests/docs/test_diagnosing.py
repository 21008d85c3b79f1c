"""What docs/diagnosing.md and docs/ci.md show beyond plain blocks is executed too."""

import re
import shlex

import imageio.v3 as iio
import numpy as np
import pytest
import yaml
from pages import ROOT, blocks

from normfix.cli import cli
from normfix.demo.data import nuclei_image

pytestmark = pytest.mark.slow

CI, DIAGNOSING = ROOT / "docs" / "ci.md", ROOT / "docs" / "diagnosing.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a small real image."""
    monkeypatch.chdir(tmp_path)
    iio.imwrite("nuclei.png", np.ascontiguousarray(nuclei_image()[256:512, 800:1056]))
    return tmp_path


@pytest.mark.zoo
def test_commands_exit_as_stated(folder):
    """Commands whose comment says they exit with another code do."""
    lines = [line for block in blocks(DIAGNOSING, "shell") for line in block.splitlines()]
    stated = [re.fullmatch(r"normfix (.*?)  # exits (\d)", line) for line in lines]
    assert stated
    for match in stated:
        assert cli.main(shlex.split(match[1]), standalone_mode=False) == int(match[2])
    assert "Tiles disagree" in (folder / "seams.html").read_text(encoding="utf-8")


def test_the_workflow_has_ten_lines_and_runs(folder):
    """The workflow parses, and its steps that call normfix pass on the folder that the page makes before."""
    (text,) = blocks(CI, "yaml")
    assert len(text.splitlines()) == 10
    (job,) = yaml.safe_load(text)["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    made = next(line for block in blocks(CI, "sh") for line in block.splitlines() if "convert" in line)
    assert cli.main(shlex.split(made)[1:], standalone_mode=False) in (None, 0)
    (check,) = (run for run in runs if run.startswith("normfix "))
    assert cli.main(shlex.split(check)[1:], standalone_mode=False) == 0
    assert (folder / "summary.md").read_text(encoding="utf-8").startswith("## normfix: passed")
    assert job["steps"][-1]["if"] == "always()"


def test_the_fixture_shown_works(pytester):
    """The test of the page passes when pytest runs it."""
    shown = next(block for block in blocks(CI, "python") if "def test_" in block)
    pytester.makepyfile(shown)
    # in a process of its own: in this one pytester would forget modules that torch registers once
    pytester.runpytest_subprocess("-p", "no:randomly").assert_outcomes(passed=1)


@pytest.mark.parametrize("cause", ["halo", "phase", "last tile", "border padding", "tile scaling", "unknown"])
def test_every_cause_is_in_the_table(cause):
    """The table of causes has each one that an experiment can name."""
    assert re.search(rf"^\| .*{cause}.* \|", DIAGNOSING.read_text(encoding="utf-8"), re.MULTILINE)


pytest_plugins = ("pytester",)
