"""TorchScript in: what torch makes of it is proved, what it cannot make is named, and nothing of a file runs unseen."""

import io
import re
import warnings
import zipfile
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from optional import needs_programs
from torch import nn
from torch.export import export

import normfix
from normfix.errors import NormfixError
from normfix.storage import loading, scripts, transcription
from normfix.storage.script_source import objection
from normfix.storage.transcription import Refusal, transcribed

pytestmark = pytest.mark.filterwarnings("ignore")


class Small(nn.Module):
    """A U-Net of one level."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), norm(4)
        self.deep, self.inner = nn.Conv2d(4, 4, 3, padding=1), norm(4)
        self.up, self.head = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        skip = F.relu(self.norm(self.stem(x)))
        deep = F.relu(self.inner(self.deep(F.max_pool2d(skip, 2))))
        return self.head(torch.cat([skip, self.up(deep)], 1))


class Resized(nn.Module):
    """Resizes to the size of its input, which scripting writes as choices by the number of axes."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.InstanceNorm2d(4), nn.Conv2d(5, 1, 1)

    def forward(self, x):
        deep = F.interpolate(self.norm(self.stem(x)), size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat([x, deep], 1))


class Endless(nn.Module):
    """A loop without an end, which computes nothing."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x):
        go = True
        while go:
            assert x.dim() != 9
        return self.conv(x)


class Branching(nn.Module):
    """Computes something else for bright images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        if bool(x.mean() > 0):
            x = x * 2
        return self.conv(x)


class Reading(nn.Module):
    """Makes a tensor of a file, which torch would create."""

    def __init__(self, path: str):
        super().__init__()
        self.conv, self.path = nn.Conv2d(1, 1, 3, padding=1), path

    def forward(self, x):
        return self.conv(x) + torch.from_file(self.path, True, 1)


class Restoring(nn.Module):
    """Does something when it is read."""

    def __init__(self):
        super().__init__()
        self.conv, self.training = nn.Conv2d(1, 1, 3, padding=1), False

    def forward(self, x):
        return self.conv(x)

    @torch.jit.export
    def __getstate__(self):
        return self.training

    @torch.jit.export
    def __setstate__(self, state: bool):
        self.training = state


def loader(script):
    """Return what reads a saved script anew."""
    saved = io.BytesIO()
    torch.jit.save(script, saved)
    return lambda: torch.jit.load(io.BytesIO(saved.getvalue()))


IMAGE = torch.rand(1, 1, 64, 64)
NORMS = {
    "instance": nn.InstanceNorm2d,
    "instance affine": lambda n: nn.InstanceNorm2d(n, affine=True),
    "group": lambda n: nn.GroupNorm(2, n),
}
FORMS = {
    "traced": lambda net: torch.jit.trace(net, IMAGE),
    "scripted": torch.jit.script,
    "traced and frozen": lambda net: torch.jit.freeze(torch.jit.trace(net, IMAGE)),
    "scripted and frozen": lambda net: torch.jit.freeze(torch.jit.script(net)),
}


@pytest.mark.slow
@needs_programs
@pytest.mark.parametrize(
    ("norm", "form"),
    [("instance", "scripted"), ("instance affine", "traced"), ("instance", "traced and frozen")]
    + [("group", "scripted"), ("group", "scripted and frozen")],
)
def test_a_script_becomes_a_program_that_computes_the_same(norm, form):
    """In float64 it is within rounding of the script, its norms are norms, and batch and sizes are free."""
    net = Small(NORMS[norm]).eval()
    found = transcribed(loader(FORMS[form](net)))
    assert (found.dtype, found.max_sd < 1e-12) == (torch.float64, True)
    called = [str(node.target) for node in found.program.graph.nodes]
    assert sum("_norm.default" in name for name in called) == 2
    image = torch.rand(3, 1, 80, 48)
    with torch.no_grad():
        torch.testing.assert_close(found.program.module()(image), net(image))


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        lambda: torch.jit.script(UNet(2, 1, 1, (4, 8, 8), (2, 2), norm="instance").eval()),
        lambda: torch.jit.script(Resized().eval()),
    ],
    ids=["MONAI's UNet", "interpolation"],
)
def test_choices_by_the_number_of_axes_are_decided(script):
    """Checks of sizes, and conditions on how many axes there are, are no control flow once that is known."""
    assert transcribed(loader(script())).max_sd < 1e-12


