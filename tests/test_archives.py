"""Archives, programs' JSON and workloads: what is right is read and handed on as it is."""

import collections
import io
import json
import zipfile

import archive_attacks
import pytest
import torch
from archive_attacks import FREE, Scaled, exported, good, zipped
from torch import nn
from torch.utils._pytree import _register_namedtuple

from normfix import NormfixError
from normfix.loading import read_program
from normfix.loading.archives import Archive, View
from normfix.loading.expressions import guard, size_expression
from normfix.loading.operations import is_allowed
from normfix.loading.serialized import HarmfulProgramError, parsed
from normfix.loading.zips import directory, layout
from normfix.workload import Workload

Pair = collections.namedtuple("Pair", "first second")
_register_namedtuple(Pair, serialized_type_name="test_archives.Pair")


class Zeros(io.RawIOBase):
    """A file of zeros, of any length."""

    def __init__(self):
        super().__init__()
        self.place = 0

    def seek(self, offset, whence=0):
        self.place = offset
        return offset

    def read(self, size=-1):
        return b"\0" * size


class Blocks(nn.Module):
    """A network that leaves gradients and autocast for a part, as those of transformers do."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            y = self.conv(x)
        return self.norm(y)


class Named(Blocks):
    """A network that returns a named tuple with a list in it."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        return Pair(y, [y * 2, {"third": y * 3}])


def test_a_rewritten_archive_holds_the_same(tmp_path):
    """Every member is handed on with its content, of an archive of torch's and of a compressed one."""
    torch.save({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, tmp_path / "new.pt")
    content = archive_attacks.members((tmp_path / "new.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in content.items():
            packed.writestr(name, data)
    for name in ("new.pt", "packed.pt"):
        with Archive(tmp_path / name) as archive:
            view = archive.rewritten(list(archive.names), {})
            again = archive_attacks.members(view.read())
        assert {n.partition("/")[2]: d for n, d in again.items()} == {
            n.partition("/")[2]: d for n, d in content.items()
        }


def test_an_archive_beyond_four_gigabytes_is_written_and_read():
    """Sizes and places beyond 32 bits are where zip says, for this reader and for Python's."""
    size = 5 << 30
    parts = {"data/0": (Zeros(), 0, size, 7), "data/1": (io.BytesIO(b"abc"), 0, 3, 5)}
    view = View(layout(parts))
    length = view.seek(0, io.SEEK_END)
    assert [(m.name, m.size) for m in directory(view, length).values()] == [("data/0", size), ("data/1", 3)]
    with zipfile.ZipFile(view) as archive:
        assert [info.file_size for info in archive.infolist()] == [size, 3]
        assert archive.infolist()[1].header_offset > size


def test_a_view_has_no_descriptor():
    """What reads a view cannot reach the file behind it."""
    with pytest.raises(io.UnsupportedOperation):
        View([(io.BytesIO(b"abc"), 0, 3)]).fileno()


def test_an_archive_with_entries_for_folders_opens(tmp_path):
    """Zip tools write an entry for each folder; such an archive is read."""
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    content = archive_attacks.members((tmp_path / "w.pt").read_bytes())
    (tmp_path / "again.pt").write_bytes(zipped({"w/": b"", "w/data/": b"", **content}))
    with Archive(tmp_path / "again.pt") as archive:
        assert "data.pkl" in archive.names


def test_a_block_without_autocast_opens(tmp_path):
    """Blocks of another mode inside a network are graphs of their own, and computed as they were."""
    network, image = Blocks().eval(), torch.rand(3, 1, 20, 12)
    program = torch.export.export(
        network, (torch.rand(2, 1, 16, 16),), dynamic_shapes={"x": FREE}, strict=False
    )
    torch.export.save(program, tmp_path / "p.pt2")
    assert "wrap_with_autocast" in str(program.graph)
    assert torch.equal(read_program(tmp_path / "p.pt2").module()(image), network(image))


def test_a_named_tuple_opens_as_a_tuple(tmp_path):
    """The structure of outputs stays, without the type that only its own code knows."""
    program = torch.export.export(Named().eval(), (torch.rand(2, 1, 16, 16),), strict=False)
    torch.export.save(program, tmp_path / "p.pt2")
    first, (second, third) = read_program(tmp_path / "p.pt2").module()(torch.rand(2, 1, 16, 16))
    assert torch.equal(second, first * 2)
    assert torch.equal(third["third"], first * 3)


def test_a_librarys_output_opens_as_a_dict(tmp_path):
    """An output class of a library becomes a dict of its parts' names, so that the library need not be there."""
    leaf = {"type": None, "context": None, "children_spec": []}
    tree = {"type": "library.Output", "context": '["logits"]', "children_spec": [leaf]}
    path = archive_attacks.changed(tmp_path / "p.pt2", archive_attacks.structured("out_spec", tree))
    assert list(read_program(path).module()(torch.rand(1, 1, 8, 8))) == ["logits"]


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', '[{"b": {"c": 1, "c": 1}}]'])
def test_json_that_readers_differ_about_is_refused(text):
    """Two values of one key, and numbers that are none, are refused at any depth."""
    with pytest.raises(HarmfulProgramError):
        parsed(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), FloorDiv(Symbol('s1', integer=True), Integer(2))), Integer(-1))",
        "Max(Integer(1), Symbol('u0', integer=True))",
    ],
)
def test_arithmetic_on_sizes_is_kept(text):
    """What torch.export writes comes out as it was."""
    assert size_expression(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "().__class__",
        "Symbol('s1').func",
        "Symbol('__import__')",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "Pow(Symbol('s1'), Symbol('s2'))",
        "2 ** 2 ** 9",
        "Float('1', 99999999)",
        "f'{1}'",
        "1 if 1 else 2",
        "x := 3",
        "Max(" + ",".join(f"Mod(Symbol('s{n}'), {n})" for n in range(1, 30)) + ")",
    ],
)
def test_what_is_no_arithmetic_is_refused(text):
    """Attributes, calls, powers without bound and text that is code are no sizes."""
    assert size_expression(text) is None


