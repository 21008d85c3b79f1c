"""A corpus of hostile files: what each would do if it were opened carelessly, made anew for each run."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch
from torch import nn

MARK = "ran"


class Touch:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return Path.touch, (self.folder / MARK,)


def archive(path: Path, members: dict[str, bytes], *, compressed: bool = False) -> Path:
    """Write a zip archive."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def torch_archive(path: Path, data: bytes, **members: bytes) -> Path:
    """Write what torch.save writes around a pickle."""
    rest = {f"x/{name}": content for name, content in members.items()}
    return archive(path, {"x/data.pkl": data, "x/byteorder": b"little", "x/version": b"3\n", **rest})


def saved(folder: Path, name: str = "w.pt") -> Path:
    """Write a harmless state dict."""
    torch.save({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, folder / name)
    return folder / name


def program(folder: Path) -> Path:
    """Write a harmless program whose sizes are free."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)).eval()
    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    path = folder / "p.pt2"
    torch.export.save(torch.export.export(model, (torch.randn(2, 1, 8, 8),), dynamic_shapes=(free,)), path)
    return path


def edited(path: Path, change) -> Path:
    """Rewrite an archive, each member through change(name, data); None drops it."""
    with zipfile.ZipFile(path) as file:
        members = {name: change(name, file.read(name)) for name in file.namelist()}
    return archive(path, {name: data for name, data in members.items() if data is not None})


def _doubling(depth: int) -> bytes:
    """Return a pickle of a dict whose key is a tuple of tuples of tuples, hashed in 2**depth steps."""
    grow = b"".join(b"2\x86" for _ in range(depth))  # DUP, TUPLE2
    return b"\x80\x02}K\x01" + grow + b"K\x01s."


def _hidden_global() -> bytes:
    """Return a pickle that takes the name it imports from its memo."""
    return b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x8c\x0btouch ran_it\x940h\x00h\x01\x93h\x02\x85R."


def _huge_header(length: int, real: int = 0) -> bytes:
    return struct.pack("<Q", length) + b" " * real


def _overlapping(folder: Path) -> Path:
    """Write an archive whose central directory names one member ten thousand times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02}." + b"\0" * 100_000)
        info = file.infolist()[0]
        file.filelist += [_renamed(info, f"x/data/{n}") for n in range(10_000)]
    (folder / "overlap.pt").write_bytes(buffer.getvalue())
    return folder / "overlap.pt"


def _renamed(info: zipfile.ZipInfo, name: str) -> zipfile.ZipInfo:
    other = zipfile.ZipInfo(name)
    other.file_size, other.compress_size, other.CRC = info.file_size, info.compress_size, info.CRC
    other.header_offset = info.header_offset
    return other


def _in_json(path: Path, old: str, new: str) -> Path:
    """Replace text in a program's model.json, which must hold it."""
    found = []

    def change(name, data):
        if name.endswith("models/model.json"):
            found.append(old.encode() in data)
            return data.replace(old.encode(), new.encode(), 1)
        return data

    edited(path, change)
    assert found == [True], old
    return path


def _expression(folder: Path) -> Path:
    """Write a program whose size expression runs a command when sympy evaluates it."""
    path = program(folder)

    def change(name, data):
        if not name.endswith("models/model.json"):
            return data
        content = json.loads(data)
        planted = _plant(content, "expr_str", f"__import__('pathlib').Path({str(folder / MARK)!r}).touch()")
        assert planted
        return json.dumps(content).encode()

    return edited(path, change)


def _guard(folder: Path) -> Path:
    """Write a program whose guard runs a command when it is compiled."""
    path = program(folder)

    def change(name, data):
        if not name.endswith("models/model.json"):
            return data
        content = json.loads(data)
        content["guards_code"] = [f"__import__('pathlib').Path({str(folder / MARK)!r}).touch() is None"]
        return json.dumps(content).encode()

    return edited(path, change)


