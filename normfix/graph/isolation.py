"""torch.export in one thread, so that no other notices.

While it traces, torch patches `nn.Module.__call__` and `__getattr__` for the whole process, adds to its environment and
warns: a network that serves in another thread would be recorded as well, and fail. Here the patches hold for the
thread that traces, one thread traces at a time, and filters, loggers and environment are as before afterwards.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.fx

from normfix.quiet_imports import environment_kept, import_compiler

__all__ = ["silence"]

_LOUD = (
    "torch.export",
    "torch._export",
    "torch.fx",
    "torch._dynamo",
    "torch._subclasses.fake_tensor",
)
_EVERYTHING = ("ignore", re.compile("(?s).*"), Warning, None, 0)
_ALONE = threading.RLock()


@contextmanager
def silence() -> Iterator[None]:
    """Run torch.export for this thread alone, and keep what it warns and logs to itself; what matters is returned."""
    with _ALONE, ExitStack() as stack:
        import_compiler()
        stack.enter_context(environment_kept())
        stack.enter_context(_unheard())
        stack.enter_context(_tracing_here())
        yield


@contextmanager
def _unheard() -> Iterator[None]:
    """Ignore warnings and quiet loggers; other filters, and those that others set meanwhile, stay."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    nested = _EVERYTHING in warnings.filters
    try:
        if not nested:
            warnings.filters.insert(0, _EVERYTHING)  # type: ignore[attr-defined]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not nested and _EVERYTHING in warnings.filters:
            warnings.filters.remove(_EVERYTHING)  # type: ignore[attr-defined]


@contextmanager
def _tracing_here() -> Iterator[None]:
    """Let the methods that a trace in this thread patches be patched in this thread only."""
    patcher = torch.fx._symbolic_trace._Patcher
    here, patch = threading.get_ident(), patcher.patch_method

    def patch_method(
        self: Any, cls: type, name: str, new: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        if threading.get_ident() == here:
            new = _only_in(here, new, getattr(cls, name))
        patch(self, cls, name, new, deduplicate)

    patcher.patch_method = patch_method  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        patcher.patch_method = patch  # type: ignore[method-assign]


def _only_in(thread: int, new: Callable[..., Any], old: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(new)
    def method(*args: Any, **kwargs: Any) -> Any:
        return (new if threading.get_ident() == thread else old)(*args, **kwargs)

    return method
