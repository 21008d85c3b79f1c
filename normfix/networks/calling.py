"""How a network is called and which of its outputs counts."""

from __future__ import annotations

import inspect
import math
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from types import CodeType, MethodType, TracebackType
from typing import Any
from weakref import WeakMethod, ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.overrides import TorchFunctionMode

from normfix.errors import NormfixError, reason_of
from normfix.networks.numerics import HALF, as_numbers
from normfix.networks.randomness import OwnRandomness
from normfix.networks.releases import is_exporting
from normfix.networks.slabs import in_slabs, is_convolution
from normfix.networks.surroundings import as_given, own_defaults
from normfix.records.saved import Provenance

__all__ = [
    "REFUSALS",
    "Caller",
    "ControlFlow",
    "NotTaken",
    "OutOfMemory",
    "affordable",
    "buffers_kept",
    "class_of",
    "evaluating",
    "failures",
    "home_of",
    "in_eval_mode",
    "is_affordable",
    "is_halved",
    "is_out_of_memory",
    "once_each",
    "refusals",
    "require_network",
    "resized",
    "take_buffers_",
]


REFUSALS = (NormfixError, RuntimeError, ValueError, AssertionError, IndexError)
"""What a network may raise that does not take a size it is tried with; to be caught by `refusals`."""


_PAIRS, _SMALL_STEPS = 1 << 29, (16, 8, 4)
"""Elements of the largest tensor at a size that is tried, if it grows as pairs of pixels do; smaller steps to sizes."""


class NotTaken(NormfixError):  # noqa: N818 - what happened, not what went wrong
    """A network does not run on an input."""


class ControlFlow(NotTaken):
    """A network branches or loops by torch.cond or the like, of which only one side can be watched (NF575)."""


class Unreached(NormfixError):  # noqa: N818 - what happened, as its siblings are named
    """A site does not run once per image (NF301)."""


