"""Files that try to run, reach or take something through what an archive holds, each by a function (folder)."""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from functools import cache
from pathlib import Path

import torch
from hostile import Touch, torch_archive
from torch import nn

FREE = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
BIG = 2**61 - 1
"""Python's hash of a whole number is its remainder by this."""


class Scaled(nn.Module):
    """A convolution, a norm, and whatever a test adds to its input."""

    def __init__(self, more=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2)
        self.more = more

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y if self.more is None else y + 0 * self.more(x)


def exported(path: Path, more=None, **extra) -> Path:
    """Write a program with free sizes."""
    shapes = (None,) if more is not None else (FREE,)
    program = torch.export.export(
        Scaled(more).eval(),
        (torch.rand(2, 1, 16, 16),),
        dynamic_shapes={"x": shapes[0]} if more is None else None,
    )
    torch.export.save(program, path, extra_files=extra)
    return path


@cache
def good() -> bytes:
    """Return a harmless program, exported once."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return exported(Path(folder) / "p.pt2").read_bytes()


def members(data: bytes) -> dict[str, bytes]:
    """Return an archive's members by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(content: dict[str, bytes]) -> bytes:
    """Return an archive of members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def changed(path: Path, change, ending="models/model.json") -> Path:
    """Write the program with one of its JSON members changed by a function of its content or text."""
    content = members(good())
    (name,) = (n for n in content if n.endswith(ending))
    made = change(json.loads(content[name]))
    content[name] = made if isinstance(made, bytes) else json.dumps(made).encode()
    path.write_bytes(zipped(content))
    return path


def replaced(path: Path, old: str, new: str, ending="models/model.json") -> Path:
    """Write the program with a text in its JSON replaced, which must be there."""

    def change(content):
        text = json.dumps(content)
        assert old in text, old
        return text.replace(old, new).encode()

    return changed(path, change, ending)


def _evil_pickle(folder: Path) -> bytes:
    out = io.BytesIO()
    torch.save(Touch(folder), out)
    return out.getvalue()


def two_directories(path: Path, first: bytes, second: bytes) -> Path:
    """Write two archives in one file: one reader takes the directory its end names, another the one before the end."""
    body, index, count = _split(first)
    other, other_index, other_count = _split(second)
    index += b"\0" * (len(other_index) - len(index))
    shift = len(body) + len(index)
    moved, at = b"", 0
    for _ in range(other_count):
        entry = bytearray(
            other_index[at : at + 46 + sum(struct.unpack("<HHH", other_index[at + 28 : at + 34]))]
        )
        struct.pack_into("<I", entry, 42, struct.unpack_from("<I", entry, 42)[0] + shift)
        moved, at = moved + bytes(entry), at + len(entry)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(moved), len(body), 0)
    path.write_bytes(body + index + other + moved + end)
    return path


def _split(data: bytes) -> tuple[bytes, bytes, int]:
    at = data.rfind(b"PK\5\6")
    count, size, start = struct.unpack("<HLL", data[at + 10 : at + 20])
    return data[:start], data[start : start + size], count


def comment_with_an_end(path: Path) -> Path:
    """Write a program whose comment is the end of another archive."""
    data = good()
    other = zipped({"x/data.pkl": b"\x80\x02}."})
    body = data[:-2] + struct.pack("<H", len(other)) + other
    path.write_bytes(body)
    return path


def other_local_name(path: Path) -> Path:
    """Write a program one of whose members has another name in its own header than in the directory."""
    content = members(good())
    data = zipped(content)
    name = next(n for n in content if n.endswith("models/model.json")).encode()
    path.write_bytes(data.replace(name, name.replace(b"model.json", b"nodel.json"), 1))
    return path


def second_name(path: Path) -> Path:
    """Write a program with a member whose extra field gives it another name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members(good()).items():
            info = zipfile.ZipInfo(name)
            if name.endswith("archive_version"):
                other = name.replace("archive_version", "models/model.json").encode()
                body = struct.pack("<BL", 1, zlib.crc32(name.encode())) + other
                info.extra = struct.pack("<HH", 0x7075, len(body)) + body
            archive.writestr(info, data)
    path.write_bytes(out.getvalue())
    return path


