"""Whether an image has one of each statistic or several: one of every block of it, where blocks are stacked as a batch.

An image that is no larger than a block has one, and a constant in its place is exact; of a larger image one constant
stands for several. So what is shown on a part of an image holds for the whole where both have one, or both several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from normfix.conversion.targets import StatisticTarget, Target
from normfix.networks.behaviour import structure_of
from normfix.networks.calling import Caller, failures, home_of
from normfix.networks.graph.isolation import silence
from normfix.networks.numerics import exact_arithmetic

__all__ = ["have_as_many"]

_Several = dict[str, tuple[bool, ...]]

_COUNTED: WeakKeyDictionary[nn.Module, dict[object, _Several | None]] = WeakKeyDictionary()
"""What was found of copies of a network, by their structure and the size: a run without numbers takes a second."""


def have_as_many(
    owner: nn.Module,
    model: nn.Module,
    targets: Sequence[Target],
    caller: Caller,
    shapes: tuple[Sequence[int], Sequence[int]],
) -> bool | None:
    """Tell whether images of two shapes both have one of each statistic, or both several.

    Args:
        owner: keeps what is found.
        model: a copy of it that holds the targets' modules; in eval mode.
        targets: of statistics of single images.
        caller: calls it.
        shapes: (N, C, *space) of the images.

    Returns:
        None where the network does not run without numbers.
    """
    one, other = ((1, *shape[1:]) for shape in shapes)
    if one == other or not targets:
        return True
    known = _COUNTED.setdefault(owner, {})
    structure = structure_of(model), caller.likeness
    for shape in (one, other):
        if (structure, shape) not in known:
            known[structure, shape] = _several_of(model, targets, caller, shape)
    first, second = known[structure, one], known[structure, other]
    return None if first is None or second is None else first == second


def _several_of(
    model: nn.Module, targets: Sequence[Target], caller: Caller, shape: Sequence[int]
) -> _Several | None:
    """Tell of each target that is reached along which dimensions an image has several of its statistic."""
    found: _Several = {}
    handles = []
    for target in targets:

        def before(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: Target = target
        ) -> None:
            operand = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if operand is not None:
                found[target.name] = tuple(n > 1 for n in _kept(target, operand.shape))

        handles.append(target.module.register_forward_pre_hook(before, with_kwargs=True))
    device, dtype = home_of(model)
    try:
        with exact_arithmetic(), silence(), FakeTensorMode(allow_non_fake_inputs=True):
            caller(model, torch.empty(tuple(shape), dtype=dtype, device=device))
    except failures():  # it looks at values, or takes another size
        return None
    finally:
        for handle in handles:
            handle.remove()
    return found


def _kept(target: Target, shape: Sequence[int]) -> list[int]:
    """Return the extents of an operand that are not within one of its statistics."""
    if isinstance(target, StatisticTarget):
        dims = target.spec.dims or ()
        within = {d % len(shape) for d in dims if -len(shape) <= d < len(shape)}
        return [n for d, n in enumerate(shape) if d not in within]
    return [shape[0]]
