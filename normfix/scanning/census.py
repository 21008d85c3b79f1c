"""Every call that one eager forward pass makes, with the module that makes it and the tensors it connects.

A TorchFunctionMode sees calls at the level people write them (`F.instance_norm`, `x.mean((2, 3))`), also when
they sit inside a norm module; module hooks say who is calling. Tensors that depend on the network's input
carry a serial number, so the calls form a dataflow graph, and a norm of *weights* (weight standardisation)
is told from a norm of activations.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from normfix.networks.frames import OURS, TORCH, line_name
from normfix.networks.functions import COUNTED, DIRECT, NORMS, arguments_of, bound, taken_by
from normfix.records.sites import site_id

__all__ = [
    "LEAVES",
    "PICKS",
    "Call",
    "Follow",
    "Recorder",
    "Settle",
    "Shaped",
    "alone",
    "census",
    "source_line",
]

Follow = Callable[["Recorder"], AbstractContextManager[None]]
"""Gets the recorder and is entered around a run, for another look at the same calls."""

Settle = Callable[[str, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""Gets (site id, function, args, kwargs) of a call and returns the result the network shall get."""


LEAVES = (
    frozenset({"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"})
    | frozenset({"__complex__", "__contains__", "__dlpack__", "to_dlpack"})
    | frozenset({"equal", "allclose", "is_nonzero"})
)
"""Functions by which a value leaves tensors, for a branch or for arithmetic that no census sees."""

PICKS = frozenset({"masked_select", "nonzero", "argwhere", "unique", "unique_consecutive", "unique_dim"})
"""Functions that return as many values as the data tells them to: a size that no census follows."""


_ATEN = {"slice": "__getitem__", "select": "__getitem__", "index": "__getitem__", "narrow": "__getitem__"}
_NAME_OF = {function: name for name, function in NORMS.items()}
_COUNTED_NAMES = frozenset(COUNTED.values())


