"""What makes a network compute what it computes, besides the values of its tensors: something to compare.

Modules and their attributes, hooks, and the code of their classes and functions, with what it closes over and what it
reads by name (`reading`). A copy of a network compares equal to it, as long as neither was changed. Two that compare
equal may still differ in what is not looked at: variables of installed libraries,
globals that code writes itself or that hold other objects, and memory of foreign libraries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from normfix.networks.devices import bytes_of
from normfix.networks.reading import (
    LIBRARIES,
    OURS,
    VALUES,
    held_by,
    is_mutable,
    plain_of,
    read_by,
    written_by,
)

__all__ = [
    "SAID",
    "behaviour_of",
    "digest_of_tensor",
    "digest_of_values",
    "open_behaviour_of",
    "state_of",
    "structure_of",
]

SAID = (
    "_normfix_provenance",
    "_normfix_structure",
    "_normfix_values",
    "_normfix_scaling",
    "_normfix_window",
    "_normfix_folder",
)
"""Attributes that say something of a network and compute nothing."""

_ELSEWHERE = frozenset({"_parameters", "_buffers", "_modules", "training", *SAID})
"""What state dicts hold, what differs in a twin, and what is said of a network and computes nothing."""

_DEEPEST = 8


def behaviour_of(model: nn.Module) -> object:
    """Return what compares equal as long as the modules, attributes, hooks and code of a network are the same.

    Values of parameters and buffers are no part of it, nor their dtypes and devices; their names and shapes are, and
    which of them are one.
    """
    return _behaviour(model)[0]


def open_behaviour_of(model: nn.Module) -> object | None:
    """Return `behaviour_of` where it sees into all that the modules of a network hold, else None.

    What it knows by its identity alone, as an object with slots, may change in place and compare equal.
    """
    behaviour, hides = _behaviour(model)
    return None if hides else behaviour


def _behaviour(model: nn.Module) -> tuple[object, bool]:
    """Return `behaviour_of`, and whether modules hold what it does not see into."""
    modules = [*model.named_modules(remove_duplicate=False)]
    picture = _Picture(dict(reversed([(id(module), path) for path, module in modules])))
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    attributes = [
        (path, picture.number(module), type(module), picture.attributes(module)) for path, module in modules
    ]
    hides = picture.hides  # before their code: what that refers to is not held by them
    behaviour = (
        attributes,
        [picture.code(kind) for kind in dict.fromkeys(type(module) for _, module in modules)],
        [(name, picture.number(t), t.shape, t.is_floating_point()) for name, t in tensors],
    )
    return behaviour, hides


def state_of(model: nn.Module) -> tuple[tuple[str, torch.dtype, torch.device, object], ...]:
    """Return what compares equal as long as the parameters and buffers of a network have the same values."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return tuple((name, t.dtype, t.device, digest_of_tensor(t)) for name, t in tensors)


def digest_of_values(model: nn.Module) -> str:
    """Return a digest that stays as long as `state_of` does, whatever device a network is on."""
    values = [(name, dtype, digest) for name, dtype, _, digest in state_of(model)]
    return hashlib.sha256(repr(values).encode()).hexdigest()


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
        [picture.code(kind) for kind in kinds if not kind.__module__.startswith(LIBRARIES)],
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
        if value is None or isinstance(value, VALUES):
            return type(value), repr(value) if isinstance(value, float) else value
        if id(value) in above:
            return type(value), "above", above.index(id(value))
        if isinstance(value, nn.Module) and id(value) in self._modules:
            return type(value), self._modules[id(value)]
        if isinstance(value, type):
            return type(value), self._hidden(value), self._of(plain_of(value), (*above, id(value)))
        if len(above) > _DEEPEST or isinstance(value, nn.Module | ModuleType):
            self.hides = True
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
                    *(part for pair in read_by(value, self._functions) for part in pair),
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
        if hasattr(type(value), "__array_interface__"):
            return [value.shape, str(value.dtype), value.tobytes()]
        if getattr(getattr(type(value), "__dataclass_params__", None), "frozen", False):
            return [getattr(value, field.name) for field in fields(value)]
        held = self._held(value)
        if held is not None:
            return [self.number(value), held]
        self.hides = self.hides or not isinstance(value, BuiltinFunctionType)
        return [self._hidden(value)]

    def _tensor(self, value: Tensor) -> object:
        return self.number(value), value.shape, value.dtype, digest_of_tensor(value)

    def _instructions(self, code: CodeType) -> object:
        return code

    def _held(self, value: object) -> dict[str, object] | None:
        return held_by(value)

    def _hidden(self, value: object) -> object:
        """Return what stands for a value that Python does not show."""
        return id(value)


class _LastingPicture(_Picture):
    """Pictures that read the same in a copy, in another process and after a forward pass."""

    def attributes(self, module: nn.Module) -> object:
        held = vars(module)
        hooks = [self._of([*held[name].values()]) for name in ("_forward_hooks", "_forward_pre_hooks")]
        if type(module).__module__.startswith(OURS):
            return hooks, self._of(held.get("forward"))
        kind: type = type(module)
        written, changed = written_by(kind)
        passing = _ALL_HAVE | written
        stay = (
            (name, value)
            for name, value in held.items()
            if name not in passing and not (name in changed and is_mutable(value))
        )
        return hooks, [(name, self._of(value)) for name, value in stay]

    def _tensor(self, value: Tensor) -> object:
        exact = not (value.is_floating_point() or value.is_complex() or value.is_meta)
        return tuple(value.shape), digest_of_tensor(value) if exact else None

    def _instructions(self, code: CodeType) -> object:
        return code.co_code.hex(), code.co_names, [self._of(constant) for constant in code.co_consts]

    def _held(self, value: object) -> dict[str, object] | None:
        held = held_by(value)
        return getattr(value, "__dict__", None) if held is None else held

    def _hidden(self, value: object) -> object:
        return getattr(value, "__module__", None), getattr(value, "__qualname__", None)


_ALL_HAVE = frozenset((*vars(nn.Module()), *SAID))


def digest_of_tensor(value: Tensor) -> object:
    """Return what differs if the values do; the identity of a tensor whose values cannot be read."""
    try:
        return hashlib.sha256(bytes_of(value)).hexdigest()
    except (RuntimeError, NotImplementedError, TypeError):  # on no device, sparse, quantised
        return id(value)


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
