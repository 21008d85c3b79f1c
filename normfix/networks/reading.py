"""What functions read by name: values of their own module and the environment, of modules and classes of no library.

A forward may take its width from `WIDTH`, `settings.WIDTH`, `Settings.WIDTH` or from a function elsewhere that does.
Values are looked at if they are plain: numbers, texts, arrays, tensors, and what holds nothing else.
"""

from __future__ import annotations

import dis
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LIBRARIES",
    "OURS",
    "VALUES",
    "codes",
    "held_by",
    "is_mutable",
    "is_own",
    "plain_of",
    "read_by",
    "written_by",
]

VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)
"""Types of values that do not change in place."""

OURS = "normfix."
LIBRARIES = (OURS, "torch.")

_CHANGING = frozenset(("append", "extend", "insert", "pop", "popitem", "update", "setdefault", "clear"))
_MOST = 100
"""Collections and objects in one value that is plain: beyond, it is a registry and no setting."""


def read_by(function: FunctionType, seen: set[int]) -> Iterator[tuple[str, object]]:
    """Yield the values and functions that a function reads, with their names.

    Args:
        function: of any module; libraries that compute read nothing that changes.
        seen: identities of the functions that were met before, which are left out; grows.
    """
    if not function.__module__ or function.__module__.startswith(LIBRARIES):
        return
    reads = _reads(function.__code__)
    for name in reads.globals:
        yield from _valued(name, function.__globals__.get(name), function.__module__, reads, seen)
    if not reads.names.isdisjoint(("environ", "getenv")):
        yield "environ", {text: os.environ.get(text) for text in sorted(reads.texts)}
    for name, value in tuple(vars(function).items()):
        if name not in reads.stored and _is_plain(value):
            yield name, value


def _valued(
    name: str, value: object, home: str, reads: _Reads, seen: set[int]
) -> Iterator[tuple[str, object]]:
    """Yield a value that is read, or what is read of it: attributes of modules and classes."""
    if isinstance(value, ModuleType):
        if not is_own(value.__name__) or id(value) in seen:
            return
        seen.add(id(value))
        for part in sorted(reads.names & vars(value).keys() - reads.stored):
            yield from _valued(f"{name}.{part}", vars(value)[part], value.__name__, reads, seen)
        seen.remove(id(value))
    elif isinstance(value, type):
        if is_own(value.__module__):
            held = plain_of(value)
            yield name, {part: held[part] for part in sorted(held.keys() - reads.stored)}
    elif isinstance(value, FunctionType):
        if id(value) not in seen and (value.__module__ == home or is_own(value.__module__)):
            seen.add(id(value))
            yield name, value
    elif isinstance(
        inspect.getattr_static(value, "__wrapped__", None), FunctionType
    ):  # that caches what it gave
        yield from _valued(name, value.__wrapped__, home, reads, seen)  # type: ignore[attr-defined]
    elif isinstance(value, Tensor) or (_is_plain(value) and not (reads.changes and is_mutable(value))):
        yield name, value


def plain_of(kind: type) -> dict[str, object]:
    """Return the plain attributes of a class that is no library's, and of those that it derives from."""
    return {
        name: value
        for c in reversed(kind.__mro__)
        if is_own(c.__module__)
        for name, value in tuple(vars(c).items())
        if not name.startswith("__") and _is_plain(value)
    }


@cache
def is_own(module: str | None) -> bool:
    """Tell whether a module is the user's: of no installed library, and not torch or ours."""
    if module is None or f"{module}.".startswith(LIBRARIES):
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module == "__main__"
    path = Path(file)
    installed = {"site-packages", "dist-packages"}.intersection(path.parts)
    return not installed and not path.is_relative_to(sysconfig.get_path("stdlib"))


def is_mutable(value: object) -> bool:
    """Tell whether a value may change in place."""
    return value is not None and not isinstance(value, (*VALUES, tuple))


def held_by(value: object) -> dict[str, object] | None:
    """Return all that an object is, its attributes and slots; None where Python does not show it.

    It shows what is pickled as `object` is.
    """
    kind = type(value)
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return None
    slots = [*_slots(kind)]
    if not slots and not hasattr(value, "__dict__"):
        return None
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**getattr(value, "__dict__", {}), **held}


