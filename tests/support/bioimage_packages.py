"""bioimage.io packages made by hand, 0.4 and 0.5, right ones and ones with a single fault."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.networks.nets import UNet
from torch import nn

__all__ = ["KWARGS", "package", "rewritten", "seashell", "sha256", "volume", "zipped"]

KWARGS = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8],
    "strides": [2],
    "norm": "instance",
}
"""Of a MONAI UNet with InstanceNorms, which its package calls by a file of its own."""

OWN = """
from torch import nn

class Own(nn.Sequential):
    def __init__(self, width, norm="InstanceNorm2d"):
        norm = getattr(nn, norm)(width, affine=norm == "BatchNorm2d")
        super().__init__(nn.Conv2d(1, width, 3, padding=1), norm, nn.Conv2d(width, 2, 1))
"""
"""Code that no library has."""


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def package(folder: Path, version: str = "0.5", *, own: bool = False, seed: int = 0, side: int = 64) -> Path:
    """Write a package into a new folder and return it."""
    folder.mkdir()
    torch.manual_seed(seed)
    (folder / "arch.py").write_text(
        OWN if own else "raise RuntimeError('a file does not decide what runs')\n"
    )
    if own:
        names: dict[str, Any] = {}
        exec(OWN, names)
        network: nn.Module = names["Own"](4)
    else:
        network = UNet(**KWARGS)
    torch.save(network.state_dict(), folder / "weights.pt")
    image = np.random.default_rng(0).random((1, 1, side, side), dtype=np.float32) * 50 + 100
    scaled = (image - image.mean()) / (image.std() + 1e-6)
    with torch.no_grad():
        output = torch.sigmoid(network.eval()(torch.from_numpy(scaled))).numpy()
    np.save(folder / "test_input.npy", image)
    np.save(folder / "test_output.npy", output)
    (folder / "README.md").write_text("# A network\n")
    callable_ = ("Own", {"width": 4}) if own else ("UNet", KWARGS)
    content = _content_of_0_5(folder, *callable_) if version == "0.5" else _content_of_0_4(folder, *callable_)
    # by way of JSON, so that no value is shared, which YAML would write as an alias
    (folder / "rdf.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False))
    return folder


def _common(version: str) -> dict[str, Any]:
    return {
        "format_version": version,
        "type": "model",
        "name": "small network",
        "description": "for tests",
        "authors": [{"name": "somebody"}],
        "cite": [{"text": "nobody", "doi": "10.1234/abcd"}],
        "license": "CC-BY-4.0",
        "documentation": "README.md",
        "tags": ["unet"],
    }


def _content_of_0_5(folder: Path, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    def axes(channels: list[str], **more: Any) -> list[dict[str, Any]]:
        space = [{"type": "space", "id": a, **more} for a in "yx"]
        return [{"type": "batch"}, {"type": "channel", "channel_names": channels}, *space]

    def test(file: str) -> dict[str, str]:
        return {"source": file, "sha256": sha256(folder / file)}

    outputs = axes(["a", "b"], size={"tensor_id": "image", "axis_id": "y"}, halo=8)
    outputs[3]["size"] = {"tensor_id": "image", "axis_id": "x"}
    zscore = {"id": "zero_mean_unit_variance", "kwargs": {"axes": ["channel", "y", "x"]}}
    return {
        **_common("0.5.3"),
        "inputs": [
            {
                "id": "image",
                "axes": axes(["raw"], size={"min": 32, "step": 2}),
                "preprocessing": [zscore],
                "test_tensor": test("test_input.npy"),
            }
        ],
        "outputs": [
            {
                "id": "masks",
                "axes": outputs,
                "postprocessing": [{"id": "sigmoid"}],
                "test_tensor": test("test_output.npy"),
            }
        ],
        "weights": {
            "pytorch_state_dict": {
                **test("weights.pt"),
                "architecture": {"callable": name, "kwargs": kwargs, **test("arch.py")},
                "pytorch_version": "2.6",
            }
        },
    }


def _content_of_0_4(folder: Path, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    step = {"name": "zero_mean_unit_variance", "kwargs": {"mode": "per_sample", "axes": "cyx"}}
    tensor = {"axes": "bcyx", "data_type": "float32"}
    return {
        **_common("0.4.10"),
        "covers": [],
        "timestamp": "2024-01-01T00:00:00",
        "test_inputs": ["test_input.npy"],
        "test_outputs": ["test_output.npy"],
        "inputs": [
            {
                "name": "image",
                **tensor,
                "shape": {"min": [1, 1, 32, 32], "step": [0, 0, 2, 2]},
                "preprocessing": [step],
            }
        ],
        "outputs": [
            {
                "name": "masks",
                **tensor,
                "shape": {"reference_tensor": "image", "scale": [1, 2, 1, 1], "offset": [0, 0, 0, 0]},
                "halo": [0, 0, 8, 8],
                "postprocessing": [{"name": "sigmoid"}],
            }
        ],
        "weights": {
            "pytorch_state_dict": {
                "source": "weights.pt",
                "sha256": sha256(folder / "weights.pt"),
                "architecture": f"arch.py:{name}",
                "architecture_sha256": sha256(folder / "arch.py"),
                "kwargs": kwargs,
            }
        },
    }


def volume(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return a volume whose brightness grows along its last axis, so that blocks have statistics of their own."""
    values = torch.rand(
        (1, 1, *(max(2, n // 8) for n in shape)), generator=torch.Generator().manual_seed(seed)
    )
    coarse = nn.functional.interpolate(values, size=shape, mode="trilinear").numpy()[0, 0]
    noise = np.random.default_rng(seed).random(shape)
    return ((coarse + 0.2 * noise) * np.linspace(0.3, 1.7, shape[-1]) * 1000).astype(np.float32)


def seashell(folder: Path, factors: list[list[int]]) -> Path:
    """Write a package as kind-seashell's: torch-em's AnisotropicUNet, blocks of 16x64x64, halo 2/8/8, z-score."""
    import torch_em.model

    folder.mkdir()
    kwargs = {"in_channels": 1, "out_channels": 2, "scale_factors": factors, "initial_features": 2}
    kwargs["final_activation"] = "Sigmoid"
    torch.manual_seed(0)
    network = torch_em.model.AnisotropicUNet(**kwargs).eval()
    image = volume((16, 64, 64), 0)[None, None]
    with torch.no_grad():
        output = network(torch.from_numpy((image - image.mean()) / (image.std() + 1e-6)))
    torch.save(network.state_dict(), folder / "weights.pt")
    np.save(folder / "test_input.npy", image)
    np.save(folder / "test_output.npy", output.numpy())
    (folder / "README.md").write_text("# Boundaries\n")
    (folder / "unet.py").write_bytes(Path(torch_em.model.unet.__file__).read_bytes())

    def test(file: str) -> dict[str, str]:
        return {"source": file, "sha256": sha256(folder / file)}

    def axes(channels: list[str], **space: dict[str, Any]) -> list[dict[str, Any]]:
        named = [{"type": "space", "id": a, **more} for a, more in space.items()]
        return [{"type": "batch"}, {"type": "channel", "channel_names": channels}, *named]

    step = np.prod(factors, axis=0).tolist()
    sizes = {a: {"size": {"min": n, "step": s}} for a, n, s in zip("zyx", (16, 64, 64), step, strict=True)}
    halos = {
        a: {"size": {"tensor_id": "image", "axis_id": a}, "halo": h}
        for a, h in zip("zyx", (2, 8, 8), strict=True)
    }
    zscore = {"id": "zero_mean_unit_variance", "kwargs": {"axes": ["channel", "z", "y", "x"]}}
    architecture = {"callable": "AnisotropicUNet", "kwargs": kwargs, **test("unet.py")}
    content = {
        **_common("0.5.3"),
        "id": "kind-seashell",
        "inputs": [
            {
                "id": "image",
                "axes": axes(["raw"], **sizes),
                "preprocessing": [zscore],
                "test_tensor": test("test_input.npy"),
            }
        ],
        "outputs": [
            {
                "id": "masks",
                "axes": axes(["foreground", "boundary"], **halos),
                "test_tensor": test("test_output.npy"),
            }
        ],
        "weights": {
            "pytorch_state_dict": {
                **test("weights.pt"),
                "architecture": architecture,
                "pytorch_version": "2.6",
            }
        },
    }
    (folder / "rdf.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False))
    return folder


def rewritten(folder: Path, **changes: Any) -> Path:
    """Change values of a package's description: names are places such as weights__pytorch_state_dict__source."""
    path = folder / "rdf.yaml"
    content = yaml.safe_load(path.read_text())
    for name, value in changes.items():
        *places, last = (int(p) if p.isdigit() else p for p in name.split("__"))
        part = content
        for place in places:
            part = part[place]
        part[last] = value
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def zipped(folder: Path, target: Path, further: dict[str, bytes] | None = None) -> Path:
    """Write a folder as the zip archive that bioimage.io serves: files without a top folder."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
        for name, content in (further or {}).items():
            archive.writestr(name, content)
    return target