def _plant(value, key, text) -> int:
    """Set every text under a key; return how many there were."""
    if isinstance(value, dict):
        count = 0
        for name, inner in value.items():
            if name == key and isinstance(inner, str):
                value[name] = text
                count += 1
            else:
                count += _plant(inner, key, text)
        return count
    return sum(_plant(inner, key, text) for inner in value) if isinstance(value, list) else 0


def sample_inputs(folder: Path) -> Path:
    """Write a program whose sample inputs are a pickle that runs."""
    buffer = io.BytesIO()
    torch.save(Touch(folder), buffer)
    return edited(program(folder), lambda name, data: buffer.getvalue() if "sample_inputs" in name else data)


def _pickled_weights(folder: Path) -> Path:
    """Write a program that stores a weight as a pickle."""
    path = program(folder)

    def change(name, data):
        return data.replace(b'"use_pickle": false', b'"use_pickle": true').replace(
            b'"use_pickle":false', b'"use_pickle":true'
        )

    return edited(path, change)


def _library(folder: Path) -> Path:
    """Write a program that brings a shared library."""
    path = program(folder)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("p/data/aotinductor/model/m.so", b"\x7fELF")
    return path


def _legacy(folder: Path) -> Path:
    torch.save(Touch(folder), folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def _module(folder: Path) -> Path:
    torch.save(nn.Sequential(nn.Conv2d(1, 1, 1)), folder / "m.pt")
    return folder / "m.pt"


def _payload(folder: Path, name: str = "m.pt") -> Path:
    torch.save(Touch(folder), folder / name)
    return folder / name


def _plain(folder: Path) -> Path:
    (folder / "m.pkl").write_bytes(pickle.dumps(Touch(folder)))
    return folder / "m.pkl"


def _checkpoint(folder: Path) -> Path:
    torch.save({"state_dict": {"a": torch.ones(1)}, "callback": Touch(folder)}, folder / "c.ckpt")
    return folder / "c.ckpt"


def _huge_network(folder: Path, config: dict) -> Path:
    """Write a folder whose config asks for more than any machine has, with weights of four bytes."""
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        (folder / "hf" / name).write_bytes(
            _safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
        )
    return folder / "hf"


def _claims(folder: Path) -> Path:
    """Write a program whose weights and input claim 2**40 values."""

    def change(name, data):
        return data.replace(b'"as_int": 2}', b'"as_int": 1099511627776}') if name.endswith(".json") else data

    return edited(program(folder), change)


def _long_json(folder: Path) -> Path:
    """Write a program whose graph is a hundred megabytes of blanks."""

    def change(name, data):
        return data + b" " * (100 << 20) if name.endswith("models/model.json") else data

    return edited(program(folder), change)


def _bomb(folder: Path) -> Path:
    """Write a program whose graph unpacks to a thousand times its size."""
    with zipfile.ZipFile(program(folder)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    grown = {n: d + b" " * (100 << 20) * n.endswith("model.json") for n, d in members.items()}
    return archive(folder / "p.pt2", grown, compressed=True)


def _bin_folder(folder: Path, config: dict, name: str) -> Path:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    torch.save(Touch(folder), folder / "hf" / name)
    return folder / "hf"


CORPUS = {
    "pickle that runs": _payload,
    "pickle that runs, old format": _legacy,
    "pickle that runs, not of torch": _plain,
    "pickle that runs in a checkpoint": _checkpoint,
    "pickle that hides what it imports": lambda d: torch_archive(d / "m.pt", _hidden_global()),
    "pickled module": _module,
    "pickle of doubling tuples": lambda d: torch_archive(d / "m.pt", _doubling(60)),
    "pickle that allocates": lambda d: torch_archive(
        d / "m.pt", b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R."
    ),
    "pickle of a tensor without storage": lambda d: torch_archive(
        d / "m.pt", b"\x80\x02ctorch\nFloatTensor\n\x8a\x05\0\0\0\0\x10\x85R."
    ),
    "pickle without end": lambda d: torch_archive(d / "m.pt", b"\x80\x02" + b"K\x01" * 1000),
    "pickle with a deep stack": lambda d: torch_archive(
        d / "m.pt", b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    ),
    "zip bomb": lambda d: archive(
        d / "b.pt", {"x/data.pkl": b"\x80\x02}.", "x/data/0": b"\0" * (64 << 20)}, compressed=True
    ),
    "zip of overlapping members": _overlapping,
    "zip that leads outside": lambda d: archive(
        d / "t.pt", {"x/data.pkl": b"\x80\x02}.", "x/../../evil": b"1"}
    ),
    "zip with an absolute name": lambda d: archive(
        d / "t.pt", {"x/data.pkl": b"\x80\x02}.", "/etc/evil": b"1"}
    ),
    "safetensors with a huge header": lambda d: _written(d / "w.safetensors", _huge_header(2**62)),
    "safetensors with a long header": lambda d: _written(
        d / "w.safetensors", _huge_header(64 << 20, 64 << 20)
    ),
    "safetensors that claims terabytes": lambda d: _written(
        d / "w.safetensors", _safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}})
    ),
    "safetensors of deep JSON": lambda d: _written(
        d / "w.safetensors", struct.pack("<Q", 200_000) + b"[" * 200_000
    ),
    "program with an expression that runs": _expression,
    "program with a guard that runs": _guard,
    "program with pickled weights": _pickled_weights,
    "program with a library": _library,
    "program that calls another function": lambda d: _in_json(
        program(d), "torch.ops.aten.conv2d.default", "torch.hub.load_state_dict_from_url"
    ),
    "transformers folder with a pickle": lambda d: _bin_folder(
        d,
        {"architectures": ["BertModel"], "model_type": "bert", "transformers_version": "5"},
        "pytorch_model.bin",
    ),
    "diffusers folder with a pickle": lambda d: _bin_folder(
        d, {"_class_name": "UNet2DModel", "_diffusers_version": "0"}, "diffusion_pytorch_model.bin"
    ),
    "timm folder with a pickle": lambda d: _bin_folder(
        d, {"architecture": "test_resnet", "num_features": 1}, "pytorch_model.bin"
    ),
    "folder with an index that leads outside": lambda d: _index(d),
    "program that claims terabytes": _claims,
    "program with a long graph": _long_json,
    "program that is a zip bomb": _bomb,
    "timm folder that asks for terabytes": lambda d: _huge_network(
        d, {"architecture": "test_resnet", "num_features": 1, "num_classes": 10**8}
    ),
    "timm folder that asks for gigabytes": lambda d: _huge_network(
        d, {"architecture": "test_resnet", "num_features": 1, "num_classes": 10**7}
    ),
    "diffusers folder that asks for gigabytes": lambda d: _huge_network(
        d,
        {
            "_class_name": "UNet2DModel",
            "_diffusers_version": "0",
            "block_out_channels": [16384],
            "norm_num_groups": 4,
            "down_block_types": ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"],
        },
    ),
    "folder of a symlink that leads nowhere": lambda d: _symlink(d),
    "deep config": lambda d: _written(d / "config.json", b'{"a":' * 100_000).parent,
}
"""Name -> function (folder) that writes the file and returns its path; opening creates folder/ran."""


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _safetensors(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 4


def _symlink(folder: Path) -> Path:
    """Write a folder whose weights are a link to themselves."""
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text('{"architecture": "test_resnet", "num_features": 1}')
    (folder / "hf" / "model.safetensors").symlink_to("model.safetensors")
    return folder / "hf"


def _index(folder: Path) -> Path:
    config = {"architecture": "test_resnet", "num_features": 1}
    (folder / "config.json").write_text(json.dumps(config))
    _payload(folder, "evil.bin")
    (folder / "deep").mkdir()
    (folder / "config.json").rename(folder / "deep" / "config.json")
    names = {"weight_map": {"a": "../evil.bin"}}
    (folder / "deep" / "pytorch_model.bin.index.json").write_text(json.dumps(names))
    return folder / "deep"
