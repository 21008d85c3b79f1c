"""Archives, programs' JSON and workloads: what is right is read and handed on as it is."""

import collections
import io
import json
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
import zlib

import archive_attacks
import pytest
import torch
from archive_attacks import FREE, Scaled, exported, good, zipped
from optional import needs_programs
from torch import nn
from torch.utils._pytree import _register_namedtuple

from normfix import NormfixError
from normfix.storage.opening import archives, open_model
from normfix.storage.opening.allocation import Stored
from normfix.storage.opening.archives import Archive, View
from normfix.storage.opening.candidates import candidates
from normfix.storage.opening.expressions import guard, size_expression
from normfix.storage.opening.formats import FORMATS, lightning
from normfix.storage.opening.formats.exported import read_program
from normfix.storage.opening.machine import followed
from normfix.storage.opening.operations import is_allowed
from normfix.storage.opening.pickles import inspect_pickle, read_torch
from normfix.storage.opening.request import Request
from normfix.storage.opening.serialized import HarmfulProgramError, parsed
from normfix.storage.opening.workload import Foreseen, Workload
from normfix.storage.opening.zips import directory, layout

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


@needs_programs
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
        "Pow(Mul(Symbol('s1', integer=True), Symbol('s2', integer=True)), Rational(1, 2))",
        "FloatPow(ToFloat(Symbol('s1', integer=True)), Float('0.5', precision=53))",
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
        "Pow(Symbol('s1'), Float('9e9', precision=53))",
        # sympy would factor it
        "Pow(Add(Pow(Pow(Integer(4611686018427387847), Integer(8)), Integer(8)), Integer(1)), Rational(1, 2))",
        "(Integer(4611686018427387847) * Integer(4611686018427387847)) ** 0.5",
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
    root = "torch.sym_float(L['x'].size()[3] * L['x'].size()[2]) ** 0.5 <= 1000.0"
    assert guard(root) == root
    assert guard(root.replace("0.5", "90.5")) is None
    assert guard("L['x'].__class__") is None
    assert guard("torch.load('x')") is None


@pytest.mark.parametrize(
    "name",
    [
        *("add.Tensor", "instance_norm.default", "relu_.default", "_assert_scalar.default", "lstm.input"),
        *(
            "cdist.default",
            "linalg_inv.default",
            "normal_.default",
            "special_entr.default",
            "permute_copy.default",
        ),
    ],
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
        "bincount.default",
        "manual_seed.default",
        "special_hermite_polynomial_h.default",
        "save.default",
    ],
)
def test_other_functions_are_not(name):
    """Functions of texts and lists, of memory that is not a tensor's own, of costs beyond its size, are not on it."""
    assert not is_allowed(f"torch.ops.aten.{name}")


def test_every_core_operator_is_allowed_but_gradients():
    """torch's core operators are what an exporter writes; a network that is applied needs all but these."""
    left = set()
    for name in torch._C._dispatch_get_all_op_names():
        home, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        is_core = home == "aten" and operator is not None and torch.Tag.core in operator.tags
        if is_core and not is_allowed(f"torch.ops.aten.{packet}.{overload or 'default'}"):
            left.add(packet)
    # atan2.out; bags read by numbers that torch does not check
    unneeded = {"atan2", "resize_", "_embedding_bag"}
    assert {name for name in left if not name.endswith("_backward")} == unneeded


class _Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lift = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.rows = kind(4, 4, batch_first=True)

    def forward(self, x):
        y = self.lift(x).permute(0, 2, 3, 1)
        return self.rows(y.flatten(0, 1))[0].reshape(y.shape).permute(0, 3, 1, 2)


class _OfMatrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Parameter(torch.eye(4) + 0.1)

    def forward(self, x):
        y = torch.einsum("dc,bchw->bdhw", torch.linalg.inv(self.mix), x.expand(-1, 4, -1, -1))
        return y + torch.cdist(self.mix, self.mix).mean()