def test_a_loop_that_may_have_no_end_is_refused_before_anything_runs():
    """A check in it computes nothing, so no graph keeps it, and the script would still turn in it for ever."""
    with pytest.raises(Refusal, match=r"no end \(prim::Loop at") as info:
        transcribed(loader(torch.jit.script(Endless())))
    assert info.value.code == "NF123"


def test_control_flow_is_named_with_its_line():
    """What values decide is refused, naming the condition and where it stands; traced, the same network is taken."""
    with pytest.raises(Refusal, match=r"control flow \(prim::If at .*test_scripts.py:\d+\)") as info:
        transcribed(loader(torch.jit.script(Branching().eval())))
    assert info.value.code == "NF123"
    assert transcribed(loader(torch.jit.trace(Branching().eval(), IMAGE))).max_sd < 1e-12


def test_a_network_without_a_convolution_is_named():
    """What it takes is not known (NF123)."""
    with pytest.raises(Refusal, match="begins with no convolution"):
        transcribed(loader(torch.jit.trace(nn.InstanceNorm2d(1), IMAGE)))


def test_an_operator_that_files_may_not_call_is_refused_before_anything_runs(tmp_path):
    """A network that maps a file is NF121, and the file, which running it creates, is not there."""
    target = tmp_path / "mapped"
    script = torch.jit.script(Reading(str(target)).eval())
    with pytest.raises(Refusal, match="aten::from_file") as info:
        transcribed(loader(script))
    assert (info.value.code, target.exists()) == ("NF121", False)
    script(IMAGE)
    assert target.exists()


class Anything(nn.Module):
    """Hides which module is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pass


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.jit says that it is deprecated
    torch.jit.interface(Anything)


class Behind(nn.Module):
    """Calls a module by its interface alone."""

    inner: Anything

    def __init__(self, path: str):
        super().__init__()
        self.inner, self.conv = Reading(path), nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.inner.forward(self.conv(x))


class Ordered:
    """Is compared by a method, which sorting calls."""

    def __init__(self, path: str):
        self.path = path

    def __lt__(self, other: "Ordered") -> bool:
        return bool(torch.from_file(self.path, True, 1)[0] > 0)


class Sorting(nn.Module):
    """Sorts objects."""

    items: list[Ordered]

    def __init__(self, path: str):
        super().__init__()
        self.conv, self.items = nn.Conv2d(1, 1, 1), [Ordered(path), Ordered(path)]

    def forward(self, x):
        return self.conv(x) * len(sorted(self.items)[0].path)


@pytest.mark.parametrize(("network", "met"), [(Behind, "prim::CallMethod"), (Sorting, "aten::sorted of")])
def test_what_the_graph_does_not_show_is_refused_before_anything_runs(tmp_path, network, met):
    """A call by an interface, and a method that an operator calls, could be any: NF121, and nothing was written."""
    target = tmp_path / "mapped"
    with pytest.raises(Refusal, match=met) as info:
        transcribed(loader(torch.jit.script(network(str(target)).eval())))
    assert (info.value.code, target.exists()) == ("NF121", False)


HEAD = "class Net(Module):\n  __parameters__ = []\n  training : bool\n"
CALL = 'torch.from_file("a", True, 1)'


@pytest.mark.parametrize(
    "source",
    [
        f"def f(x: Tensor={CALL}) -> Tensor:\n  return x\n",
        f"def f(*, x: Tensor={CALL}) -> Tensor:\n  return x\n",
        f"{HEAD}  def f(self, x: List[Tensor]=[{CALL}]) -> Tensor:\n    return x[0]\n",
        f"{HEAD}  x : Final[Tensor] = {CALL}\n",
        f"class Pair(NamedTuple):\n  x : Tensor = {CALL}\n",
        "def f(x: List[int]=[i for i in [1] * 1000000000]) -> int:\n  return 1\n",
        HEAD + '  __annotations__["a", exec(\'1\')) #"] = Tensor\n',
        HEAD + '  __annotations__["a=exec(1)"] = Tensor\n',
        "# one line\rdef f() -> int:\n  return 1\n",
        "def f(x: Tensor) -> Tensor:\n  return ^Foo(1)(x)\n",
    ],
)
def test_source_that_would_run_as_it_is_read_is_refused(source):
    """Defaults and constants are evaluated by torch's reader, and names written into Python source."""
    assert objection(source.encode())


