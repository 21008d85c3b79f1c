"""calibrate --tile and predict --engine stages: files larger than memory on the command line."""

import json
import shutil
import sys

import numpy as np
import pytest
import tifffile
import torch
from click import Abort
from click.testing import CliRunner
from factories import tiny_unet
from optional import zarr
from streamed_networks import Tangled

import normfix
from normfix.cli import cli, main
from normfix.cli.stages import Bar, Lines, outlook_text
from normfix.errors import NormfixError
from normfix.tiling.stages.journal import Written
from normfix.tiling.stages.outlook import Outlook, Step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a converted network and an image as TIFF and as Zarr."""
    path = tmp_path_factory.mktemp("cli")
    image = torch.rand(1, 1, 96, 128, generator=torch.Generator().manual_seed(0)) ** 2
    normfix.save(normfix.convert(tiny_unet(), image), path / "fixed", source="factories:tiny_unet")
    (path / "pyproject.toml").write_text('[tool.normfix]\ntrust = ["factories"]\n')
    tifffile.imwrite(path / "image.tif", image[0, 0].numpy(), tile=(32, 32))
    zarr.create_array(store=str(path / "image.zarr"), data=image[0, 0].numpy(), chunks=(32, 32))
    return path


@pytest.fixture(autouse=True)
def _project(folder, monkeypatch):
    """Stand in the folder, which trusts the network's module."""
    monkeypatch.chdir(folder)


def _run(*arguments):
    result = CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def test_predict_in_stages_writes_what_tiles_write(folder, monkeypatch, capsys):
    """A Zarr image predicted in stages, stopped by Ctrl-C and continued, is the TIFF predicted in tiles."""
    _run("predict", folder / "fixed", folder / "image.tif", "-o", folder / "tiles.npy", "--tile", 32)
    arguments = [
        *("predict", folder / "fixed", folder / "image.zarr", "-o", folder / "stages.npy", "--tile", 32),
        *("--engine", "stages", "--budget", 0, "--store", folder, "--workers", 2, "--format", "json"),
    ]
    monkeypatch.setattr(sys, "argv", ["normfix", *map(str, arguments)])
    compute = Written.note

    def stop(self, stage, block, measured):
        if self.count == 20:
            raise KeyboardInterrupt
        compute(self, stage, block, measured)

    monkeypatch.setattr(Written, "note", stop)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert "Stopped; no output is half written. 20 blocks are kept in" in said
    assert "The same command goes on from there" in said
    assert not (folder / "stages.npy").exists()
    monkeypatch.setattr(Written, "note", compute)
    result = _run(*arguments)
    assert json.loads(result.stdout) == {
        "path": str(folder / "stages.npy"),
        "shape": [1, 96, 128],
        "dtype": "float32",
    }
    assert "20 are whole already: about" in result.stderr
    assert not (folder / "normfix-run").exists()
    tiles, stages = np.load(folder / "tiles.npy"), np.load(folder / "stages.npy")
    np.testing.assert_allclose(stages, tiles, atol=1e-5 * tiles.std())