class _Noisy(nn.Module):
    def forward(self, x):
        return x + torch.empty_like(x).normal_() + torch.randperm(x.shape[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize(
    "make", [lambda: _Recurrent(torch.nn.LSTM), lambda: _Recurrent(torch.nn.GRU), _OfMatrices, _Noisy]
)
def test_recurrence_matrices_and_noise_open(tmp_path, make):
    """A program with recurrent layers, an inverse and distances, or noise is right and opens."""
    import normfix

    free = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    program = torch.export.export(make().eval(), (torch.rand(2, 1, 8, 8),), dynamic_shapes=free, strict=False)
    torch.export.save(program, str(tmp_path / "p.pt2"))
    assert normfix.load(tmp_path / "p.pt2").shape[1] == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.linalg.inv(torch.ones(1, 1).expand(4000, 4000)),
        lambda: torch.linalg.svdvals(torch.ones(1, 1).expand(3000, 3000)),
        lambda: torch.cdist(torch.ones(1, 1).expand(9000, 256), torch.ones(1, 1).expand(9000, 256)),
        lambda: torch.nn.LSTM(64, 512)(torch.ones(1, 1, 1).expand(2000, 100, 64)),
    ],
    ids=["inverse", "singular values", "distances", "recurrence"],
)
def test_what_takes_longer_than_its_size_is_foreseen(call):
    """Decompositions, distances of all pairs and recurrence are refused by what they cost, before they run."""
    began = time.process_time()
    with pytest.raises(NormfixError) as refused, torch.no_grad(), Workload(0, "x"):
        call()
    assert refused.value.code == "NF144"
    assert time.process_time() - began < 2


def test_small_matrices_are_not_refused():
    """Negative control: the same operations on what networks hold are cheap."""
    with torch.no_grad(), Workload(0, "x"):
        torch.linalg.inv(torch.eye(64))
        torch.linalg.svdvals(torch.eye(64))
        torch.cdist(torch.ones(256, 8), torch.ones(256, 8))
        torch.nn.LSTM(64, 64)(torch.ones(64, 4, 64))


_DEFORMABLE = """
import sys, torch, normfix
if sys.argv[2] == "write":
    from torchvision.ops import DeformConv2d
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.offset, self.conv = torch.nn.Conv2d(1, 18, 3, padding=1), DeformConv2d(1, 4, 3, padding=1)
        def forward(self, x):
            return self.conv(x, self.offset(x))
    torch.export.save(torch.export.export(Net().eval(), (torch.rand(1, 1, 8, 8),)), sys.argv[1])
else:
    normfix.load(sys.argv[1])
"""


@pytest.mark.zoo
def test_deformable_convolutions_open_where_nothing_imported_torchvision(tmp_path):
    """torch knows torchvision's operator only once that is imported, so opening imports it."""
    for what in ("write", "read"):
        run = [sys.executable, "-c", _DEFORMABLE, str(tmp_path / "p.pt2"), what]
        done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=120)
        assert not done.returncode, done.stderr[-500:]


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


@needs_programs
@pytest.mark.parametrize("name", ["ones", "a sum of one value"])
def test_a_program_too_large_is_refused(tmp_path, name):
    """A program that asks for gigabytes, or adds up a trillion values, is refused before it computes."""
    import normfix

    with pytest.raises(NormfixError) as refused:
        normfix.load(archive_attacks.too_large(tmp_path / "p.pt2", name))
    assert refused.value.code == "NF144"


@pytest.mark.slow
def test_the_harmless_program_of_these_tests_opens(tmp_path):
    """Negative control of the attacks: what they change is right before."""
    (tmp_path / "p.pt2").write_bytes(good())
    assert read_program(tmp_path / "p.pt2").module()(torch.rand(3, 1, 9, 7)).shape == (3, 2, 9, 7)
    again = archive_attacks.changed(tmp_path / "q.pt2", lambda content: json.loads(json.dumps(content)))
    assert read_program(again).module()(torch.rand(3, 1, 9, 7)).shape == (3, 2, 9, 7)
    assert exported(tmp_path / "r.pt2").exists()


def _pickled(path, content):
    torch.save(content, path)
    return path


def _refused(path, **more):
    with pytest.raises(NormfixError) as caught:
        open_model(str(path), arch="factories:tiny_unet", **more)
    return caught.value.code


def test_a_pickle_that_torch_would_not_read_is_not_unpacked_to_be_recognised(tmp_path):
    """A kilobyte of bzip2 may hold gigabytes, and zipfile unpacks all of it at the first byte."""
    content = io.BytesIO()
    torch.save({"pytorch-lightning_version": "2"}, content)
    for kind, recognised in (
        (zipfile.ZIP_BZIP2, False),
        (zipfile.ZIP_LZMA, False),
        (zipfile.ZIP_DEFLATED, True),
    ):
        path = tmp_path / f"{kind}.ckpt"
        with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w", kind) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        assert lightning.recognises(path) is recognised
        assert recognised or _refused(path) == "NF121"


