"""Which constants are best: whole images or windows by each law, on the labelled columns the demo network never saw.

    pip install ".[demo]" && pip install --no-deps stardist
    python benchmarks/choosing.py
    python benchmarks/choosing.py --cost
    python benchmarks/choosing.py --image IMAGE.tif --labels LABELS.tif --zooms 1

Prints a table of Dice per zoom of the image. Statistics are measured on the unlabelled image that is predicted, in
windows of the 160 pixels that the network was trained on (--size); "measured live" takes every window in the network as
it is, the others each layer while all before it use their constants.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfix
from normfix.conversion.measurement import measure_
from normfix.conversion.measuring import freeze_sites_
from normfix.conversion.pooling import windows_of
from normfix.conversion.targets import planned_targets
from normfix.demo.network import nuclei_unet
from normfix.images.collections import Images
from normfix.images.sources import TensorImage, whole
from normfix.layers import ChannelNorm
from normfix.networks.calling import Caller
from normfix.networks.copying import copy_of
from normfix.records.statistics import WHOLE, parse_statistics
from normfix.tiling.geometry import geometry_of

LAWS = ("geometric", "median", "arithmetic", "total")


def read(image: str, labels: str) -> tuple[Tensor, Tensor]:
    """Return an image of one channel and its labels, as float32 (1, 1, H, W); labels are 0 or 1."""
    pair = (tifffile.imread(image), tifffile.imread(labels) > 0)
    found = (torch.from_numpy(a.astype("float32"))[None, None] for a in pair)
    return next(found), next(found)


def labelled() -> tuple[Tensor, Tensor]:
    """Return stardist's image and its nuclei, columns from 320 on."""
    spec = importlib.util.find_spec("stardist")  # found, not imported: importing it needs TensorFlow
    if spec is None or spec.origin is None:
        raise SystemExit("The image comes with: pip install --no-deps stardist")
    folder = Path(spec.origin).parent / "data" / "images"
    image, labels = read(str(folder / "img2d.tif"), str(folder / "mask2d.tif"))
    return image[..., 320:], labels[..., 320:]


def zoomed(image: Tensor, labels: Tensor, zoom: float) -> tuple[Tensor, Tensor]:
    """Return both at a zoom, extents multiples of 8, the image scaled by percentiles over all of it."""
    size = [int(n * zoom) // 8 * 8 for n in image.shape[2:]]
    x = F.interpolate(image, size, mode="bilinear", antialias=True)
    low, high = np.percentile(x.numpy(), (1, 99.8))
    return (x - float(low)) / float(high - low), F.interpolate(labels, size, mode="nearest")


def dice(prediction: Tensor, labels: Tensor) -> float:
    """Return the overlap of what is above 0.5 with the labels."""
    found, true = prediction > 0.5, labels > 0.5
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


def live_tiles(net: nn.Module, x: Tensor, size: int) -> Tensor:
    """Return what tiles side by side give, each normalised by itself."""
    rows = [torch.cat([net(p) for p in row.split(size, 3)], 3) for row in x.split(size, 2)]
    return torch.cat(rows, 2)


def layers(net: nn.Module) -> list[ChannelNorm]:
    """Return the converted norms in order."""
    return [module for module in net.modules() if isinstance(module, ChannelNorm)]


def freeze_live_(net: nn.Module, x: Tensor, size: int) -> None:
    """Give norms the geometric law of what windows have in the network as it is: each frozen at its own values."""
    found = []
    for window in windows_of(TensorImage(x), (size,), GEOMETRY):
        freeze_sites_(net, planned_targets(net, PLAN), whole(window), Caller())
        found.append([(n.running_mean.double().clone(), n.running_var.double().clone()) for n in layers(net)])
    for norm, own in zip(layers(net), zip(*found, strict=True), strict=True):
        means, variances = (torch.stack(values) for values in zip(*own, strict=True))
        norm.running_mean.copy_(means.mean(0))
        norm.running_var.copy_((variances + norm.eps).log().mean(0).exp() - norm.eps)


DONE = normfix.convert(nuclei_unet(), torch.rand(1, 1, 96, 96, generator=torch.Generator().manual_seed(0)))
PLAN, GEOMETRY = DONE.plan, geometry_of(DONE.scan)


def frozen(x: Tensor, name: str) -> nn.Module:
    """Return the network with constants of an image, by what is written on the command line."""
    net = copy_of(DONE.model)
    statistics = WHOLE if name == "whole" else parse_statistics(name)
    images = Images.of(x, x.device, x.dtype)
    measure_(net, planned_targets(net, PLAN), images, Caller(), geometry=GEOMETRY, statistics=statistics)
    return net


def measured_live(x: Tensor, size: int) -> nn.Module:
    """Return the network with the geometric law of windows that are measured in the network as it is."""
    net = copy_of(DONE.model)
    freeze_live_(net, x, size)
    return net


def cost(size: int) -> None:
    """Print processor seconds of one conversion and of choosing, and their ratio."""
    x = torch.rand(1, 1, 2 * size, 3 * size, generator=torch.Generator().manual_seed(0))
    net, seconds = nuclei_unet(), []
    for run in (lambda: normfix.convert(net, x), lambda: normfix.choose(net, x, window=size)):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    print(f"convert {seconds[0]:.1f} s, choose {seconds[1]:.1f} s, {seconds[1] / seconds[0]:.2f}x")


def main() -> None:
    """Measure and print, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image")
    parser.add_argument("--labels")
    parser.add_argument("--zooms", type=float, nargs="+", default=[3.5, 2.0, 1.0])
    parser.add_argument("--size", type=int, default=160, help="of windows and tiles, in pixels")
    parser.add_argument("--cost", action="store_true", help="measure the time of choosing instead")
    given = parser.parse_args()
    if given.cost:
        cost(given.size)
        return
    compare(given)


@torch.no_grad()
def compare(given: argparse.Namespace) -> None:
    """Print a row for each zoom and kind of constants."""
    image, labels = labelled() if given.image is None else read(given.image, given.labels)
    original, size = nuclei_unet(), given.size
    rows: dict[str, Callable[[Tensor], Tensor]] = {
        "live, whole image": original,
        f"live, tiles of {size}": lambda x: live_tiles(original, x, size),
        f"windows:{size}:geometric, measured live": lambda x: measured_live(x, size)(x),
        "whole": lambda x: frozen(x, "whole")(x),
    }
    for law in LAWS:
        rows[f"windows:{size}:{law}"] = lambda x, law=law: frozen(x, f"windows:{size}:{law}")(x)  # type: ignore[misc]
    print("| zoom | constants | Dice |\n| --- | --- | --- |")
    for zoom in given.zooms:
        x, true = zoomed(image, labels, zoom)
        for name, predict in rows.items():
            print(f"| {zoom:g} | {name} | {dice(predict(x), true):.3f} |", flush=True)


if __name__ == "__main__":
    main()
