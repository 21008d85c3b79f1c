"""Exported programs in and out: raised into modules, converted without source, written to run alone."""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from archive_attacks import members, zipped
from factories import tiny_unet
from optional import needs_programs
from torch import nn
from torch.export import ExportedProgram

import normfix
from normfix import NormfixError
from normfix.networks.graph.capture import export
from normfix.networks.graph.program import ProgramNetwork, require_free
from normfix.networks.graph.raising import raised
from normfix.records.plans import Action
from normfix.records.saved import Source, statement_of
from normfix.storage import saving
from normfix.storage.instructions import commands
from normfix.storage.loading import open_any
from normfix.storage.opening import open_model
from normfix.storage.opening.formats.exported import read_program
from normfix.storage.opening.request import Request
from normfix.storage.programs import export_program, open_program

pytestmark = needs_programs

IMAGE = torch.rand(1, 1, 96, 80, generator=torch.Generator().manual_seed(0))
OTHERS = [torch.randn(2, 1, 64, 96), torch.randn(1, 1, 32, 128)]


class Twice(nn.Module):
    """Breaks one statistic per layer: the same norm is called on two maps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.head = nn.Conv2d(4, 1, 1)
        nn.init.uniform_(self.norm.weight, 0.5, 2)

    def forward(self, x):
        return self.head(F.relu(self.norm(F.relu(self.norm(self.conv(x))) * 3)))


class Functional(nn.Module):
    """Breaks looking for modules: group and layer norm are calls, the latter over whatever extent it is given."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.rand(4) + 0.5)
        self.bias = nn.Parameter(torch.rand(4))
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        x = F.relu(F.group_norm(self.conv(x), 2, self.weight, self.bias))
        return self.head(F.relu(F.layer_norm(x, x.shape[1:])))


def stack(norm, conv=nn.Conv2d):
    """Return two convolutions with a norm between, its affine away from the identity."""
    net = nn.Sequential(conv(1, 4, 3, padding=1), norm, nn.ReLU(), conv(4, 1, 3, padding=1))
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return net


def trained():
    """Return a batch norm with running statistics away from the identity."""
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return stack(norm)


def basic_unet():
    """Return MONAI's BasicUNet, small: 18 instance norms."""
    from monai.networks.nets import BasicUNet

    return BasicUNet(2, 1, 1, features=(4, 4, 8, 8, 8, 4))


def timm_features():
    """Return timm's ResNet with batch norm, as a feature extractor."""
    import timm

    return timm.create_model("resnet18", features_only=True, out_indices=(1,), in_chans=1)


HEAVY = {"BasicUNet", "timm", "3D"}


def named(*names):
    """Return networks to run a test on; the heavy ones only in a run over real networks."""
    return [pytest.param(n, marks=pytest.mark.zoo if n in HEAVY else ()) for n in names]


NETWORKS = {
    "instance": lambda: stack(nn.InstanceNorm2d(4, affine=True)),
    "group": lambda: stack(nn.GroupNorm(2, 4)),
    "batch": trained,
    "layer over space": lambda: stack(nn.LayerNorm([4, 96, 80], elementwise_affine=False)),
    "twice": Twice,
    "functional": Functional,
    "BasicUNet": basic_unet,
    "timm": timm_features,
    "3D": lambda: stack(nn.InstanceNorm3d(4), nn.Conv3d),
}


def images_for(name):
    """Return an image to convert with and others to compare on."""
    if name == "3D":
        return torch.rand(1, 1, 16, 24, 16), [torch.randn(2, 1, 8, 16, 24)]
    return IMAGE, OTHERS


def alone(program: ExportedProgram, image):
    """Run a program and return its first output."""
    with torch.no_grad():
        found = program.module()(image.clone())
    return found[0] if isinstance(found, (list, tuple)) else found