def hidden_member(path: Path) -> Path:
    """Write a program with a member between two others that the directory does not list."""
    content = members(good())
    first, *rest = content
    body = zipped({first: content[first]})
    start = _split(body)[0]
    hidden = _split(zipped({"p/data/weights/model.pt": b"evil"}))[0]
    tail, index, _ = _split(zipped({name: content[name] for name in rest}))
    shift, moved, at = len(start) + len(hidden), b"", 0
    while at < len(index):
        entry = bytearray(index[at : at + 46 + sum(struct.unpack("<HHH", index[at + 28 : at + 34]))])
        struct.pack_into("<I", entry, 42, struct.unpack_from("<I", entry, 42)[0] + shift)
        moved, at = moved + bytes(entry), at + len(entry)
    whole = _split(body)[1] + moved
    end = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, len(content), len(content), len(whole), shift + len(tail), 0
    )
    path.write_bytes(start + hidden + tail + whole + end)
    return path


def with_member(path: Path, name: str, data: bytes) -> Path:
    """Write the program with one more member."""
    content = members(good())
    top = next(iter(content)).partition("/")[0]
    path.write_bytes(zipped(content | {f"{top}/{name}": data}))
    return path


def saved_folder(folder: Path) -> Path:
    """Write a folder that normfix saved from an object; its program is a harmless one."""
    import normfix

    done = normfix.convert(Scaled(), torch.rand(1, 1, 64, 64))
    normfix.save(done, folder / "saved")
    assert (folder / "saved" / "program.pt2").exists()
    return folder / "saved"


def altered_folder(folder: Path) -> Path:
    """Write such a folder whose program calls what touches files, with its checksums put right."""
    import hashlib

    from normfix.records.saved import statement_of

    saved = saved_folder(folder)
    program, manifest = saved / "program.pt2", saved / "normfix.json"
    before = hashlib.sha256(program.read_bytes()).hexdigest()
    content = {
        name: data.replace(b"torch.ops.aten.relu.default", b"torch.ops.aten.from_file.default").replace(
            b"torch.ops.aten.conv2d.default", b"torch.ops.aten.from_file.default"
        )
        for name, data in members(program.read_bytes()).items()
    }
    program.write_bytes(zipped(content))
    after = hashlib.sha256(program.read_bytes()).hexdigest()
    data = json.loads(manifest.read_text())
    assert data["program"] == before
    data["program"] = after
    manifest.write_text(json.dumps(data | {"statement": statement_of(data)}))
    return saved


def _keys(body: bytes, count: int, make) -> bytes:
    return b"\x80\x02" + body + b"(" + b"".join(make(n) for n in range(1, count)) + b"u."


def _long(n: int) -> bytes:
    return b"\x8a\x10" + (n * BIG).to_bytes(16, "little")


def _small(n: int) -> bytes:
    return b"J" + n.to_bytes(4, "little", signed=True)


def tar_with_a_pickle_for_a_name(path: Path, folder: Path) -> Path:
    """Write an archive of tar whose first bytes are the five harmless pickles of torch's old format."""
    name = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.\x80\x02}.\x80\x02]."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for member in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(member), io.BytesIO(b""))
    data = bytearray(out.getvalue())
    data[0 : len(name)] = name
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    return path


def powers(content):
    """Put a chain of sizes into the graph, each the square of the one before: numbers of terabytes."""
    graph = content["graph_module"]["graph"]
    node = {
        "target": "torch.ops.aten.sym_size.int",
        "inputs": [
            {"name": "self", "arg": {"as_tensor": {"name": "x"}}, "kind": 1},
            {"name": "dim", "arg": {"as_int": 2}, "kind": 1},
        ],
        "outputs": [{"as_sym_int": {"as_name": "size_0"}}],
        "metadata": {},
    }
    nodes = [node]
    for n in range(50):
        given = {"name": "", "arg": {"as_sym_int": {"as_name": f"size_{n}"}}, "kind": 1}
        made = [{"as_sym_int": {"as_name": f"size_{n + 1}"}}]
        nodes.append({"target": "_operator.mul", "inputs": [given, given], "outputs": made, "metadata": {}})
    graph["nodes"] = nodes + graph["nodes"]
    for n in range(52):
        graph["sym_int_values"][f"size_{n}"] = {"as_int": 16}
    return content