class OutOfMemory(NormfixError):  # noqa: N818 - what happened, as its siblings are named
    """The machine, not the network, refused an input."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, of the machine or of a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    # torch's allocator on the CPU has no class for it, only these words
    return type(error) is RuntimeError and "DefaultCPUAllocator: " in str(error)


_STOPS = (TimeoutError, MemoryError, torch.OutOfMemoryError, OutOfMemory)


def refusals() -> tuple[type[Exception], ...]:
    """Return what `except` may take for a network that refuses an input: nothing while somebody stops the work.

    A time-out, memory that ran out, and whatever a signal handler raises say nothing about the network, whichever
    class they have, and go on to the caller. Meant for the head of an `except` clause alone.
    """
    return () if _stops(sys.exc_info()[1]) else REFUSALS


def failures() -> tuple[type[Exception], ...]:
    """Return what `except` may take for any failure of code that is not ours; see `refusals`."""
    return () if _stops(sys.exc_info()[1]) else (Exception,)


def _stops(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it was raised over, stops the work instead of refusing an input."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, _STOPS) or _raised_by_signal(error.__traceback__):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _raised_by_signal(trace: TracebackType | None) -> bool:
    """Tell whether a handler that is installed for a signal is among the frames that an error came through."""
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _code_of(handler: Any) -> CodeType | None:
    while hasattr(handler, "func"):  # a functools.partial
        handler = handler.func
    if not hasattr(handler, "__code__"):
        handler = getattr(handler, "__func__", getattr(type(handler), "__call__", None))  # noqa: B004 - its code
    return getattr(handler, "__code__", None)


@dataclass(frozen=True, slots=True)
class Caller:
    """Calls a model on one image and picks the output.

    Args:
        forward_fn: `forward_fn(model, image)` for any other calling convention; None means `model(image)`.
        output: key, name or index where the model returns a mapping, a dataclass, a named tuple or a sequence.
        draws: the network draws random numbers: it gets the same ones in every call, from no generator of torch's.
        wide: the network casts to half precision whatever its weights are, and is run in float32.
    """

    forward_fn: Callable[[nn.Module, Tensor], Any] | None = None
    output: str | int | None = None
    draws: bool = False
    wide: bool = False

    @classmethod
    def of(
        cls,
        known: Provenance | None,
        forward_fn: Callable[[nn.Module, Tensor], Any] | None = None,
        output: str | int | None = None,
    ) -> Caller:
        """Call a model as is asked for, and else as what travels with it says."""
        if known is None:
            return cls(forward_fn, output)
        return cls(forward_fn, known.output if output is None else output, known.scan.draws)

    @property
    def likeness(self) -> object:
        """Return what compares equal for callers that call alike, and keeps alive nothing that their function holds."""
        return _reference(self.forward_fn), self.output, self.draws, self.wide

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Return the output tensor for an image (N, C, *space).

        Raises:
            NormfixError: NF109 if the network fails on the image or gives nothing for it, NF110 if `output` leads to no
                tensor of real numbers.
            OutOfMemory: NF250 if memory runs out.
        """
        found = self.pick(self.everything(model, image))
        if is_exporting():
            return found
        _require_values(model, image, found)
        # a network may switch gradients on for itself (torch.enable_grad)
        return found.detach() if found.requires_grad and not torch.is_grad_enabled() else found

    def everything(self, model: nn.Module, image: Tensor) -> Any:
        """Return all that the network returns for an image (N, C, *space); raises as a call does, but NF110."""
        return _opened(self._returned(model, image))

    def is_open(self, model: nn.Module, image: Tensor) -> bool:
        """Tell whether a program that the network is exported as returns what it does: no class of somebody's own."""
        result = self._returned(model, image)
        return _opened(result) is result and not _names(result)

    def _returned(self, model: nn.Module, image: Tensor) -> Any:
        try:
            with ExitStack() as around:
                if not is_exporting():  # what the network switches is its own affair
                    around.enter_context(own_defaults())
                    around.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
                around.enter_context(as_given(image.device))
                if self.draws and not is_exporting():
                    around.enter_context(OwnRandomness())
                if self.wide and image.dtype == torch.float32:
                    around.enter_context(_StaysWide(torch.float32))
                given = image.clone()  # some networks work in place on their input
                return model(given) if self.forward_fn is None else self.forward_fn(model, given)
        except NormfixError:
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise _out_of_memory(model, image, error) from error
        except failures() as error:
            if is_out_of_memory(error):
                raise _out_of_memory(model, image, error) from error
            if _is_control_flow(error):
                raise ControlFlow(
                    "NF575",
                    f"it calls an operator of control flow{_layer(model, error)} (torch.cond, while_loop, map, scan), "
                    "which torch compiles whole and in which no call can be watched or converted. Write a branch by "
                    "values as torch.where, one by settings as a plain `if`, and a loop as a plain `for`.",
                    where=type(model).__name__,
                ) from error
            raise NotTaken(
                "NF109",
                f"the network does not run on an input of shape {_shape(image)}{_layer(model, error)}: "
                f"{reason_of(error)}. {self._way_on(model, error)}",
                where=type(model).__name__,
            ) from error

    def widened(self, model: nn.Module, image: Tensor) -> Caller:
        """Return what calls a network that was in half precision in float32, also if it casts to half itself."""
        try:
            with torch.no_grad():
                self(model, image)
        except NotTaken:
            return replace(self, wide=True)
        return self

    def in_double(self, model: nn.Module, image: Tensor) -> Tensor:
        """Return the output of a float64 model for a float64 image, without casts to less on the way."""
        with _StaysWide(torch.float64):
            return as_numbers(self(model, image))

    def exactly(self, model: nn.Module, image: Tensor) -> Tensor:
        """Return the output as the network computes it, but in float64 throughout if it is a float64 network."""
        return (
            self.in_double(model, image) if image.dtype == torch.float64 else as_numbers(self(model, image))
        )

    def pick(self, result: Any) -> Tensor:
        """Return the tensor that `output` names in what the model returned."""
        if self.output is None:
            found = result
        else:
            key = self.output
            if isinstance(key, str) and key.isdigit() and not (isinstance(result, Mapping) and key in result):
                key = int(key)
            if key in _names(result):
                key = _names(result).index(key)
            try:
                found = result[key]
            except (KeyError, IndexError, TypeError) as error:
                raise self._not_found(result) from error
        if not isinstance(found, Tensor):
            raise self._not_found(result)
        if found.is_complex():
            raise NormfixError(
                "NF110",
                "the output that counts is complex, and predictions are real numbers. Give its parts as channels, in "
                "Python: forward_fn=lambda net, image: torch.view_as_real(net(image)).movedim(-1, 1).flatten(1, 2).",
            )
        return found

    def _way_on(self, model: nn.Module, error: Exception) -> str:
        """Say what to give instead: another shape, or what the network takes beside the image."""
        if _asks_for_gradients(error):
            return (
                "It computes gradients in its forward (torch.autograd), and these end where a statistic is held or "
                "watched: through a constant they would be others than through the statistic. Such a network is run on "
                "whole images; give a module without that part to convert the rest."
            )
        further = [] if self.forward_fn is not None else _further_inputs(model)
        needed = [p.name for p in further if p.default is p.empty]
        # an input left at None fails where it is used, as what None cannot do
        if not needed and not (further and isinstance(error, TypeError | AttributeError)):
            return "Give an input it accepts: --input NxCxHxW to scan with, images of sizes it takes."
        names = needed or [p.name for p in further[:4]]
        signature = str(inspect.signature(model.forward))[:160]
        return (
            f"It takes more than the image: forward{signature} {'needs' if needed else 'may need'} "
            f"{', '.join(names)}. Say how it is called, in Python: forward_fn=lambda net, image: "
            f"net(image, {', '.join(f'{name}={name}' for name in names)}), or wrap it in a module whose forward takes "
            "the image alone."
        )

    def _not_found(self, result: Any) -> NormfixError:
        if isinstance(result, Mapping):
            choices = f"a mapping with keys {', '.join(map(repr, result))}"
        elif _names(result):
            choices = f"a named tuple of {', '.join(map(repr, _names(result)))}"
        elif isinstance(result, Sequence):
            choices = f"a sequence of {len(result)}"
        else:
            choices = f"a {type(result).__name__}"
        return NormfixError(
            "NF110",
            f"the network returned {choices}, and output={self.output!r} names no tensor in it. "
            "Choose one with --output KEY or --output INDEX (output= in Python).",
        )