def test_a_compressed_archive_of_tar_is_not_unpacked(tmp_path):
    """A gzip of fifty megabytes, said to be the header of a file within, is NF101 and takes no memory."""
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[148:156], header[156:157] = b"%011o\0" % (50 << 20), b" " * 8, b"x"
    header[148:156] = b"%06o\0 " % sum(header)
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = packer.compress(bytes(header) + bytes(50 << 20)) + packer.flush()
    path = tmp_path / "w.pth"
    # the name that a gzip may give its content is where torch's old format has its first bytes
    path.write_bytes(b"\x1f\x8b\x08\x08" + bytes(6) + b"l\xfc\x9cF\xf9 j\xa8P\x19\0" + data)
    tracemalloc.start()
    try:
        assert _refused(path) == "NF101"
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def _itself():
    content = {}
    content |= {f"key{n}": content for n in range(2000)}
    content["key0"] = content
    return content


def _doubled():
    values = [1]
    for _ in range(40):
        values = [values, values]
    return values


@pytest.mark.parametrize(
    "content",
    [
        _itself(),
        {"state_dict": {}, "hyper_parameters": {"base": _doubled()}, "pytorch-lightning_version": "2"},
        {"network_weights": {}, "trainer_name": _doubled()},
    ],
    ids=["a dict in itself", "hyperparameters", "a name"],
)
def test_values_that_share_their_parts_without_end_are_refused(tmp_path, content):
    """Whatever would write them out, or go through them, a checkpoint of a kilobyte is NF121 before."""
    assert _refused(_pickled(tmp_path / "w.ckpt", content)) == "NF121"


def test_values_that_share_their_parts_a_few_times_are_read(tmp_path):
    """Negative control: one state dict under three names, and one list in ten thousand."""
    shared, weights = ["a"], {"weight": torch.ones(2)}
    content = dict.fromkeys(("model", "ema", "best"), weights) | {"log": [shared] * 10_000}
    path = _pickled(tmp_path / "w.pt", content)
    assert read_torch(path, Request())["log"] == content["log"]


def test_a_programs_json_holds_no_more_lists_than_programs_do():
    """Ten megabytes of lists take a gigabyte; those of a program are few for its length."""
    with pytest.raises(HarmfulProgramError, match="lists"):
        parsed(json.dumps([[0]] * 100_000).encode())
    assert parsed(json.dumps([[0]] * 1000).encode()) == [[0]] * 1000


def test_names_without_end_are_not_searched_for_hints():
    """Two megabytes of names cost no more than those looked at."""
    names = [f"backbone.{n}.{'x' * 40}" for n in range(40_000)]
    started = time.process_time()
    assert candidates(names) == ()
    assert time.process_time() - started < 2


def test_a_pickle_is_followed_for_a_bounded_time(tmp_path, monkeypatch):
    """One that only puts values down and takes them away again is NF121 after its time."""
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("w/data.pkl", b"\x80\x02" + b"N0" * 1_000_000 + b"}.")
    monkeypatch.setattr("normfix.storage.opening.pickles._SECONDS", 0.2)
    assert _refused(path) == "NF121"


