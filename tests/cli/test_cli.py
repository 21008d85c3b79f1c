"""The command line: results on stdout, one paragraph on stderr when it refuses, and honest exit codes."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import tifffile
import torch
from commands import Run, on_terminal
from factories import tiny_unet
from warm import warm_program

import normfix
from normfix.cli import cli
from normfix.cli.extents import Extents
from normfix.cli.options import ArgumentsJson
from normfix.errors import CODES
from normfix.images.files import read_image
from normfix.layers import FrozenKeys
from normfix.networks.releases import writes_archives
from normfix.records.measurements import CalibrationSummary
from normfix.records.plans import Plan
from normfix.records.saved import ConversionRecord, Saved
from normfix.records.sites import Scan
from normfix.records.verdicts import Verdict

ARCH = "factories:tiny_unet"
FILES = {"model.safetensors", "normfix.json", "README.md"} | ({"graph.pt2"} if writes_archives() else set())
PIXELS = np.random.default_rng(0).integers(0, 4000, (96, 80), dtype=np.uint16)
COMMANDS = sorted(cli.commands)


@pytest.fixture
def image(tmp_path):
    """A 16-bit TIFF."""
    tifffile.imwrite(tmp_path / "image.tif", PIXELS)
    return tmp_path / "image.tif"


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """A folder that `normfix convert` wrote, read-only for tests."""
    folder = tmp_path_factory.mktemp("fixed")
    tifffile.imwrite(folder / "image.tif", PIXELS)
    words = [
        "convert",
        ARCH,
        folder / "image.tif",
        "--scale",
        "zscore",
        "-o",
        folder / "out",
    ]
    assert subprocess_run(*words).returncode == 0
    return folder / "out"


def subprocess_run(*words) -> subprocess.CompletedProcess:
    """Call the command line as a user does, in a process of its own."""
    return subprocess.run(
        [warm_program(), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_refused(done: Run, code: str):
    """The run ended with exit code 2, nothing on stdout and one paragraph with the code on stderr."""
    assert done.code == 2
    assert done.out == ""
    # rich before 14 ends its progress with an empty line
    assert done.err.lstrip("\n").startswith(f"{code} ")
    assert "\n" not in done.err.strip()


def names(folder: Path) -> set[str]:
    """Return what lies in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}


def examples() -> list[str]:
    """Return every example line of every help text."""
    found = []
    for command in cli.commands.values():
        lines = [line.strip() for line in (command.help or "").splitlines()]
        found += [line.strip() for line in lines[lines.index("Example:") + 1 :] if line.strip()]
    return found


# --- what it does ---


@pytest.mark.slow
def test_converting_works_in_a_fresh_process(fixed):
    """`normfix convert` on a TIFF exits 0 and leaves the three files."""
    assert names(fixed) == FILES


def test_the_saved_folder_states_its_scaling(fixed):
    """What --scale said is in normfix.json."""
    saved = Saved.from_json(json.loads((fixed / "normfix.json").read_text("utf-8")))
    assert saved.provenance.scaling.kind == "zscore"


@pytest.mark.slow
def test_scan_prints_its_record(run):
    """`scan --format json` is a Scan, on stdout alone."""
    done = run("scan", ARCH, "--input", "1x1x64x64", "--format", "json")
    assert done.code == 0
    assert len(Scan.from_json(json.loads(done.out)).live) == 2


@pytest.mark.slow
def test_scan_prints_text(run):
    """`scan` says in words that the network is not tile-invariant, and exits 0 though it is not."""
    done = run("scan", ARCH)
    assert (done.code, "tile-invariant: no" in done.out) == (0, True)
    assert done.out.startswith("Not tile-invariant: 2 statistics are computed from the tile")


@pytest.mark.slow
def test_scan_names_sites_where_that_is_asked(run):
    """Without -v the answer and the numbers alone are printed."""
    short, long = (run("scan", ARCH, *words).out for words in ((), ("-v",)))
    assert ("instance_norm/0" in short, "instance_norm/0" in long) == (False, True)
    assert len(short.splitlines()) < len(long.splitlines())


@pytest.mark.slow
def test_plan_prints_its_record(run):
    """`plan` is a Plan, on stdout alone."""
    done = run("plan", ARCH, "--to", "frozen", "--keep", "second*")
    assert done.code == 0
    assert len(Plan.from_json(json.loads(done.out)).converted) == 1


@pytest.mark.slow
def test_convert_prints_its_record(run, image, tmp_path, monkeypatch):
    """`convert --format json` is a ConversionRecord, on stdout alone, and so is the report."""
    torch.save(tiny_unet(), tmp_path / "m.pt")
    done = run(
        *("convert", tmp_path / "m.pt", image, "--trust-pickle", "--scale", "unit", "--to", "batchrenorm"),
        *("-o", tmp_path / "out", "--format", "json", "--report", tmp_path / "r.json"),
    )
    assert done.code == 0
    assert ConversionRecord.from_json(json.loads(done.out)).proof.passed
    assert (tmp_path / "r.json").read_text("utf-8") == done.out


