"""verify: what the program gives is derived again, and every kind of change in a folder is found."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from factories import tiny_unet
from optional import needs_programs
from tampering import argument_of, call_of, changed_graph, changed_weights, derived_anew, edited, forked
from torch import nn

import normfix
from normfix import NormfixError
from normfix.records.certificates import Verification
from normfix.records.saved import Saved
from normfix.records.sites import Finding
from normfix.storage.folder import GRAPH, MANIFEST

pytestmark = needs_programs

IMAGE = torch.rand(1, 1, 96, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder whose network a factory builds: a graph lies beside the weights."""
    folder = tmp_path_factory.mktemp("whole") / "fixed"
    normfix.save(normfix.convert(forked(), IMAGE), folder, "tampering:forked")
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it to change."""
    return Path(shutil.copytree(whole, tmp_path / "fixed"))


def outcome(found: Verification) -> tuple[str, set[tuple[str, str]]]:
    """Return the status, and code and step of each finding."""
    return found.status, {(f.code, f.where) for f in found.findings}


@pytest.mark.slow
def test_what_was_saved_passes(whole):
    """Every step passes on a folder that nobody changed, and the record survives JSON."""
    found = normfix.verify(whole)
    assert outcome(found) == ("passed", set())
    assert [step.name for step in found.steps] == [
        *("statement", "constants", "program", "sites", "derivation", "guards", "geometry", "numbers")
    ]
    assert Verification.loads(found.dumps()) == found


def test_the_certificate_holds_the_derivation(whole):
    """It names constants, sites, the widest path by operator, the lattice and the condition on the size."""
    certificate = Saved.loads((whole / MANIFEST).read_text("utf-8")).certificate
    found = certificate.counting
    assert (found.bound, found.lattice, found.scale, found.offset) == (
        ((5, 5), (5, 5)),
        (2, 2),
        ("1", "1"),
        (0, 0),
    )
    assert [(s.where, s.adds) for s in found.paths[0][0]] == [("stem", 1.0), ("wide", 4.0)]
    assert [(g.text, g.role) for g in certificate.guards if g.role == "condition"] == [
        ("W * H <= 25600", "condition")
    ]
    assert certificate.sites[0].constants == (
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.weight",
    )
    assert {"stem.weight", "norm.running_mean"} <= {c.name for c in certificate.constants}


@pytest.mark.slow
def test_every_output_is_derived(tmp_path):
    """A network that returns several maps has a derivation for each, with its scale, and one that counts."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.down = (
                nn.Conv2d(1, 2, 3, padding=1),
                nn.InstanceNorm2d(2),
                nn.Conv2d(2, 1, 2, 2),
            )

        def forward(self, x):
            fine = self.norm(self.stem(x))
            return {"coarse": self.down(fine), "fine": fine}

    done = normfix.convert(Deep(), IMAGE, output="fine")
    normfix.save(done, tmp_path / "fixed")
    certificate = Saved.loads((tmp_path / "fixed" / MANIFEST).read_text("utf-8")).certificate
    assert [(d.counts, d.scale[0]) for d in certificate.derivations] == [(False, "1/2"), (True, "1")]
    assert normfix.verify(tmp_path / "fixed").passed


