"""Windows and macOS: nothing that only Linux has, and files as Windows treats them, shown without Windows."""

import ast
from pathlib import Path, PureWindowsPath

import pytest
import tifffile
import torch
from click.testing import CliRunner
from networks import TOLERANCE
from streamed_networks import Tangled
from torch.testing import assert_close
from windows import POSIX_ONLY, behave_like_windows, fault_of_name, lock_bytes

import normfix
from normfix.cli import cli
from normfix.images import drafts, locks
from normfix.tiling.stages import chunks, manifest, resuming

ARCH = "streamed_networks:Tangled"
SOURCE = Path(normfix.__file__).parent
ON_PROC = pytest.mark.skipif(not Path("/proc/self/fdinfo").is_dir(), reason="the plant reads /proc")
LINUX_CALLS = {
    "fork",
    "forkpty",
    "getuid",
    "geteuid",
    "setsid",
    "getpgid",
    "killpg",
    "mkfifo",
    "sched_getaffinity",
}


def _image():
    return torch.rand(1, 1, 48, 44, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def converted():
    """A network with constants, converted once."""
    torch.manual_seed(0)
    return normfix.convert(Tangled().eval(), _image()).model


@pytest.fixture
def windows(monkeypatch):
    """Files behave as on Windows, and normfix sees that it is there."""
    behave_like_windows(monkeypatch, drafts, chunks, manifest, resuming)
    return lock_bytes(monkeypatch)


def posix_only(tree):
    """Return what a module takes that Windows has not, where it takes it without asking first."""
    taken = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            taken |= {alias.name for alias in node.names} & set(POSIX_ONLY)
        if isinstance(node, ast.ImportFrom):
            taken |= {node.module or ""} & set(POSIX_ONLY)
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    taken |= {n.attr for n in named if n.attr in LINUX_CALLS and getattr(n.value, "id", "") == "os"}
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return taken | ({"fork"} & {word for word in words if isinstance(word, str)})


@pytest.mark.slow
def test_no_module_needs_what_only_posix_has():
    """No module imports a POSIX module at its top, forks, or asks for what Windows lacks."""
    faults = {path: posix_only(ast.parse(path.read_text("utf-8"))) for path in SOURCE.rglob("*.py")}
    assert {str(path): taken for path, taken in faults.items() if taken} == {}


@pytest.mark.parametrize(
    "planted",
    ["import fcntl", "from resource import getrusage", "import os\nos.fork()", "get_context('fork')"],
)
def test_what_only_posix_has_is_seen(planted):
    """The check above fails on a module that needs it."""
    assert posix_only(ast.parse(planted))


@pytest.mark.slow
def test_every_text_file_names_its_encoding():
    """No file is opened as text in the system's encoding, which is no UTF-8 on Windows."""
    silent = []
    for path in SOURCE.rglob("*.py"):
        for call in (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            named = any(keyword.arg == "encoding" for keyword in call.keywords)
            if name == "write_text" and not named and len(call.args) < 2:
                silent.append(f"{path}:{call.lineno}")
            if name == "read_text" and not named and not call.args:
                silent.append(f"{path}:{call.lineno}")
    assert silent == []


@ON_PROC
def test_the_plant_refuses_to_rename_what_is_open(windows, tmp_path):
    """A file that is open, or in a folder that is renamed, keeps its name, and nothing takes another's."""
    (tmp_path / "folder").mkdir()
    with (tmp_path / "folder" / "open").open("w") as file:
        with pytest.raises(PermissionError):
            (tmp_path / "folder").rename(tmp_path / "other")
        with pytest.raises(PermissionError):
            Path(file.name).unlink()
    (tmp_path / "taken").touch()
    with pytest.raises(FileExistsError):
        (tmp_path / "folder" / "open").rename(tmp_path / "taken")


@pytest.mark.slow
@ON_PROC
@pytest.mark.parametrize("ending", ["tif", "npy", "zarr"])
def test_predictions_are_written_where_nothing_open_can_be_renamed(windows, converted, tmp_path, ending):
    """Every image file is closed and unmapped before it takes its name, and leaves nothing beside it."""
    if ending == "zarr":
        pytest.importorskip("zarr", reason="Zarr images need zarr 3, which needs Python 3.11")
    normfix.write_prediction(converted, _image(), tmp_path / f"out.{ending}", tile=16)
    assert [path.name for path in tmp_path.iterdir()] == [f"out.{ending}"]


@pytest.mark.slow
@ON_PROC
def test_a_network_is_saved_where_nothing_open_can_be_renamed(windows, converted, tmp_path):
    """A saved folder appears whole, loads, and leaves nothing beside it."""
    normfix.save(converted, tmp_path / "fixed", source=ARCH)
    assert [path.name for path in tmp_path.iterdir()] == ["fixed"]
    loaded = normfix.load(tmp_path / "fixed", arch=ARCH)
    assert_close(loaded(_image()), converted(_image()), **TOLERANCE[torch.float32])


@ON_PROC
def test_the_draft_of_a_killed_run_goes_where_nothing_open_can_be_deleted(windows, tmp_path):
    """Its lock file is closed before it is deleted."""
    holder, file = drafts._made(tmp_path)
    (holder / "draft").mkdir()
    file.close()
    drafts.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@ON_PROC
def test_a_finished_run_gives_its_folder_up_where_nothing_open_can_be_renamed(windows, converted, tmp_path):
    """Values between stages are deleted although the folder's lock is open until the end."""
    pytest.importorskip("zarr", reason="values between stages lie in Zarr, which needs Python 3.11")
    normfix.calibrate(converted, _image(), blocks=normfix.Blocks(tile=16, store=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_on_windows_a_lock_is_of_one_byte_wherever_the_file_is_read(monkeypatch, tmp_path):
    """What was read or written before makes no other lock of it."""
    held = lock_bytes(monkeypatch)
    path = tmp_path / "lock"
    path.write_text("who holds it", encoding="utf-8")
    with path.open("a", encoding="utf-8") as first, path.open("r+", encoding="utf-8") as second:
        assert locks.lock(first)
        second.read(4)
        assert not locks.lock(second)
        first.write("!")
    assert len(held) == 1
    assert path.read_text(encoding="utf-8") == "who holds it!"
    with path.open("r+", encoding="utf-8") as third:
        assert locks.lock(third)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, "reserved") for name in ("CON", "aux.tif", "Nul .txt", "com1.a.b", "LPT9")),
        *(("a:b", "forbidden character"), ("a?.tif", "forbidden character")),
        *(("name.", "ends in a dot or a space"), ("name ", "ends in a dot or a space")),
        *((name, "") for name in ("console", "aux2", "0-conv", ".hidden", "com.tif", "größe ü.tif")),
    ],
)
def test_which_names_windows_has_not(name, fault):
    """Reserved names count with any ending; colons, question marks and trailing dots are none."""
    assert fault_of_name(name) == fault


