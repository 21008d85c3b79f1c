"""Several images with one start of the program: each whole or not at all, and one that fails loses no other."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import tifffile
import torch
from optional import needs_programs, needs_zarr, zarr

import normfix
from normfix.cli.answers import Predicted
from normfix.cli.showing import show
from normfix.images.names import find_images

pytestmark = needs_programs  # the folder holds no network that can be built without one
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 4000, (96, 80), dtype=np.uint16)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """A saved folder of a converted network, whose images are scaled by their range."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4), torch.nn.Conv2d(4, 2, 1)
    )
    folder = tmp_path_factory.mktemp("saved")
    np.save(folder / "image.npy", PIXELS)
    done = normfix.convert(net, normfix.read_images(folder / "image.npy", net, scaling="unit"))
    normfix.save(done, folder / "fixed")
    return folder / "fixed"


@pytest.fixture
def images(tmp_path):
    """A folder of three images, in three formats and sizes."""
    folder = tmp_path / "images"
    folder.mkdir()
    tifffile.imwrite(folder / "a.tif", PIXELS)
    np.save(folder / "b.npy", PIXELS[:64])
    tifffile.imwrite(folder / "c.tiff", PIXELS[:, :48])
    return folder


def names(folder):
    """Return what lies in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}


def test_a_folder_is_predicted_into_a_folder(run, fixed, images, tmp_path):
    """Each prediction has its image's name, and is what predicting that image alone gives."""
    code, _out, err = run("predict", fixed, images, "--tile", 32, "-o", tmp_path / "out")
    assert (code, names(tmp_path / "out")) == (0, {"a.tif", "b.npy", "c.tiff"})
    assert run("predict", fixed, images / "b.npy", "--tile", 32, "-o", tmp_path / "one.npy")[0] == 0
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "out/b.npy").read_bytes()
    assert tifffile.imread(tmp_path / "out/c.tiff").shape == (2, 96, 48)
    assert "3 of 3 images predicted" in err