@pytest.mark.slow
def test_a_header_of_countless_tensors_is_refused(tmp_path):
    """Those without elements take no room in a file."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({str(n): entry for n in range(150_001)}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert _refused(tmp_path / "w.safetensors") == "NF121"


def test_the_formats_look_at_one_inventory(tmp_path, monkeypatch):
    """However many formats ask what a file is, its directory is read once to recognise it; a new file is read anew."""
    path = tmp_path / "w.pt"
    torch.save({"a": torch.ones(2)}, path)
    opened = []
    real = zipfile.ZipFile
    monkeypatch.setattr(archives.zipfile, "ZipFile", lambda *args: opened.append(args) or real(*args))
    assert [f.recognises(path) for f in FORMATS].count(True) == 1
    assert len(opened) == 1
    torch.save({"pytorch-lightning_version": "2", "state_dict": {"a": torch.ones(2)}}, path)
    assert [f.recognises(path) for f in FORMATS].count(True) == 2
    assert len(opened) == 2


@pytest.mark.parametrize(
    "program",
    [
        b"(2.",
        b"(q\x00.",
        b"K\x01(\x86.",
        b"K\x01t.",
        b"(h\x00.",
        b"K\x01",
        b"\xff.",
        b"(K\x01q\x01tq\x01h\x02.",
    ],
)
def test_a_mark_is_no_value(program):
    """What copies, notes or takes a mark, or comes to none, is malformed for every unpickler, and refused here."""
    with pytest.raises((ValueError, LookupError)):
        followed(io.BytesIO(program), 1000)


def test_a_plain_program_is_followed():
    """Negative control: the same operations where values stand are taken."""
    assert followed(io.BytesIO(b"(K\x012q\x00h\x00tq\x01."), 1000).names == set()


_NUMBERS = b"".join(
    b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little", signed=True) for n in range(1, 2500)
)
"""Whole numbers of one hash."""
_CALLED = {
    "a list that grew after it was noted": b"ccollections\nCounter\n]q\x00(" + _NUMBERS + b"e\x86h\x00\x85R",
    "by a function that is called by another": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nCounter\nccollections\nCounter\n]NtR"
    ),
    "another codec": b"c_codecs\nencode\n(c_codecs\nencode\n(X\2\0\0\0abX\6\0\0\0latin1tRX\3\0\0\0hextR",
    "a codec in a list": b"c_codecs\nencode\n](X\2\0\0\0abX\3\0\0\0hexeR",
    "a tensor of an extent": b"ctorch\nFloatTensor\nK\x05\x85R",
    "a storage of an extent": b"ctorch.storage\nUntypedStorage\nK\x05\x85R",
    "one key of many parts, often": b"(X\1\0\0\0x"
    + b"q\x01h\x01\x86" * 12
    + b"q\x02"
    + b"}h\x02Ns" * 500
    + b"t",
}


@pytest.mark.parametrize("name", _CALLED)
def test_calls_that_no_tensors_are_saved_by_are_refused(name):
    """What a pickle of allowed names would take time or memory by without end is refused before it is read."""
    with pytest.raises(NormfixError) as refused:
        inspect_pickle(io.BytesIO(b"\x80\x02" + _CALLED[name] + b"."), "w.pt")
    assert refused.value.code == "NF121"


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_torch_saves_of_values_around_tensors_is_read(tmp_path):
    """Negative control: bytes, sets, counters, sizes, subclasses and numbers go through, with lists of thousands."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "kept"
    content = {
        "bytes": b"\x00\xff",
        "set": {1, 2},
        "counter": collections.Counter("aab"),
        "losses": [n / 7 for n in range(5000)],
        "shape": torch.Size([2, 3]),
        "parameter": parameter,
        "nested": collections.OrderedDict(a=collections.OrderedDict(b=torch.ones(2))),
        "sparse": torch.eye(3).to_sparse(),
    }
    torch.save(content, tmp_path / "w.pt")
    read = read_torch(tmp_path / "w.pt", Request())
    assert read["bytes"] == b"\x00\xff"
    assert read["counter"] == content["counter"]
    assert read["losses"] == content["losses"]
    assert torch.equal(read["sparse"].to_dense(), torch.eye(3))


def test_a_tensor_that_is_copied_out_of_one_value_is_counted(tmp_path):
    """A view of one stored value that a pickle asks to copy, a gigabyte of it, is refused before it is made."""
    tensor = torch.ones(1).expand(12_000, 12_000)
    torch.save({"a": _Copied(tensor)}, tmp_path / "w.pt")
    with pytest.raises(NormfixError) as refused:
        read_torch(tmp_path / "w.pt", Request())
    assert refused.value.code == "NF121"


class _Copied:
    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce__(self):
        copied = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return copied, (self.tensor, torch.float64, "cpu", False)


