"""Every benchmark runs to its end on a small size and prints what its docstring promises; none of it is timed here."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# the words after the file's name, what the last lines must match
LONG = ("attention", "check", "scan", "streaming")
RUNS = {
    "attention": (
        ["--height", "32", "--width", "64", "--tile", "32", "--memory", "64"],
        r'"apart_sd": [\d.e-]+',
    ),
    "check": (["--size", "128", "--tile", "64"], r"converted: passes [\d.]+ s, check [\d.]+ s, [\d.]+x"),
    "layers": (["--rounds", "1", "--size", "32"], r"\| BatchRenorm2d \| \d+ \| -?\d+ \|"),
    "scan": (["demo"], r"demo +[\d.]+s +[\d.]+x +[\d.]+x  \(\(46, 46\), \(46, 46\)\)"),
    "streaming": (["2d", "--size", "96", "--tile", "48", "--width", "4"], r"[\d.]+"),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a program of benchmarks/ in an empty folder; gives what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(name, *words):
        program = str(BENCHMARKS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [program, *map(str, words)])
        runpy.run_path(program, run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.zoo if n in LONG else ()) for n in sorted(RUNS)],
)
def test_a_benchmark_runs_to_its_end(name, run):
    """What it prints last has numbers in it."""
    if name == "attention":
        pytest.importorskip("einops", reason="MONAI's attention needs einops")
    words, pattern = RUNS[name]
    printed = run(name, *words)
    assert re.search(pattern, printed), printed


@pytest.mark.zoo
def test_constants_are_compared_on_labels(run, tmp_path):
    """The benchmark of constants takes an image and labels of one's own, and has a row for each kind."""
    rows, columns = np.mgrid[:96, :112]
    labels = ((rows - 40) ** 2 + (columns - 50) ** 2 < 400).astype(np.uint8)
    tifffile.imwrite(tmp_path / "labels.tif", labels)
    noise = np.random.default_rng(0).random(labels.shape)
    tifffile.imwrite(tmp_path / "image.tif", (labels * 0.8 + noise * 0.2).astype(np.float32))
    words = ["--image", "image.tif", "--labels", "labels.tif", "--zooms", "1", "--size", "48"]
    printed = run("choosing", *words)
    assert len(re.findall(r"^\| 1 \| .+ \| [01]\.\d{3} \|$", printed, re.MULTILINE)) == 8


@pytest.mark.zoo
def test_growth_is_plotted(run, tmp_path):
    """The benchmark of growth starts a process per size and draws them."""
    words = ["growth", "--sizes", "64", "96", "--tile", "48", "--width", "4", "--plot", "growth.png"]
    run("streaming", *words)
    assert (tmp_path / "growth.png").stat().st_size > 1000


@pytest.mark.zoo
def test_what_is_diagnosed_is_confirmed_without_normfix(run, tmp_path):
    """The network that needs no download is diagnosed, and the numbers are found again by other means."""
    run("real_networks", tmp_path, "found.json", "demo")
    printed = run("confirm_real", tmp_path, "found.json")
    assert "demo mean_sd" in printed
    assert "DIFFERS" not in printed


def test_a_wrong_number_is_not_confirmed(run, tmp_path):
    """The confirmation fails where there is nothing to confirm."""
    (tmp_path / "found.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        run("confirm_real", tmp_path, "found.json")
    assert ended.value.code == 1


def test_every_benchmark_is_run_here_or_by_its_own_test():
    """A new file in benchmarks/ needs a run of its own."""
    files = {path.stem for path in BENCHMARKS.glob("*.py")}
    # the last two have tests/benchmarks/test_tradeoffs.py, and a GPU to themselves
    assert files == {*RUNS, "choosing", "choosing_sets", "confirm_real", "real_networks", "tradeoffs", "gpu"}
