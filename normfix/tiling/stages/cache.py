"""Keep captured programs and their schedules per model, and use them only while they are what the model computes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normfix.images.sources import Image
from normfix.layers.affine import as_in_graphs
from normfix.networks.calling import Caller
from normfix.networks.copying import original_of
from normfix.networks.numerics import IDENTITY, deviation
from normfix.records.spans import round_up
from normfix.tiling.stages.program import Program, captured_program
from normfix.tiling.stages.schedule import Schedule
from normfix.tiling.stages.scheduling import schedule

__all__ = ["program_of", "schedule_of"]


@dataclass(frozen=True, slots=True)
class _Capture:
    """A program, what it was captured for and the example it is compared on."""

    key: object
    program: Program
    example: Tensor

    def still_holds(self, model: nn.Module, caller: Caller) -> bool:
        """Tell whether the program, with the model's present weights, still computes what the model does."""
        self.program.refresh_(model)
        with as_in_graphs():
            expected = tree_leaves(caller(model, self.example))
        actual = tree_leaves(self.program.body(self.example))[: len(expected)]
        return all(
            a.shape == e.shape
            and deviation(a, e, float(e.double().std(correction=0)) or 1.0)[0] <= IDENTITY.get(e.dtype, 0.0)
            for a, e in zip(actual, expected, strict=True)
        )


_CAPTURES: weakref.WeakKeyDictionary[nn.Module, _Capture] = weakref.WeakKeyDictionary()
_SCHEDULES: weakref.WeakKeyDictionary[Any, dict[object, Schedule]] = weakref.WeakKeyDictionary()


@contextmanager
def program_of(
    model: nn.Module,
    caller: Caller,
    sites: tuple[str, ...],
    image: Image,
    stride: Sequence[int],
) -> Iterator[Program]:
    """Capture the model, or lend the capture of last time with the model's present weights, to one user at a time.

    Args:
        model: to capture; the capture of a twin is kept for the network that it was made of.
        caller: calls it.
        sites: paths of modules to cut at.
        image: to capture it on.
        stride: of the network.
    """
    owner = original_of(model)
    ndim = len(image.shape) - 2
    key = (caller, sites, ndim, _fingerprint(owner))
    known = _CAPTURES.pop(owner, None)
    if known is None or known.key != key or not known.still_holds(model, caller):
        limit = {1: 1024, 2: 256, 3: 64}[ndim]
        window = [(0, min(n, round_up(limit, m))) for n, m in zip(image.shape[2:], stride, strict=True)]
        example = _telling(model, caller, image.read(window)[:1].clone())
        known = _Capture(key, captured_program(model, caller, example, sites), example)
    try:
        yield known.program
    finally:
        _CAPTURES[owner] = known


def _telling(model: nn.Module, caller: Caller, example: Tensor) -> Tensor:
    """Return an example that a program can be compared on: noise, where the network overflows on the image."""
    with torch.no_grad():
        values = [v for v in tree_leaves(caller(model, example)) if isinstance(v, Tensor)]
    if all(bool(torch.isfinite(value).all()) for value in values):
        return example
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(example.device, example.dtype)


def schedule_of(
    program: Program,
    stride: Sequence[int],
    images: Sequence[Image],
    *,
    measured: tuple[str, ...],
    outputs: bool,
) -> Schedule:
    """Cut the program into stages, or take the schedule of last time."""
    ragged = any(n % s for image in images for n, s in zip(image.shape[2:], stride, strict=True))
    known = _SCHEDULES.setdefault(program.body, {})
    key = (tuple(stride), ragged, measured, outputs)
    if key not in known:
        known[key] = schedule(program, stride=stride, ragged=ragged, measured=measured, outputs=outputs)
    return known[key]


def _fingerprint(model: nn.Module) -> object:
    """Return what must not have changed for a captured graph to still be the model's."""
    return (
        tuple((path, type(module), id(module)) for path, module in model.named_modules()),
        tuple(
            (name, t.shape, t.dtype, t.device)
            for name, t in (*model.named_parameters(), *model.named_buffers())
        ),
    )
