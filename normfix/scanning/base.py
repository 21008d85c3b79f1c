"""The base: the copy of a network that everything is derived from, which runs alone and remembers nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.networks.alone import run_alone
from normfix.networks.calling import Caller, NotTaken, home_of
from normfix.networks.copying import as_trained_copy, copy_of
from normfix.networks.numerics import IDENTITY, deviation
from normfix.networks.randomness import OwnRandomness
from normfix.scanning.sites import materialise_

__all__ = ["Base", "base_of"]


@dataclass(frozen=True, slots=True)
class Base:
    """A network that everything is derived from, and how it is called from here on."""

    network: nn.Module
    caller: Caller


def base_of(
    model: nn.Module,
    example: Tensor,
    caller: Caller,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    as_trained: bool = False,
) -> Base:
    """Return the copy that everything is derived from: materialised, on its device, in its dtype."""
    base = as_trained_copy(model) if as_trained else copy_of(model)
    base.to(device=device, dtype=dtype)
    given = example.to(*home_of(base))
    with OwnRandomness():
        materialise_(base, caller, given)
    try:
        draws = _require_one_network(base, model, caller, _quarter(given))
    except NotTaken:
        draws = _require_one_network(base, model, caller, given)
    return Base(base, replace(caller, draws=draws))


def _quarter(example: Tensor) -> Tensor:
    """Return a corner of half the extents, on which most networks run as well."""
    for axis in range(2, example.dim()):
        if example.shape[axis] >= 64:
            example = example.narrow(axis, 0, example.shape[axis] // 2)
    return example


def _require_one_network(base: nn.Module, model: nn.Module, caller: Caller, example: Tensor) -> bool:
    """Make sure, on copies, that what runs is the copy alone, and that each run is for itself; tell whether it draws.

    Raises:
        NormfixError: NF109 if it does not run on the example, NF208 and NF246 as below.
    """
    watched = replace(caller, draws=False)  # what is drawn from a source of its own is not seen
    first, draws = _drawing(lambda: run_alone(copy_of(base).eval(), model, watched, example))
    _require_no_memory(copy_of(base).eval(), replace(caller, draws=draws), example, first)
    return draws


def _drawing(run: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """Run a network and tell whether it draws random numbers; if it does, it drew them from a source of our own."""
    source = OwnRandomness()
    with torch.no_grad():
        try:
            with source:
                return run(), source.drawn
        except NotTaken:  # perhaps of being watched
            return run(), False


def _require_no_memory(untried: nn.Module, caller: Caller, example: Tensor, first: Tensor) -> None:
    """Run a copy on another input, then on the example: it must give what one gave that had seen nothing before.

    Raises:
        NormfixError: NF246 if it does not, so that "the original's output on an image" is no such thing.
    """
    with torch.no_grad():
        caller(untried, example.flip(-1) * 0.5)
        again = caller(untried, example)
    a, b = first.double().nan_to_num(), again.double().nan_to_num()
    bound = IDENTITY.get(first.dtype, 0.0)
    if a.shape == b.shape and deviation(b, a, float(a.std().nan_to_num()) or 1.0)[0] <= bound:
        return
    raise NormfixError(
        "NF246",
        "its output on one input is another after it has run on a different one: it keeps what it computed in an "
        "attribute or buffer, or draws random numbers of its own. Compute it anew in every forward, or reset it.",
        where=type(untried).__name__,
    )