def test_check_of_a_converted_network_passes(run, fixed, image):
    """`check` on what was converted exits 0, with a Verdict as JSON."""
    done = run("check", fixed, image, "--arch", ARCH, "--tile", 32, "--format", "json")
    assert (done.code, Verdict.from_json(json.loads(done.out)).passed) == (0, True)


def test_check_of_a_live_network_fails(run, image):
    """`check` on a live network exits 1 and names the live sites."""
    done = run("check", ARCH, image, "--scale", "zscore", "--tile", 32)
    assert done.code == 1
    assert done.out.startswith("failed: 2 statistics are computed from the tile (")
    assert f"normfix convert {ARCH} {image} --scale zscore --to frozen" in done.out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "predict", "prove"])
def test_a_scaling_that_contradicts_the_stored_one_is_refused(run, fixed, image, tmp_path, command):
    """Statistics of z-scores say nothing of percentiles: 78 % of the pixels changed their class without a word."""
    words = [command, fixed, image, "--arch", ARCH, "--tile", 32, "--scale", "percentile:1,99"]
    words += ["-o", tmp_path / "p.tif"] if command == "predict" else []
    refused = run(*words)
    assert (refused.code, "NF107" in refused.err, "zscore" in refused.err) == (2, True, True)
    assert "NF107" not in run(*words, "--override-scale").err


def test_the_stored_scaling_may_be_repeated(run, fixed, image):
    """Saying what is known is no contradiction."""
    assert run("check", fixed, image, "--arch", ARCH, "--tile", 32, "--scale", "zscore").code == 0


@pytest.mark.parametrize("model", ["live", "converted"])
def test_check_with_windows_over_the_whole_image_does_not_pass(run, fixed, image, model):
    """When every window covers the image nothing was compared: exit 1, NF407, never passed."""
    named = [ARCH] if model == "live" else [fixed, "--arch", ARCH]
    done = run("check", *named, image, "--scale", "zscore", "--tile", 96)
    assert (done.code, "NF407" in done.out, "passed" in done.out.splitlines()[0]) == (1, True, False)


def test_check_with_a_halo_one_stride_too_small_fails(run, fixed, image):
    """A halo that is too small exits 1 with NF403, though the images hardly differ."""
    done = run("check", fixed, image, "--arch", ARCH, "--tile", 32, "--halo", 2)
    assert (done.code, "NF403" in done.out) == (1, True)