_ONE = torch.ones(1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: nn.functional.scaled_dot_product_attention(*(_ONE.expand(1, 1, 1 << 16, 64),) * 3),
        lambda: torch.ops.aten.conv_tbc(
            _ONE.expand(16_384, 4, 4096), _ONE.expand(9, 4096, 64), torch.ones(64)
        ),
        lambda: nn.functional.bilinear(
            _ONE.expand(100_000, 64), _ONE.expand(100_000, 64), torch.ones(64, 64, 64)
        ),
        lambda: nn.functional.interpolate(
            _ONE.expand(1, 1, 30_000, 4), (4, 30_000), mode="bilinear", antialias=True
        ),
        lambda: nn.functional.adaptive_avg_pool2d(torch.ones(1, 1, 1, 1 << 20), (1 << 15, 1)),
        lambda: (
            torch.zeros(1 << 16, dtype=torch.float16)[:, None].expand(-1, 1 << 10)
            @ torch.zeros(1 << 10, 1 << 10).half()
        ),
        lambda: _ONE.expand(1 << 28).unbind(0),
        lambda: _ONE.expand(1 << 28).split(2),
        lambda: nn.functional.adaptive_max_pool3d(torch.zeros(4, 4, 3, 5), (1 << 40, 0, 5)),
        lambda: nn.functional.adaptive_avg_pool2d(torch.zeros(4, 3, 5), (0, 1 << 40)),
    ],
)
def test_what_falls_apart_or_multiplies_unseen_is_foreseen(call):
    """Attention, antialiasing, adaptive pools (empty ones too), half precision and lists of views take their time."""
    for workload in (Workload(0, "x"), Foreseen(0, "x")):
        with pytest.raises(NormfixError) as refused, torch.no_grad(), workload:
            call()
        assert refused.value.code == "NF144"


_MANY = torch.zeros(1).expand(1, 1, 3000, 3000)


@pytest.mark.parametrize("workload", [Workload, Foreseen])
@pytest.mark.parametrize(
    "call",
    [
        lambda: nn.functional.conv2d(_MANY.double(), torch.ones(1, 1, 11, 11).double()),
        lambda: nn.functional.conv2d(_MANY.bfloat16(), torch.ones(1, 1, 15, 15).bfloat16()),
        lambda: nn.functional.conv_transpose2d(_MANY[..., :900].half(), torch.ones(1, 1, 15, 15).half()),
        lambda: nn.functional.conv3d(_MANY[:, :, None, :1000].double(), torch.ones(1, 1, 1, 7, 9).double()),
        lambda: nn.functional.conv2d(_MANY.expand(1, 1, 3000, 3000), torch.ones(1, 1, 3, 3)),
        lambda: torch.ops.aten._unique2(torch.zeros(1).expand(1 << 27)),
    ],
)
def test_what_an_operation_takes_beside_its_output_is_foreseen(call, workload):
    """Convolutions lay their input out by the places of the kernel, or in blocks; unique values are sorted first."""
    with pytest.raises(NormfixError) as refused, torch.no_grad(), workload(0, "x"):
        call()
    assert refused.value.code == "NF144"


def test_ordinary_convolutions_are_not_refused():
    """Negative control: 64 channels of 256 x 256 pixels in float64, which are laid out in 300 MB, and a first layer."""
    with torch.no_grad(), Foreseen(0, "x"):
        nn.functional.conv2d(torch.ones(1, 64, 256, 256).double(), torch.ones(64, 64, 3, 3).double())
        nn.functional.conv2d(torch.ones(2, 1, 512, 512), torch.ones(64, 1, 3, 3), padding=1)


def test_ordinary_calls_of_that_kind_are_not_refused():
    """Negative control: the same operations on 64 pixels pass."""
    x = torch.ones(1, 8, 64, 64)
    with torch.no_grad(), Workload(0, "x"):
        nn.functional.scaled_dot_product_attention(*(x.flatten(2).mT,) * 3)
        nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
        nn.functional.adaptive_avg_pool2d(x, (7, 7))
        assert len(x.unbind(2)) == len(x.split(1, 3)) == 64


def _unlisted(path):
    """Write a file of torch's old format that refers to values and lists none of them."""
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\x80\x02]q\x00")] + b"\x80\x02].")
    return path


def test_values_that_an_old_file_does_not_hold_are_refused(tmp_path):
    """torch leaves them as the memory happened to be, so a network of them would be another each time."""
    with pytest.raises(NormfixError, match=r"NF101.*not in it"):
        read_torch(_unlisted(tmp_path / "w.pt"), Request())


def test_an_old_file_of_views_is_read(tmp_path):
    """Negative control: tensors that share their values, which are listed once."""
    values = torch.arange(6.0)
    saved = {"a": values, "b": values[2:].reshape(2, 2), "c": torch.ones(2)}
    torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(read_torch(tmp_path / "w.pt", Request()), saved)


def test_a_tensor_that_the_file_does_not_hold_buys_no_network(tmp_path):
    """What tensors claim counts as the bytes of their file at most."""
    (tmp_path / "w.pt").write_bytes(b"x" * 1000)
    tensors = [torch.empty(100_000_000)]
    assert Stored.of(tensors).elements == 100_000_000
    assert Stored.of(tensors, tmp_path / "w.pt").elements < 10_000