def written(model, path):
    """Export a network as its owner would and save it."""
    torch.export.save(export(model.eval(), torch.randn(1, 1, 32, 32)), path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A program of the tiny U-Net, without its source."""
    return written(tiny_unet(), tmp_path_factory.mktemp("program") / "source.pt2")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory, source):
    """That program converted, as a file."""
    path = tmp_path_factory.mktemp("program") / "fixed.pt2"
    normfix.save(normfix.convert(normfix.load(source), IMAGE), path)
    return path


def test_a_program_is_opened_without_its_factory():
    """What is said after one was written names none; control: of a folder it does."""
    source = Source(kind="factory", spec="my_model:UNet")
    assert "my_model" not in commands(Path("fixed.pt2"), source)
    assert commands(Path("fixed"), source).count("my_model:UNet") == 2


@pytest.mark.parametrize("name", named(*NETWORKS))
def test_a_program_equals_the_converted_module(name):
    """The exported program gives the converted network's output to the bit, with batch and sizes free."""
    image, others = images_for(name)
    model = NETWORKS[name]()
    output = 0 if name == "timm" else None
    done = normfix.convert(model, image, output=output)
    assert done.proof.passed, done.proof.steps
    program = export_program(done.model, None, image)
    kinds = {str(node.target) for node in program.graph.nodes if "norm" in str(node.target)}
    assert {k for k in kinds if k.startswith("aten")} == {"aten.batch_norm.default"}
    with torch.no_grad():
        for other in [image, *others]:
            assert torch.equal(alone(program, other), done.caller(done.model.eval(), other))


@pytest.mark.slow
@pytest.mark.parametrize("decomposed", [False, pytest.param(True, marks=pytest.mark.zoo)])
@pytest.mark.parametrize("name", named(*(n for n in NETWORKS if n not in ("layer over space", "BasicUNet"))))
def test_a_program_is_converted_without_source(name, decomposed):
    """A program, decomposed or not, is converted and proved like the module, with the same constants."""
    image, others = images_for(name)
    model = NETWORKS[name]().eval()
    output = 0 if name == "timm" else None
    program = export(model, image)
    program = program.run_decompositions() if decomposed else program
    done = normfix.convert(raised(program), image, output=output)
    assert done.proof.passed, done.proof.steps
    expected = normfix.convert(model, image, output=output)
    assert len(done.plan.converted) == len(expected.plan.converted)
    with torch.no_grad():
        for other in others:
            mine, theirs = (c.caller(c.model.eval(), other) for c in (done, expected))
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
            assert decomposed or torch.equal(mine, theirs)


def test_raising_changes_nothing():
    """A raised program gives the program's output to the bit, its norms being stock layers at their paths."""
    model = tiny_unet().eval()
    program = export(model, torch.randn(1, 1, 32, 32))
    lifted = raised(program)
    image = torch.randn(2, 1, 64, 32)
    with torch.no_grad():
        assert torch.equal(lifted(image), program.module()(image))
    expected = {path for path, m in model.named_modules() if isinstance(m, nn.InstanceNorm2d)}
    assert {path for path, m in lifted.named_modules() if isinstance(m, nn.InstanceNorm2d)} == expected


@pytest.mark.slow
def test_sites_keep_their_names(source):
    """Scanning a program names the sites as scanning the module does."""
    mine, theirs = normfix.scan(normfix.load(source)), normfix.scan(tiny_unet())
    assert [s.id for s in mine.sites] == [s.id for s in theirs.sites]
    assert (mine.halo, mine.stride, mine.exact_sizes) == (theirs.halo, theirs.stride, theirs.exact_sizes)


@pytest.mark.slow
def test_several_images_share_population_statistics(source):
    """Two unequal images give the constants that converting the module gives."""
    images = [IMAGE, torch.rand(1, 1, 64, 128) * 3]
    mine = normfix.convert(normfix.load(source), images)
    theirs = normfix.convert(tiny_unet(), images)
    assert mine.proof.passed
    state = theirs.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in mine.model.state_dict().items())


@pytest.mark.slow
def test_batchrenorm_becomes_constants(source):
    """A BatchRenorm in eval is a batch norm with constants in the program."""
    done = normfix.convert(normfix.load(source), IMAGE, to="batchrenorm")
    assert done.proof.passed
    assert {d.action for d in done.plan.converted} == {Action.BATCHRENORM}
    program = export_program(done.model, None, IMAGE)
    with torch.no_grad():
        assert torch.equal(alone(program, OTHERS[0]), done.model.eval()(OTHERS[0]))