def _require_values(model: nn.Module, image: Tensor, output: Tensor) -> None:
    """Refuse an output without values that can be compared.

    Raises:
        NormfixError: NF109 if there are none for this image, NF110 if they are sparse or on no device.
    """
    if output.layout is not torch.strided or (output.device.type == "meta" and image.device.type != "meta"):
        kind = "on the meta device, without data" if output.is_meta else f"of layout {output.layout}"
        raise NormfixError(
            "NF110",
            f"the output that counts is {kind}, and predictions are dense maps. Bring it to one in forward_fn or in a "
            "module around the network (.to_dense()).",
            where=type(model).__name__,
        )
    if output.numel() == 0:
        raise NotTaken(
            "NF109",
            f"the network gives nothing for an input of shape {_shape(image)}: its output's shape is {_shape(output)}. "
            "Give a larger input: --input NxCxHxW to scan with, larger images.",
            where=type(model).__name__,
        )


def _opened(result: Any) -> Any:
    """Return a dataclass as the mapping of its fields: what is captured and watched is what stands in containers."""
    if not is_dataclass(result) or isinstance(result, type | Mapping):
        return result
    return {field.name: _opened(getattr(result, field.name)) for field in fields(result)}


def _names(result: Any) -> tuple[Any, ...]:
    """Return the names of a named tuple's parts."""
    return getattr(result, "_fields", ()) if isinstance(result, tuple) else ()