def test_calibrate_by_window_writes_the_same_statistics(folder):
    """With and without --tile the saved statistics agree to float32's rounding."""
    for name, extra in (("whole", ()), ("blocks", ("--tile", 40))):
        _run("calibrate", folder / "fixed", folder / "image.tif", "-o", folder / name, *extra)
    whole, blocks = (
        normfix.load(folder / name, model=tiny_unet()).state_dict() for name in ("whole", "blocks")
    )
    assert whole.keys() == blocks.keys()
    for name, value in whole.items():
        torch.testing.assert_close(blocks[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.zoo
def test_convert_in_stages_writes_the_whole_image_s_statistics(folder):
    """convert --store reads a Zarr image by window; the constants are those of the whole image."""
    torch.manual_seed(0)
    _run(
        *("convert", "streamed_networks:Tangled", folder / "image.zarr", "--to", "frozen"),
        *("--scale", "none", "--tile", 48, "--store", folder, "-o", folder / "staged"),
    )
    torch.manual_seed(0)
    net = Tangled()
    image = torch.from_numpy(tifffile.imread(folder / "image.tif"))[None, None]
    whole = normfix.convert(net, image).model.state_dict()
    staged = normfix.load(folder / "staged", model=Tangled()).state_dict()
    assert whole.keys() == staged.keys()
    for name, value in whole.items():
        torch.testing.assert_close(staged[name], value, rtol=1e-5, atol=1e-6)
    assert not (folder / "normfix-run").exists()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("again.npy", ("predict", "--tile", 32)),
        ("again.tif", ("predict", "--tile", 32)),
        ("again.zarr", ("predict", "--tile", 32, "--engine", "stages")),
        pytest.param("again", ("calibrate", "--tile", 40), marks=pytest.mark.zoo),
    ],
)
def test_a_command_that_was_done_before_says_so(folder, out, words):
    """Given again it writes nothing and exits 0; on another image it is NF114, and both results are there."""
    command, *options = words
    path, second = folder / out, folder / f"again-2{_ending(out)}"
    np.save(folder / "other.npy", tifffile.imread(folder / "image.tif") * 0.5)

    def given(image):
        return _run(command, folder / "fixed", folder / image, "-o", path, *options)

    assert f"Wrote {path}" in given("image.tif").stderr
    before = _bytes(path)
    assert "Nothing was written" in given("image.tif").stderr
    with pytest.raises(NormfixError, match=rf"NF114 {path}: .*What this run made is {second}\."):
        given("other.npy")
    assert _bytes(path) == before != _bytes(second)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def _ending(name):
    return name[len("again") :]


