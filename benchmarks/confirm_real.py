"""Confirm what real_networks.py found, with onnxruntime, numpy and plain torch: no code of normfix.

    python benchmarks/confirm_real.py FOLDER found.json

Cuts the same windows in loops of its own, runs them, and compares mean and largest difference of the stitched
prediction with the whole, and 1 - Dice. Exits 1 if a number is off by more than 1 %.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mahotas.demos
import numpy as np
import onnxruntime
import safetensors.torch
import torch

Run = Callable[[Any], Any]


def style(folder: Path) -> Run:
    """Return the network of the ONNX file itself."""
    session = onnxruntime.InferenceSession(next(folder.rglob("multistyle26.onnx")))
    chosen = np.eye(26, dtype=np.float32)[3]
    return lambda x: session.run(None, {"image": x, "style_weights": chosen})[0]


def cosmics(folder: Path) -> Run:
    """Return deepCR's network in plain torch."""
    package = types.ModuleType("deepCR")
    package.__path__ = [str(next(folder.rglob("unet_batchnorm.py")).parent)]
    sys.modules["deepCR"] = package
    network = importlib.import_module("deepCR.unet_batchnorm").UNet2SigmoidBatchNorm(1, 1, 32).eval()
    path = next(p for p in folder.rglob("ACS-WFC-F606W.pth") if p.parent.name == "mask")
    weights = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - weights only
    network.load_state_dict({name.replace("module.", "", 1): v for name, v in weights.items()})

    def run(x: Any) -> Any:
        with torch.no_grad():
            return network(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    return run


def demo(folder: Path) -> Run:
    """Return the demo network, written anew from its weights: norms by numpy's mean and variance."""
    (path,) = Path(__file__).parents[1].rglob("nuclei_unet.safetensors")
    tensors = safetensors.torch.load_file(path)

    def block(x: torch.Tensor, name: str) -> torch.Tensor:
        for conv, norm in ((0, 1), (3, 4)):
            x = torch.nn.functional.conv2d(x, tensors[f"{name}.{conv}.weight"], padding=1)
            rows = x[0].numpy().astype(np.float64)
            centre, spread = rows.mean((1, 2), keepdims=True), rows.std((1, 2), keepdims=True)
            flat = torch.from_numpy((rows - centre) / np.sqrt(spread**2 + 1e-5)).float()[None]
            weight, bias = (tensors[f"{name}.{norm}.{p}"].view(1, -1, 1, 1) for p in ("weight", "bias"))
            x = (flat * weight + bias).clamp_min(0)
        return x

    def run(x: Any) -> Any:
        y, skips = block(torch.from_numpy(x), "encoder.0"), []
        for level in (1, 2, 3):
            skips.append(y)
            y = block(torch.nn.functional.max_pool2d(y, 2), f"encoder.{level}")
        for level in (0, 1, 2):
            wide = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
            y = block(torch.cat([skips.pop(), wide], 1), f"decoder.{level}")
        y = torch.nn.functional.conv2d(y, tensors["head.weight"], tensors["head.bias"])
        return (1 / (1 + torch.exp(-y))).numpy()

    return run


def measured(run: Run, image: Any, tile: int, before: int, after: int) -> dict[str, float]:
    """Stitch windows of a tile and its halo, cut at the border of the image."""
    whole = run(image).astype(np.float64)
    stitched = np.zeros_like(whole)
    height, width = image.shape[2:]
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            top, left = max(0, y - before), max(0, x - before)
            bottom, right = min(height, y + tile + after), min(width, x + tile + after)
            out = run(np.ascontiguousarray(image[:, :, top:bottom, left:right]))
            part = out[:, :, y - top : y - top + tile, x - left : x - left + tile]
            stitched[:, :, y : y + tile, x : x + tile] = part
    apart = np.abs(stitched - whole) / whole.std(ddof=1)
    a, b = stitched > 0.5, whole > 0.5
    return {
        "mean_sd": float(apart.mean()),
        "max_sd": float(apart.max()),
        "dice": float(1 - 2 * (a & b).sum() / (a.sum() + b.sum())) if (a | b).any() else 0.0,
    }


def main() -> None:
    """Compare number by number."""
    folder, found = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    grey = mahotas.demos.load("nuclear")[300:684, 700:1084, 0].astype(np.float32)[None, None] / 255
    pixels = mahotas.demos.load("nuclear")[..., 0].astype(np.float64)
    low, high = np.percentile(pixels, (1, 99.8))
    scaled = np.ascontiguousarray(
        ((pixels - low) / (high - low)).astype(np.float32)[None, None, 300:684, 700:1084]
    )
    images = {"style": np.repeat(grey, 3, 1), "cosmics": grey * 100, "demo": scaled}
    wrong = 0
    for name, build in (("style", style), ("cosmics", cosmics), ("demo", demo)):
        if name not in found:  # real_networks.py was asked for others
            continue
        record = found[name]
        halo = record["tiling"]["halo"][0]
        own = measured(build(folder), images[name], record["tiling"]["tile"][0], *halo)
        theirs = record["tile_mismatch"]["whole"]
        for key, value in own.items():
            close = abs(value - theirs[key]) <= 0.01 * abs(value) + 1e-5
            wrong += not close
            print(f"{name} {key}: here {value:.4g}, normfix {theirs[key]:.4g}{'' if close else '  DIFFERS'}")
        print(f"{name}: causes {[c['cause'] for c in record['culprits']]}, halo {halo}")
    sys.exit(1 if wrong or not found else 0)


if __name__ == "__main__":
    main()
