"""Whole images of networks that nobody converted: in stages they give what one untiled forward pass gives.

    normfix.predict(network, image, statistics="per-image", engine="stages")  =  network(image)

in float64, to 1e-9 standard deviations of the output, with an image that is twice the example's extent along one axis
and blocks of half of it. What the package is compared with is the network itself; how often it was cut is counted by
a watch, for a run in one block would show nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import normfix
from normfix.tiling.stages.options import Blocks
from normfix.tiling.stages.outlook import Outlook, Step

from .entry import Entry
from .examining import crashed
from .preparing import material, prepared, seed_of
from .tiling import distance

__all__ = ["EQUAL", "WHOLES", "Counted", "examine_whole", "image_of"]

WHOLES = {
    "exact": "in two blocks or more it gives the untiled output to 1e-9 standard deviations, in float64",
    "exact by passes": "as exact, but its statistics are measured in passes over the whole image, as it says",
    "refused": "the package says why it cannot",
    "not dense": "the output is no map of the image",
    "one size": "the network itself does not run on the longer image",
    "wrong": "it gave something else without a word",
    "failed": "it ended in an error that is no refusal",
    "timeout": "stopped after the time limit",
}

EQUAL = 1e-9


@dataclass(slots=True)
class Counted:
    """A watch that counts stages and the blocks of the heaviest run."""

    stages: int = 0
    blocks: int = 0
    timed: bool = False
    each: dict[int, int] = field(default_factory=dict)

    def begin(self, outlook: Outlook) -> None:
        """Forget an earlier run: the last one predicts."""
        self.stages, self.each = outlook.stages, {}

    def block(self, step: Step) -> None:
        """Count a block of a stage."""
        self.each[step.stage] = step.blocks
        self.blocks = max(self.each.values())


class _Told(logging.Handler):
    """Keeps what the package says instead of stages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.passes = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep why statistics are measured in passes."""
        text = record.getMessage()
        if "in passes over whole images" in text:
            self.passes = text


@contextmanager
def _listening() -> Iterator[_Told]:
    told, logger = _Told(), logging.getLogger("normfix")
    logger.addHandler(told)
    try:
        yield told
    finally:
        logger.removeHandler(told)


def examine_whole(
    entry: Entry, report: Callable[[dict[str, Any]], None] = lambda row: None
) -> dict[str, Any]:
    """Return one row; `report` is given what is known before each long step."""
    row: dict[str, Any] = {"name": entry.name, "library": entry.library}
    try:
        _examine(entry, row, report)
    except normfix.NormfixError as error:
        row |= {"category": "refused", "cause": f"{error}"[:600]}
    except Exception as error:  # noqa: BLE001 - a network of the zoo may fail in any way, and the run goes on
        row |= crashed(row["step"], error)
    return row


def image_of(entry: Entry) -> Tensor:
    """Return an image in float64 that is twice as long as the example along an axis chosen by the name."""
    size = list(entry.shape)
    size[2 + seed_of(entry.name) % entry.ndim] *= 2
    return material(tuple(size), entry.name).double()


def _examine(entry: Entry, row: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    row["step"] = "build"
    report(row)
    model = prepared(entry).double().eval()
    image = image_of(entry)
    row["image"], row["step"] = list(image.shape), "untiled"
    report(row)

    def run(net: nn.Module, x: Tensor) -> Any:
        given = entry.call(net, x) if entry.call else net(x)
        return given if entry.output is None else given[entry.output]

    start = time.process_time()
    with torch.no_grad():
        try:
            untiled = run(model, image)
        except (RuntimeError, ValueError, AssertionError) as error:
            row |= {"category": "one size", "cause": f"{error}"[:600]}
            return
    row["pass_s"] = round(time.process_time() - start, 2)
    if not isinstance(untiled, Tensor) or untiled.dim() != image.dim():
        row |= {"category": "not dense", "cause": ""}
        return
    watch, tile = Counted(), max(16, min(entry.shape[2:]) // 2)
    row["step"] = "predict"
    report(row)
    start = time.process_time()
    options: dict[str, Any] = {"forward_fn": entry.call, "output": entry.output, "engine": "stages"}
    with _listening() as told:
        given = normfix.predict(
            model, image, tile=tile, statistics="per-image", blocks=Blocks(watch=watch), **options
        )
    row |= {
        "predict_s": round(time.process_time() - start, 1),
        "stages": watch.stages,
        "blocks": watch.blocks,
        "apart": distance(given, untiled),
    }
    if row["apart"] > EQUAL:
        row |= {"category": "wrong", "cause": f"{row['apart']:.1e} sd apart"}
    elif watch.blocks < 2:
        row |= {"category": "refused", "cause": "one block is the whole image: its blocks cannot be smaller"}
    else:
        row |= {"category": "exact by passes" if told.passes else "exact", "cause": told.passes}
