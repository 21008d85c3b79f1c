"""Run a copy of a network alone: no module of the network that it was made of runs with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normfix.errors import NormfixError
from normfix.networks.calling import Caller

__all__ = ["Entangled", "run_alone"]


def run_alone(base: nn.Module, model: nn.Module, caller: Caller, example: Tensor) -> Tensor:
    """Run a copy once and make sure that no module of the original runs with it; return what it gave.

    Raises:
        NormfixError: NF208 if one does: a lambda or closure in the network still refers to the original.
    """
    mine = {id(module) for module in base.modules()}
    watch = _Foreign({id(module): module for module in model.modules() if id(module) not in mine})
    with watch:
        output = caller(base, example)
    if watch.met is not None:  # and the network caught the error
        raise _entangled(watch.met)
    return output


class Entangled(NormfixError):  # noqa: N818 - what it is, not what went wrong
    """A copy of a network runs modules of the network it was made of."""


def _entangled(where: str) -> Entangled:
    return Entangled(
        "NF208",
        "a lambda or closure in the network refers to the original's modules, which a copy would run as well. "
        "Make it a method or a module.",
        where=where,
    )


class _Foreign(TorchFunctionMode):
    """Looks up the stack at each call of torch in this thread for a module of another network.

    Nothing is hooked into that network: other threads may be running it.
    """

    def __init__(self, foreign: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.met: str | None = None
        self._foreign = foreign

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.met = self.met or self._above(sys._getframe(1))
        if self.met is not None:
            raise _entangled(self.met)
        return func(*args, **(kwargs or {}))

    def _above(self, frame: FrameType | None) -> str | None:
        while frame is not None and frame.f_code is not run_alone.__code__:
            code = frame.f_code
            first = code.co_varnames[:1] if code.co_argcount else ()
            owner = frame.f_locals.get(*first) if first else None
            if isinstance(owner, nn.Module) and id(owner) in self._foreign:
                return type(owner).__name__
            frame = frame.f_back
        return None
