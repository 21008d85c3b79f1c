"""push and hf-hub: speak with a hub through huggingface_hub, here a stand-in on this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from factories import tiny_unet
from optional import needs_programs
from safetensors.torch import save
from stand_in_hub import TOKEN, Hub
from warm import warm_program

import normfix
from normfix import NormfixError

ARCH = "factories:tiny_unet"
DEMO = "normfix.demo.network:nuclei_unet"
IMAGE = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hub():
    """Start a stand-in."""
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """Save a converted network."""
    folder = tmp_path_factory.mktemp("fixed") / "out"
    source = normfix.Source(kind="factory", spec=ARCH)
    normfix.save(normfix.convert(tiny_unet(), IMAGE), folder, source)
    return folder


def run(hub: Hub, home: Path, *words: object, token: str = TOKEN) -> subprocess.CompletedProcess:
    """Call the command line in a process whose hub is the stand-in."""
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, sys.path)])
    env = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HOME": str(home), "PYTHONPATH": paths}
    return subprocess.run(
        [warm_program(), *map(str, words)],
        env={**os.environ, **env, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_pushed_network_is_loaded_from_the_hub(hub, fixed, tmp_path):
    """push sends the three files byte for byte; hf-hub:ORG/NAME loads and verifies them."""
    done = run(hub, tmp_path, "push", fixed, "lab/nuclei")
    assert done.returncode == 0, done.stderr
    _, files = hub.at("lab/nuclei", "main")
    assert files == {path.name: path.read_bytes() for path in fixed.iterdir()}
    loaded = run(
        hub, tmp_path, "scan", "hf-hub:lab/nuclei", "--arch", ARCH, "--input", "1x1x64x64", "--format", "json"
    )
    assert loaded.returncode == 0, loaded.stderr
    scanned = normfix.Scan.from_json(__import__("json").loads(loaded.stdout))
    assert scanned.tile_invariant


@pytest.mark.slow
def test_a_revision_is_what_is_loaded(hub, tmp_path):
    """An older commit gives the older weights; the record names repository and commit."""
    model = tiny_unet()
    first = hub.add("lab/plain", {"model.safetensors": save(model.state_dict())})
    hub.add("lab/plain", {"model.safetensors": save({"other": torch.ones(1)})})
    words = ("scan", "hf-hub:lab/plain", "--arch", ARCH, "--input", "1x1x64x64", "--fast")
    assert run(hub, tmp_path, *words, "--revision", first).returncode == 0
    assert run(hub, tmp_path, "scan", f"hf-hub:lab/plain@{first}", *words[2:]).returncode == 0
    newest = run(hub, tmp_path, *words)
    assert (newest.returncode, "NF105" in newest.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["hf-hub:lab/nowhere", "hf-hub:lab/plain@nosuch", "hf-hub:broken", "hf-hub:a/b/c"]
)
def test_what_is_not_on_the_hub_is_refused(hub, tmp_path, name):
    """An unknown repository, revision or name is NF125 and exits 2."""
    hub.add("lab/plain", {"a.json": b"{}"})
    done = run(hub, tmp_path, "scan", name, "--arch", ARCH)
    assert (done.returncode, done.stderr.startswith("NF125")) == (2, True), done.stderr


@pytest.mark.slow
def test_a_tampered_download_is_refused(hub, fixed, tmp_path):
    """Weights changed in the repository are NF115."""
    files = {path.name: path.read_bytes() for path in fixed.iterdir()}
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"\1"
    hub.add("lab/changed", files)
    done = run(hub, tmp_path, "scan", "hf-hub:lab/changed", "--arch", ARCH)
    assert (done.returncode, done.stderr.startswith("NF115")) == (2, True), done.stderr


def test_a_folder_that_is_not_whole_is_not_pushed(hub, fixed, tmp_path):
    """A folder with changed weights is NF115, and nothing is sent."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in fixed.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "model.safetensors").write_bytes(b"\0" * 9)
    assert run(hub, tmp_path, "push", copy, "lab/new").returncode == 2
    assert "lab/new" not in hub.commits


def _link(name):
    """Return what puts a link to a file outside in a file's place."""

    def change(folder, outside):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)

    return change


def _other_graph(folder, outside):
    (folder / "graph.pt2").write_bytes(outside.read_bytes())


@needs_programs
@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize(
    ("change", "code"),
    [(_link("README.md"), "NF413"), (_link("graph.pt2"), "NF115"), (_other_graph, "NF115")],
)
def test_what_was_not_saved_together_is_not_sent(fixed, tmp_path, monkeypatch, change, code):
    """A folder of somebody else's may hold a link to a file of the user's, or another program than was proved."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("it speaks with the hub"))
    (tmp_path / "id_rsa").write_text("private")
    folder = Path(shutil.copytree(fixed, tmp_path / "copy"))
    change(folder, tmp_path / "id_rsa")
    with pytest.raises(NormfixError) as refused:
        normfix.push(folder, "lab/new")
    assert refused.value.code == code


def test_files_that_normfix_did_not_save_stay(fixed, tmp_path, monkeypatch):
    """Only what was saved is sent, and links into the hub's own cache are followed."""
    import huggingface_hub

    sent = {}
    api = SimpleNamespace(
        create_repo=lambda *a, **k: None,
        upload_folder=lambda **k: sent.update(k) or SimpleNamespace(commit_url="there"),
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    (tmp_path / "blobs").mkdir()
    folder = Path(shutil.copytree(fixed, tmp_path / "snapshots" / "abc"))
    shutil.move(folder / "README.md", tmp_path / "blobs" / "1")
    (folder / "README.md").symlink_to("../../blobs/1")
    (folder / "program.pt2").write_bytes(b"not of this folder")
    assert normfix.push(folder, "lab/new") == "there"
    assert set(sent["allow_patterns"]) == {path.name for path in fixed.iterdir()}


@pytest.mark.slow
def test_a_hub_that_is_not_there_is_named(fixed, tmp_path):
    """Pushing to where nothing answers is NF413 and exit 2, not a failure of normfix's own."""
    done = run(SimpleNamespace(address="http://127.0.0.1:9"), tmp_path, "push", fixed, "lab/nuclei")
    assert (done.returncode, "NF413" in done.stderr) == (2, True)


@pytest.mark.slow
def test_without_the_right_to_write_nothing_is_pushed(hub, fixed, tmp_path):
    """A token the hub does not accept is NF413 and exits 2."""
    done = run(hub, tmp_path, "push", fixed, "lab/new", token="hf_other")
    assert (done.returncode, done.stderr.startswith("NF413")) == (2, True), done.stderr
    assert "lab/new" not in hub.commits