def sums(content):
    """Give three hundred tensors sizes that are long sums, each another."""
    values = content["graph_module"]["graph"]["tensor_values"]
    for n in range(300):
        other = json.loads(json.dumps(values["x"]))
        size = other["sizes"][2]["as_expr"]
        parts = ", ".join(f"Mul(Integer({n + k}), {size['expr_str']})" for k in range(20))
        size["expr_str"] = f"Add({parts})"
        values[f"y{n}"] = other
    return content


def input_named(name: str):
    """Return a change that gives the program's input another name, everywhere."""
    return lambda path: replaced(path, '"name": "x"', f'"name": {json.dumps(name)}')


def given_an_operator(content):
    """Give a function to an operation, by its name."""
    content["graph_module"]["graph"]["nodes"][0]["inputs"][-1]["arg"] = {"as_operator": "torch.hub.load"}
    return content


def arguments_named(name: str):
    """Return a change of the names of forward's arguments."""

    def change(content):
        content["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [name]
        return content

    return change


def structured(which: str, tree):
    """Return a change of the structure of inputs or outputs."""

    def change(content):
        content["graph_module"]["module_call_graph"][0]["signature"][which] = json.dumps([1, tree])
        return content

    return change


def given(target: str, name: str, argument: dict, kind: int | None = None):
    """Return a change of the program's calls of one operation: an argument of this name, kept in its place or added."""

    def change(content):
        calls = [node for node in content["graph_module"]["graph"]["nodes"] if node["target"] == target]
        assert calls
        for call in calls:
            others = [one for one in call["inputs"] if one["name"] == name]
            call["inputs"] += [] if others else [{"name": name, "kind": kind}]
            for one in others or call["inputs"][-1:]:
                one["arg"] = argument
        return content

    return change


def calling(path: Path, more, change) -> Path:
    """Write a program that computes more than the others, changed."""
    content = members(exported(path, more).read_bytes())
    (name,) = (n for n in content if n.endswith("models/model.json"))
    content[name] = json.dumps(change(json.loads(content[name]))).encode()
    path.write_bytes(zipped(content))
    return path


def _spectrum(x):
    return torch.ops.aten._fft_r2c(x, [3], 0, True).abs().sum()


def _normalised(x):
    return torch.ops.aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-5)[0].sum()


def nested(depth: int):
    """Return a structure of tuples in tuples."""
    tree = {"type": None, "context": None, "children_spec": []}
    for _ in range(depth):
        tree = {"type": "builtins.tuple", "context": "null", "children_spec": [tree]}
    return tree


def wide_weight(content):
    """Claim a weight of terabytes whose values are all one that is stored."""
    meta = content["config"]["conv.weight"]["tensor_meta"]
    meta["sizes"], meta["strides"] = [{"as_int": 2**20}] * 2, [{"as_int": 0}] * 2
    return content