def _reference(function: Callable[..., Any] | None) -> object:
    """Return what stands for a function as long as it lives; for one that nothing can refer to so, like no other."""
    if function is None:
        return None
    try:
        return (WeakMethod if isinstance(function, MethodType) else ref)(function)
    except TypeError:
        return object()


def _out_of_memory(model: nn.Module, image: Tensor, error: BaseException) -> OutOfMemory:
    return OutOfMemory(
        "NF250",
        f"memory ran out on an input of shape {_shape(image)}{_layer(model, error)}: {reason_of(error)}. "
        "Give a smaller --input or image, or compute on another device.",
        where=type(model).__name__,
    )


def _is_control_flow(error: BaseException) -> bool:
    """Tell whether an operator of control flow was to be compiled and could not be, as none can while it is watched."""
    dynamo = sys.modules.get("torch._dynamo.exc")
    kind = getattr(dynamo, "UncapturedHigherOrderOpError", None)
    return kind is not None and isinstance(error, kind)


def _asks_for_gradients(error: BaseException) -> bool:
    """Tell whether an error is from a way back through a graph that a network itself began."""
    begun = (torch.autograd.grad.__code__, torch.autograd.backward.__code__)
    return any(frame.f_code in begun for frame, _ in traceback.walk_tb(error.__traceback__))