def _slots(kind: type) -> Iterator[str]:
    for c in kind.__mro__:
        slots = vars(c).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if name not in ("__dict__", "__weakref__"):
                is_private = name.startswith("__") and not name.endswith("__")
                yield f"_{c.__name__.lstrip('_')}{name}" if is_private else name


def _is_plain(value: object) -> bool:
    """Tell whether a value, or all that a collection or an object holds, are numbers, texts and the like."""
    pending, seen = [value], set[int]()
    for one in pending:
        if one is None or isinstance(one, (*VALUES, Tensor)) or hasattr(type(one), "__array_interface__"):
            continue
        if id(one) in seen:
            continue
        seen.add(id(one))
        held = _parts(one)
        if held is None or len(seen) > _MOST:
            return False
        pending += held
    return True


def _parts(value: Any) -> Iterable[object] | None:
    """Return what a collection or an object consists of; None of anything else."""
    match value:
        case Mapping():
            return [*value.values()]
        case list() | tuple() | set() | frozenset():
            return value
        case SimpleNamespace():
            return [*vars(value).values()]
        case type() | FunctionType() | ModuleType() | nn.Module():
            return None
    held = held_by(value)
    return None if held is None else held.values()


@cache
def written_by(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Return attributes that forward and the methods it names write, and those that they may change in place."""
    own = [c for c in kind.__mro__ if c not in nn.Module.__mro__]
    stored, changed, seen = set[str](), set[str](), set[str]()
    left = {"forward"}
    while left:
        name = left.pop()
        seen.add(name)
        for function in (vars(c).get(name) for c in own):
            for code in codes(function):
                for names, operations, arguments in _lines(code):
                    stored.update(arguments)
                    if _CHANGING & names or "STORE_SUBSCR" in operations:
                        changed.update(names)
                left.update({*code.co_names} - seen)
    return frozenset(stored), frozenset(changed)


def _lines(code: CodeType) -> Iterator[tuple[set[str], set[str], set[str]]]:
    """Yield the attributes that each line of code names, its operations, and the attributes that it writes."""
    starts = dict(dis.findlinestarts(code))
    names, operations, written = set[str](), set[str](), set[str]()
    for step in dis.get_instructions(code):
        if step.offset in starts:
            yield names, operations, written
            names, operations, written = set(), set(), set()
        operations.add(step.opname)
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names.add(step.argval)
        elif step.opname == "STORE_ATTR":
            written.add(step.argval)
    yield names, operations, written


@dataclass(frozen=True, slots=True)
class _Reads:
    """What code names: globals that it reads and does not write, all names, texts, and attributes that it writes.

    `changes` tells whether it may change something in place.
    """

    globals: tuple[str, ...]
    names: frozenset[str]
    texts: frozenset[str]
    stored: frozenset[str]
    changes: bool


@cache
def _reads(code: CodeType) -> _Reads:
    read, written, stored, changes = dict[str, None](), set[str](), set[str](), False
    names, texts = set[str](), set[str]()
    for inner in _nested(code):
        names.update(inner.co_names)
        texts.update(text for text in inner.co_consts if isinstance(text, str))
        for step in dis.get_instructions(inner):
            match step.opname:
                case "LOAD_GLOBAL" | "LOAD_NAME":
                    read[step.argval] = None
                case "STORE_GLOBAL":
                    written.add(step.argval)
                case "STORE_ATTR":
                    stored.add(step.argval)
                    changes = True
                case "STORE_SUBSCR":
                    changes = True
        changes = changes or not _CHANGING.isdisjoint(inner.co_names)
    found = tuple(name for name in read if name not in written)
    return _Reads(found, frozenset(names), frozenset(texts), frozenset(stored), changes)


def codes(function: object) -> Iterator[CodeType]:
    """Yield the code of a function and of those that it defines."""
    if isinstance(function, FunctionType):
        yield from _nested(function.__code__)


def _nested(outer: CodeType) -> Iterator[CodeType]:
    """Yield code and that of the functions that it defines."""
    left = [outer]
    while left:
        code = left.pop()
        yield code
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