def test_guards_are_written_anew():
    """A guard keeps its meaning and loses comments and spaces, in which other text could hide."""
    assert guard("L['x'].size()[2]   >= 2 # )") == "L['x'].size()[2] >= 2"
    assert guard("L['x'].__class__") is None
    assert guard("torch.load('x')") is None


@pytest.mark.parametrize(
    "name", ["add.Tensor", "instance_norm.default", "relu_.default", "_assert_scalar.default"]
)
def test_functions_of_tensors_are_allowed(name):
    """Negative control of the list: what networks are made of is on it."""
    assert is_allowed(f"torch.ops.aten.{name}")


@pytest.mark.parametrize(
    "name",
    [
        "add.str",
        "mul.left_t",
        "resize_.default",
        "set_.source_Tensor",
        "add.out",
        "linalg_svd.default",
        "save.default",
    ],
)
def test_other_functions_are_not(name):
    """Functions of texts and lists, of memory that is not a tensor's own, of costs beyond its size, are not on it."""
    assert not is_allowed(f"torch.ops.aten.{name}")


def test_a_workload_changes_nothing():
    """A network gives the same bits under it, and what is freed is not counted."""
    network, image = Scaled().eval(), torch.rand(1, 1, 64, 64)
    with torch.no_grad(), Workload(0, "x"):
        inside = network(image)
        for _ in range(300):
            _ = torch.ones(1 << 20) * 2
    assert torch.equal(inside, network(image))


def test_a_workload_counts_what_is_kept():
    """Negative control: the same tensors held at once are refused."""
    held = []
    with pytest.raises(NormfixError) as refused, Workload(0, "x"):
        held.extend(torch.ones(1 << 20) for _ in range(300))
    assert refused.value.code == "NF144"
    assert len(held) < 200


@pytest.mark.parametrize("name", ["ones", "a sum of one value"])
def test_a_program_too_large_is_refused(tmp_path, name):
    """A program that asks for gigabytes, or adds up a trillion values, is refused before it computes."""
    import normfix

    with pytest.raises(NormfixError) as refused:
        normfix.load(archive_attacks.too_large(tmp_path / "p.pt2", name))
    assert refused.value.code == "NF144"


def test_the_harmless_program_of_these_tests_opens(tmp_path):
    """Negative control of the attacks: what they change is right before."""
    (tmp_path / "p.pt2").write_bytes(good())
    assert read_program(tmp_path / "p.pt2").module()(torch.rand(3, 1, 9, 7)).shape == (3, 2, 9, 7)
    again = archive_attacks.changed(tmp_path / "q.pt2", lambda content: json.loads(json.dumps(content)))
    assert read_program(again).module()(torch.rand(3, 1, 9, 7)).shape == (3, 2, 9, 7)
    assert exported(tmp_path / "r.pt2").exists()