def _digits(content):
    """Put a number of a thousand million digits into a size."""
    size = content["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][2]
    size["as_expr"]["expr_str"] = "Float('1.5', precision=1000000000)"
    return content


_IMPORTING = {
    "type": "collections.defaultdict",
    "context": {"default_factory_module": "xmlrpc.server", "default_factory_name": "x", "dict_context": []},
    "children_spec": [],
}
_ENUM = {
    "type": "builtins.dict",
    "context": '[{"__enum__": true, "fqn": "xmlrpc.server:x", "name": "x"}]',
    "children_spec": [{"type": None, "context": None, "children_spec": []}],
}


def _calls(target: str):
    return lambda d: replaced(d / "p.pt2", "torch.ops.aten.conv2d.default", target)


def _code(folder: Path) -> str:
    return f"__import__('pathlib').Path({str(folder / 'ran')!r}).touch()"


REFUSED = {
    "two directories": lambda d: two_directories(
        d / "p.pt2",
        zipped({n: _evil_pickle(d) if "sample_inputs" in n else c for n, c in members(good()).items()}),
        zipped(members(good())),
    ),
    "two directories in weights": lambda d: two_directories(
        d / "w.pt", zipped({"x/data.pkl": b"\x80\x02cos\ngetcwd\n)R."}), zipped({"x/data.pkl": b"\x80\x02}."})
    ),
    "bytes before the archive": lambda d: _bytes(d / "p.pt2", b"MZ" * 50 + good()),
    "bytes behind the archive": lambda d: _bytes(d / "p.pt2", good() + b"\0" * 64),
    "an archive before the archive": lambda d: _bytes(d / "p.pt2", zipped({"y/a": b"1"}) + good()),
    "a comment that is an end": lambda d: comment_with_an_end(d / "p.pt2"),
    "another name in a member's header": lambda d: other_local_name(d / "p.pt2"),
    "a second name in an extra field": lambda d: second_name(d / "p.pt2"),
    "a member that is not listed": lambda d: hidden_member(d / "p.pt2"),
    "a name that differs in case": lambda d: with_member(d / "p.pt2", "models/Model.json", b"{}"),
    "a name that is the same once normalised": lambda d: with_member(
        d / "p.pt2", "models/ｍodel.json", b"{}"
    ),
    "another program": lambda d: with_member(d / "p.pt2", "models/other.json", b"{}"),
    "weights as a pickle": lambda d: with_member(d / "p.pt2", "data/weights/model.pt", _evil_pickle(d)),
    "constants as objects": lambda d: with_member(
        d / "p.pt2", "data/constants/opaque_obj_0", b"cos\ngetcwd\n)R."
    ),
    "a library": lambda d: with_member(d / "p.pt2", "data/aotinductor/model/m.so", b"\x7fELF"),
    "two values of one key": lambda d: replaced(
        d / "p.pt2", '"target": "torch.ops.aten.conv2d.default"', '"target": "torch.hub.load", "target": "x"'
    ),
    "a number that is none": lambda d: replaced(d / "p.pt2", "1e-05", "NaN"),
    "deep JSON": lambda d: changed(d / "p.pt2", lambda _: b"[" * 200_000 + b"]" * 200_000),
    "deep structure": lambda d: changed(d / "p.pt2", structured("out_spec", nested(300))),
    "deep normfix.json": lambda d: with_member(d / "p.pt2", "extra/normfix.json", b'{"a":' * 100_000),
    "an input whose name is code": lambda d: input_named(f"x=({_code(d)})")(d / "p.pt2"),
    "an input whose name closes the line": lambda d: input_named(f"x):\n        {_code(d)}\n    def g(")(
        d / "p.pt2"
    ),
    "an argument whose name is code": lambda d: changed(d / "p.pt2", arguments_named(f"x=({_code(d)})")),
    "a weight whose name is code": lambda d: replaced(
        d / "p.pt2",
        '"parameter_name": "conv.weight"',
        f'"parameter_name": "conv\\"), {_code(d)}, (\\"weight"',
    ),
    "a structure that imports": lambda d: changed(d / "p.pt2", structured("out_spec", _IMPORTING)),
    "a structure with a member of an enumeration": lambda d: changed(
        d / "p.pt2", structured("out_spec", _ENUM)
    ),
    "a walk to a class": _calls("torch.ops.aten.__class__.mro"),
    "a walk to a module": _calls("torch._dynamo.os.system"),
    "a letter that looks like another": _calls("torch.ops.\\u0430ten.conv2d.default"),
    "a file as a tensor": _calls("torch.ops.aten.from_file.default"),
    "a method by its name": _calls("_operator.methodcaller"),
    "an attribute by its name": _calls("_operator.attrgetter"),
    "a shift of a size": _calls("_operator.lshift"),
    "a kernel": _calls("torch.ops.higher_order.triton_kernel_wrapper_functional"),
    "a loop": _calls("torch.ops.higher_order.while_loop"),
    "another's operator": _calls("torch.ops.profiler._record_function_enter.default"),
    "text to the console": _calls("torch.ops.aten._print.default"),
    "an operator given as an argument": lambda d: changed(d / "p.pt2", given_an_operator),
    "sizes that are squared fifty times": lambda d: changed(d / "p.pt2", powers),
    "a symbol of a number to count to": lambda d: changed(
        d / "p.pt2", lambda c: c | {"range_constraints": {"u99999999999": {"min_val": 2, "max_val": 9}}}
    ),
    "an expression of too many digits": lambda d: changed(d / "p.pt2", _digits),
    "a weight of terabytes": lambda d: changed(d / "p.pt2", wide_weight, "model_weights_config.json"),
    "guards without end": lambda d: changed(
        d / "p.pt2", lambda c: c | {"guards_code": [" and ".join(["L['x'].size()[2] >= 0"] * 60)] * 200}
    ),
    "expressions without end": lambda d: changed(d / "p.pt2", sums),
    "JSON of countless lists": lambda d: changed(d / "p.pt2", lambda c: c | {"more": [[0]] * 100_000}),
    "a folder whose program touches files": altered_folder,
    "keys of one hash": lambda d: torch_archive(d / "w.pt", _keys(b"}", 40_000, lambda n: _long(n) + b"K\0")),
    "tuples of one hash": lambda d: torch_archive(
        d / "w.pt", _keys(b"}", 40_000, lambda n: _small(n) + _long(n) + b"\x86K\0")
    ),
    "a set of one hash": lambda d: torch_archive(
        d / "w.pt",
        b"\x80\x02cbuiltins\nset\n(" + b"".join(_long(n) for n in range(1, 40_000)) + b"l\x85R.",
    ),
    "notes of one hash": lambda d: torch_archive(
        d / "w.pt", b"\x80\x02}" + b"".join(b"p%d\n" % (n * BIG) for n in range(1, 40_000)) + b"."
    ),
    "a memory format that is a number": lambda d: calling(
        d / "p.pt2",
        lambda x: x.clone().sum(),
        given("torch.ops.aten.clone.default", "memory_format", {"as_int": -1}, 2),
    ),
    "an argument that moves into the place of a dtype": lambda d: calling(
        d / "p.pt2",
        lambda x: x.sum(1, True).sum(),
        given("torch.ops.aten.sum.dim_IntList", "dtype", {"as_int": -1}, 1),
    ),
    "a norm by statistics that are not there": lambda d: calling(
        d / "p.pt2",
        _normalised,
        given("torch.ops.aten._native_batch_norm_legit.no_stats", "training", {"as_bool": False}),
    ),
    "a spectrum along an axis that is not there": lambda d: calling(
        d / "p.pt2", _spectrum, given("torch.ops.aten._fft_r2c.default", "dim", {"as_ints": [8, -2, -2]})
    ),
    "an archive of tar": lambda d: tar_with_a_pickle_for_a_name(d / "w.pth", d),
}
"""Name -> function (folder) that writes a file which must be refused; it may have created folder/ran."""

TOO_LARGE = {
    "ones": lambda x: torch.ones(400_000_000).sum(),
    "full of another dtype": lambda x: torch.full((30_000, 30_000), 1.0, dtype=torch.float64).mean(),
    "arange": lambda x: torch.arange(300_000_000).float().sum(),
    "identity": lambda x: torch.eye(20_000).sum(),
    "repeated": lambda x: x[:1, :, :1, :1].repeat(1, 1, 30_000, 30_000).mean(),
    "enlarged": lambda x: nn.functional.interpolate(x, size=(20_000, 20_000)).mean(),
    "padded": lambda x: nn.functional.pad(x, (0, 20_000, 0, 20_000)).mean(),
    "a sum of one value": lambda x: x[:1, :1, :1, :1].expand(1, 1, 1 << 20, 1 << 20).sum(),
    "a product of one value": lambda x: torch.mm(
        x[0, 0, :1, :1].expand(1 << 15, 1 << 15), torch.ones(1 << 15, 1)
    ).sum(),
    "by the sizes": lambda x: torch.zeros([x.shape[2] ** 4, x.shape[3] ** 4]).sum(),
}
"""What a program of some kilobytes computes that takes gigabytes or minutes."""


def too_large(path: Path, name: str) -> Path:
    """Write such a program; its sizes are fixed, but for the one that is made by them."""
    return exported(path, TOO_LARGE[name])


def _bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