class Padded(nn.Module):
    """Pads what is odd to the size of its skip, as many U-Nets do: a branch on the remainder."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2)

    def forward(self, x):
        fine = self.norm(self.stem(x))
        up = F.interpolate(F.max_pool2d(fine, 2), scale_factor=2.0)
        for dim in (2, 3):
            if up.shape[dim] != fine.shape[dim]:
                up = F.pad(up, [0, dim - 2, 0, 3 - dim], mode="replicate")
        return fine + up


STRIDED = {
    "sizes that are any": nn.Sequential(
        nn.Conv2d(1, 2, 3, 2, 1), nn.InstanceNorm2d(2), nn.Conv2d(2, 2, 3), nn.Upsample(scale_factor=2)
    ),
    "one axis, offset": nn.Sequential(
        nn.Conv1d(1, 2, 3, 2, 1), nn.GroupNorm(1, 2), nn.ReLU(), nn.Conv1d(2, 2, 3, 1, 3, 3)
    ),
    "a branch on the remainder": Padded(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRIDED)
def test_other_geometries_pass(name, tmp_path):
    """Sizes that the stride does not divide, outputs of another scale and images of one axis pass as well."""
    network = STRIDED[name]
    image = IMAGE[:, :, 0].repeat(1, 1, 2) if name.startswith("one axis") else IMAGE
    normfix.save(normfix.convert(network.eval(), image, to="batchrenorm"), tmp_path / "fixed")
    assert outcome(normfix.verify(tmp_path / "fixed")) == ("passed", set())


def scan_of(data):
    """Return the scan in a manifest."""
    return data["provenance"]["scan"]


def smaller_halo(data):
    """Say that tiles read less."""
    scan_of(data).update(halo=[[4, 4], [4, 4]], halo_rounded=[[4, 4], [4, 4]])


def certified_smaller(data):
    """Say so in the certificate as well."""
    smaller_halo(data)
    data["certificate"]["derivations"][0]["bound"] = [[4, 4], [4, 4]]


def finer_stride(data):
    """Say that tiles may start anywhere, with the halo that the graph gives for that."""
    scan_of(data).update(stride=[1, 1], halo=[[6, 6], [6, 6]], halo_rounded=[[6, 6], [6, 6]])


def another_scale(data):
    """Say that the output is half as large."""
    scan_of(data)["scale"] = ["1/2", "1/2"]


def without_condition(data):
    """Say nothing of the size."""
    scan_of(data)["sizes"]["conditions"] = []


def another_condition(data):
    """Say that the network is the same up to larger images."""
    scan_of(data)["sizes"]["conditions"][0]["text"] = "H*W <= 25700"


def any_size(data):
    """Say that any size is exact."""
    scan_of(data)["exact_sizes"] = [1, 1]


def kept(data):
    """Say that a site was left alone."""
    data["provenance"]["plan"]["decisions"][0]["action"] = "keep"


def another_name(data):
    """Certify another tensor than there is."""
    data["certificate"]["constants"][0]["sha256"] = "0" * 64


EDITS = {
    "halo": (smaller_halo, "NF524", "geometry"),
    "halo in both": (certified_smaller, "NF523", "derivation"),
    "stride": (finer_stride, "NF523", "derivation"),
    "scale": (another_scale, "NF524", "geometry"),
    "guard": (without_condition, "NF525", "guards"),
    "limit of a guard": (another_condition, "NF525", "guards"),
    "sizes": (any_size, "NF523", "derivation"),
    "site": (kept, "NF523", "sites"),
    "digest": (another_name, "NF521", "constants"),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_found(edit, folder):
    """Each statement about the network, edited and sealed again, fails the step that derives it."""
    change, code, step = EDITS[edit]
    edited(folder, change)
    status, findings = outcome(normfix.verify(folder))
    assert status == "failed"
    assert (code, step) in findings


@pytest.mark.slow
def test_a_stride_that_the_graph_cannot_refute_is_refuted_by_numbers(folder):
    """A stride of 1, with halo and certificate to match, fails where windows are cut."""
    edited(folder, finer_stride)
    edited(folder, derived_anew(folder))
    bound = Saved.loads((folder / MANIFEST).read_text("utf-8")).certificate.counting.bound
    edited(folder, lambda data: scan_of(data).update(halo=bound, halo_rounded=bound))
    assert outcome(normfix.verify(folder)) == ("failed", {("NF524", "numbers")})


@pytest.mark.parametrize(
    "wrong",
    [{"stride": [0, 1]}, {"halo": []}, {"exact_sizes": [1 << 40, 1]}, {"example": [1, 1, 1 << 60, 8]}],
)
def test_a_geometry_that_no_network_has_is_refused(wrong, folder):
    """Sealed again it is refused as it is when the folder is opened, not divided by or allocated."""
    edited(folder, lambda data: scan_of(data).update(wrong))
    for opened in (normfix.verify, normfix.load):
        with pytest.raises(NormfixError) as refused:
            opened(folder)
        assert refused.value.code == "NF108"


def test_an_example_that_is_huge_is_not_run(folder):
    """Numbers are open then, and the other steps are taken."""
    edited(folder, lambda data: scan_of(data).update(example=[1, 1, 30_000, 30_000]))
    status, findings = outcome(normfix.verify(folder))
    assert status != "passed"
    assert ("NF526", "numbers") in findings


@pytest.mark.slow
def test_a_guard_that_nobody_states_is_no_pass(folder):
    """Taken out of the scan and of a certificate made anew, a condition of the program is open."""
    edited(folder, without_condition)
    edited(folder, derived_anew(folder))
    assert outcome(normfix.verify(folder)) == ("inconclusive", {("NF526", "guards")})


def shifted_mean(tensors):
    """Move a frozen statistic."""
    tensors["norm.running_mean"] += 0.1


def test_a_changed_constant_is_found(folder):
    """A statistic that moved is another tensor than is certified, whatever the checksum of the file."""
    changed_weights(folder, shifted_mean)
    edited(folder, lambda data: None)
    status, findings = outcome(normfix.verify(folder))
    assert (status, ("NF521", "constants") in findings) == ("failed", True)


@pytest.mark.slow
def test_a_changed_constant_that_is_certified_gives_another_output(folder):
    """With a certificate of the moved statistic, the program does not give the stored output any more."""
    changed_weights(folder, shifted_mean)
    edited(folder, derived_anew(folder))
    assert outcome(normfix.verify(folder)) == ("failed", {("NF522", "program")})


def wider(program):
    """Dilate a convolution by 3 instead of 2."""
    call = call_of(program, "conv2d.default", 1)
    for name in ("padding", "dilation"):
        argument_of(call, name)["as_ints"] = [3, 3]


def smoother(program):
    """Compute another function of a pixel."""
    call_of(program, "relu.default")["target"] = "torch.ops.aten.sigmoid.default"


def unguarded(program):
    """Let the program take images of any size."""
    program["guards_code"] = [text for text in program["guards_code"] if "25600" not in text]


GRAPHS = {
    "reach": (wider, ("NF523", "derivation")),
    "values": (smoother, ("NF522", "program")),
    "guard": (unguarded, ("NF525", "guards")),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_changed_graph_is_found(kind, folder):
    """Another reach, another function or another guard fails, although every checksum was made right."""
    change, finding = GRAPHS[kind]
    changed_graph(folder, change)
    edited(folder, lambda data: None)
    status, findings = outcome(normfix.verify(folder))
    assert (status, finding in findings) == ("failed", True)


@pytest.mark.parametrize("stem", [torch.zeros(8, 1, 3, 3), torch.zeros(4, 1, 3, 3).double(), None])
def test_the_program_of_another_network_is_found(stem, folder):
    """A graph whose tensors are not those of the weights beside it fails, and nothing is derived of it."""

    def change(tensors):
        del tensors["stem.weight"]
        if stem is not None:
            tensors["stem.weight"] = stem

    changed_weights(folder, change)
    edited(folder, lambda data: None)
    found = normfix.verify(folder)
    assert outcome(found) == ("failed", {("NF522", "program")})
    assert [step.name for step in found.steps] == ["statement", "program"]


@pytest.mark.parametrize("name", [MANIFEST, GRAPH])
def test_a_file_that_changed_is_named(name, folder):
    """A file with another checksum than was stated fails the first step, which names it."""
    if name == MANIFEST:
        (folder / name).write_text(
            (folder / name).read_text("utf-8").replace('"eval mode"', "").replace("25600", "25601")
        )
    else:
        changed_graph(folder, lambda program: program.update(torch_version="2.9.0"))
    found = normfix.verify(folder)
    assert found.status == "failed"
    assert (found.findings[0].code, name in found.findings[0].message) == ("NF520", True)


def test_a_folder_of_before_loads_and_is_undecided(folder):
    """Without certificate and graph a folder loads as before; verify decides nothing and says what to do."""
    path = folder / MANIFEST
    data = json.loads(path.read_text("utf-8"))
    del data["certificate"], data["statement"]
    path.write_text(json.dumps(data), "utf-8")
    (folder / GRAPH).unlink()
    assert normfix.load(folder, arch="tampering:forked")(IMAGE).shape == IMAGE.shape
    found = normfix.verify(folder)
    assert outcome(found) == ("inconclusive", {("NF526", "statement"), ("NF526", "derivation")})
    assert "Convert the network again" in found.findings[-1].message


def test_a_folder_without_its_graph_is_undecided(folder):
    """A graph that was lost is no pass."""
    (folder / GRAPH).unlink()
    found = normfix.verify(folder)
    assert outcome(found) == ("inconclusive", {("NF526", "derivation")})
    assert f"{GRAPH} is missing" in found.findings[0].message


def test_a_network_that_is_not_captured_is_undecided(tmp_path, monkeypatch):
    """If torch.export fails, the folder says why, and verify repeats it."""

    def fail(*args, **options):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(torch.export, "export", fail)
    normfix.save(normfix.convert(tiny_unet(), IMAGE), tmp_path / "fixed")
    found = normfix.verify(tmp_path / "fixed")
    assert outcome(found) == ("inconclusive", {("NF526", "derivation")})
    assert "data-dependent" in found.findings[0].message


class Moved(nn.Module):
    """Reads what lies further away than any strip is long."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2)

    def forward(self, x):
        return self.norm(self.conv(x + F.pad(x, (700, 0))[..., : x.shape[3]]))