@dataclass(frozen=True, slots=True)
class Shaped:
    """What is remembered of a tensor argument: its shape, and whether it depends on the input."""

    shape: tuple[int, ...]
    depends: bool


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a torch function during the root forward.

    `within` holds the paths of the modules around the call, root first, owner last; `index` counts the
    owner's calls of this function in this invocation. `arguments` are bound by name for norms and reducing
    functions only, tensors replaced by Shaped. `operand` tells which of the tensors among the arguments is
    the first that depends on the input, of shape `inputs[0]`. `reads` and `writes` are serial numbers of memory
    that depends on the input. `numbers` are the Python numbers among the arguments and steps of slices, `kinds` the
    outputs' dtypes.
    `returned` tells that the result that counts holds an output of this call, `checkpointed` names the modules
    whose forward recomputes this call by an activation checkpoint, `hooked` that a hook of the root makes it,
    outside of every forward.
    """

    function: str
    within: tuple[str, ...]
    owner_class: str
    invocation: int
    index: int
    line: str
    arguments: Mapping[str, Any] = field(repr=False)
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    reads: tuple[int, ...] = field(repr=False)
    writes: tuple[int, ...] = field(repr=False)
    numbers: tuple[float, ...] = field(repr=False, default=())
    kinds: tuple[str, ...] = field(repr=False, default=())
    operand: int = 0
    checkpointed: tuple[str, ...] = ()
    returned: bool = False
    hooked: bool = False

    @property
    def owner(self) -> str:
        """Return the path of the innermost module."""
        return self.within[-1]

    @property
    def id(self) -> str:
        """Name the call as Site.id does."""
        return site_id(self.owner, self.invocation, self.function, self.index)


@dataclass(slots=True)
class _Frame:
    path: str
    kind: str
    invocation: int
    checkpoints: int
    running: bool = False
    counts: Counter[str] = field(default_factory=Counter)


def alone(recorder: Recorder) -> AbstractContextManager[None]:
    """Follow a run with nothing: the census is the only look."""
    return nullcontext()


def census(
    model: nn.Module,
    run: Callable[[nn.Module, Tensor], Any],
    example: Tensor,
    settle: Settle | None = None,
    follow: Follow = alone,
) -> tuple[list[Call], Counter[str], Any]:
    """Run the network once and record every call that depends on the input, every norm and counted function.

    Args:
        model: left as it was found; its training flags decide what it computes.
        run: calls the model on one input.
        example: (N, C, *space).
        settle: may replace what a call returns, for experiments.
        follow: is entered around the run with the recorder, for another look at the same calls.

    Returns:
        The calls in order, how often each module path ran, and what `run` returned.
    """
    recorder = Recorder(settle)
    with torch.no_grad(), _watched(model, recorder):
        x = example.clone()
        recorder.mark(x)
        with recorder, follow(recorder):
            output = run(model, x)
        recorder.returned(output)
    return recorder.finished(), recorder.invocations, output


class Recorder(TorchFunctionMode):
    """Records calls while modules run; `frames` are the modules that are running, `calls` what they called."""

    def __init__(self, settle: Settle | None = None) -> None:
        super().__init__()
        self._settle = settle
        self.calls: list[Call] = []
        self.invocations: Counter[str] = Counter()
        self.frames: list[_Frame] = []
        self._serials: dict[int, int] = {}
        self._held: list[object] = []  # while a storage is known here, no other takes its number
        self._returned: set[int] = set()
        self._handed: set[int] = set()
        self._outside: defaultdict[int, set[int]] = defaultdict(set)

    def mark(self, tensor: Tensor) -> int:
        """Return the serial number of memory that depends on the input."""
        key, reference = _memory(tensor)
        if key not in self._serials:
            self._serials[key] = len(self._serials)
            self._held.append(reference)
        return self._serials[key]

    def depends(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is known to depend on the input."""
        return _memory(tensor)[0] in self._serials

    def returned(self, result: object) -> None:
        """Note what counts of what the network hands out."""
        self._returned |= self._known(result)

    def handed(self, result: object) -> None:
        """Note all that the network hands out, for results that nothing is known to lead to."""
        self._handed |= self._known(result)

    def finished(self) -> list[Call]:
        """Return the calls, with those that made the result marked."""
        made = self._sources(self._returned)
        between = {serial for call in self.calls for serial in call.reads if serial in self._outside}
        made |= self._sources(between) - between
        if not any(made & {*call.writes} for call in self.calls):
            made |= self._handed
        return [replace(c, returned=True) if made & {*c.writes} else c for c in self.calls]

    def _known(self, result: object) -> set[int]:
        leaves = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return {self.mark(leaf) for leaf in leaves if self.depends(leaf)}

    def _sources(self, serials: set[int]) -> set[int]:
        """Return serials, with those that calls outside of every module made them of."""
        found, waiting = set(serials), [*serials]
        while waiting:
            new = self._outside.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = self._picking(_name_of(func), args)
        dependent = [t for t in taken_by(name, operands) if self.depends(t)]
        counted = name in NORMS or name in DIRECT or name in _COUNTED_NAMES
        if self._settle is not None and self.frames and (dependent or counted):
            frame = self.frames[-1]
            site = site_id(frame.path, frame.invocation, name, frame.counts[name])
            result = self._settle(site, func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name == "__setitem__" and dependent and isinstance(args[0], Tensor):
            results = [args[0]]
        # what is done to the image before the network has it, or to its result
        if not self.frames and dependent:
            sources = {self.mark(t) for t in dependent}
            for tensor in results:
                self._outside[self.mark(tensor)] |= sources
        leaves = bool(dependent) and name in LEAVES
        if self.frames and (leaves or (results and (dependent or counted))):
            operand = next((i for i, t in enumerate(operands) if self.depends(t)), 0)
            self._record(name, args, kwargs, dependent, results, operand)
        return result

    def _record(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        dependent: list[Tensor],
        results: list[Tensor],
        operand: int,
    ) -> None:
        frame = self.frames[-1]
        reads = tuple(self.mark(t) for t in dependent)
        inputs = tuple(tuple(t.shape) for t in dependent)
        arguments: Mapping[str, Any] = {}
        if name in NORMS or name in DIRECT:
            arguments = {key: self._shaped(value) for key, value in bound(name, args, kwargs).items()}
        elif name in _COUNTED_NAMES:
            arguments = {k: self._shaped(v) for k, v in arguments_of(name, args, kwargs).items()}
        checkpoints = _checkpoints()
        self.calls.append(
            Call(
                function=name,
                within=tuple(f.path for f in self.frames),
                owner_class=frame.kind,
                invocation=frame.invocation,
                index=frame.counts[name],
                line=source_line(),
                arguments=arguments,
                inputs=inputs,
                outputs=tuple(tuple(t.shape) for t in results),
                reads=reads,
                writes=tuple(self.mark(t) for t in results) if dependent else (),
                numbers=_numbers(args, kwargs),
                kinds=tuple(_kind(t.dtype) for t in results),
                operand=operand,
                checkpointed=tuple(f.path for f in self.frames if f.checkpoints < checkpoints),
                hooked=not self.frames[0].running,
            )
        )
        frame.counts[name] += 1

    def _picking(self, name: str, args: tuple[Any, ...]) -> str:
        """Give `x[mask]` and `where(mask)`, with a mask made from the input, the names of what they do."""
        if name == "where" and len(args) == 1:
            return "nonzero"
        if name != "__getitem__" or len(args) < 2:
            return name
        index = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        masks = (i for i in index if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8))
        return "masked_select" if any(map(self.depends, masks)) else name

    def _shaped(self, value: object) -> object:
        if isinstance(value, Tensor):
            return Shaped(tuple(value.shape), self.depends(value))
        return value


