"""Time and memory of stages against everything else that gives (or is said to give) the same: ratios of one run.

    python benchmarks/streaming.py 2d --size 2048 --tile 512
    python benchmarks/streaming.py 3d --size 256 --tile 128
    python benchmarks/streaming.py growth --sizes 1024 2048 4096 8192 --plot growth.png

Every ratio is to one untiled forward pass of the original network in the same process, in processor time on one
thread: the better of two runs, but one run of the rivals in 3D, which take long. Capture and the cutting into
stages are done before the clock starts and shown on their own.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import normfix
from normfix.conversion.measuring import measure_sites_
from normfix.conversion.targets import site_target
from normfix.images.collections import Images
from normfix.networks.calling import Caller
from normfix.records.spans import round_up
from normfix.tiling.geometry import geometry_of


def unet(ndim: int, width: int) -> nn.Module:
    """Return MONAI's BasicUNet with 18 instance norms."""
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    features = (width, width, 2 * width, 4 * width, 8 * width, width)
    return BasicUNet(spatial_dims=ndim, in_channels=1, out_channels=2, features=features).eval()


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Return the processor time of the fastest of some calls: ratios then hold on a busy machine too."""
    found = list[float]()
    for _ in range(times):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def first_use(model: nn.Module, image: Tensor) -> float:
    """Return what a network costs beyond its work, which is little on so small an image: to measure and to predict."""
    measured = seconds(lambda: normfix.calibrate_(model, image, tile=32))
    return measured + seconds(lambda: normfix.predict(model, image, tile=32, engine="stages"))


def compare(ndim: int, size: int, tile: int, width: int, rivals: bool) -> None:
    """Print the table of ratios."""
    net = unet(ndim, width)
    small = (128,) * ndim if ndim == 2 else (48,) * ndim
    done = normfix.convert(net, torch.rand(1, 1, *small))
    model, scan = done.model.eval(), done.scan
    image = torch.rand(1, 1, *(size,) * ndim, generator=torch.Generator().manual_seed(1)) ** 3 * 5
    warm = torch.rand(1, 1, *(64,) * ndim)
    uses = [first_use(network, warm) for network in (model, model, copy.deepcopy(model))]
    with torch.no_grad():
        original = net(image)
        untiled = seconds(lambda: net(image), 2)
    print(
        f"{ndim}D U-Net, 18 instance norms, width {width}; image {size}^{ndim}, blocks of {tile}, {threads()}"
    )
    print(f"untiled pass: {untiled:.2f} s = 1.00", flush=True)
    for name, use in zip(
        ("first use: capture, stages, proof", "second use", "use of a copy"), uses, strict=True
    ):
        row(name, use, untiled)
    row("calibrate in stages", seconds(lambda: normfix.calibrate_(model, image, tile=tile), 2), untiled)
    staged = predicted = None

    def predict() -> None:
        nonlocal staged
        staged = normfix.predict(model, image, tile=tile, engine="stages")

    row("predict in stages", seconds(predict, 2), untiled, error(staged, original))
    if not rivals:
        return
    geometry = geometry_of(scan)
    halos = [round_up(max(h), s) for h, s in zip(geometry.halo, geometry.stride, strict=True)]

    def tiles() -> None:
        nonlocal predicted
        predicted = normfix.predict(model, image, tile=tile, engine="tiles")

    row(f"predict in tiles, full halo {halos}", seconds(tiles, 4 - ndim), untiled, error(predicted, original))
    del predicted
    targets = [site_target(model, d, express=False) for d in done.plan.converted if d.measured]
    images = Images.of([image, image], torch.device("cpu"), torch.float32)
    part = 3  # sequential passes of several images: time the first, middle and last site, which bound the sum
    chosen = [targets[0], targets[len(targets) // 2], targets[-1]]
    one = seconds(lambda: measure_sites_(model, chosen, images, Caller()))
    passes = (one - 2 * untiled) / (2 * part) * len(targets)
    row("calibrate by sequential passes (extrapolated)", passes, untiled)
    from monai.inferers import SlidingWindowInferer

    window = tile + 2 * max(halos)
    inferer = SlidingWindowInferer((min(size, window),) * ndim, overlap=2 * max(halos) / window)
    result = None

    def monai() -> None:
        nonlocal result
        with torch.no_grad():
            result = inferer(image, model)

    row(
        f"MONAI SlidingWindowInferer, window {min(size, window)}",
        seconds(monai, 4 - ndim),
        untiled,
        error(result, original),
    )


def row(name: str, taken: float, untiled: float, difference: float | None = None) -> None:
    """Print one line."""
    shown = "" if difference is None else f"   max difference {difference:.1e} sd"
    print(f"{name:58s} {taken:8.2f} s   {taken / untiled:6.2f}{shown}", flush=True)


def error(actual: Tensor | None, expected: Tensor) -> float:
    """Return the largest difference in sd."""
    assert actual is not None
    return float((actual - expected).abs().max() / expected.std())


def threads() -> str:
    """Say what the numbers depend on."""
    return f"{torch.get_num_threads()} thread(s), torch {torch.__version__.split('+')[0]}"


class Waves:
    """An image of any size that is computed where it is read."""

    def __init__(self, size: int) -> None:
        self.shape, self.dtype = (size, size), torch.zeros(0).numpy().dtype

    def __getitem__(self, index: tuple[slice, slice]) -> object:
        y, x = (torch.arange(s.start, s.stop, dtype=torch.float32) for s in index)
        return ((y[:, None] * 0.013).sin() * (x * 0.017).cos() + ((y[:, None] * x) % 97) / 97).numpy()


def grown(size: int, tile: int, width: int, budget: int) -> None:
    """Calibrate and predict one image within a budget and print seconds and the peak of memory as JSON."""
    net = unet(2, width)
    model = normfix.convert(net, torch.rand(1, 1, 128, 128)).model.eval()
    image = normfix.open_image(Waves(size), model)
    small = normfix.open_image(Waves(128), model)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        normfix.calibrate_(model, small, tile=tile)
        normfix.write_prediction(model, small, place / "small.zarr", tile, engine="stages")
        blocks = normfix.Blocks(budget=budget, store=place)
        calibrated = seconds(lambda: normfix.calibrate_(model, image, tile, blocks=blocks))
        predicted = seconds(
            lambda: normfix.write_prediction(
                model, image, place / "out.zarr", tile, engine="stages", blocks=blocks
            )
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"size": size, "calibrate": calibrated, "predict": predicted, "peak": peak}))


def growth(sizes: list[int], tile: int, width: int, budget: int, plot: str | None) -> None:
    """Run each size in a process of its own and show how time and memory grow."""
    found = []
    for size in sizes:
        command = [sys.executable, __file__, "one", "--size", str(size), "--tile", str(tile)]
        command += ["--width", str(width), "--budget", str(budget)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        found.append(json.loads(lines[-1]))
        seconds_per = (found[-1]["calibrate"] + found[-1]["predict"]) / size**2 * 1e6
        print(
            f"{size:6d}^2  calibrate {found[-1]['calibrate']:7.1f} s  predict {found[-1]['predict']:7.1f} s  "
            f"{seconds_per:6.2f} s/Mpx  peak {found[-1]['peak'] / 2**20:6.0f} MiB",
            flush=True,
        )
    if plot:
        draw(found, plot)


def draw(found: list[dict[str, float]], path: str) -> None:
    """Plot time and peak memory against pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    pixels = [f["size"] ** 2 / 1e6 for f in found]
    for name in ("calibrate", "predict"):
        left.loglog(pixels, [f[name] for f in found], "o-", label=name)
    slope = found[0]["calibrate"] / pixels[0]
    left.loglog(pixels, [slope * p for p in pixels], "k:", lw=1, label="linear")
    left.set(xlabel="megapixels", ylabel="seconds", title="time")
    left.legend(frameon=False)
    right.semilogx(pixels, [f["peak"] / 2**20 for f in found], "o-")
    right.set(xlabel="megapixels", ylabel="MiB", title="peak memory of the process", ylim=(0, None))
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["2d", "3d", "growth", "one"])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--budget", type=int, default=1 << 28)
    parser.add_argument("--plot")
    parser.add_argument("--no-rivals", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    match given.what:
        case "2d" | "3d":
            compare(int(given.what[0]), given.size, given.tile, given.width, not given.no_rivals)
        case "growth":
            growth(given.sizes, given.tile, given.width, given.budget, given.plot)
        case "one":
            grown(given.size, given.tile, given.width, given.budget)


if __name__ == "__main__":
    main()
