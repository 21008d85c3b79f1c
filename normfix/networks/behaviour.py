"""What makes a network compute what it computes, besides the values of its tensors: something to compare.

Modules and their attributes, hooks, and the code of their classes and functions, with what it closes over and the
plain values and functions of its own module that it reads by name. A copy of a network compares equal to it, as long as
neither was changed. Two that compare equal may still differ in what is not looked at: variables of other modules,
globals that code writes itself or that hold other objects, and memory of foreign libraries.
"""

from __future__ import annotations

import dis
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from normfix.networks.devices import bytes_of

__all__ = ["SAID", "behaviour_of", "digest_of_tensor", "is_open", "state_of", "structure_of"]

SAID = (
    "_normfix_provenance",
    "_normfix_structure",
    "_normfix_scaling",
    "_normfix_window",
    "_normfix_folder",
)
"""Attributes that say something of a network and compute nothing."""

_ELSEWHERE = frozenset({"_parameters", "_buffers", "_modules", "training", *SAID})
"""What state dicts hold, what differs in a twin, and what is said of a network and computes nothing."""

_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)
_DEEPEST = 8


def behaviour_of(model: nn.Module) -> object:
    """Return what compares equal as long as the modules, attributes, hooks and code of a network are the same.

    Values of parameters and buffers are no part of it, nor their dtypes and devices; their names and shapes are, and
    which of them are one.
    """
    modules = [*model.named_modules(remove_duplicate=False)]
    picture = _Picture(dict(reversed([(id(module), path) for path, module in modules])))
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return (
        [
            (path, picture.number(module), type(module), picture.attributes(module))
            for path, module in modules
        ],
        [picture.code(kind) for kind in dict.fromkeys(type(module) for _, module in modules)],
        [(name, picture.number(t), t.shape, t.is_floating_point()) for name, t in tensors],
    )


def is_open(model: nn.Module) -> bool:
    """Tell whether `behaviour_of` sees into all that the modules of a network hold.

    What it knows by its identity alone, as an object with slots, may change in place and compare equal.
    """
    modules = [*model.named_modules(remove_duplicate=False)]
    picture = _Picture({id(module): path for path, module in modules})
    for _, module in modules:
        picture.attributes(module)
    return not picture.hides


