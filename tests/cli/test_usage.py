"""Wrong usage is said at once: before torch is imported, which alone takes seconds."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from normfix.cli import main
for words in {cases}:
    sys.argv = ["normfix", *words]
    try:
        main()
    except SystemExit as stop:
        print(stop.code, "torch" in sys.modules, *words)
"""

IMAGE, MODEL = "image.npy", "normfix.demo.network:nuclei_unet"

WRONG = [
    ["scan", "no.pth"],
    ["scan", "nowhere:Net"],
    ["scan", "nowhere.py:Net"],
    ["scan", "weights.pth", "--arch", "nowhere:Net"],
    ["scan", MODEL, "--input", "64"],
    ["scan", MODEL, "--input", "9223372036854775808x1x8x8"],
    ["plan", "no.pth", "--to", "frozen"],
    ["convert", MODEL, "no.png", "--to", "frozen", "-o", "out"],
    ["convert", MODEL, IMAGE, "--to", "frozen", "-o", "taken"],
    ["convert", MODEL, IMAGE, "--to", "frozen", "-o", "out", "--give-back", "taken"],
    ["convert", MODEL, IMAGE, "--to", "frozen", "-o", "out", "--engine", "dask"],
    ["convert", MODEL, IMAGE, "--to", "frozen", "-o", "out", "--scale", "minmax"],
    ["convert", MODEL, IMAGE, "-o", "out", "--keys", "some"],
    ["calibrate", MODEL, "no.png", "-o", "out"],
    ["calibrate", MODEL, IMAGE, "-o", "out", "--mask", "no.png"],
    ["calibrate", MODEL, IMAGE, "-o", "taken"],
    ["check", MODEL, "no.png"],
    ["check", MODEL, "taken"],
    ["check", MODEL, IMAGE, "--report", "check.pdf"],
    ["prove", MODEL, "no.png"],
    ["diagnose", MODEL, "no.png"],
    ["diagnose", MODEL, IMAGE, "--labels", "no.png"],
    ["diagnose", MODEL, IMAGE, "--metric", "nowhere:dice"],
    ["diagnose", MODEL, IMAGE, "--converted", "no"],
    ["diagnose", MODEL, IMAGE, "--scale-tiles", "minmax"],
    ["predict", MODEL, "no.png", "-o", "p.tif"],
    ["predict", MODEL, IMAGE, "-o", "p.png"],
    ["predict", MODEL, "other/image.npy", "-o", ""],
    ["predict", MODEL, IMAGE, IMAGE, "-o", "p.tif"],
    ["predict", MODEL, IMAGE, "other/image.npy", "-o", "out"],
    ["predict", MODEL, IMAGE, "-o", "p.tif", "--as", "colours"],
    ["predict", MODEL, IMAGE, "-o", "p.tif", "--scheduler", "tcp://here:1"],
    ["predict", MODEL, IMAGE, "-o", "taken.tif"],
    ["predict", MODEL, IMAGE, "-o", "p.tif", "--ending", ".npy"],
    ["predict", MODEL, IMAGE, "-o", "p.tif", "--preprocess", "nowhere:f"],
    ["check", MODEL, IMAGE, "--preprocess", "nowhere.py:f"],
    ["check", MODEL, IMAGE, "--preprocess", "json"],
    ["check", MODEL, IMAGE, "--axes", "YY"],
    ["check", MODEL, IMAGE, "--tile", "0"],
    ["check", MODEL, IMAGE, "--halo-curve", "--report", "curve.md"],
    ["check", MODEL, IMAGE, "--halo-curve", "--threshold", "1"],
    ["check", MODEL, IMAGE, "--halo-curve", "--halo", "4"],
    ["scan", MODEL, "--device", "gpu"],
    ["scan", MODEL, "--device", "cuda:first"],
    ["scan", MODEL, "--revision", "main"],
    ["scan", "hf-hub:nameless"],
    ["give-back", "no", "-o", "out"],
    ["give-back", "taken", "no", "-o", "out"],
    ["give-back", "taken", "-o", "taken"],
    ["give-back", "taken", "-o", "out", "--original", "no"],
    ["give-back", "taken", "-o", "out", "--switch", "norm"],
    ["verify", "no"],
    ["push", "no", "my-group/nuclei"],
    *([command, "", "other/image.npy", "-o", "out"] for command in ("convert", "calibrate", "predict")),
    *([command, ""] for command in ("scan", "plan", "verify", "explain")),
    ["calibrate", MODEL, "", "-o", "out"],
    ["check", MODEL, IMAGE, ""],
    ["prove", MODEL, IMAGE, "--mask", ""],
    ["scan", MODEL, "--trust", "json", "--trust", ""],
    ["give-back", "taken", "-o", "out", "--original", ""],
    ["push", "", "my-group/nuclei"],
    ["calibrate", MODEL, IMAGE, "-o", "out", "--seed", "1"],
    ["convert", MODEL, IMAGE, "-o", "out", "--workers", "2"],
    ["convert", MODEL, IMAGE, "-o", "out", "--workers", "2", "--tile", "64"],
    ["convert", MODEL, "-o", "out", "--workers", "2", "--budget", "9"],
    ["calibrate", MODEL, IMAGE, "-o", "out", "--workers", "2"],
    ["predict", MODEL, IMAGE, "-o", "p.tif", "--workers", "2", "--engine", "tiles"],
    ["predict", MODEL, IMAGE, "-o", "p.tif", "--override-scale"],
    ["check", MODEL, IMAGE, "--override-scale"],
    ["check", MODEL, IMAGE, "--axes", "QYX"],
    ["check", MODEL, IMAGE, "--axes", "IYX"],
    ["scan", MODEL, "--trust", "a:b:c"],
    ["scan", MODEL, "--trust", "json", "--trust", "my-project"],
    ["scan", MODEL, "--trust", "net.py/"],
    ["scan", MODEL, "--allow-class", "x"],
    ["scan", MODEL, "--allow-class", "*"],
    ["scan", MODEL, "--allow-class", "numpy.*", "--allow-class", "numpy."],
    ["scan", MODEL, "--allow-code", "zz"],
    ["scan", MODEL, "--allow-code", "0" * 63],
    ["scan", MODEL, "--device", "cpu:7"],
    ["scan", MODEL, "--device", "auto:1"],
    ["demo", "-o", "taken"],
    ["explain", "NF999"],
]