def test_patterns_and_files_are_predicted_together(run, fixed, images, tmp_path):
    """What is named twice is predicted once, and the ending may be chosen."""
    words = (images / "*.tif*", images / "a.tif", "--ending", ".npy", "-o", tmp_path / "out")
    code, out, _ = run("predict", fixed, *words, "--tile", 32, "--format", "json")
    assert (code, names(tmp_path / "out")) == (0, {"a.npy", "c.npy"})
    decoder, found = json.JSONDecoder(), []
    while out.strip():
        record, end = decoder.raw_decode(out.lstrip())
        found, out = [*found, record["shape"]], out.lstrip()[end:]
    assert found == [[2, 96, 80], [2, 96, 48]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.tif", "b.npy", "c.tiff"], ids=["first", "middle", "last"])
def test_a_damaged_image_does_not_lose_the_others(run, fixed, images, tmp_path, name):
    """The others are predicted, nothing of the damaged one is written, it is named, and the exit code is 2."""
    (images / name).write_bytes((images / name).read_bytes()[:200])
    code, _, err = run("predict", fixed, images, "--tile", 32, "-o", tmp_path / "out")
    assert (code, names(tmp_path / "out")) == (2, {"a.tif", "b.npy", "c.tiff"} - {name})
    assert f"Failed: {images / name}." in err
    assert "2 of 3" in err
    assert sum(line.startswith("NF") for line in err.splitlines()) == 1


def test_an_error_that_nobody_foresaw_does_not_lose_the_others(run, fixed, images, tmp_path, monkeypatch):
    """Also what is no error of normfix is said of its image."""
    from normfix.images.opening import Opener

    plain = Opener.open

    def failing(self, image):
        if str(image).endswith("b.npy"):
            raise ZeroDivisionError("planted")
        return plain(self, image)

    monkeypatch.setattr(Opener, "open", failing)
    code, _, err = run("predict", fixed, images, "--tile", 32, "-o", tmp_path / "out")
    assert (code, names(tmp_path / "out")) == (2, {"a.tif", "c.tiff"})
    assert f"{images / 'b.npy'}: NF901 ZeroDivisionError: planted" in err


def test_where_all_fail_no_folder_is_left(run, fixed, images, tmp_path):
    """A folder that was made for predictions is not left empty."""
    for path in images.iterdir():
        path.write_bytes(b"")
    assert run("predict", fixed, images, "-o", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()


def test_predicting_again_writes_over_nothing(run, fixed, images, tmp_path):
    """The same command finds its own files; another file of the name is left as it is, and fails that image alone."""
    words = ("predict", fixed, images, "--tile", 32, "-o", tmp_path / "out")
    run(*words)
    (tmp_path / "out/a.tif").write_text("mine")
    before = (tmp_path / "out/b.npy").stat()
    code, _, err = run(*words)
    assert code == 2
    assert (tmp_path / "out/a.tif").read_text() == "mine"
    assert (tmp_path / "out/b.npy").stat().st_mtime_ns == before.st_mtime_ns
    assert "NF114" in err


REFUSED = {
    "two of one name": (("images/a.tif", "other/a.tif", "-o", "out"), "NF531"),
    "one name in two formats": (("images", "other/b.png.npy", "other/b.npy", "-o", "out"), "NF531"),
    "into their own folder": (("images", "-o", "images"), "NF531"),
    "several to a file": (("images", "-o", "out.tif"), "NF531"),
    "a folder in no folder": (("images", "-o", "no/out"), "NF114"),
    "a file for a folder": (("images", "-o", "plain"), "NF114"),
    "no image": (("empty", "-o", "out"), "NF101"),
    "an ending that is not written": (("images", "-o", "out.jpg"), "NF114"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_written_over_is_refused_first(run, fixed, images, tmp_path, monkeypatch, name):
    """Names that cannot be are refused before the model (no model at all) is opened, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "empty").mkdir()
    for other in ("a.tif", "b.npy", "b.png.npy"):
        (tmp_path / "other" / other).write_bytes((images / other.replace("png.", "")).read_bytes())
    (tmp_path / "plain").write_text("mine")
    before = names(tmp_path), names(images)
    words, code = REFUSED[name]
    done = run("predict", images / "c.tiff", *words)
    assert (done[0], done[2].split()[0]) == (2, code)
    assert (names(tmp_path), names(images)) == before


def test_a_network_that_is_live_is_refused_once(run, images, tmp_path):
    """What is wrong with the network is not said for every image."""
    code, _, err = run("predict", "factories:tiny_unet", images, "--scale", "unit", "-o", tmp_path / "out")
    assert (code, err.count("NF409")) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_checked(run, fixed, images):
    """Each verdict follows its image's name, and all must pass."""
    code, out, err = run("check", fixed, images, "--tile", 16)
    assert code == 0
    for line, name in zip(out.splitlines(), ("a.tif", "b.npy", "c.tiff"), strict=True):
        assert line.startswith(f"{images / name}: passed: tile-invariant.")
    assert "3 of 3 images passed" in err


@pytest.mark.slow
def test_one_image_that_fails_its_check_is_enough(run, images):
    """A live network passes on no image larger than its windows: exit 1."""
    code, _out, err = run(
        "check", "factories:tiny_unet", images / "*.tif", images / "b.npy", "--scale", "unit", "--tile", 32
    )
    assert code == 1
    assert "0 of 2 images passed" in err


def test_a_damaged_image_is_no_passed_check(run, fixed, images):
    """The others are checked, the damaged one is named, and the exit code is 2."""
    (images / "b.npy").write_bytes(b"")
    code, out, err = run("check", fixed, images, "--tile", 16)
    assert (code, out.count(": passed")) == (2, 2)
    assert f"Not checked: {images / 'b.npy'}." in err


@pytest.mark.slow
def test_each_image_has_a_report_of_its_own(run, fixed, images, tmp_path):
    """Named after it, in a folder that is made; pages have the picture."""
    flags = [word for ending in ("html", "xml") for word in ("--report", tmp_path / "new" / f"r.{ending}")]
    assert run("check", fixed, images, "--tile", 16, *flags)[0] == 0
    assert names(tmp_path / "new") == {f"r-{name}.{ending}" for name in "abc" for ending in ("html", "xml")}
    page = (tmp_path / "new/r-c.html").read_text(encoding="utf-8")
    assert str(images / "c.tiff") in page
    assert "image" in page
    assert page.count("<img") > 5
    cases = {
        (tmp_path / f"new/r-{name}.xml").read_text().split('testcase classname="')[1][:400] for name in "abc"
    }
    assert len(cases) == 3


@needs_zarr
@pytest.mark.parametrize("version", [2, 3])
def test_a_folder_in_zarr_is_an_image_of_its_folder(tmp_path, version):
    """Nothing of a folder of images is passed over because it is a folder itself; other folders are no images."""
    np.save(tmp_path / "b.npy", PIXELS)
    zarr.create_array(str(tmp_path / "a.zarr"), data=PIXELS, zarr_format=version)
    zarr.create_group(str(tmp_path / "c"), zarr_format=version)
    (tmp_path / "d").mkdir()
    assert find_images([str(tmp_path)]) == [tmp_path / name for name in ("a.zarr", "b.npy", "c")]


@pytest.mark.parametrize("again", ["a.tif", "*.tif", "link.tif"])
def test_an_image_that_counts_twice_is_told(run, fixed, images, again):
    """A pattern and a name, or a link, may name one image twice, which weighs its statistics."""
    (images / "link.tif").symlink_to(images / "a.tif")
    code, _, err = run("check", fixed, images / "a.tif", images / again, "--tile", 32)
    assert code == 0
    assert f"{images / 'a.tif'} is given {3 if again == '*.tif' else 2} times" in err


@pytest.mark.parametrize("name", [b"\xff\xfe.npy", b"\x1b[31m.npy"], ids=["no-text", "escape"])
def test_a_file_whose_name_is_no_text_has_reports(run, fixed, tmp_path, name):
    """Names that are not in UTF-8, or steer a terminal, are written by number in each kind of report."""
    path = tmp_path / os.fsdecode(name)
    try:
        np.save(path, PIXELS[:48, :48])
    except (OSError, UnicodeError):
        pytest.skip("the system takes no such name")
    reports = [tmp_path / f"r{ending}" for ending in (".md", ".xml", ".html", ".json")]
    words = [word for report in reports for word in ("--report", report)]
    assert run("check", fixed, path, "--tile", 32, *words)[0] == 0
    for report in reports:
        assert "\x1b" not in report.read_text(encoding="utf-8")


def test_what_ctrl_c_leaves_is_said(run, fixed, images, tmp_path, monkeypatch):
    """Predictions of the images before stay, whole, and the same command makes the rest."""
    from normfix.cli import predict

    begun = predict._Run.predict

    def stopped(self, path, place):
        if path.name == "c.tiff":
            raise KeyboardInterrupt
        return begun(self, path, place)

    words = ("predict", fixed, images, "--tile", 32, "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(predict._Run, "predict", stopped)
        code, _, err = run(*words)
    assert (code, names(tmp_path / "out")) == (130, {"a.tif", "b.npy"})
    assert "2 of 3 images were predicted before" in err
    assert "nothing was written" not in err
    assert run(*words)[0] == 0


def _of_a_full_system(folder, monkeypatch):
    make = Path.mkdir

    def mkdir(path, *words, **options):
        if path == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *words, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return folder


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (_of_a_full_system, "cannot write it: Read-only file system"),
        (lambda folder, patch: (folder.symlink_to("nowhere"), folder)[1], "it exists and is no folder"),
        (lambda folder, patch: folder.with_name("o" * 300), "cannot write it: File name too long"),
        (lambda folder, patch: folder.with_name("o" * 300 + ".tif"), "cannot write it: File name too long"),
    ],
    ids=["read-only", "a link to nothing", "a long name", "a long name of a file"],
)
@pytest.mark.skipif(os.name != "posix", reason="errors of other systems")
def test_a_folder_that_cannot_be_made_is_known_before_the_network(run, tmp_path, monkeypatch, place, said):
    """It is NF114 as for a file, and the network, which is none, is not opened for it."""
    np.save(tmp_path / "a.npy", PIXELS)
    (tmp_path / "empty").mkdir()
    out = place(tmp_path / "out", monkeypatch)
    code, _out, err = run("predict", tmp_path / "empty", tmp_path / "a.npy", "-o", out)
    assert (code, f"NF114 {out}: {said}" in err) == (2, True), err


def test_a_folder_that_nothing_came_into_is_gone(run, tmp_path):
    """A network that cannot be opened leaves no folder, and lets one that was there be."""
    np.save(tmp_path / "a.npy", PIXELS)
    (tmp_path / "old").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("new", "old"):
        assert run("predict", tmp_path / "empty", tmp_path / "a.npy", "-o", tmp_path / name)[0] == 2
    assert names(tmp_path) == {"a.npy", "empty", "old"}


@pytest.mark.zoo
@pytest.mark.skipif(os.name != "posix", reason="pipes of other systems")
@pytest.mark.parametrize("unread", ["stdout", "stderr"])
def test_a_reader_who_has_seen_enough_stops_no_prediction(fixed, images, tmp_path, unread):
    """`normfix predict ... | head -1` predicts every image, and says and exits as without."""
    end, pipe = os.pipe()
    os.close(end)
    words = ("predict", fixed, images, "--tile", 32, "-o", tmp_path / "out")
    program = [sys.executable, "-c", "from normfix.cli import main; main()", *map(str, words)]
    files = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, unread: pipe}
    done = subprocess.run(program, **files, text=True, check=False)
    os.close(pipe)
    assert (done.returncode, names(tmp_path / "out")) == (0, {"a.tif", "b.npy", "c.tiff"})
    assert unread == "stderr" or "3 of 3 images predicted" in done.stderr
    assert unread == "stdout" or done.stdout.count("float32") == 3


class _Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_result_that_cannot_be_written_is_no_success(monkeypatch):
    """A full disk behind stdout is another thing than a reader who went: the result is lost, which is an error."""
    monkeypatch.setattr("sys.stdout", _Full())
    with click.Context(click.Command("predict")), pytest.raises(OSError, match="No space"):
        show(Predicted(path="a.tif", shape=(1, 8, 8), dtype="float32"), "a.tif", "text")