def state_of(model: nn.Module) -> object:
    """Return what compares equal as long as the parameters and buffers of a network have the same values."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return tuple((name, t.dtype, t.device, digest_of_tensor(t)) for name, t in tensors)


def structure_of(model: nn.Module) -> str:
    """Return a digest that stays as long as `behaviour_of` does, also in copies and pickles and over forward passes.

    So attributes that forward passes write are no part of it, nor are values of floating-point tensors, nor the
    attributes of our own layers, which are schedules of training; what Python does not show is known by its type.
    """
    modules = [*model.named_modules()]
    picture = _LastingPicture({id(module): path for path, module in modules})
    kinds = dict.fromkeys(type(module) for _, module in modules)
    parts = (
        repr(model),
        [(path, type(module), picture.attributes(module)) for path, module in modules],
        [picture.code(kind) for kind in kinds if not kind.__module__.startswith(_LIBRARIES)],
        [
            (name, tuple(t.shape), _numbers(name, t))
            for name, t in model.state_dict(keep_vars=True).items()
            if isinstance(t, Tensor)
        ],
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _numbers(name: str, value: Tensor) -> object:
    """Return what differs if whole numbers do that a network holds, such as rows to be read; None for all else."""
    if value.is_floating_point() or value.is_complex() or name.rpartition(".")[2] == "num_batches_tracked":
        return None
    found = digest_of_tensor(value)
    return found if isinstance(found, str) else None


class _Picture:
    """Immutable pictures of the values that one network holds, in which objects are numbered as they are met.

    What Python does not show the state of is known by its identity, so that no copy of it is the same.
    """

    def __init__(self, modules: Mapping[int, str]) -> None:
        self._modules = modules
        self._numbers: dict[int, int] = {}
        self._functions: set[int] = set()
        self.hides = False
        """Whether it met what may change in place and is known by its identity."""

    def number(self, value: object) -> int:
        """Return a number that tells an object from the others: one object under two names has one."""
        return self._numbers.setdefault(id(value), len(self._numbers))

    def attributes(self, module: nn.Module) -> object:
        """Return what a module holds beside state and submodules."""
        held = tuple(vars(module).items())
        return [(name, self._of(value)) for name, value in held if name not in _ELSEWHERE]

    def code(self, kind: type) -> object:
        """Return the code and constants of a class, and of those it derives from below nn.Module."""
        own = [c for c in kind.__mro__ if c not in nn.Module.__mro__]
        return [
            (name, self._of(value))
            for c in own
            for name, value in tuple(vars(c).items())
            if name == "__call__" or not name.startswith("__")
        ]

    def _of(self, value: object, above: tuple[int, ...] = ()) -> object:
        """Return the picture of a value; of what holds itself where, of what is nested deeply its identity."""
        if isinstance(value, CodeType):
            return self._instructions(value)
        if value is None or isinstance(value, _VALUES):
            return type(value), repr(value) if isinstance(value, float) else value
        if id(value) in above:
            return type(value), "above", above.index(id(value))
        if isinstance(value, nn.Module) and id(value) in self._modules:
            return type(value), self._modules[id(value)]
        if len(above) > _DEEPEST or isinstance(value, type | nn.Module | ModuleType):
            self.hides = self.hides or not isinstance(value, type)
            return type(value), self._hidden(value)
        if isinstance(value, Tensor):  # no part of a state dict
            return self._tensor(value)
        parts = [self._of(part, (*above, id(value))) for part in self._parts(value)]
        return type(value), parts

    def _parts(self, value: Any) -> Iterable[object]:
        """Return what a value consists of; its identity where Python does not show."""
        match value:
            case Mapping():
                return [part for item in tuple(value.items()) for part in item]
            case list() | tuple():
                return list(value)
            case set() | frozenset():
                return sorted(value, key=repr)
            case FunctionType():
                return [
                    value.__code__,
                    value.__defaults__,
                    value.__kwdefaults__,
                    *map(_content, value.__closure__ or ()),
                    *self._read_by(value),
                ]
            case MethodType():
                return [value.__func__, value.__self__]
            case staticmethod() | classmethod():
                return [value.__func__]
            case property():
                return [value.fget]
            case partial():
                return [value.func, value.args, value.keywords]
            case SimpleNamespace():
                return [vars(value)]
        if hasattr(value, "__array_interface__"):
            return [value.shape, str(value.dtype), value.tobytes()]
        if getattr(getattr(type(value), "__dataclass_params__", None), "frozen", False):
            return [getattr(value, field.name) for field in fields(value)]
        if self._shows(value):
            return [self.number(value), vars(value)]
        self.hides = self.hides or not isinstance(value, BuiltinFunctionType)
        return [self._hidden(value)]

    def _read_by(self, function: FunctionType) -> Iterator[object]:
        """Yield the globals that a function reads, with their names: of a function once, of its own module alone."""
        if not function.__module__ or function.__module__.startswith(_LIBRARIES):
            return
        names, changes = _globals_read(function.__code__)
        for name in names:
            value = function.__globals__.get(name)
            if isinstance(value, FunctionType):
                if value.__module__ != function.__module__ or id(value) in self._functions:
                    continue
                self._functions.add(id(value))
            elif not isinstance(value, Tensor) and (not _is_plain(value) or (changes and _is_mutable(value))):
                continue
            yield name
            yield value

    def _tensor(self, value: Tensor) -> object:
        return self.number(value), value.shape, value.dtype, digest_of_tensor(value)

    def _instructions(self, code: CodeType) -> object:
        return code

    def _shows(self, value: object) -> bool:
        return _shows_all(value)

    def _hidden(self, value: object) -> object:
        """Return what stands for a value that Python does not show."""
        return id(value)


class _LastingPicture(_Picture):
    """Pictures that read the same in a copy, in another process and after a forward pass."""

    def attributes(self, module: nn.Module) -> object:
        held = vars(module)
        hooks = [self._of([*held[name].values()]) for name in ("_forward_hooks", "_forward_pre_hooks")]
        if type(module).__module__.startswith(_OURS):
            return hooks, self._of(held.get("forward"))
        kind: type = type(module)
        written, changed = _written(kind)
        passing = _ALL_HAVE | written
        stay = (
            (name, value)
            for name, value in held.items()
            if name not in passing and not (name in changed and _is_mutable(value))
        )
        return hooks, [(name, self._of(value)) for name, value in stay]

    def _tensor(self, value: Tensor) -> object:
        exact = not (value.is_floating_point() or value.is_complex() or value.is_meta)
        return tuple(value.shape), digest_of_tensor(value) if exact else None

    def _instructions(self, code: CodeType) -> object:
        return code.co_code.hex(), code.co_names, [self._of(constant) for constant in code.co_consts]

    def _shows(self, value: object) -> bool:
        return hasattr(value, "__dict__")

    def _hidden(self, value: object) -> object:
        return getattr(value, "__module__", None), getattr(value, "__qualname__", None)


_OURS = "normfix."
_LIBRARIES = (_OURS, "torch.")
_ALL_HAVE = frozenset((*vars(nn.Module()), *SAID))
_CHANGING = frozenset(("append", "extend", "insert", "pop", "popitem", "update", "setdefault", "clear"))


def _is_mutable(value: object) -> bool:
    return value is not None and not isinstance(value, (*_VALUES, tuple))


@cache
def _written(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Return attributes that forward and the methods it names write, and those that they may change in place."""
    own = [c for c in kind.__mro__ if c not in nn.Module.__mro__]
    stored, changed, seen = set[str](), set[str](), set[str]()
    left = {"forward"}
    while left:
        name = left.pop()
        seen.add(name)
        for function in (vars(c).get(name) for c in own):
            for code in _codes(function):
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


