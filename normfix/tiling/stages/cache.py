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
from normfix.networks.behaviour import behaviour_of
from normfix.networks.calling import Caller, failures
from normfix.networks.copying import original_of
from normfix.networks.numerics import IDENTITY, deviation
from normfix.records.spans import round_up
from normfix.tiling.stages.program import Program, Run, captured_program, marked
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.schedule import Schedule
from normfix.tiling.stages.scheduling import schedule

__all__ = ["program_of", "schedule_of"]


@dataclass(frozen=True, slots=True)
class _Capture:
    """A program and what it was captured for."""

    key: object
    program: Program

    def still_holds(self, model: nn.Module, run: Run, example: Tensor) -> bool:
        """Tell whether the program, with the model's present weights, computes what the model does at every site."""
        self.program.refresh_(model)
        try:
            with as_in_graphs():
                expected = tree_leaves(run(model, example))
            actual = tree_leaves(self.program.body(example))
        except failures():  # it is another network, or one of other sizes: capturing it says what is wrong
            return False
        return len(actual) == len(expected) and all(map(_are_same, actual, expected))


def _are_same(a: Tensor, e: Tensor) -> bool:
    sd = float(e.double().std(correction=0)) or 1.0
    return a.shape == e.shape and deviation(a, e, sd)[0] <= IDENTITY.get(e.dtype, 0.0)


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

    Raises:
        NotInStages: NF324 for a network that draws random numbers, and as captured_program.
    """
    if caller.draws:
        where = type(original_of(model)).__name__
        raise NotInStages(
            "NF324", "it draws random numbers, and blocks draw others than the whole.", where=where
        )
    owner = original_of(model)
    ndim = len(image.shape) - 2
    key = (caller, sites, ndim, behaviour_of(owner))
    known = _CAPTURES.pop(owner, None)
    limit = {1: 1024, 2: 256, 3: 64}[ndim]
    window = [(0, min(n, round_up(limit, m))) for n, m in zip(image.shape[2:], stride, strict=True)]
    # of this image: what an earlier one did not reach (a bound, a branch) it may
    example = _telling(model, caller, image.read(window)[:1].clone())
    if known is None or known.key != key or not known.still_holds(model, marked(caller, sites), example):
        known = _Capture(key, captured_program(model, caller, example, sites))
    try:
        yield known.program
    finally:
        _CAPTURES[owner] = known


def _telling(model: nn.Module, caller: Caller, example: Tensor) -> Tensor:
    """Return an example that a program can be compared on: noise, where the image is flat or the network overflows."""
    if bool((example != example.flatten()[0]).any()):
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