@pytest.mark.slow
def test_all_files_have_names_that_windows_has(converted, tmp_path, monkeypatch):
    """What convert, save, calibrate and predict name by themselves, drafts included, is a name on Windows."""
    named = set()
    make = Path.mkdir

    def mkdir(self, *args, **kwargs):
        named.add(self)
        return make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    normfix.save(converted, tmp_path / "fixed", source=ARCH)
    normfix.write_prediction(converted, _image(), tmp_path / "out.npy", tile=16)
    named |= set(tmp_path.rglob("*"))
    parts = {part for path in named for part in path.relative_to(tmp_path).parts}
    assert len(parts) > 5
    assert {part: fault for part in parts if (fault := fault_of_name(part))} == {}
    assert not any(PureWindowsPath(part).drive for part in parts)


@pytest.mark.slow
def test_paths_may_have_spaces_and_letters_of_any_script(converted, tmp_path):
    """Image, folder and prediction lie under names with spaces, umlauts and ideographs."""
    home = tmp_path / "Größe und 画像"
    home.mkdir()
    tifffile.imwrite(home / "bild ü 1.tif", _image()[0, 0].numpy())
    normfix.save(converted, home / "ge fixt", source=ARCH)
    words = ["predict", home / "ge fixt", home / "bild ü 1.tif", "--arch", ARCH, "-o", home / "aus gabe.npy"]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert (done.exit_code, (home / "aus gabe.npy").is_file()) == (0, True), done.output


@pytest.mark.slow
def test_lines_may_end_as_windows_ends_them(converted, tmp_path):
    """A folder and a plan that went through Git on Windows, with CRLF, load as before."""
    normfix.save(converted, tmp_path / "fixed", source=ARCH)
    for name in ("normfix.json", "README.md"):
        path = tmp_path / "fixed" / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    loaded = normfix.load(tmp_path / "fixed", arch=ARCH)
    assert_close(loaded(_image()), converted(_image()), **TOLERANCE[torch.float32])


def test_a_terminal_that_lacks_letters_shows_the_rest(tmp_path):
    """Results with signs that the console's code page has not are written with escapes, not with an error."""
    done = CliRunner(charset="ascii").invoke(cli, ["explain", "NF203"])
    assert done.exit_code == 0, done.output