@pytest.mark.slow
def test_a_written_program_is_the_module(fixed):
    """The file gives the converted module's output to the bit on another size and batch, and is tile-exact."""
    module = normfix.convert(tiny_unet(), IMAGE).model.eval()
    with torch.no_grad():
        assert torch.equal(alone(torch.export.load(fixed), OTHERS[0]), module(OTHERS[0]))
    again = normfix.load(fixed)
    assert normfix.check(again, IMAGE, 32).passed
    assert torch.equal(normfix.predict(again, IMAGE, 32), normfix.predict(module, IMAGE, 32))


def test_what_torch_says_of_its_own_reading_is_no_damage(fixed, monkeypatch):
    """torch 2.11 warns of bytes that it reads tensors from: with warnings as errors a program opens all the same."""
    load = torch.export.load

    def loud(file):
        warnings.warn(
            "The given buffer is not writable, and PyTorch does not support it", UserWarning, stacklevel=2
        )
        return load(file)

    monkeypatch.setattr(torch.export, "load", loud)
    with torch.no_grad():
        assert read_program(fixed).module()(IMAGE).isfinite().all()


@pytest.mark.slow
def test_a_written_program_needs_nobody(fixed):
    """With normfix, monai and timm blocked, a fresh process loads and runs the file."""
    script = (
        "import sys\n"
        "for name in ('normfix', 'monai', 'timm', 'factories'): sys.modules[name] = None\n"
        "import torch\n"
        "program = torch.export.load(sys.argv[1])\n"
        "assert not any(str(n.target).startswith('normfix') for n in program.graph.nodes)\n"
        "with torch.no_grad(): y = program.module()(torch.ones(3, 1, 48, 64).cumsum(2))\n"
        "sys.stdout.write(y.double().sum().item().hex())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(fixed)],
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        here = normfix.load(fixed)(torch.ones(3, 1, 48, 64).cumsum(2))
    assert float.fromhex(done.stdout) == float(here.double().sum())


def test_what_travels_comes_back(fixed):
    """Plan and geometry are in the file; a converted program is not converted again."""
    model = normfix.load(fixed)
    assert isinstance(model, ProgramNetwork)
    known = normfix.networks.provenance.provenance_of(model)
    assert len(known.plan.converted) == 2
    with pytest.raises(NormfixError, match="NF502"):
        saving.require_unconverted(model)


@pytest.mark.slow
def test_another_calling_convention_is_baked_in(tmp_path):
    """With forward_fn the program takes the image and returns what counts."""

    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_unet()

        def forward(self, x, gain):
            return {"map": self.net(x) * gain}

    def call(model, image):
        return model(image, 3.0)

    done = normfix.convert(TwoInputs(), IMAGE, forward_fn=call, output="map")
    program = export_program(done.model, done.caller, IMAGE)
    with torch.no_grad():
        assert torch.equal(alone(program, OTHERS[0]), done.caller(done.model.eval(), OTHERS[0]))


@pytest.mark.slow
def test_guards_survive(tmp_path):
    """A program that was captured on one side of a branch on sizes refuses the other side, also rewritten."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = stack(nn.InstanceNorm2d(4))

        def forward(self, x):
            return self.net(x) * (2 if x.shape[-1] % 8 == 0 else 3)

    program = raised(export(Branches().eval(), torch.randn(1, 1, 32, 32)))
    rewritten = export_program(normfix.convert(program, IMAGE).model, None, IMAGE)
    assert alone(rewritten, torch.randn(1, 1, 32, 40)).shape[-1] == 40
    with pytest.raises(AssertionError, match="Guard"):
        alone(rewritten, torch.randn(1, 1, 32, 41))


def test_guards_do_not_need_examples():
    """A program saved without example inputs has lost its guards in torch, not here."""

    class Branches(nn.Module):
        def forward(self, x):
            return x * (2 if x.shape[-1] % 8 == 0 else 3)

    program = export(Branches().eval(), torch.randn(1, 1, 32, 32))
    program.example_inputs = None
    assert alone(program, torch.randn(1, 1, 32, 41)).shape[-1] == 41
    with pytest.raises(AssertionError, match="Guard"):
        raised(program)(torch.randn(1, 1, 32, 41))


@pytest.mark.slow
def test_tiles_that_are_too_small_are_enlarged():
    """A program that was captured for images above 40 pixels is proved with tiles above that."""

    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = stack(nn.InstanceNorm2d(4))

        def forward(self, x):
            return self.net(x) * (2 if x.shape[-1] > 40 else 3)

    done = normfix.convert(
        raised(export(Large().eval(), torch.randn(1, 1, 64, 64))), torch.rand(1, 1, 112, 112)
    )
    assert done.proof.passed, done.proof.steps
    assert done.verdict.tile == (56, 56)


# ---- refusals


@pytest.mark.slow
def test_fixed_sizes_are_refused_with_the_line():
    """A program of one size is refused, and the line in the message exports one that is not."""
    model = tiny_unet().eval()
    program = raised(torch.export.export(model, (torch.randn(1, 1, 64, 64),), strict=False))
    assert program.fixed == (2, 3)
    for use in (lambda: normfix.convert(program, IMAGE), lambda: normfix.check(program, IMAGE, 32)):
        with pytest.raises(NormfixError, match=r"NF220.*1x1x64x64") as caught:
            use()
    line = caught.value.message.partition("source is: ")[2]
    export_alone = line.removeprefix("torch.export.save(").removesuffix(", 'free.pt2')")
    free = raised(eval(export_alone, {"torch": torch, "model": model}))  # noqa: S307 - the line is for pasting
    require_free(free)
    assert free.shape == (None, 1, None, None)


def test_an_image_of_another_size_is_refused():
    """A fixed program says which size it takes."""
    program = raised(torch.export.export(tiny_unet().eval(), (torch.randn(1, 1, 64, 64),), strict=False))
    assert program(torch.randn(1, 1, 64, 64)).shape[-1] == 64
    with pytest.raises(NormfixError, match="NF220"):
        program(torch.randn(1, 1, 32, 64))


def test_what_is_no_program_is_refused(tmp_path):
    """A damaged file is refused."""
    (tmp_path / "x.pt2").write_bytes(b"PK nonsense")
    with pytest.raises(NormfixError, match="NF101"):
        open_program(tmp_path / "x.pt2", read_program)


@pytest.mark.slow
def test_a_program_is_no_network_with_modules(fixed):
    """Whoever asks for modules to swap is told that a program has none."""
    with pytest.raises(NormfixError, match="NF124"):
        open_model(str(fixed))


def test_what_cannot_be_exported_is_refused():
    """A branch on values cannot be written as a program."""

    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.max() > 1 else x

    with pytest.raises(NormfixError, match="NF225"):
        export_program(Branches(), None, IMAGE)


@pytest.mark.slow
def test_a_program_is_written_as_one(source, tmp_path):
    """What came from a program is not written as a folder."""
    done = normfix.convert(normfix.load(source), IMAGE)
    with pytest.raises(NormfixError, match="NF227"):
        normfix.save(done, tmp_path / "folder")


@pytest.mark.slow
def test_nothing_is_overwritten(fixed):
    """An existing file is refused before anything is computed for it."""
    before = fixed.read_bytes()
    with pytest.raises(NormfixError, match="NF114"):
        normfix.save(normfix.convert(tiny_unet(), IMAGE), fixed)
    assert fixed.read_bytes() == before


# ---- planted mistakes


def swap_a_statistic(program):
    """Exchange the means of two sites."""
    one, two = (k for k in program.state_dict if k.endswith("running_mean"))
    program.state_dict[one], program.state_dict[two] = program.state_dict[two], program.state_dict[one]


def leave_a_site_live(program):
    """Turn one frozen node back into an instance norm."""
    node = next(n for n in program.graph.nodes if str(n.target) == "aten.batch_norm.default")
    node.target = torch.ops.aten.instance_norm.default
    node.args = (*node.args[:3], None, None, True, 0.1, 1e-5, False)
    program.graph_module.recompile()


@pytest.mark.slow
@pytest.mark.parametrize("plant", [swap_a_statistic, leave_a_site_live])
def test_a_wrong_program_is_not_written(plant, tmp_path, monkeypatch):
    """A swapped statistic and a live site are found by running the file, and nothing is kept."""
    honest = saving.export_program

    def planted(*args):
        program = honest(*args)
        plant(program)
        return program

    done = normfix.convert(tiny_unet(), IMAGE)
    monkeypatch.setattr(saving, "export_program", planted)
    with pytest.raises(NormfixError, match=r"NF226.*differs"):
        normfix.save(done, tmp_path / "out.pt2")
    assert list(tmp_path.iterdir()) == []


def test_wrong_groups_are_not_read(tmp_path, monkeypatch):
    """A node raised with the wrong number of groups is found by replaying the file."""
    from normfix.networks.graph import raising

    path = written(stack(nn.GroupNorm(2, 4)), tmp_path / "group.pt2")
    honest = raising.read_norm

    def planted(node):
        norm = honest(node)
        return norm and replace(norm, groups=4)

    monkeypatch.setattr(raising, "read_norm", planted)
    with pytest.raises(NormfixError, match=r"NF224.*does not compute"):
        normfix.load(path)


@pytest.mark.slow
def test_a_norm_that_is_not_raised_does_not_pass(source, monkeypatch):
    """A norm that raising overlooks stays live, is named, and the conversion does not pass."""
    from normfix.networks.graph import raising

    honest = raising.read_norm
    monkeypatch.setattr(
        raising, "read_norm", lambda node: None if node.name == "instance_norm_1" else honest(node)
    )
    done = normfix.convert(normfix.load(source), IMAGE)
    assert not done.proof.passed
    assert [d.site.function for d in done.plan.left_live] == ["torch.instance_norm"]


@pytest.mark.slow
def test_a_swapped_constant_fails_the_identity(source, monkeypatch):
    """A statistic written to the wrong site of a program is found by comparing with the original program."""
    from normfix.conversion import targets

    honest = targets.set_statistics_

    def planted(layer, decision, moments, **settings):
        honest(layer, decision, replace(moments, mean=moments.mean.flip(0)), **settings)

    monkeypatch.setattr(targets, "set_statistics_", planted)
    done = normfix.convert(normfix.load(source), IMAGE)
    assert done.proof.step("identity").status == "failed"


# ---- command line


@pytest.mark.cold
@pytest.mark.slow
def test_command_line(source, tmp_path, capsys):
    """plan, convert, calibrate, check and predict take a program, and convert and calibrate write one."""
    import numpy as np

    from normfix.cli import cli

    np.save(tmp_path / "image.npy", IMAGE[0].numpy())
    image, out = str(tmp_path / "image.npy"), str(tmp_path / "out.pt2")

    def run(*words):
        return cli.main([str(w) for w in words], standalone_mode=False)

    assert run("plan", source, "--to", "frozen", "--input", "1x1x64x64") in (None, 0)
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    assert run("convert", source, image, "--plan", tmp_path / "plan.json", "-o", out, "--format", "pt2") == 0
    assert run("calibrate", out, image, "-o", tmp_path / "again.pt2") in (None, 0)
    assert run("check", out, image, "--tile", 32) == 0
    assert run("predict", out, image, "--tile", 32, "-o", tmp_path / "p.npy") in (None, 0)
    assert np.load(tmp_path / "p.npy").shape == (1, 96, 80)
    with pytest.raises(NormfixError, match="NF227"):
        run("convert", source, image, "--to", "frozen", "-o", tmp_path / "folder", "--format", "pt2")
    assert not Path(tmp_path / "folder").exists()


def stating(path, target, change):
    """Write a program again with another statement inside."""
    content = members(path.read_bytes())
    (name,) = (name for name in content if name.endswith("extra/normfix.json"))
    statement = json.loads(content[name])
    change(statement)
    target.write_bytes(zipped(content | {name: json.dumps(statement).encode()}))
    return target


def test_an_edited_statement_in_a_program_is_noticed(fixed, tmp_path):
    """A halo of 0 that was written into a program is NF115, and one that was left alone is taken."""
    no_halo = lambda known: known["provenance"]["scan"].update(halo=[[0, 0], [0, 0]])  # noqa: E731
    with pytest.raises(NormfixError, match=r"NF115.*edited"):
        normfix.load(stating(fixed, tmp_path / "edited.pt2", no_halo))
    assert open_any(stating(fixed, tmp_path / "same.pt2", lambda _: None), Request()).notes == ()


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("dtype", "save", "NF108"),
        ("shape", [1, 1, 64, 10**400], "NF108"),
        ("seed", 1 << 80, "NF108"),
        ("values", [1.0], "NF115"),
    ],
)
def test_a_probe_that_none_is_does_not_end_inside_torch(fixed, tmp_path, name, value, code):
    """An edited probe in a program, sealed again, is refused with a code, as it is in a folder."""

    def change(known):
        known["probe"][name] = value
        known["statement"] = statement_of(known)

    with pytest.raises(NormfixError, match=code):
        normfix.load(stating(fixed, tmp_path / "edited.pt2", change))


@pytest.mark.slow
def test_a_program_with_the_statement_of_another_is_noticed(fixed, tmp_path):
    """A statement, whole as it is, belongs to the tensors that it was written with: NF115."""
    other = tmp_path / "other.pt2"
    normfix.save(normfix.convert(Twice(), IMAGE), other)
    (name,) = (name for name in members(other.read_bytes()) if name.endswith("extra/normfix.json"))
    theirs = json.loads(members(other.read_bytes())[name])
    with pytest.raises(NormfixError, match=r"NF115.*other tensors"):
        normfix.load(stating(fixed, tmp_path / "mixed.pt2", lambda known: known.update(theirs)))


def test_a_program_of_before_opens_with_a_note(fixed, tmp_path):
    """A program whose statement has no checksum opens, and says that an edit would not be noticed."""
    old = stating(fixed, tmp_path / "old.pt2", lambda known: known.pop("statement"))
    (note,) = open_any(old, Request()).notes
    assert "no checksum of its plan" in note


class Timed(nn.Module):
    """Breaks constants: a table is made in the forward of a module that calls a norm itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        table = torch.tensor([1.0, 2.0, 0.5, 4.0])
        return F.group_norm(self.conv(x), 2) * table[:, None, None]


@pytest.mark.parametrize("network", [Timed, lambda: nn.Sequential(nn.Identity(), Timed())])
def test_constants_of_a_module_are_kept_and_moved(network, tmp_path):
    """A tensor made in the forward opens with its module, is no part of the state dict, and follows the dtype."""
    model = network().eval()
    opened = normfix.load(written(model, tmp_path / "c.pt2"))
    torch.testing.assert_close(opened(OTHERS[0]), model(OTHERS[0]), rtol=0, atol=0)
    assert opened.state_dict().keys() == model.state_dict().keys()
    assert opened.double()(OTHERS[0].double()).dtype == torch.float64


def fixed_to(size, path):
    """Write a program of an ordinary network that is fixed to images of a size."""
    conv = lambda n: nn.Sequential(nn.Conv2d(n, 32, 3, padding=1), nn.InstanceNorm2d(32), nn.ReLU())  # noqa: E731
    model = nn.Sequential(conv(1), *(conv(32) for _ in range(4)), nn.Conv2d(32, 1, 1)).eval()
    example = torch.zeros(()).expand(1, 1, size, size)
    torch.export.save(torch.export.export(model, (example,)), path)
    return path


def test_a_program_fixed_to_a_large_image_opens_without_being_run(tmp_path):
    """What one run costs is foreseen; where it is in proportion to the image, the program opens at once and says so."""
    path = fixed_to(4096, tmp_path / "large.pt2")
    begin = time.process_time()
    opened = open_any(path, Request())
    assert time.process_time() - begin < 10
    assert "was not run to compare" in opened.notes[0]
    assert opened.model.fixed == (2, 3)


def test_a_program_fixed_to_a_small_image_is_run(tmp_path):
    """Negative control: it is compared with the file as those of free sizes are."""
    assert open_any(fixed_to(64, tmp_path / "small.pt2"), Request()).notes == ()


def test_an_image_of_a_terabyte_is_not_believed(tmp_path):
    """A size in a file buys no more memory than the machine has: NF144."""
    with pytest.raises(NormfixError, match="NF144"):
        open_any(fixed_to(500_000, tmp_path / "vast.pt2"), Request())


@pytest.mark.zoo
@pytest.mark.skipif(sys.platform != "linux", reason="the system limits the length of files there")
@pytest.mark.parametrize("more", [-1000, 1000], ids=["the program", "what it is compared with"])
def test_a_disk_that_fills_up_behind_a_program_is_an_error(tmp_path, source, fixed, more):
    """The program fits, what it is compared with in a fresh process does not: NF114 too, and nothing is left."""
    import resource

    done = normfix.convert(normfix.load(source), IMAGE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fixed.stat().st_size + more, before[1]))
    try:
        with pytest.raises(NormfixError, match=r"NF114.*too large"):
            normfix.save(done, tmp_path / "again.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
