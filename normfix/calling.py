"""How a network is called and which of its outputs counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.overrides import TorchFunctionMode

from normfix.errors import NormfixError

__all__ = ["REFUSALS", "Caller", "buffers_kept", "evaluating", "home_of", "require_network"]


REFUSALS = (NormfixError, RuntimeError, ValueError, AssertionError)
"""What a network may raise that does not take a size it is tried with."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Calls a model on one image and picks the output.

    Args:
        forward_fn: `forward_fn(model, image)` for any other calling convention; None means `model(image)`.
        output: key or index where the model returns a mapping or a sequence.
    """

    forward_fn: Callable[[nn.Module, Tensor], Any] | None = None
    output: str | int | None = None

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Return the output tensor for an image (N, C, *space).

        Raises:
            NormfixError: NF109 if the network fails on the image, NF110 if `output` does not lead to a tensor.
        """
        try:
            given = image.clone()  # some networks work in place on their input
            result = model(given) if self.forward_fn is None else self.forward_fn(model, given)
        except NormfixError:
            raise
        except Exception as error:
            shape = "x".join(map(str, image.shape))
            reason = " ".join(str(error).split())[:200]
            raise NormfixError(
                "NF109",
                f"the network does not run on an input of shape {shape}: {type(error).__name__}: {reason}. "
                f"{self._way_on(model, error)}",
                where=type(model).__name__,
            ) from error
        return self.pick(result)

    def in_double(self, model: nn.Module, image: Tensor) -> Tensor:
        """Return the output of a float64 model for a float64 image, without casts to float32 on the way."""
        with _StaysDouble():
            return self(model, image)

    def exactly(self, model: nn.Module, image: Tensor) -> Tensor:
        """Return the output as the network computes it, but in float64 throughout if it is a float64 network."""
        return (self.in_double if image.dtype == torch.float64 else self)(model, image)

    def pick(self, result: Any) -> Tensor:
        """Return the tensor that `output` names in what the model returned."""
        if self.output is None:
            found = result
        else:
            key = self.output
            if isinstance(key, str) and key.isdigit() and not isinstance(result, Mapping):
                key = int(key)
            try:
                found = result[key]
            except (KeyError, IndexError, TypeError) as error:
                raise self._not_found(result) from error
        if not isinstance(found, Tensor):
            raise self._not_found(result)
        return found

    def _way_on(self, model: nn.Module, error: Exception) -> str:
        """Say what to give instead: another shape, or what the network takes beside the image."""
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
        elif isinstance(result, Sequence):
            choices = f"a sequence of {len(result)}"
        else:
            choices = f"a {type(result).__name__}"
        return NormfixError(
            "NF110",
            f"the network returned {choices}, and output={self.output!r} names no tensor in it. "
            "Choose one with --output KEY or --output INDEX (output= in Python).",
        )


def _further_inputs(model: nn.Module) -> list[inspect.Parameter]:
    """Return the inputs of a network beside the first that can be named."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a forward without a signature, such as a compiled one
        return []
    return [p for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


class _StaysDouble(TorchFunctionMode):
    """Leaves float64 tensors alone where a network casts to float32, as many norms do to be safe in half."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operand = args[0] if args else None
        to_single = func is Tensor.float or torch.float32 in (*args[1:], *kwargs.values())
        casts = func in (Tensor.float, Tensor.to, Tensor.type) and to_single
        if casts and isinstance(operand, Tensor) and operand.dtype == torch.float64:
            return operand
        return func(*args, **kwargs)


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
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in before and buffer.shape == before[name].shape:
                    buffer.copy_(before[name])


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
    elif any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        reason = "it has tensors on the meta device, which hold no data. Load its weights first."
    if reason:
        raise NormfixError("NF118", reason, where=type(model).__name__)


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