def test_predict_equals_the_whole_image(run, fixed, image, tmp_path):
    """The stitched TIFF equals the original network's prediction of the whole image."""
    done = run("predict", fixed, image, "--arch", ARCH, "--tile", 32, "-o", tmp_path / "p.tif")
    assert (done.code, done.out) == (0, f"{tmp_path / 'p.tif'}: 1x96x80, float32\n")
    whole = (PIXELS - PIXELS.mean()) / PIXELS.std()
    with torch.no_grad():
        expected = tiny_unet().eval()(torch.from_numpy(whole)[None, None].float())
    found = read_image(tmp_path / "p.tif", ndim=2, channels=1)
    torch.testing.assert_close(torch.from_numpy(found)[None], expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_calibrate_prints_its_record(run, fixed, image, tmp_path):
    """`calibrate --format json` is a CalibrationSummary, and the folder loads."""
    done = run("calibrate", fixed, image, "--arch", ARCH, "-o", tmp_path / "re", "--format", "json")
    assert (done.code, len(CalibrationSummary.from_json(json.loads(done.out)).sites)) == (0, 2)
    assert names(tmp_path / "re") == FILES


@pytest.mark.slow
def test_calibrate_remembers_a_new_scaling(run, fixed, image, tmp_path):
    """Statistics measured under another --scale travel with that scaling, not the old one."""
    run("calibrate", fixed, image, "--arch", ARCH, "-o", tmp_path / "re", "--scale", "100,50")
    saved = Saved.from_json(json.loads((tmp_path / "re" / "normfix.json").read_text("utf-8")))
    assert (saved.provenance.scaling.kind, saved.provenance.scaling.values) == ("fixed", (100.0, 50.0))


@pytest.mark.slow
def test_a_plan_replays_to_the_same_weights(run, fixed, image, tmp_path):
    """`convert --plan` with a printed plan writes byte-identical weights."""
    (tmp_path / "plan.json").write_text(run("plan", ARCH, "--to", "frozen").out, "utf-8")
    words = ("--scale", "zscore", "--plan", tmp_path / "plan.json", "-o", tmp_path / "again")
    assert run("convert", ARCH, image, *words).code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        fixed / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_keys_are_held_and_saved(run, image, tmp_path):
    """`convert --keys` writes a network that loads with its keys, and predicts by tiles what it predicts whole."""
    words = ("--scale", "zscore", "--keys", 64, "-o", tmp_path / "out")
    done = run("convert", "attentive:Attends", image, *words)
    assert done.code == 0
    assert "used for nothing" not in done.err
    net = normfix.load(tmp_path / "out", trust=["attentive"])
    assert [m.bias.numel() for m in net.modules() if isinstance(m, FrozenKeys)] == [64]
    pixels = torch.randn(1, 1, 48, 64)
    with torch.no_grad():
        whole = net(pixels)
    assert (normfix.predict(net, pixels, tile=16) - whole).abs().max() < 1e-4 * whole.std()


@pytest.mark.slow
def test_keys_of_a_network_without_attention_are_not_taken_without_a_word(run, image, tmp_path):
    """What the option changes nothing in is converted, and told so."""
    done = run("convert", ARCH, image, "--scale", "zscore", "--keys", "all", "-o", tmp_path / "out")
    assert done.code == 0
    assert "--keys is used for nothing" in done.err


@pytest.mark.slow
def test_a_printed_plan_is_the_same_twice(run):
    """Two runs print byte-identical plans."""
    words = ("plan", ARCH, "--to", "batchrenorm")
    assert run(*words).out == run(*words).out


@pytest.mark.slow
def test_a_reviewed_plan_is_followed(run, image, tmp_path):
    """A decision edited to keep leaves the site live; the proof says so, exit 1, nothing written."""
    plan = json.loads(run("plan", ARCH).out)
    plan["decisions"][1].update(action="keep", means="none")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    words = ("--scale", "zscore", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert run("convert", ARCH, image, *words).code == 1
    assert names(tmp_path) == {"image.tif", "plan.json"}


def test_an_unproved_conversion_leaves_only_its_report(run, image, tmp_path):
    """A kept live site exits 1: the report is there, the folder is not."""
    words = ("--to", "frozen", "--keep", "second*", "-o", tmp_path / "out", "--report", tmp_path / "r.json")
    done = run("convert", ARCH, image, "--scale", "zscore", *words)
    assert (done.code, "Nothing was written" in done.err) == (1, True)
    assert names(tmp_path) == {"image.tif", "r.json"}


@pytest.mark.slow
def test_a_partial_conversion_is_written_and_exits_1(run, image, tmp_path):
    """--partial writes it all the same, and still says that the proof did not pass."""
    torch.save(tiny_unet(), tmp_path / "m.pt")
    words = ("--trust-pickle", "--to", "frozen", "--keep", "second*", "--partial", "-o", tmp_path / "out")
    assert run("convert", tmp_path / "m.pt", image, "--scale", "zscore", *words).code == 1
    assert "model.safetensors" in names(tmp_path / "out")


@pytest.mark.slow
def test_refused_sites_are_written_named_and_no_pass(run, image, tmp_path):
    """A network with attention is converted as far as it goes: exit 0, and the text never says it is invariant."""
    words = ("--scale", "zscore", "--to", "frozen", "-o", tmp_path / "out")
    done = run("convert", "factories:attentive", image, *words)
    assert done.code == 0
    assert "Partly converted: 1 site stays live, so the network is not tile-invariant." in done.out
    assert "scaled_dot_product_attention/0: every pixel looks at every other" in done.out
    assert "tiles: passed" not in done.out
    assert "model.safetensors" in names(tmp_path / "out")


@pytest.mark.slow
def test_strict_writes_nothing_where_a_site_is_refused(run, image, tmp_path):
    """With --strict a refusal exits 1 and leaves no folder; a network without refusals is not concerned."""
    words = ("--scale", "zscore", "--to", "frozen", "--strict", "-o")
    refused = run("convert", "factories:attentive", image, *words, tmp_path / "out")
    assert (refused.code, "live sites were refused" in refused.err) == (1, True)
    assert not (tmp_path / "out").exists()
    assert run("convert", ARCH, image, *words, tmp_path / "fine").code == 0


@pytest.mark.slow
def test_what_the_network_prints_is_kept_off_stdout(run):
    """A network whose code prints does not spoil the JSON on stdout."""
    done = run("scan", "factories:talkative", "--input", "1x1x64x64", "--format", "json")
    assert Scan.from_json(json.loads(done.out)).dense
    assert "forward" in done.err


@pytest.mark.slow
def test_images_of_different_sizes_are_calibrated_together(run, image, tmp_path):
    """A folder of two images of different sizes gives one network and two shifts."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, pixels in (("a.tif", PIXELS), ("b.tif", PIXELS[:64, :64] // 2)):
        tifffile.imwrite(folder / name, pixels)
    torch.save(tiny_unet(), tmp_path / "m.pt")
    words = (
        "--trust-pickle",
        "--scale",
        "unit",
        "--to",
        "frozen",
        "--format",
        "json",
        "-o",
        tmp_path / "out",
    )
    done = run("convert", tmp_path / "m.pt", folder, *words)
    assert len(ConversionRecord.from_json(json.loads(done.out)).proof.shifts) == 2


@pytest.mark.slow
def test_double_precision_is_saved_and_used(run, image, tmp_path):
    """--dtype float64 proves to 1e-10 and checks again from the folder."""
    words = ("--scale", "zscore", "--to", "frozen", "--dtype", "float64", "-o", tmp_path / "out")
    assert run("convert", ARCH, image, *words).code == 0
    assert run("check", tmp_path / "out", image, "--arch", ARCH, "--tile", 32).code == 0


@pytest.mark.slow
def test_a_preprocess_function_is_repeated_by_the_caller(run, image, tmp_path):
    """A function that a folder names for its images runs only if the caller repeats it."""
    torch.save(tiny_unet(), tmp_path / "m.pt")
    preprocess = ("--preprocess", "preprocessing:preprocess_halves")
    words = ("--trust-pickle", "--to", "frozen", "-o", tmp_path / "out")
    assert run("convert", tmp_path / "m.pt", image, *preprocess, *words).code == 0
    checking = ("check", tmp_path / "out", image, "--arch", ARCH, "--tile", 32)
    assert_refused(run(*checking), "NF113")
    assert run(*checking, *preprocess).code == 0


# --- what it refuses ---


def bad_inputs(folder: Path) -> dict[str, tuple[str, list]]:
    """Return, by name, the code and the words of a convert that must be refused."""
    torch.save(tiny_unet(), folder / "m.pt")
    torch.save(tiny_unet().state_dict(), folder / "w.pt")
    (folder / "cut.pt").write_bytes((folder / "w.pt").read_bytes()[:500])
    np.save(folder / "nan.npy", np.full((96, 80), np.nan, np.float32))
    np.save(folder / "rgb.npy", np.zeros((3, 96, 80), np.float32))
    np.save(folder / "constant.npy", np.zeros((96, 80), np.float32))
    np.save(folder / "small.npy", np.random.default_rng(0).random((1, 1)).astype(np.float32))
    (folder / "cut.tif").write_bytes((folder / "image.tif").read_bytes()[:900])
    (folder / "bad.json").write_text("{")
    (folder / "list.json").write_text("[]")
    (folder / "newer.json").write_text('{"schema": 99}')
    (folder / "taken").mkdir()
    (folder / "empty").mkdir()
    image = [folder / "image.tif", "--scale", "zscore"]
    out = ["-o", folder / "out"]
    frozen = ["--to", "frozen", *out]
    return {
        "missing model": ("NF101", [folder / "no.pt", *image, *frozen]),
        "truncated model": ("NF101", [folder / "cut.pt", "--arch", ARCH, *image, *frozen]),
        "folder that is none": ("NF101", [folder / "empty", *image, *frozen]),
        "pickle without trust": ("NF102", [folder / "m.pt", *image, *frozen]),
        "weights without arch": ("NF112", [folder / "w.pt", *image, *frozen]),
        "wrong arch": ("NF105", [folder / "w.pt", "--arch", "factories:batched", *image, *frozen]),
        "wrong args": (
            "NF105",
            [folder / "w.pt", "--arch", ARCH, "--arch-args", '{"width": 5}', *image, *frozen],
        ),
        "factory that fails": ("NF111", ["factories:failing", *image, *frozen]),
        "no factory": ("NF111", ["factories:nope", *image, *frozen]),
        "missing image": ("NF101", [ARCH, folder / "no.tif", *frozen]),
        "truncated image": ("NF101", [ARCH, folder / "cut.tif", "--scale", "zscore", *frozen]),
        "empty folder": ("NF101", [ARCH, folder / "empty", *frozen]),
        "nan": ("NF104", [ARCH, folder / "nan.npy", *frozen]),
        "channels": ("NF106", [ARCH, folder / "rgb.npy", *frozen]),
        "axes": ("NF106", [ARCH, *image, "--axes", "QW", *frozen]),
        "integers unscaled": ("NF107", [ARCH, folder / "image.tif", *frozen]),
        "constant": ("NF107", [ARCH, folder / "constant.npy", "--scale", "zscore", *frozen]),
        "bad scale": ("NF107", [ARCH, folder / "image.tif", "--scale", "loud", *frozen]),
        "bad preprocess": ("NF111", [ARCH, folder / "image.tif", "--preprocess", "no:f", *frozen]),
        "too small": ("NF109", [ARCH, folder / "small.npy", *frozen]),
        "no images": ("NF203", [ARCH, *frozen]),
        "keep of nothing": ("NF204", [ARCH, *image, "--keep", "nothing.*", *frozen]),
        "device": ("NF116", [ARCH, *image, "--device", "cuda:99", *frozen]),
        "output exists": ("NF114", [ARCH, *image, "--to", "frozen", "-o", folder / "taken"]),
        "report nowhere": ("NF114", [ARCH, *image, *frozen, "--report", folder / "image.tif" / "r.json"]),
        "no plan file": ("NF101", [ARCH, *image, "--plan", folder / "no.json", *out]),
        "bad plan file": ("NF101", [ARCH, *image, "--plan", folder / "bad.json", *out]),
        "plan of nothing": ("NF108", [ARCH, *image, "--plan", folder / "list.json", *out]),
        "newer plan": ("NF108", [ARCH, *image, "--plan", folder / "newer.json", *out]),
    }


BAD = [
    "missing model",
    "truncated model",
    "folder that is none",
    "pickle without trust",
    "weights without arch",
    "wrong arch",
    "wrong args",
    "factory that fails",
    "no factory",
    "missing image",
    "truncated image",
    "empty folder",
    "nan",
    "channels",
    "axes",
    "integers unscaled",
    "constant",
    "bad scale",
    "bad preprocess",
    "too small",
    "no images",
    "keep of nothing",
    "device",
    "output exists",
    "report nowhere",
    "no plan file",
    "bad plan file",
    "plan of nothing",
    "newer plan",
]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_is_written(run, image, tmp_path, name):
    """Each bad input is one paragraph with its code, exit 2, and the folder is as before."""
    code, words = bad_inputs(tmp_path)[name]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert_refused(run("convert", *words), code)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_converting_twice_is_refused(run, fixed, image, tmp_path):
    """A folder normfix wrote is not converted again: NF502."""
    words = ("--arch", ARCH, "--to", "batchrenorm", "-o", tmp_path / "out")
    assert_refused(run("convert", fixed, image, *words), "NF502")


def test_every_bad_input_is_tested(image, tmp_path):
    """The list of names above is the whole list."""
    assert list(bad_inputs(tmp_path)) == BAD


@pytest.mark.slow
def test_a_plan_of_another_network_is_refused(run, image, tmp_path):
    """Replaying a plan on another network is NF205."""
    (tmp_path / "plan.json").write_text(run("plan", "factories:batched", "--to", "frozen").out, "utf-8")
    words = ("--scale", "zscore", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert_refused(run("convert", ARCH, image, *words), "NF205")


@pytest.mark.parametrize(
    "words",
    [
        ["convert", ARCH, "-o", "out"],
        ["convert", ARCH, "-o", "out", "--to", "frozen", "--plan", "p.json"],
        ["convert", ARCH, "-o", "out", "--plan", "p.json", "--keep", "a"],
        ["convert", ARCH, "-o", "out", "--to", "thawed"],
        ["convert", ARCH, "-o", "out", "--to", "frozen", "--report", "r.txt"],
        ["convert", ARCH, "--to", "frozen"],
        ["convert", ARCH, "i.tif", "-o", "out", "--to", "frozen", "--arch-args", "{"],
        ["convert", ARCH, "i.tif", "-o", "out", "--to", "frozen", "--arch-args", "[1]"],
        ["check", ARCH, "i.tif", "--threshold", "nan"],
        ["check", ARCH, "i.tif", "--threshold", "inf"],
        ["check", ARCH, "i.tif", "--threshold", "-1"],
        ["check", ARCH, "i.tif", "--halo", "-1"],
        ["check", ARCH, "i.tif", "--halo", "²"],
        ["check", ARCH, "i.tif", "--tile", "big"],
        ["check", ARCH, "i.tif", "--tile", "32,"],
        ["check", ARCH, "i.tif", "--halo", "8,-1"],
        ["convert", ARCH, "i.tif", "-o", "out", "--to", "frozen", "--tile", "64,0"],
        ["check", ARCH, "i.tif", "--report", "r.txt"],
        ["scan", ARCH, "--input", "64"],
        ["scan", ARCH, "--input", "1x1x0x64"],
        ["scan", ARCH, "--dtype", "int8"],
        ["explain"],
        ["explain", "NF999"],
        ["explain", "NF203", "NF204"],
        ["shake"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(run, tmp_path, monkeypatch, words):
    """Words that the command line does not know exit 2, say so on stderr only, and write nothing."""
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err
    assert not names(tmp_path)


def test_a_tile_off_the_grid_is_refused(run, fixed, image):
    """A tile that is no multiple of the stride is NF402."""
    assert_refused(run("check", fixed, image, "--arch", ARCH, "--tile", 33), "NF402")


@pytest.mark.parametrize("out", ["old.tif", "p.png", "no/p.tif"])
def test_an_output_is_refused_before_anything_is_computed(run, tmp_path, out):
    """`predict` looks at -o before it opens the model, which is none here."""
    for name in ("old.tif", "no.pt", "no.tif"):
        (tmp_path / name).write_text("mine")
    assert_refused(run("predict", tmp_path / "no.pt", tmp_path / "no.tif", "-o", tmp_path / out), "NF114")
    assert (tmp_path / "old.tif").read_text() == "mine"


@pytest.mark.parametrize(
    "command",
    ["calibrate", "predict", "check"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("convert", "diagnose")]
    + [pytest.param("prove", marks=pytest.mark.zoo)],
)
def test_tile_and_halo_are_taken_per_axis(run, fixed, image, tmp_path, command):
    """Every command with --tile or --halo takes one number for each axis."""
    options = {parameter.name for parameter in cli.commands[command].params}
    words = (
        [*("convert", ARCH, "--to", "frozen")] if command == "convert" else [command, fixed, "--arch", ARCH]
    )
    words += ["-o", tmp_path / "out.npy"] if command == "predict" else []
    words += ["-o", tmp_path / "out"] if command in ("convert", "calibrate") else []
    words += ["--scale", "zscore", "--tile", "32,16"]
    words += ["--halo", "32,48"] if command in ("check", "predict", "diagnose") else []
    done = run(*words, image)
    assert "tile" in options
    assert done.code == 0, done.err


def test_tiles_per_axis_are_those_that_are_checked(run, fixed, image):
    """The record states the tile of each axis, also where pyproject.toml gives it as a list."""
    done = run("check", fixed, image, "--arch", ARCH, "--tile", "32,16", "--format", "json")
    assert Verdict.loads(done.out).tile == (32, 16)
    assert Extents().convert([32, 16], None, None) == (32, 16)


def test_tiles_for_three_axes_are_refused_for_two(run, fixed, image):
    """One number too many is NF402."""
    assert_refused(run("check", fixed, image, "--arch", ARCH, "--tile", "32,16,8"), "NF402")


def test_predicting_with_a_live_network_is_refused(run, image, tmp_path):
    """Tiles of a live network do not give its prediction: NF409, no file."""
    words = ("--scale", "zscore", "--tile", 32, "-o", tmp_path / "p.tif")
    assert_refused(run("predict", ARCH, image, *words), "NF409")
    assert names(tmp_path) == {"image.tif"}


@pytest.mark.slow
def test_calibrating_a_live_network_is_refused(run, image, tmp_path):
    """A network with live statistics has nothing to calibrate yet: NF302."""
    words = ("--scale", "zscore", "-o", tmp_path / "out")
    assert_refused(run("calibrate", ARCH, image, *words), "NF302")


def test_a_folder_does_not_decide_what_runs(run, fixed, image):
    """A folder with a factory of the user's own is NF113 until --arch repeats it."""
    assert_refused(run("check", fixed, image, "--tile", 32), "NF113")


@pytest.mark.parametrize("debug", [False, True])
def test_an_internal_error_is_one_paragraph(run, monkeypatch, debug):
    """A failure inside normfix is NF901 and exit 2; the traceback only comes with --debug."""

    def fail(*args, **options):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("normfix.scanning.scan.scan", fail)
    done = run(*(["--debug"] if debug else []), "scan", ARCH, "--input", "1x1x64x64")
    assert (done.code, "NF901" in done.err, "Traceback" in done.err) == (2, True, debug)


@pytest.mark.slow
def test_convert_decodes_its_image_at_most_twice(run, image, tmp_path, monkeypatch):
    """However many steps read the image, its file is opened and decoded once per pass over it, and not to count."""
    decoded = []
    opens = tifffile.TiffFile
    monkeypatch.setattr(tifffile, "TiffFile", lambda path: (decoded.append(path), opens(path))[1])
    done = run("convert", ARCH, image, "--scale", "unit", "--to", "frozen", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert 1 <= len(decoded) <= 2


def test_what_the_system_refuses_is_said_in_its_words(run, monkeypatch):
    """A full disk where nobody expected one is NF337 with the place, and no fault of normfix's."""

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/somewhere")

    monkeypatch.setattr("normfix.scanning.scan.scan", full)
    done = run("scan", ARCH, "--input", "1x1x64x64")
    assert (done.code, "NF337 /tmp/somewhere: the system refused: No space left" in done.err) == (2, True)


def test_the_demo_s_image_has_a_record(run, monkeypatch, tmp_path):
    """As each command with --format json, it prints one document."""
    monkeypatch.setattr("normfix.demo.data.nuclei_image", lambda: np.zeros((600, 600), np.uint8))
    for said in ("Wrote", "Done before"):
        done = run("demo", "--image", tmp_path / "n.png", "--format", "json")
        assert json.loads(done.out)["passed"]
        assert said in done.err
    monkeypatch.setattr("normfix.demo.data.nuclei_image", lambda: np.ones((600, 600), np.uint8))
    assert run("demo", "--image", tmp_path / "n.png").code == 2


@pytest.mark.parametrize("of", ["python", "numpy", "torch", "system"])
def test_memory_that_runs_out_is_no_fault_of_ours(run, monkeypatch, of):
    """Whoever asked for it, it is NF250 with what to do; torch's allocator on the CPU has no class for it."""

    def empty(*args, **options):
        if of == "python":
            raise MemoryError
        if of == "system":
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return np.empty(1 << 60, "uint8") if of == "numpy" else torch.empty(1 << 60)

    monkeypatch.setattr("normfix.scanning.scan.scan", empty)
    done = run("scan", ARCH, "--input", "1x1x64x64")
    assert (done.code, done.err[:5], "No output is half written" in done.err) == (2, "NF250", True)


def test_stopping_exits_130(run, monkeypatch):
    """Ctrl-C is no failure of normfix's, and leaves no traceback."""

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("normfix.scanning.scan.scan", stop)
    done = run("scan", ARCH)
    assert (done.code, "Traceback" in done.err) == (130, False)


def test_a_reader_that_stops_early_sees_no_error(tmp_path):
    """`normfix explain NF203 | head -0` complains about nothing."""
    script = f"{shlex.quote(sys.executable)} -c 'from normfix.cli import main; main()' explain NF203 | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("closed", [{1}, {0, 2}])
def test_a_standard_file_that_is_closed_is_none_of_ours(run, monkeypatch, closed):
    """The next file that is opened would get its number, and what libraries print: it is opened on nothing first."""
    opened, fstat = [], os.fstat

    def state(number):
        if number in closed - set(opened):
            raise OSError(9, "Bad file descriptor")
        return fstat(number)

    monkeypatch.setattr("normfix.cli.os.fstat", state)
    monkeypatch.setattr("normfix.cli.os.open", lambda path, flags: opened.append(min(closed - set(opened))))
    assert run("explain", "NF101").code == 0
    assert set(opened) == closed


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "m", "x.npy", "--to", "frozen", "-o", "q", "--report", "a\x9b31m\x1b[2J.md"),
        ("explain", "\u202eNF\x9b31m"),
    ],
)
def test_wrong_usage_steers_no_terminal(run, words):
    """What click says of words that the caller, or a pattern of the shell, gave is printable."""
    done = run(*words)
    assert (done.code, all(line.isprintable() for line in done.err.split("\n"))) == (2, True)


