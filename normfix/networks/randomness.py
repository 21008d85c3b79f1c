"""Random numbers from a source of our own: what a network draws neither comes from torch's generators nor moves them.

torch's default generators belong to the process, so seeding, saving or restoring them changes what another thread
draws. A TorchDispatchMode is the thread's own, and sees every operator that draws:

    op(..., generator=None)  ->  op(..., generator=own)         rand(shape)  ->  rand.generator(shape, generator=own)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normfix.networks.quiet_imports import import_compiler

__all__ = ["OwnRandomness"]

_SEED = 0


class OwnRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Let what runs inside draw from seeded generators made for it; `drawn` tells whether it drew at all."""

    def __init__(self) -> None:
        import_compiler()  # which the mode would import on its own terms
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = False
        self._generators: dict[torch.device, Generator] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or given.get("generator") is not None:
            return func(*args, **given)
        device = _device(args, given)
        if device.type == "meta":
            return func(*args, **given)
        drawing = _with_generator(func) or _WITHOUT_GENERATOR.get(func)
        if drawing is None:  # attention and recurrent layers, which draw for their dropout alone
            self.drawn |= _drops(func, args, given)
            return func(*args, **given)
        self.drawn = True
        return drawing(*args, **given, generator=self._generator(device))

    def _generator(self, device: torch.device) -> Generator:
        if device not in self._generators:
            self._generators[device] = Generator(device).manual_seed(_SEED)
        return self._generators[device]


def _device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return next((value.device for value in args if isinstance(value, Tensor)), torch.device("cpu"))


@cache
def _with_generator(func: Any) -> Callable[..., Any] | None:
    """Return the overload that takes the same arguments and a generator: the operator itself, or one beside it."""
    packet = func.overloadpacket
    wanted = [argument.name for argument in func._schema.arguments if argument.name != "generator"]
    for overload in (func, *(getattr(packet, name) for name in packet.overloads())):
        names = [argument.name for argument in overload._schema.arguments]
        kinds = {argument.name: argument.kwarg_only for argument in overload._schema.arguments}
        if kinds.get("generator") and [name for name in names if name != "generator"] == wanted:
            return overload  # type: ignore[no-any-return]
        if "generator" in names and names[:-1] == wanted:
            return overload  # type: ignore[no-any-return]
    return None


def _uniform_like(x: Tensor, *, generator: Generator, **home: Any) -> Tensor:
    return torch.empty_like(x, **home).uniform_(generator=generator)


def _normal_like(x: Tensor, *, generator: Generator, **home: Any) -> Tensor:
    return torch.empty_like(x, **home).normal_(generator=generator)


def _integers_like(x: Tensor, *bounds: int, generator: Generator, **home: Any) -> Tensor:
    low, high = (0, *bounds)[-2:]
    return torch.empty_like(x, **home).random_(low, high, generator=generator)


def _drops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get("dropout_p") or given.get("dropout"))


def _dropout(x: Tensor, p: float, train: bool | None, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """Drop as aten::native_dropout does, which takes no generator."""
    if train is False or not p:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
    return x * kept * (1 / (1 - p) if p < 1 else 0.0), kept


_WITHOUT_GENERATOR: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.native_dropout.default: _dropout,
    # these take one in later releases
    torch.ops.aten.rand_like.default: _uniform_like,
    torch.ops.aten.randn_like.default: _normal_like,
    torch.ops.aten.randint_like.default: _integers_like,
    torch.ops.aten.randint_like.low_dtype: _integers_like,
}