def _bytes(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [p.read_bytes() for p in files]


def test_a_run_that_was_killed_after_naming_its_output_is_done(folder, monkeypatch):
    """Stopped between the output's name and the clearing of its store, the same command exits 0 and clears it."""
    words = ("predict", folder / "fixed", folder / "image.tif", "-o", folder / "named.npy", "--tile", 32)
    words = (*words, "--engine", "stages", "--store", folder)
    with monkeypatch.context() as patched:
        patched.setattr("normfix.tiling.stages.resuming._remove", lambda folder: None)
        _run(*words)
    assert (folder / "normfix-run").exists()
    computed = []
    compute = Written.note
    monkeypatch.setattr(Written, "note", lambda *given: (computed.append(given), compute(*given)))
    assert "Nothing was written" in _run(*words).stderr
    assert not computed
    assert not (folder / "normfix-run").exists()


@pytest.mark.zoo
@pytest.mark.parametrize("out", ["predictions", "stack.npy"])
def test_several_images_go_on_where_the_last_of_them_was_stopped(folder, monkeypatch, out):
    """What is done before is done again, and does not meet the run of another image; a stack's planes likewise."""
    image = tifffile.imread(folder / "image.tif")[:48, :40]
    for number in range(2):
        np.save(folder / f"im{number}.npy", image * (number + 1))
    np.save(folder / "planes.npy", np.stack([image, image * 2]))
    given = (folder / "im0.npy", folder / "im1.npy") if out == "predictions" else (folder / "planes.npy",)
    words = ("predict", folder / "fixed", *given, "--tile", 32, "--engine", "stages")
    words = (*words, *(("--slices", "Z", "--axes", "ZYX") if out == "stack.npy" else ()))
    computed = []
    compute = Written.note

    def note(self, *given):
        if len(computed) == limit:
            raise KeyboardInterrupt
        computed.append(given)
        compute(self, *given)

    monkeypatch.setattr(Written, "note", note)
    limit = -1
    _run(*words, "--store", folder, "-o", folder / f"expected-{out}")
    count, limit = len(computed), len(computed) * 3 // 4
    computed.clear()
    store = folder / f"store-{out}"
    store.mkdir()
    with pytest.raises((KeyboardInterrupt, Abort)):
        _run(*words, "--store", store, "-o", folder / out)
    limit = -1
    computed.clear()
    _run(*words, "--store", store, "-o", folder / out)
    assert len(computed) <= (count // 4 if out == "stack.npy" else count * 3 // 4) + 1
    assert not list(store.iterdir())
    assert _bytes(folder / out) == _bytes(folder / f"expected-{out}")


def test_options_of_stages_mean_stages(folder):
    """calibrate without --tile runs stages where an option of theirs is given: none is ignored."""

    def engine(*options, out):
        words = ("calibrate", folder / "fixed", folder / "image.tif", "-o", folder / out, "--format", "json")
        return json.loads(_run(*words, *options).stdout)["engine"]

    assert engine("--budget", 64, out="budgeted") == "stages"
    assert engine(out="plain") == "passes"


_STEPS = [Step(stage=1, stages=9, done=n, blocks=40, left=None if n == 1 else 200.0) for n in (1, 2, 3)]


def test_what_a_run_will_take_is_a_sentence():
    """Stages, blocks, time, memory and disk stand in one line, and what an earlier process did."""
    outlook = Outlook(
        stages=9, blocks=360, whole=0, seconds=200.0, memory=10**6, disk=34_359_738_368, block=900
    )
    assert outlook_text(outlook) == (
        "9 stages, 360 blocks: about 3 minutes; between stages at most 1.0 MB in memory and 34.4 GB on disk, "
        "and about 900 bytes for each block at a time."
    )


def test_elsewhere_than_on_a_terminal_a_line_now_and_then(capsys):
    """Lines are written to stderr no more often than asked for, and say stage, block and time left."""
    often, seldom = Lines(every=0), Lines(every=60)
    for step in _STEPS:
        often.block(step)
        seldom.block(step)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "stage 2 of 9, block 1 of 40",
        "stage 2 of 9, block 2 of 40, 3 minutes left",
        "stage 2 of 9, block 3 of 40, 3 minutes left",
    ]


def test_on_a_terminal_a_bar():
    """The bar shows the stage, its blocks and the time left."""
    from rich.progress import Progress

    progress = Progress(disable=True)
    bar = Bar(progress)
    bar.begin(Outlook(stages=9, blocks=360, whole=0, seconds=None, memory=0, disk=0, block=0))
    for step in _STEPS:
        bar.block(step)
    (task,) = progress.tasks
    assert (task.description, task.completed, task.total) == ("stage 2 of 9", 3, 40)
    assert task.fields["left"] == "3 minutes left"


def test_values_that_are_not_finite_end_with_a_code(folder, tmp_path):
    """An image that overflows in the network is NF149 for predict, unless it may write it, and NF148 for calibrate."""
    huge = np.full((96, 128), 3e38, np.float32)
    huge[:, ::2] *= -1
    np.save(tmp_path / "huge.npy", huge)
    out = tmp_path / "p.npy"
    given = ["predict", folder / "fixed", tmp_path / "huge.npy", "-o", out, "--tile", 32]
    with pytest.raises(normfix.NormfixError, match="NF149"):
        _run(*given)
    assert not out.exists()
    _run(*given, "--allow-nonfinite")
    assert not np.isfinite(np.load(out)).all()
    with pytest.raises(normfix.NormfixError, match="NF148"):
        _run("calibrate", folder / "fixed", tmp_path / "huge.npy", "-o", tmp_path / "refitted")
    assert not (tmp_path / "refitted").exists()


@pytest.mark.parametrize("engine", ["tiles", "stages"])
def test_missing_chunks_are_said_on_the_command_line(folder, tmp_path, engine):
    """A Zarr image with a chunk missing is predicted, and stderr says how many read as the fill value."""
    shutil.copytree(folder / "image.zarr", tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "c" / "1" / "2").unlink()
    given = ["predict", folder / "fixed", tmp_path / "a.zarr", "-o", tmp_path / "p.npy", "--tile", 32]
    said = _run(*given, "--engine", engine).stderr
    assert said.count("1 of 12 chunks are missing and read as the fill value") == 1
