"""Train the demo network on the labelled 512x512 nuclei image of the stardist package.

    pip install --no-deps stardist
    python scripts/train_demo.py

Everything left of column 384 is trained on, the strip right of it is only ever measured. The nuclei here are
about 23 px across and those of the demo image about 80, so patches are cut at random zooms from 0.8 to 4.5.
The same machine gives the same bytes again; another one may round differently.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import click
import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from normfix.demo.network import WEIGHTS, NucleiUNet

OUTPUT = Path(__file__).parents[1] / "normfix" / "demo" / WEIGHTS
TRAINED_COLUMNS = 384
PATCH = 160
BATCH = 4
ZOOM = (0.8, 4.5)
DEMO_ZOOM = 3.5  # brings these nuclei to the size of the demo image's


@click.command()
@click.option("--steps", default=250, show_default=True, help="Optimiser steps.")
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="Where the weights go.")
def main(steps: int, seed: int, output: Path) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    image, target = labelled_nuclei()
    model = NucleiUNet()
    train(model, image[:, :TRAINED_COLUMNS], target[:, :TRAINED_COLUMNS], steps)
    for zoom in (1, DEMO_ZOOM):
        score = dice(model, image[:, TRAINED_COLUMNS:], target[:, TRAINED_COLUMNS:], zoom)
        click.echo(f"held-out strip at zoom {zoom}: Dice {score:.3f}")
    save_file(model.state_dict(), output)
    click.echo(f"{output}: {output.stat().st_size} bytes")


def labelled_nuclei() -> tuple[Tensor, Tensor]:
    """Return image and target, (H, W) each: percentiles 1 and 99.8 become 0 and 1; foreground is 0 or 1."""
    spec = importlib.util.find_spec("stardist")  # found, not imported: importing it needs TensorFlow
    if spec is None or spec.origin is None:
        raise click.ClickException("The labelled image comes with stardist: pip install --no-deps stardist")
    folder = Path(spec.origin).parent / "data" / "images"
    image = tifffile.imread(folder / "img2d.tif").astype(np.float32)
    labels = torch.from_numpy(tifffile.imread(folder / "mask2d.tif").astype(np.int64))
    low, high = np.percentile(image, (1, 99.8))
    scaled = ((image - low) / (high - low)).astype(np.float32)
    return torch.from_numpy(scaled), separated_foreground(labels).float()


def separated_foreground(labels: Tensor) -> Tensor:
    """Mark the pixels of nuclei, except those that touch another nucleus, so that neighbours stay apart."""
    padded = F.pad(labels, (1, 1, 1, 1))
    height, width = labels.shape
    foreground = labels > 0
    for down in range(3):
        for right in range(3):
            neighbour = padded[down : down + height, right : right + width]
            foreground &= (neighbour == labels) | (neighbour == 0)
    return foreground


def train(model: NucleiUNet, image: Tensor, target: Tensor, steps: int) -> None:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        patches = [random_patch(image, target) for _ in range(BATCH)]
        x, y = (torch.stack(tensors)[:, None] for tensors in zip(*patches, strict=True))
        loss = segmentation_loss(model(x), y)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            click.echo(f"step {step}: loss {loss.item():.4f}")
    model.eval()


def random_patch(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a square at a random zoom and orientation, and vary its intensities."""
    zoom = ZOOM[0] * (ZOOM[1] / ZOOM[0]) ** random.random()
    size = round(PATCH / zoom)
    top, left = random.randint(0, image.shape[0] - size), random.randint(0, image.shape[1] - size)
    pair = torch.stack((image, target))[:, top : top + size, left : left + size]
    pair = resized(pair, (PATCH, PATCH)).rot90(random.randrange(4), (1, 2))
    if random.random() < 0.5:
        pair = pair.flip(2)
    return varied_intensity(pair[0]), pair[1]


def varied_intensity(x: Tensor) -> Tensor:
    gamma, gain, offset = random.uniform(0.6, 1.6), random.uniform(0.5, 2.0), random.uniform(-0.05, 0.1)
    noise = random.uniform(0, 0.04) * torch.randn_like(x)
    return gain * x.clamp(min=0) ** gamma + offset + noise


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images[None], size=size, mode="bilinear", align_corners=False)[0]


def segmentation_loss(probability: Tensor, target: Tensor) -> Tensor:
    """Add cross-entropy and one minus the soft Dice of the whole batch."""
    overlap = 2 * (probability * target).sum() / (probability.sum() + target.sum() + 1)
    return F.binary_cross_entropy(probability, target) + 1 - overlap


@torch.no_grad()
def dice(model: NucleiUNet, image: Tensor, target: Tensor, zoom: float) -> float:
    height, width = (round(size * zoom) for size in image.shape)
    x, y = resized(torch.stack((image, target)), (height, width)) if zoom != 1 else (image, target)
    predicted, truth = model(x[None, None])[0, 0] > 0.5, y > 0.5
    return float(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))


if __name__ == "__main__":
    main()
