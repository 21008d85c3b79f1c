"""Whether an image has one of each statistic or several: one of every block of it, where blocks are stacked as a batch.

An image that is no larger than a block has one, and a constant in its place is exact; of a larger image one constant
stands for several. So what is shown on a part of an image holds for the whole where both have one, or both several.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from normfix.conversion.targets import StatisticTarget, Target, measured_targets
from normfix.networks.behaviour import structure_of
from normfix.networks.calling import Caller, failures, home_of
from normfix.networks.graph.isolation import silence
from normfix.networks.numerics import exact_arithmetic
from normfix.records.plans import Plan
from normfix.records.sites import Family

__all__ = ["have_as_many", "objection", "of_single_images"]

_Several = dict[str, tuple[bool, ...]]

_COUNTED: WeakKeyDictionary[nn.Module, dict[object, _Several | None]] = WeakKeyDictionary()
"""What was found of copies of a network, by their structure and the size: a run without numbers takes a second."""


def of_single_images(model: nn.Module, plan: Plan) -> list[Target]:
    """Return the targets whose statistics are of one image alone, whatever it is stacked with."""
    batch = {decision.site.id for decision in plan.converted if decision.site.family is Family.BATCH}
    return [target for target in measured_targets(model, plan) if target.name not in batch]


def objection(
    owner: nn.Module,
    model: nn.Module,
    plan: Plan,
    caller: Caller,
    example: Sequence[int],
    image: Sequence[int],
) -> str:
    """Say where an image has several of a statistic of which the example has one, and what to do; "" where it has not.

    Args:
        owner: as for `have_as_many`.
        model: a copy of it in which the plan is carried out; in eval mode.
        plan: by which it was converted.
        caller: calls it.
        example: (N, C, *space) of what it was scanned with.
        image: (N, C, *space) of what is asked.
    """
    if have_as_many(owner, model, of_single_images(model, plan), caller, (example, image)) is not False:
        return ""
    return (
        f"an image of {'x'.join(map(str, image[2:]))} pixels has several of a statistic of which one of "
        f"{'x'.join(map(str, example[2:]))} has one, such as one of each block of pixels that is stacked as a batch, "
        "and one constant stands for it. Predict the image whole, with the original."
    )


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
    # what a forward keeps by the image's size, such as a mask, would be without numbers in the model afterwards
    kept: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    model, targets = copy.deepcopy((model, tuple(targets)), kept)
    ends = [_watch(target, found) for target in targets]
    device, dtype = home_of(model)
    try:
        with exact_arithmetic(), silence(), FakeTensorMode(allow_non_fake_inputs=True):
            caller(model, torch.empty(tuple(shape), dtype=dtype, device=device))
    except failures():  # it looks at values, or takes another size
        return None
    finally:
        for end in ends:
            end()
    return found


def _watch(target: Target, found: _Several) -> Callable[[], None]:
    """Note what a target's calls have several of; return what ends that."""

    def note(*shape: int) -> None:
        found[target.name] = tuple(n > 1 for n in shape)

    if isinstance(target, StatisticTarget):
        layer = target.module

        def observe(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            with torch._C.DisableTorchFunction():  # outer interceptions count calls
                given = next(leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor))
            note(*given.shape)

        def end() -> None:
            layer.observer = None

        layer.observer = observe
        return end

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)).shape[0])

    return target.module.register_forward_pre_hook(before, with_kwargs=True).remove