NO_OUTPUT = ["--output", "no"]
RIGHT = [
    ["scan", MODEL, *NO_OUTPUT, "--trust", "my_project.networks", "--device", "cpu:0"],
    ["scan", MODEL, *NO_OUTPUT, "--allow-class", "numpy.*", "--allow-class", "my_project:Net.Inner"],
    ["scan", MODEL, *NO_OUTPUT, "--allow-code", "0aF9" * 16],
    ["check", MODEL, IMAGE, "--axes", "tzyxs"],
    ["check", MODEL, IMAGE, "--axes", "yx", "--override-scale", "--scale", "unit"],
    ["calibrate", MODEL, IMAGE, "-o", "out", "--workers", "2", "--tile", "64"],
    ["predict", MODEL, IMAGE, "-o", "p.tif", "--workers", "2"],
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each wrong call gave, in a process of its own: its code, whether torch was there, its words."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "taken").mkdir()
    (folder / "other").mkdir()
    for name in (IMAGE, "other/image.npy", "weights.pth", "taken.tif"):
        (folder / name).write_bytes(b"never read")
    script = SCRIPT.format(cases=[*WRONG, *RIGHT, ["scan", MODEL, *NO_OUTPUT]])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_wrong_usage_exits_2_without_torch(answers):
    """A slip in a name, an option or an output is told before torch is imported."""
    assert answers[: len(WRONG)] == [" ".join(["2 False", *words]) for words in WRONG]


@pytest.mark.slow
@pytest.mark.parametrize("case", RIGHT, ids=" ".join)
def test_what_is_right_goes_on(answers, case):
    """Negative control: these go on to what only the network tells, so no option of them was refused."""
    assert answers[len(WRONG) + RIGHT.index(case)].startswith("2 True"), answers


@pytest.mark.slow
def test_torch_would_be_seen(answers):
    """Negative control: what only the network's output can tell imports torch."""
    assert answers[-1].startswith("2 True")