@cache
def _globals_read(code: CodeType) -> tuple[tuple[str, ...], bool]:
    """Return the globals that code reads and does not write, and whether it may change something in place."""
    read, written, changes = dict[str, None](), set[str](), False
    for inner in _nested(code):
        for step in dis.get_instructions(inner):
            match step.opname:
                case "LOAD_GLOBAL" | "LOAD_NAME":
                    read[step.argval] = None
                case "STORE_GLOBAL":
                    written.add(step.argval)
                case "STORE_SUBSCR" | "STORE_ATTR":
                    changes = True
        changes = changes or not _CHANGING.isdisjoint(inner.co_names)
    return tuple(name for name in read if name not in written), changes


def _is_plain(value: object) -> bool:
    """Tell whether a value, or all that a collection or an object holds, are numbers, texts and the like."""
    match value:
        case Mapping():
            held: Iterable[object] = value.values()
        case list() | tuple() | set() | frozenset():
            held = value
        case SimpleNamespace():
            held = vars(value).values()
        case _ if not isinstance(value, type | FunctionType | ModuleType | nn.Module) and _shows_all(value):
            held = vars(value).values()
        case _:
            return isinstance(value, _VALUES)
    return all(isinstance(one, (*_VALUES, type(None))) for one in held)


def _codes(function: object) -> Iterator[CodeType]:
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


def digest_of_tensor(value: Tensor) -> object:
    """Return what differs if the values do; the identity of a tensor whose values cannot be read."""
    try:
        return hashlib.sha256(bytes_of(value)).hexdigest()
    except (RuntimeError, NotImplementedError, TypeError):  # on no device, sparse, quantised
        return id(value)


def _shows_all(value: object) -> bool:
    """Tell whether an object holds all that it is in its __dict__: it is pickled as `object` is, and has no slots."""
    kind = type(value)
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    slots = any(vars(c).get("__slots__") for c in kind.__mro__)
    return plain and not slots and hasattr(value, "__dict__")


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
