"""A converted network as a program (.pt2) that needs neither its source nor normfix to run.

A network that was given as an object cannot be built again from its folder; its program can still be run, on any
size that the export kept free.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from normfix.calling import evaluating, home_of
from normfix.numerics import IDENTITY, exact_arithmetic

__all__ = ["PROGRAM", "write_program"]

PROGRAM = "program.pt2"


def write_program(
    path: Path, model: nn.Module, shape: tuple[int, ...], multiples: tuple[int, ...] | None
) -> str:
    """Export a network and write it if the program repeats it on another size; return why not, else "".

    Args:
        path: the file to write.
        model: not modified.
        shape: (N, C, *space) to export with.
        multiples: what sizes the network is exact for are multiples of, per axis.
    """
    device, dtype = home_of(model)
    generator = torch.Generator().manual_seed(0)
    steps = multiples or (1,) * (len(shape) - 2)
    first = torch.randn((2, *shape[1:]), generator=generator).to(device, dtype)
    other = (
        3,
        shape[1],
        *(n + step * (2 if step > 1 else 16) for n, step in zip(shape[2:], steps, strict=True)),
    )
    second = torch.randn(other, generator=generator).to(device, dtype)
    free = dict.fromkeys((0, *range(2, len(shape))), torch.export.Dim.AUTO)
    try:
        with _quiet(), evaluating(model), exact_arithmetic():
            program = torch.export.export(
                deepcopy(model).eval(), (first,), dynamic_shapes=(free,), strict=False
            )
            if not _same(program.module()(second), model(second), IDENTITY[dtype]):
                return "the exported program gives another result"
            torch.export.save(program, path)
    except Exception as error:  # noqa: BLE001 - torch.export raises a score of kinds for what it cannot capture
        path.unlink(missing_ok=True)
        return f"torch.export cannot capture it: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""


def _same(actual: object, expected: object, tolerance: float) -> bool:
    if isinstance(expected, Tensor) and isinstance(actual, Tensor) and actual.shape == expected.shape:
        scale = float(expected.std()) or 1.0
        return float((actual - expected).abs().max()) <= tolerance * scale
    if isinstance(expected, dict) and isinstance(actual, dict) and actual.keys() == expected.keys():
        return all(_same(actual[key], expected[key], tolerance) for key in expected)
    if (
        isinstance(expected, list | tuple)
        and isinstance(actual, list | tuple)
        and len(actual) == len(expected)
    ):
        return all(_same(a, e, tolerance) for a, e in zip(actual, expected, strict=True))
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what torch.export says about a network it then captures or refuses."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