def test_source_as_torch_writes_it_is_taken():
    """Negative control: literals, whatever writes them, and names that are none of Python's."""
    source = (
        f'{HEAD}  eps : Final[float] = -1.0e-05\n  at : Final[Device] = torch.device("cpu")\n'
        '  __annotations__["0-a"] = Tensor\n'
        "  def forward(self, x: Tensor, n: List[int]=annotate(List[int], []), c: Tensor=CONSTANTS.c0) -> Tensor:\n"
        '    return torch.conv2d(x, getattr(self, "0-a"))\n'
    )
    assert objection(source.encode()) == ""


@pytest.mark.slow
def test_a_default_is_not_evaluated_when_an_archive_is_opened(tmp_path):
    """By way of a file: it is NF121, and what torch's reader would write is not there."""
    path, target = tmp_path / "net.ts", tmp_path / "mapped"
    torch.jit.script(Small(nn.InstanceNorm2d)).save(str(path))
    evil = b'def f(x: Tensor=torch.from_file("%s", True, 1)) -> Tensor:\n  return x\n' % bytes(target)
    rewritten(path, "/functional.py", lambda content: content + evil)
    assert code_of(path) == "NF121"
    assert not target.exists()


def test_a_program_that_computes_something_else_is_refused(monkeypatch):
    """Were torch's road to give another network's program, the comparison would find it (NF224)."""
    other = Small(nn.InstanceNorm2d).eval()
    program = export(other, (torch.rand(2, 1, 128, 128),))
    monkeypatch.setattr(transcription, "_exported", lambda script, image: program)
    with pytest.raises(Refusal, match="differs from it by") as info:
        transcribed(loader(torch.jit.script(Small(nn.InstanceNorm2d).eval())))
    assert info.value.code == "NF224"


def code_of(path):
    with pytest.raises(NormfixError) as info:
        normfix.load(path)
    return info.value.code


@pytest.fixture
def no_process(monkeypatch):
    """Fail if a process is started that would read the archive."""
    monkeypatch.setattr(scripts, "run_fresh", lambda *words, **options: pytest.fail("it was read"))


