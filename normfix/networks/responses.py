"""What a network gives for a little noise: it moves with all that a forward reads, whether a picture shows it or not.

`behaviour` looks at modules, attributes, code and what code reads by name; settings in an object that hides them, in a
context, in a module that is no part of the network or in the state of a library it does not see. Two networks of equal
values that are set differently give different responses, unless a small image does not reach what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normfix.networks.alone import run_alone
from normfix.networks.behaviour import state_of
from normfix.networks.calling import Caller, NotTaken, home_of, refusals
from normfix.networks.copying import original_of, twin_of
from normfix.networks.numerics import IDENTITY, deviation, exact_arithmetic
from normfix.networks.randomness import OwnRandomness
from normfix.networks.reading import LIBRARIES
from normfix.records.sizes import ProvedSizes

__all__ = ["Response", "is_as_known", "response_of"]

_EXTENTS = {1: 256, 2: 64, 3: 32}
"""Pixels per axis of the noise, at most, per number of axes."""


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """What a network gave; equal to what differs from it by rounding alone. One that took no noise gave None."""

    values: Tensor | None

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Response):
            return NotImplemented
        mine, theirs = self.values, other.values
        if mine is None or theirs is None:
            return mine is theirs
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            return False
        finite = mine.isfinite()
        if not torch.equal(finite, theirs.isfinite()):
            return False
        mine, theirs = mine.masked_fill(~finite, 0), theirs.masked_fill(~finite, 0)
        sd = float(mine.double().std(correction=0)) or 1.0
        return deviation(mine, theirs, sd)[0] <= IDENTITY.get(mine.dtype, 0.0)


def response_of(
    model: nn.Module, caller: Caller, shape: Sequence[int], sizes: ProvedSizes | None = None
) -> Response:
    """Return what a network gives for noise.

    Args:
        model: not modified.
        caller: calls it.
        shape: (N, C, *space) of what it takes; the noise is smaller where that shows as much.
        sizes: of the scan that was of this shape, if there is one.

    Raises:
        NormfixError: NF208 if a copy of it runs the network's own modules.
    """
    extents = (1, shape[1], *_extents(shape[2:], sizes))
    noise = torch.randn(extents, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    try:
        with exact_arithmetic():
            given = _given(model, caller, noise.to(*home_of(model)))
    except refusals():  # it takes another size
        return Response(None)
    return Response(given.detach().cpu())


def _extents(space: Sequence[int], sizes: ProvedSizes | None) -> Sequence[int]:
    """Return the extents of the noise: small ones, unless a branch on the size parts them from what was scanned."""
    most = _EXTENTS[min(3, len(space))]
    small = tuple(min(n, most) for n in space)
    if sizes is None:
        return small
    here, there = ({*sizes.broken(size), *sizes.passed(size)} for size in (small, space))
    return space if sizes.unknown or here - there else small


def _given(model: nn.Module, caller: Caller, noise: Tensor) -> Tensor:
    """Run a twin of a network that may draw random numbers: the same ones each time, from no generator of torch's."""
    try:
        with OwnRandomness():
            return run_alone(twin_of(model), model, caller, noise)
    except NotTaken:  # perhaps of being watched
        return run_alone(twin_of(model), model, caller, noise)


@dataclass(frozen=True, slots=True)
class _Known:
    """What a network gave, and the values that it had."""

    response: Response
    state: object


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
"""Responses of networks whose geometry travels with them."""


def is_as_known(
    model: nn.Module, caller: Caller, shape: Sequence[int], sizes: ProvedSizes | None = None
) -> bool:
    """Tell whether a network gives what it gave before, or has other weights now; of one that is new, remember it.

    Args:
        model: whose modules, attributes and code are as before.
        caller: calls it.
        shape: (N, C, *space) of what it was scanned with.
        sizes: that the scan speaks for.

    Returns:
        False where other settings than anything in it shows must have changed: with equal values it gives another
        response, or a buffer that it reads itself has other values.
    """
    owner = original_of(model)
    response, known = response_of(model, caller, shape, sizes), _KNOWN.get(owner)
    if known is None or response != known.response:
        state = state_of(owner)
        if known is not None and _is_set_anew(owner, known.state, state):
            return False
        _KNOWN[owner] = _Known(response, state)
    return True


def _is_set_anew(model: nn.Module, before: object, now: object) -> bool:
    """Tell whether no weight differs between two states, or a buffer does that modules of no library hold."""
    if before == now:
        return True
    own = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if not isinstance(module, _NormBase) and not type(module).__module__.startswith(LIBRARIES)
        for name, _ in module.named_buffers(recurse=False)
    }
    were = {name: rest for name, *rest in before}  # type: ignore[attr-defined]
    # values of one dtype on one device: a network that was moved or rounded is the same
    return any(
        name in own and name in were and were[name][:2] == rest[:2] and were[name] != rest
        for name, *rest in now  # type: ignore[attr-defined]
    )
