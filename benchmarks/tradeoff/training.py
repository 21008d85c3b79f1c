"""Train a network on random patches, and fine-tune one with normfix.prepare_finetune."""

from __future__ import annotations

import random
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfix
from normfix.layers import BatchRenorm, RenormSchedule

from .data import Region

__all__ = ["RATE", "finetune", "train"]

RATE = 3e-3
"""Learning rate of a network that is trained from scratch, whoever chooses the rest."""


def train(model: nn.Module, region: Region, window: tuple[int, ...], batch: int, steps: int) -> float:
    """Train from scratch; return seconds of processor time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-3)
    if any(isinstance(module, BatchRenorm) for module in model.modules()):
        RenormSchedule(model, steps).follow(optimizer)
    return _run(model, optimizer, region, window, batch, steps)


def finetune(
    model: nn.Module, region: Region, window: tuple[int, ...], batch: int, steps: int, rate: float = 1e-3
) -> float:
    """Train, or go on training on new data, by the package's own choices; return seconds of processor time."""
    run = normfix.prepare_finetune(model.train(), steps, weight_decay=1e-3)
    optimizer = torch.optim.AdamW(run.groups, lr=rate)
    run.follow(optimizer)
    taken = _run(model, optimizer, region, window, batch, steps)
    for module in model.modules():
        if isinstance(module, BatchRenorm):
            module.hold_(False)
    return taken


def _run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    region: Region,
    window: tuple[int, ...],
    batch: int,
    steps: int,
) -> float:
    model.train()
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.process_time()
    for _ in range(steps):
        image, label = (
            torch.stack(part) for part in zip(*(_patch(region, window) for _ in range(batch)), strict=True)
        )
        loss = _loss(model(image), label)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
    model.eval()
    return time.process_time() - start


def _patch(region: Region, window: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cut a window at random, turn it in the plane, and vary its intensities."""
    index = random.randrange(len(region.images))
    pair = torch.stack((region.images[index], region.labels[index]))
    starts = [random.randint(0, size - part) for size, part in zip(pair.shape[2:], window, strict=True)]
    for axis, (start, part) in enumerate(zip(starts, window, strict=True)):
        pair = pair.narrow(axis + 2, start, part)
    pair = pair.rot90(random.randrange(4), (-2, -1))
    if random.random() < 0.5:
        pair = pair.flip(-1)
    image, label = pair
    gain, offset = random.uniform(0.7, 1.4), random.uniform(-0.05, 0.05)
    return gain * image + offset + random.uniform(0, 0.05) * torch.randn_like(image), label


def _loss(logits: Tensor, label: Tensor) -> Tensor:
    """Add cross-entropy and one minus the soft Dice of the batch."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * label).sum() / (probability.sum() + label.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, label) + 1 - overlap
