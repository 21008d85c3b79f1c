"""Give a recomputed call the corrections of the call it repeats.

Activation checkpointing runs a part of the network once more during backward. By then the running statistics
have moved, so a layer that read them again would compute another output and another gradient (17 % off was
seen) and would count the batch twice. Here each training call leaves a record of its r and d; a call made
during backward takes the record of the call it repeats, and changes nothing.

Which call is repeated is told by the batch statistics, the same up to rounding in both runs. Where inputs are
identical too, a segment's calls are repeated in their order, and later segments before earlier ones, as
backward does. A record lives as long as the autograd graph it belongs to.

A compiled graph recomputes too, of its own accord and likewise from running statistics that have moved: the
partitioner sees no mutation. `keep` is an operation it does not repeat of itself, and which refuses to be
repeated where it is told to: by a checkpoint around compiled code or inside it, or by an
`activation_memory_budget` below 1.
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

__all__ = ["RecordedCall", "in_backward", "keep", "recall", "remember"]

_HELD = 32  # calls per layer without a graph to hold their record, as in reentrant checkpointing
_NO_BACKWARD = -1
_CHECKPOINT = torch.utils.checkpoint.__file__
_COMPILED_CHECKPOINT = (
    "a compiled BatchRenorm is inside an activation checkpoint, which would run it again on running "
    "statistics that have moved: wrong gradients, and each batch counted twice. Leave out the checkpoint, "
    "for a compiled graph decides itself what to recompute, or leave the checkpointed part uncompiled."
)


@dataclasses.dataclass(eq=False, kw_only=True)
class RecordedCall:
    """One training call: its batch statistics, its corrections and the checkpointed segment it is in."""

    vectors: Sequence[Tensor] | Tensor = ()  # mean, var, r and d, and what follows
    segment: Callable[[], object] = dataclasses.field(default_factory=lambda: _segment())
    repeated_in: int = _NO_BACKWARD
    repeats: bool = False

    @property
    def mean(self) -> Tensor:
        """Return the batch's mean per channel."""
        return self.vectors[0]

    @property
    def var(self) -> Tensor:
        """Return the batch's biased variance per channel."""
        return self.vectors[1]

    @property
    def r(self) -> Tensor:
        """Return the correction of the scale."""
        return self.vectors[2]

    @property
    def d(self) -> Tensor:
        """Return the correction of the shift."""
        return self.vectors[3]


@dataclasses.dataclass
class _Memory:
    calls: list[weakref.ref[RecordedCall]] = dataclasses.field(default_factory=list)
    held: deque[RecordedCall] = dataclasses.field(default_factory=lambda: deque(maxlen=_HELD))
    repeating: Callable[[], object] = lambda: None  # the segment run again at present ...
    repeated: RecordedCall | None = None  # ... and the last call repeated in it


# beside the layers rather than in them: nothing to copy, to pickle or to guard on
_memories: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()


def remember(layer: nn.Module, call: RecordedCall, *, held_by_graph: bool) -> None:
    """Keep the record of a training call for as long as it may be repeated."""
    memory = _memories.get(layer)
    if memory is None:
        memory = _memories[layer] = _Memory()
    memory.calls = [ref for ref in memory.calls if ref() is not None]
    memory.calls.append(weakref.ref(call))
    if not held_by_graph:
        memory.held.append(call)


def recall(layer: nn.Module, mean: Tensor, var: Tensor) -> RecordedCall | None:
    """Return the call that is being repeated, or None outside backward or when there was none."""
    task = torch._C._current_graph_task_id()
    if task == _NO_BACKWARD or layer not in _memories:
        return None
    memory = _memories[layer]
    calls = [call for ref in memory.calls if (call := ref()) is not None]
    if not calls:
        return None
    call = calls[0] if len(calls) == 1 else _choose(_nearest(calls, mean, var), memory, task)
    call.repeated_in = task
    memory.repeating, memory.repeated = _segment(), call
    return call


def keep(values: Tensor) -> Tensor:
    """Return a copy that a compiled graph saves for its backward and never recomputes."""
    copy: Tensor = torch.ops.normfix.keep(values)
    return copy


def in_backward() -> bool:
    """Tell whether a backward is under way, in which calls may be repeated."""
    return bool(torch._C._current_graph_task_id() != _NO_BACKWARD)


def _keep(values: Tensor) -> Tensor:
    if in_backward():
        raise RuntimeError(_COMPILED_CHECKPOINT)
    return values.clone()


def _keep_fake(values: Tensor) -> Tensor:
    if "ac_graph_id" in torch.fx.traceback.get_current_meta():  # checkpointing repeats any operation
        raise RuntimeError(_COMPILED_CHECKPOINT)
    return torch.empty_like(values)


# nothing in it has gradients: what torch.library.custom_op adds for them is ten times what the copy costs
_LIBRARY: Any = torch.library.Library("normfix", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("keep(Tensor values) -> Tensor")
_LIBRARY.impl("keep", _keep, "CompositeExplicitAutograd")
torch.library.register_fake("normfix::keep", _keep_fake, lib=_LIBRARY)


def _nearest(calls: list[RecordedCall], mean: Tensor, var: Tensor) -> list[RecordedCall]:
    values = torch.stack([_gap(call, mean, var) for call in calls]).tolist()
    return [call for call, value in zip(calls, values, strict=True) if value == min(values)]


def _gap(call: RecordedCall, mean: Tensor, var: Tensor) -> Tensor:
    apart = (mean - call.mean).square() / call.var.clamp_min(1e-30) + (var - call.var).abs()
    # a batch that overflowed repeats itself too, for a GradScaler to skip its step
    same = _equal(mean, call.mean) & _equal(var, call.var)
    return apart.masked_fill(same, 0).nan_to_num(nan=torch.inf, posinf=torch.inf).sum()


def _equal(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def _choose(equal: list[RecordedCall], memory: _Memory, task: int) -> RecordedCall:
    waiting = [call for call in equal if call.repeated_in != task] or equal
    segment = waiting[-1].segment()
    if memory.repeated is not None and memory.repeating() is _segment()():
        following = memory.repeated.segment()
        if any(call.segment() is following for call in waiting):
            segment = following
    return next(call for call in waiting if call.segment() is segment)


def _segment() -> Callable[[], object]:
    mark = _mark_of_segment()
    return _no_segment if mark is None else weakref.ref(mark)


def _no_segment() -> None:
    """Stand for a call outside of all segments."""


def _mark_of_segment() -> Any:
    """Return an object that lives as long as the innermost checkpointed segment's graph; None outside of all."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        return _frame_of_segment()
    # non-reentrant checkpointing installs one pack hook per segment, and another when it runs that again
    hooks = top(True)
    return hooks[0] if hooks else None


def _frame_of_segment() -> Any:
    """Return what checkpointing itself keeps of the segment: before torch 2.7 nothing tells the hooks in use."""
    call = inspect.currentframe()
    while call is not None:
        if call.f_code.co_filename == _CHECKPOINT:
            # one generator around the first run; the closure of a hook that starts a repetition
            around = call.f_locals.get("gen")
            held = call.f_locals if around is None else inspect.getgeneratorlocals(around)
            for name in ("new_frame", "frame"):
                if held.get(name) is not None:
                    return held[name]
        call = call.f_back
    return None
