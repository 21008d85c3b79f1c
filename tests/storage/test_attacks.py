"""Opening a file runs nothing, writes nothing and reaches nothing: every format, under an audit hook."""

import contextlib
import sys
from dataclasses import replace

import archive_attacks
import factories
import hostile
import pytest
import torch
from attacks import Job, audited
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

PLANTED = (
    "writes",
    "writes_by_descriptor",
    "removes",
    "starts_a_process",
    "calls_the_shell",
    "connects",
    "imports",
    "unpickles",
    "loads_a_library",
    "reads_elsewhere",
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What the hook notes of openers that misbehave, each on a file of its own."""
    jobs = []
    for name in (*PLANTED, "dies", "takes_memory", "reads"):
        folder = tmp_path_factory.mktemp("planted")
        (folder / "forbidden").mkdir()
        (folder / "forbidden" / "secret").write_text("secret")
        (folder / "file").write_text("x")
        jobs.append(Job(name, folder / "file", opener=f"planted:{name}"))
    return audited(jobs, warm=("planted",), forbidden=tuple(job.path.parent / "forbidden" for job in jobs))


@pytest.mark.parametrize("name", PLANTED)
def test_the_hook_notes_a_planted_violation(planted, name):
    """Negative control: an opener that does what opening must not is noted, each kind."""
    assert planted[name].violations


def test_the_hook_notes_nothing_where_a_file_is_read(planted):
    """Negative control the other way: reading the file itself is no violation."""
    assert planted["reads"].violations == ()
    assert planted["reads"].said == "bytes"


def test_a_child_that_dies_costs_only_its_job(planted):
    """A dead child is reported as such, and the jobs after it were still carried out."""
    assert planted["dies"].said.startswith("DIED")
    assert planted["takes_memory"].said == "int"


def test_memory_is_measured(planted):
    """The growth of 300 MiB is seen, and none where a file is read."""
    assert planted["takes_memory"].mebibytes >= 290
    assert planted["reads"].mebibytes < 50


NETWORK = "factories:tiny_unet"
SECONDS, MEBIBYTES = 10, 1024


def _opener(path):
    return Job(str(path), path, arguments={} if path.suffix in (".pt2", "") else {"arch": NETWORK})


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """What opening each attack on archives came to."""
    jobs = []
    for name, write in archive_attacks.REFUSED.items():
        path = write(tmp_path_factory.mktemp("attack"))
        jobs.append(replace(_opener(path), name=name))
    for name in archive_attacks.TOO_LARGE:
        path = archive_attacks.too_large(tmp_path_factory.mktemp("large") / "p.pt2", name)
        jobs.append(replace(_opener(path), name=f"large: {name}"))
    outcomes = audited(jobs, warm=("factories", "torch.export.pt2_archive._package"))
    return {job.name: (job.path, outcomes[job.name]) for job in jobs}


@pytest.mark.parametrize(
    "name", [*archive_attacks.REFUSED, *(f"large: {n}" for n in archive_attacks.TOO_LARGE)]
)
def test_an_attack_is_refused_and_does_nothing(attacked, name):
    """Each is refused with a code, does nothing that opening must not, and takes little time and memory."""
    path, outcome = attacked[name]
    assert outcome.refused, outcome
    assert outcome.violations == (), outcome
    assert not list(path.parent.rglob("ran"))
    assert outcome.seconds < SECONDS
    assert outcome.mebibytes < MEBIBYTES


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """What opening a right file of each format came to."""
    folder = tmp_path_factory.mktemp("right")
    network = factories.tiny_unet()
    state = network.state_dict()
    torch.save(state, folder / "new.pt")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    lightning = {f"net.{key}": value for key, value in state.items()}
    torch.save({"state_dict": lightning, "pytorch-lightning_version": "2.5.0"}, folder / "l.ckpt")
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "w.safetensors")
    (folder / "p.pt2").write_bytes(archive_attacks.good())
    saved = archive_attacks.saved_folder(folder)
    hostile.sample_inputs(tmp_path_factory.mktemp("planted")).rename(folder / "planted.pt2")
    paths = {p.name: p for p in (*folder.glob("*.*"), saved)}
    jobs = [replace(_opener(path), name=name) for name, path in paths.items()]
    return audited(jobs, warm=("factories", "torch.export.pt2_archive._package"))


@pytest.mark.parametrize(
    "name", ["new.pt", "old.pth", "l.ckpt", "w.safetensors", "p.pt2", "planted.pt2", "saved"]
)
def test_a_right_file_opens_and_does_nothing_else(opened, name):
    """Negative control: a right file of each format opens under the same hook; sample inputs are not even read."""
    outcome = opened[name]
    assert not outcome.said.startswith("NF"), outcome
    assert outcome.violations == ()


@pytest.mark.parametrize("name", ["a structure that imports", "a structure with a member of an enumeration"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_planted_runs_when_torch_opens_it(tmp_path, name):
    """Negative control: torch itself runs or imports what these programs say, so the refusal is what protects."""
    path = archive_attacks.REFUSED[name](tmp_path)
    sys.modules.pop("xmlrpc.server", None)
    with contextlib.suppress(Exception):  # whether it fails after running is not the point
        program = torch.export.load(path)
        program.module()(torch.rand(1, 1, 16, 16))
    assert (tmp_path / "ran").exists() or "xmlrpc.server" in sys.modules
    sys.modules.pop("xmlrpc.server", None)
