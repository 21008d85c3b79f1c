"""torch.export in one thread, so that no other notices.

While it traces, torch patches `nn.Module.__call__` and `__getattr__` for the whole process, switches its fast kernels
off, adds to the environment and warns: a network that serves in another thread would be recorded as well, and fail, or
give other bits. Here all that holds for the thread that traces, one thread traces at a time, and filters, loggers and
environment are as before afterwards.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch.compiler
import torch.fx

from normfix.networks.quiet_imports import environment_kept, import_compiler

__all__ = ["silence"]

_LOUD = (
    "torch.__trace",
    "torch.export",
    "torch._export",
    "torch.fx",
    "torch._dynamo",
    "torch._subclasses.fake_tensor",
)
_EVERYTHING = ("ignore", re.compile("(?s).*"), Warning, None, 0)
_ALONE = threading.RLock()


@contextmanager
def silence(*, backends_off: bool = False) -> Iterator[None]:
    """Run torch.export for this thread alone, and keep what it warns and logs to itself; what matters is returned.

    Args:
        backends_off: let torch switch oneDNN and cuDNN off while it traces, for all threads.
    """
    with _ALONE, ExitStack() as stack:
        import_compiler()
        stack.enter_context(environment_kept())
        # fake tensors whose sizes are formulas are seldom met again: looking for them takes a third of a small trace
        stack.enter_context(
            importlib.import_module("torch._dynamo.config").patch(fake_tensor_cache_enabled=False)
        )
        stack.enter_context(_unheard())
        stack.enter_context(_tracing_here(backends_off=backends_off))
        yield


@contextmanager
def _unheard() -> Iterator[None]:
    """Ignore warnings and quiet loggers; other filters, and those that others set meanwhile, stay."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    held: list[Any] = warnings.filters  # type: ignore[assignment]
    nested = _EVERYTHING in held
    try:
        if not nested:
            warnings.filters.insert(0, _EVERYTHING)  # type: ignore[attr-defined]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        # catch_warnings of another thread puts this list back later
        for filters in () if nested else (held, warnings.filters):
            if _EVERYTHING in filters:
                filters.remove(_EVERYTHING)  # type: ignore[union-attr]


@contextmanager
def _tracing_here(*, backends_off: bool) -> Iterator[None]:
    """Let what a trace in this thread switches for the process hold in this thread only.

    In it formulas of sizes are simplified once. Methods of nn.Module are patched, torch.compiler.is_compiling()
    answers yes, and oneDNN and cuDNN are off, so that none of their own operators gets into the graph. Those two are
    no thread's own: they stay on unless asked for.
    """
    exporter = importlib.import_module("torch.export._trace")  # after import_compiler: it brings the compiler
    here, tracer = threading.get_ident(), torch.fx._symbolic_trace._Patcher
    patch, ignore = tracer.patch_method, getattr(exporter, "_ignore_backend_decomps", None)

    def patch_method(
        self: Any, cls: type, name: str, new: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        if threading.get_ident() == here:
            new = _only_in(here, new, getattr(cls, name))
        patch(self, cls, name, new, deduplicate)

    replaced: list[tuple[Any, str, Any]] = [(tracer, "patch_method", patch_method)]
    if ignore is not None and not backends_off:
        replaced.append((exporter, "_ignore_backend_decomps", _only_in(here, nullcontext, ignore)))
    compiling = getattr(exporter, "_compiling_state_context", None)
    if compiling is not None:
        replaced.append((exporter, compiling.__name__, _only_in(here, _compiling_here, compiling)))
    else:  # before torch 2.7 the flag is set by what cannot be replaced, so its reader is
        asked = torch.compiler.is_compiling
        replaced.append((torch.compiler, "is_compiling", _only_in(here, asked, _nobody_compiles)))
    shapes = importlib.import_module("torch.fx.experimental.symbolic_shapes").ShapeEnv
    simplify = shapes.simplify
    replaced.append((shapes, "simplify", _only_in(here, _simplified_once(simplify), simplify)))
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


class _Here(int):
    """True in one thread, False in all others."""

    def __bool__(self) -> bool:
        return threading.get_ident() == int(self)


@contextmanager
def _compiling_here() -> Iterator[None]:
    """Let torch.compiler.is_compiling() and is_exporting() answer yes in this thread."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = {flag: getattr(torch.compiler, flag) for flag in flags if hasattr(torch.compiler, flag)}
    try:
        for flag in before:
            setattr(torch.compiler, flag, _Here(threading.get_ident()))
        yield
    finally:
        for flag, value in before.items():
            setattr(torch.compiler, flag, value)


def _simplified_once(simplify: Callable[..., Any]) -> Callable[..., Any]:
    """Remember how formulas were simplified for as long as nothing else is known of their own symbols.

    torch forgets all of it, and simplifies all that it knows of sizes again, at each of the hundreds of things that a
    trace learns. What was found stays true, as facts are only added: at worst it could be shorter by now. Half of the
    time in which networks with windows are captured went there.
    """
    known: dict[Any, Any] = {}

    def remembered(self: Any, formula: Any, *args: Any, **kwargs: Any) -> Any:
        symbols = sorted(getattr(formula, "free_symbols", ()), key=str)
        if not symbols:  # numbers equal truth values
            return simplify(self, formula, *args, **kwargs)
        facts = tuple((self.replacements.get(s), self.var_to_range.get(s)) for s in symbols)
        key = (self, formula, facts, args, *sorted(kwargs.items()))
        if key not in known:
            known[key] = simplify(self, formula, *args, **kwargs)
        return known[key]

    return remembered


def _nobody_compiles() -> bool:
    """Answer for the threads that do not trace."""
    return False


def _only_in(thread: int, new: Callable[..., Any], old: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(old)
    def method(*args: Any, **kwargs: Any) -> Any:
        return (new if threading.get_ident() == thread else old)(*args, **kwargs)

    return method
