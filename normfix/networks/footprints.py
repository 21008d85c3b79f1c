"""What a network calls at the size of an image, seen without computing anything.

A branch such as `if h > 300 and w > 300` shows on no strip, however long, and a slice from the 300th row and column on
takes nothing of any. What is called at a size then tells: a line that calls what it calls at no other size, calls it
with other numbers, or on something where it was nothing.

    is as before  <=>  footprint(size)  is part of  union of footprint(s) for sizes s that were compared
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normfix.networks.calling import Caller, failures, home_of
from normfix.networks.frames import OURS, TORCH
from normfix.networks.graph.isolation import silence

__all__ = ["calls_more", "footprint"]

Footprint = frozenset[tuple[object, ...]]

_WINDOWS = ("conv", "pool")
"""In the names of operators whose numbers are of a window and follow no extent; pools to a fixed number of bins do."""


def calls_more(
    model: nn.Module, caller: Caller, size: Sequence[int], compared: Iterable[Sequence[int]]
) -> bool | None:
    """Tell whether a network calls something at a size that it calls at none of those that were compared.

    Args:
        model: in eval mode; not modified.
        caller: calls it.
        size: (N, C, *space).
        compared: sizes likewise.

    Returns:
        None where it does not run without numbers at the size.
    """
    whole = footprint(model, caller, size)
    if whole is None:
        return None
    known: set[tuple[object, ...]] = set()
    for other in compared:
        known |= footprint(model, caller, other) or frozenset()
        if whole <= known:
            return False
    return True


def footprint(model: nn.Module, caller: Caller, size: Sequence[int]) -> Footprint | None:
    """Return what a network calls at a size: lines, operators, the numbers of pointwise ones and of windows.

    Args:
        model: in eval mode; not modified.
        caller: calls it.
        size: (N, C, *space).

    Returns:
        None where it looks at values, or does not take the size.
    """
    device, dtype = home_of(model)
    # what a forward keeps by the image's size would be without numbers in the model afterwards
    kept: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    try:
        alone = copy.deepcopy(model, kept)
        with silence(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _Calls() as calls:
            caller(alone, torch.empty(tuple(size), dtype=dtype, device=device))
    except failures():
        return None
    return frozenset(calls.found)


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes calls of operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[tuple[object, ...]] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        tensors = [leaf for leaf in tree_leaves((args, given, result)) if isinstance(leaf, Tensor)]
        is_nothing = any(0 in tensor.shape for tensor in tensors)
        self.found.add((_line(), str(func), is_nothing, *_numbers(func, (args, given))))
        return result


def _numbers(func: Callable[..., Any], given: object) -> Sequence[object]:
    """Return the numbers of a call that are of the network, and of no extent of the image."""
    if not isinstance(func, OpOverload):
        return ()
    name = func._schema.name
    is_windowed = any(part in name for part in _WINDOWS) and "adaptive" not in name
    if torch.Tag.pointwise not in func.tags and not is_windowed:
        return ()
    return [repr(leaf) for leaf in tree_leaves(given) if isinstance(leaf, int | float | bool)]


def _line() -> tuple[str, int] | None:
    """Return the innermost line outside of torch and normfix that is running."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith((TORCH, OURS)):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)