@pytest.mark.slow
def test_a_measured_halo_is_undecided(tmp_path):
    """A halo below the program's bound, measured as was asked for, is named among what was assumed."""
    normfix.save(normfix.convert(Moved(), IMAGE, halo="measured"), tmp_path / "fixed", partial=True)
    found = normfix.verify(tmp_path / "fixed")
    assert outcome(found) == ("inconclusive", {("NF526", "geometry")})
    assert any("measured up to" in assumed for assumed in found.assumed)


@pytest.mark.slow
def test_a_program_built_to_harm_is_not_opened(folder):
    """A graph that calls what is no operator of the list is refused with its own code."""
    changed_graph(
        folder, lambda p: call_of(p, "relu.default").update(target="torch.ops.aten.from_file.default")
    )
    edited(folder, lambda data: None)
    with pytest.raises(NormfixError) as caught:
        normfix.verify(folder)
    assert caught.value.code == "NF121"


@pytest.mark.slow
def test_a_folder_is_verified_alone(folder, tmp_path):
    """The installed command verifies in a fresh process that cannot import the network, and exits 1 once it changed."""

    def run():
        words = [sys.executable, "-m", "normfix", "verify", str(folder), "--format", "json"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, Verification.loads(done.stdout).status

    assert run() == (0, "passed")
    edited(folder, smaller_halo)
    assert run() == (1, "failed")


def test_an_open_step_is_no_pass():
    """A verification is passed only if each of its steps is."""
    found = Verification(steps=(), findings=(Finding(code="NF526", where="derivation", message=""),))
    assert (found.status, bool(found)) == ("inconclusive", False)