def _further_inputs(model: nn.Module) -> list[inspect.Parameter]:
    """Return the inputs of a network beside the first that can be named."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a forward without a signature, such as a compiled one
        return []
    return [p for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _shape(image: Tensor) -> str:
    return "x".join(map(str, image.shape))


def _layer(model: nn.Module, error: BaseException) -> str:
    """Name the innermost module whose code an error came through, if it is not the whole network."""
    paths = (
        {id(module): path for path, module in model.named_modules()} if isinstance(model, nn.Module) else {}
    )
    found, trace = "", error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        found = paths.get(id(owner)) or found
        trace = trace.tb_next
    return f", in {found}" if found else ""


class _StaysWide(TorchFunctionMode):
    """Leaves tensors of one dtype alone where a network casts to less, as many norms do to be safe in half.

    Large convolutions are computed in slabs: whole, they take most of the time of a scan in 3D.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._less = _LESS if dtype == torch.float64 else _LESS[1:]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operand = args[0] if args else None
        if isinstance(operand, Tensor) and operand.dtype == self._dtype and self._casts(func, args, kwargs):
            return operand
        return in_slabs(func, *args, **kwargs) if is_convolution(func) else func(*args, **kwargs)

    def _casts(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if func in (Tensor.to, Tensor.type):
            return any(dtype in (*args[1:], *kwargs.values()) for dtype, _ in self._less)
        return any(func is method for _, method in self._less)


_LESS = (
    (torch.float32, Tensor.float),
    (torch.float16, Tensor.half),
    (torch.bfloat16, Tensor.bfloat16),
)
"""Floating types, and what casts to them."""


def in_eval_mode(model: nn.Module) -> nn.Module:
    """Put a network in eval mode and return it: a `train` of somebody's own often returns nothing."""
    model.eval()
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def buffers_kept(model: nn.Module, but: Sequence[str] = ()) -> Iterator[None]:
    """Give buffers that forward passes change (counters, caches) their values back, but those under `but`."""
    before = {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if not isinstance(buffer, UninitializedBuffer)
        and not any(f"{name}.".startswith(path and f"{path}.") for path in but)
    }
    try:
        yield
    finally:
        _fill_buffers_(model, before)


def take_buffers_(model: nn.Module, other: nn.Module) -> None:
    """Give the buffers of a copy the values of the network that it was made of."""
    _fill_buffers_(model, dict(other.named_buffers()))


def _fill_buffers_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in values and buffer.shape == values[name].shape:
                place, value = once_each(buffer, values[name])
                place.copy_(value)


def once_each(place: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return both without what `place` repeats, if `value` does too: torch does not write where elements are shared.

    >>> place, value = once_each(torch.zeros(1, 3).expand(2, 3), torch.ones(2, 3))
    >>> tuple(place.shape), tuple(value.shape)
    ((1, 3), (1, 3))
    """
    for dim, (n, step) in enumerate(zip(place.shape, place.stride(), strict=True)):
        if n < 2 or step:
            continue
        first = value.narrow(dim, 0, 1)
        if not value.stride(dim) or torch.equal(first.expand_as(value), value):
            place, value = place.narrow(dim, 0, 1), first
    return place, value


def require_network(model: object) -> None:
    """Refuse what is no network that can be looked into.

    Raises:
        NormfixError: NF118.
    """
    reason = ""
    if not isinstance(model, nn.Module):
        reason = "expected an nn.Module. To open a file or a name, use normfix.load."
    elif compiled := [path for path, module in model.named_modules() if "_orig_mod" in module._modules]:
        reason = (
            f"torch.compile hides the calls of {compiled[0] or 'the network'}. Give the network before it (its "
            "_orig_mod), compile the result."
        )
    elif ring := _ring(model):
        reason = (
            f"its part {ring} holds itself, directly or through others, which neither torch (train, to) nor normfix "
            "can walk through. Keep what it refers to in a list or tuple, which registers nothing."
        )
    elif any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        reason = "it has tensors on the meta device, which hold no data. Load its weights first."
    if reason:
        raise NormfixError("NF118", reason, where=type(model).__name__)


def _ring(model: nn.Module) -> str:
    """Return the path of a module that is among its own parts, if any."""
    above: set[int] = set()
    done: set[int] = set()

    def found(module: nn.Module, path: str) -> str:
        if id(module) in above:
            return path
        if id(module) in done:
            return ""
        above.add(id(module))
        try:
            parts = ((name, part) for name, part in module._modules.items() if part is not None)
            return next(filter(None, (found(part, f"{path}.{name}".lstrip(".")) for name, part in parts)), "")
        finally:
            above.discard(id(module))
            done.add(id(module))

    return found(model, "")


def is_halved(model: nn.Module) -> bool:
    """Tell whether any of a model is in half precision."""
    return any(t.dtype in HALF for t in (*model.parameters(), *model.buffers()))


def home_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and floating dtype a model computes in, by its first floating tensor.

    Raises:
        NormfixError: NF118 for what is no network.
    """
    require_network(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def resized(example: Tensor, size: Sequence[int]) -> Tensor:
    """Return an input of another size, made by repeating or cutting one."""
    for axis, n in enumerate(size, start=2):
        example = example.index_select(axis, torch.arange(n, device=example.device) % example.shape[axis])
    return example


def affordable(sizes: Sequence[Sequence[int]], space: Sequence[int], largest: int) -> list[Sequence[int]]:
    """Return the sizes at which tensors of all pairs of pixels stay small enough to try them, else smaller steps.

    Args:
        sizes: extents that shall be tried.
        space: extents that the network ran on.
        largest: elements of the largest tensor there.
    """
    small: list[Sequence[int]] = [[n + step for n in space] for step in _SMALL_STEPS]
    fitting = ([size for size in tried if is_affordable(size, space, largest)] for tried in (sizes, small))
    return next(filter(None, fitting), small[-1:])


def is_affordable(size: Sequence[int], space: Sequence[int], largest: int) -> bool:
    """Tell whether tensors of all pairs of pixels stay small enough at a size to try it; see affordable."""
    most = max(_PAIRS, 2 * largest)  # what is little larger than an image that fits does, too
    return largest * (math.prod(size) / math.prod(space)) ** 2 <= most


def class_of(model: nn.Module) -> str:
    """Return a network's class by its full name."""
    return f"{type(model).__module__}.{type(model).__qualname__}"