def rewritten(path, member, change):
    """Change a member of an archive."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            archive.writestr(name, change(content) if name.endswith(member) else content)


@needs_programs
def test_what_runs_on_reading_is_refused_before_torch_reads_it(tmp_path, no_process):
    """Methods that torch calls while it reads, and objects of C++ classes in a pickle, are NF121."""
    path = tmp_path / "restoring.ts"
    torch.jit.script(Restoring()).save(str(path))
    assert code_of(path) == "NF121"
    torch.jit.script(Small(nn.InstanceNorm2d)).save(str(path))
    rewritten(
        path,
        "/data.pkl",
        lambda content: b"\x80\x02c__torch__.torch.classes.quantized\nConv2d\n0" + content[2:],
    )
    assert code_of(path) == "NF121"
    torch.jit.script(Small(nn.InstanceNorm2d)).save(str(path))
    rewritten(path, "/data.pkl", lambda content: b"\x80\x02cposix\nsystem\n0" + content[2:])
    assert code_of(path) == "NF121"


class Offset(nn.Module):
    """A convolution, and a tensor that TorchScript keeps among the constants of its code."""

    def __init__(self):
        super().__init__()
        self.stem, self.by = nn.Conv2d(1, 4, 3, padding=1), torch.rand(4, 1, 1)

    def forward(self, x):
        return self.stem(x) + self.by


def traced(net):
    return torch.jit.trace(net.eval(), torch.rand(1, 1, 16, 16))


@needs_programs
@pytest.mark.parametrize(
    ("script", "member"),
    [
        (lambda: torch.jit.script(Small(nn.InstanceNorm2d)), "data/0"),
        (lambda: traced(Offset()), "constants/0"),
    ],
    ids=["data", "constants"],
)
def test_a_member_shorter_than_its_tensor_is_refused_before_torch_reads_it(
    tmp_path, no_process, script, member
):
    """Beyond its end torch takes what lies in memory there for weights; a longer one is none of its business."""
    path = tmp_path / "net.ts"
    script().save(str(path))
    rewritten(path, f"/{member}", lambda content: content[:-4])
    with pytest.raises(NormfixError, match=rf"NF101.*{member} has \d+ bytes, and its tensors need \d+"):
        normfix.load(path)
    script().save(str(path))
    rewritten(path, f"/{member}", lambda content: content + b"0000")
    with pytest.raises(pytest.fail.Exception, match="it was read"):
        normfix.load(path)


@needs_programs
@pytest.mark.parametrize("number", [b"J\xff\xff\xff\xff", b"N"], ids=["negative", "none"])
def test_a_number_of_values_that_is_none_is_damage(tmp_path, no_process, number):
    path = tmp_path / "net.ts"
    torch.jit.script(Small(nn.InstanceNorm2d)).save(str(path))
    rewritten(
        path,
        "/data.pkl",
        lambda content: re.sub(rb"(?s)(X\x03\x00\x00\x00cpu(?:q.)?)K.", rb"\1" + number, content),
    )
    assert code_of(path) == "NF101"


@needs_programs
def test_hooks_and_damage_are_refused(tmp_path, no_process):
    """An archive whose hooks would be left out is NF123, one with a wrong checksum NF101."""
    path = tmp_path / "net.ts"
    torch.jit.script(Small(nn.InstanceNorm2d)).save(str(path))
    hook = b"  __forward_hooks__ = [dim, ]\n  __buffers__"
    rewritten(path, ".py", lambda content: content.replace(b"  __buffers__", hook))
    assert code_of(path) == "NF123"
    net = Small(nn.InstanceNorm2d)
    torch.jit.script(net).save(str(path))
    content = bytearray(path.read_bytes())
    content[content.index(net.stem.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert code_of(path) == "NF101"


@needs_programs
def test_a_process_that_ends_is_a_refusal(tmp_path, monkeypatch):
    """If torch's reader crashes, or takes too long or too much, that is NF121 and no crash here."""
    path = tmp_path / "net.ts"
    torch.jit.script(Small(nn.InstanceNorm2d)).save(str(path))
    monkeypatch.setattr(scripts, "_ALONE", "import os; os.abort()")
    assert code_of(path) == "NF121"


@pytest.mark.parametrize("code", ["NF121", "NF224"])
def test_a_refusal_names_the_file_that_was_given(tmp_path, monkeypatch, code):
    """What was made of an archive lies in a temporary file, whose name says nothing."""
    monkeypatch.setattr(loading, "program_of", lambda path: nullcontext((tmp_path / "made.pt2", "found")))

    def refuse(program, read):
        raise NormfixError(code, f"{program} computes too much.", where=str(program))

    monkeypatch.setattr(loading, "open_program", refuse)
    with pytest.raises(NormfixError) as caught:
        loading._open_script(tmp_path / "net.ts")
    assert (caught.value.code, caught.value.where) == (code, str(tmp_path / "net.ts"))
    assert "made.pt2" not in str(caught.value)


@pytest.mark.slow
def test_an_archive_is_opened_converted_and_written_as_torchscript_again(tmp_path):
    """By way of a file: live sites are found, tiles of the converted network are its whole, which is the script's."""
    script = torch.jit.trace(Small(nn.InstanceNorm2d).eval(), IMAGE)
    torch.jit.save(torch.jit.freeze(script), tmp_path / "net.ts")
    model = normfix.load(tmp_path / "net.ts")
    image = torch.rand(1, 1, 96, 96) * torch.linspace(0.2, 2, 96)
    done = normfix.convert(model, image, to="frozen")
    assert done.proof.passed
    assert len(done.plan.converted) == 2
    with torch.no_grad():
        torch.testing.assert_close(normfix.predict(done.model, image, 32), script(image), atol=1e-5, rtol=0)
    written = normfix.save(done, tmp_path / "fixed.ts")
    assert written.tiles_sd <= written.limit_sd
    assert 2 in written.free