def _numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the numbers among a call's arguments, and the steps of its slices, which are strides."""
    given = tree_leaves((args, kwargs))
    steps = (v.step for v in given if isinstance(v, slice) and isinstance(v.step, int))
    return tuple(float(v) for v in (*given, *steps) if type(v) in (int, float))


def _memory(tensor: Tensor) -> tuple[int, object]:
    """Return what tells a tensor's memory from all other, and what must be kept for that to hold."""
    try:
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError, ValueError):  # no storage: sparse, lazy, transformed
        return -id(tensor), tensor
    return reference.cdata, reference


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "int"


def _checkpoints() -> int:
    """Return how many activation checkpoints are being run."""
    frame: FrameType | None = sys._getframe(1)
    found = 0
    while frame is not None:
        code = frame.f_code
        found += code.co_name == "checkpoint" and code.co_filename.endswith("/utils/checkpoint.py")
        frame = frame.f_back
    return found


def _name_of(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if isinstance(func, OpOverload):  # what an exported program calls
        name = func._schema.name.partition("::")[2]
        name = "interpolate" if "upsample_" in name else _ATEN.get(name, name)
    if func in _NAME_OF:
        return _NAME_OF[func]
    if func in COUNTED:
        return COUNTED[func]
    return f"torch.{name}" if f"torch.{name}" in DIRECT else str(name)


@contextmanager
def _watched(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep the recorder's stack of running modules; all hooks are gone afterwards.

    What a module's own hooks call belongs to the module around it, in whose forward they run. Nothing is around the
    root: its hooks belong to itself, while it is not yet or no longer `running`.
    """
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"

        def enter(module: nn.Module, args: Any) -> None:
            recorder.frames.append(_Frame(path, kind, recorder.invocations[path], _checkpoints()))
            recorder.invocations[path] += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            recorder.frames.pop()
            if not recorder.frames:
                recorder.handed(output)

        handles.append(module.register_forward_pre_hook(enter, prepend=module is model))
        if module is model:
            handles.append(module.register_forward_pre_hook(partial(_runs, recorder, True)))
            handles.append(module.register_forward_hook(partial(_runs, recorder, False), prepend=True))
        handles.append(module.register_forward_hook(leave, prepend=module is not model, always_call=True))

    try:
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                watch(path, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _runs(recorder: Recorder, running: bool, *_: Any) -> None:
    recorder.frames[0].running = running


def source_line() -> str:
    """Name the innermost line outside torch and normfix, or, inside a torch module, torch's own."""
    frame = sys._getframe(3)
    first = ""
    while frame is not None:
        name = frame.f_code.co_filename
        here = line_name(name, frame.f_lineno)
        if not name.startswith((TORCH, OURS)) and not name.startswith("<"):
            return here
        if not first and name.startswith(TORCH) and "/nn/modules/" in name and "module.py" not in name:
            first = here
        if frame.f_code.co_name == "census":
            break
        frame = frame.f_back  # type: ignore[assignment]
    return first