# --- what it says ---


@pytest.mark.parametrize("code", ["NF203", "nf203"])
def test_explain_prints_the_explanation(run, code):
    """`explain` prints the entry of CODES, in any case."""
    done = run("explain", code)
    assert (done.code, " ".join(done.out.split())) == (0, f"NF203 {CODES['NF203']}")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example(run, name):
    """Every command's description ends with an example of that command, as people need it."""
    done = run(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert re.search(rf"Example:\n +normfix {name}\b.*\n\n(Options|$)", done.out)


@pytest.mark.parametrize("line", examples())
def test_an_example_is_a_valid_call(line):
    """Every example parses: commands, options and choices exist."""
    words = shlex.split(line.partition(">")[0])
    assert words[0] == "normfix"
    command = cli.commands[words[1]]
    with click.Context(cli) as parent:
        command.make_context(words[1], words[2:], parent=parent)


def test_an_example_with_a_wrong_option_is_noticed():
    """Negative control: the same parsing refuses an option that does not exist."""
    with click.Context(cli) as parent, pytest.raises(click.NoSuchOption):
        cli.commands["scan"].make_context("scan", ["model", "--slow"], parent=parent)


@pytest.mark.slow
def test_an_example_factory_exists(run):
    """The demo network that the examples name can be scanned."""
    assert run("scan", "normfix.demo.network:nuclei_unet", "--input", "1x1x64x64").code == 0


def test_help_lists_every_command(run):
    """`normfix --help` exits 0 and names all commands."""
    done = run("--help")
    assert done.code == 0
    assert all(name in done.out for name in COMMANDS)


def test_version_is_printed(run):
    """`normfix --version` exits 0."""
    assert run("--version").code == 0


@pytest.mark.parametrize(
    "text", ["{", "[1]", "3", "null", "", '{"width": 4, "width": 8}', '{"a": {"b": 1, "c": 2, "b": 1}}']
)
def test_arguments_must_be_a_json_object(text):
    """--arch-args takes an object and nothing else, in which no key stands twice."""
    with pytest.raises(click.BadParameter):
        ArgumentsJson().convert(text, None, None)


@pytest.mark.slow
def test_a_network_converted_unscaled_does_not_take_integers_silently(tmp_path, monkeypatch):
    """A folder that says 'none' takes an integer file only when that is said again."""
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("image.tif", PIXELS)
    done = normfix.convert(tiny_unet(), torch.rand(1, 1, 96, 96))
    normfix.save(done, "fixed", source=ARCH)
    arguments = ["check", "fixed", "image.tif", "--tile", "32", "--arch", ARCH]
    with pytest.raises(normfix.NormfixError, match="NF107"):
        cli.main(arguments, standalone_mode=False)
    assert cli.main([*arguments, "--scale", "none"], standalone_mode=False) == 0


@pytest.mark.slow
def test_no_colour_and_no_animation_off_a_terminal(run, fixed, image, tmp_path):
    """What goes to a file or pipe has no escape codes and no bars, on stdout and stderr."""
    for words in (
        ("convert", ARCH, image, "--scale", "zscore", "--to", "frozen"),
        ("calibrate", fixed, image),
    ):
        extra = () if words[0] == "convert" else ("--arch", ARCH)
        done = subprocess_run(*words, *extra, "-o", tmp_path / words[0])
        assert done.returncode == 0
        assert not re.search(r"\x1b|\r|━|█", done.stdout + done.stderr)


@pytest.mark.slow
def test_no_color_is_respected_on_a_terminal(tmp_path, fixed, image):
    """With NO_COLOR, a terminal gets no colours; without it, the bar has them (negative control)."""

    def coloured(**environment) -> bool:
        env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | environment
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        words = ["calibrate", str(fixed), str(image), "--arch", ARCH, "-o", str(out)]
        env |= {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
        shown = on_terminal([str(warm_program()), *words], env, "stderr")
        return re.search(rb"\x1b\[[0-9;]*3[0-9][0-9;]*m", shown) is not None

    assert coloured()
    assert not coloured(NO_COLOR="1")


def test_predict_prints_its_record(run, fixed, image, tmp_path):
    """`predict --format json` prints the file, shape and type it wrote."""
    done = run(
        "predict", fixed, image, "--arch", ARCH, "--tile", "32", "-o", tmp_path / "p.npy", "--format", "json"
    )
    record = json.loads(done.out)
    assert (record["path"], record["shape"]) == (str(tmp_path / "p.npy"), [1, 96, 80])
    assert np.load(record["path"]).dtype == record["dtype"]


@pytest.mark.parametrize("imagej", [True, False])
def test_the_prediction_has_the_pixel_size_of_the_image(run, fixed, tmp_path, imagej):
    """Resolution and the unit that ImageJ or the tag says are in the prediction's TIFF, as tags and in OME-XML."""
    described = {"unit": "um", "spacing": 0.5} if imagej else None
    options = {"resolution": (4.0, 2.0), "resolutionunit": 3, "imagej": imagej, "metadata": described}
    tifffile.imwrite(tmp_path / "sized.tif", PIXELS, **options)
    words = (
        "predict",
        fixed,
        tmp_path / "sized.tif",
        "--arch",
        ARCH,
        "--tile",
        "32",
        "-o",
        tmp_path / "p.tif",
    )
    assert run(*words).code == 0
    with tifffile.TiffFile(tmp_path / "p.tif") as file:
        tags = file.pages[0].tags
        sizes = [tags[name].value for name in ("XResolution", "YResolution")]
        assert [a / b for a, b in sizes] == [4.0, 2.0]
        assert int(tags["ResolutionUnit"].value) == 3
        text = file.ome_metadata
    sizes, unit = (("0.25", "0.5"), "µm" if imagej else "cm")
    assert f'PhysicalSizeX="{sizes[0]}" PhysicalSizeXUnit="{unit}"' in text
    assert f'PhysicalSizeY="{sizes[1]}" PhysicalSizeYUnit="{unit}"' in text


def test_an_image_without_a_size_gives_none(run, fixed, image, tmp_path):
    """Negative control: no resolution is made up."""
    run("predict", fixed, image, "--arch", ARCH, "--tile", "32", "-o", tmp_path / "p.tif")
    with tifffile.TiffFile(tmp_path / "p.tif") as file:
        assert file.pages[0].tags["XResolution"].value == (1, 1)


def test_it_is_a_module_too():
    """`python -m normfix` is the command."""
    command = [sys.executable, "-m", "normfix", "explain", "NF115"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "NF115" in done.stdout


def test_a_prediction_that_found_no_name_is_not_shown(run, fixed, image, tmp_path):
    """stdout told of a file at the output's name, which held something else; a second image is shown by itself."""
    words = ("predict", fixed, "--arch", ARCH, image, "--format", "json")
    np.save(tmp_path / "other.npy", PIXELS)
    before = (tmp_path / "other.npy").read_bytes()
    done = run(*words, "-o", tmp_path / "other.npy")
    assert (done.code, done.out) == (2, "")
    assert "NF114" in done.err
    assert (tmp_path / "other.npy").read_bytes() == before
    (tmp_path / "several").mkdir()
    np.save(tmp_path / "several" / "image.npy", PIXELS)
    done = run(*words, "-o", tmp_path / "several", "--ending", ".npy")
    assert (done.code, done.out) == (2, "")
    assert json.loads(run(*words, "-o", tmp_path / "new.npy").out)["path"] == str(tmp_path / "new.npy")


@pytest.mark.parametrize("words", [("scan", "nope"), ("scan", "--nope")])
def test_an_error_that_cannot_be_told_keeps_its_code(run, monkeypatch, words):
    """Where stderr is full, Python's own exit code would pass for findings."""

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("normfix.cli.click.echo", full)
    assert run(*words).code == 2
