"""What makes a network compute what it computes, besides the values of its tensors: something to compare.

Modules and their attributes, hooks, and the code of their classes and functions with what it closes over. A copy of a
network compares equal to it, as long as neither was changed. Two that compare equal may still differ in what Python
does not show (a global variable, memory of foreign libraries).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from normfix.networks.devices import bytes_of
from normfix.networks.provenance import SAID

__all__ = ["behaviour_of", "digest_of_tensor", "state_of"]

_ELSEWHERE = frozenset({"_parameters", "_buffers", "_modules", "training", *SAID})
"""What state dicts hold, what differs in a twin, and what is said of a network and computes nothing."""

_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, CodeType)
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


def state_of(model: nn.Module) -> object:
    """Return what compares equal as long as the parameters and buffers of a network have the same values."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [(name, t.dtype, t.device, digest_of_tensor(t)) for name, t in tensors]


class _Picture:
    """Immutable pictures of the values that one network holds, in which objects are numbered as they are met.

    What Python does not show the state of is known by its identity, so that no copy of it is the same.
    """

    def __init__(self, modules: Mapping[int, str]) -> None:
        self._modules = modules
        self._numbers: dict[int, int] = {}

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
        if value is None or isinstance(value, _VALUES):
            return type(value), repr(value) if isinstance(value, float) else value
        if id(value) in above:
            return type(value), "above", above.index(id(value))
        if isinstance(value, nn.Module) and id(value) in self._modules:
            return type(value), self._modules[id(value)]
        if len(above) > _DEEPEST or isinstance(value, type | nn.Module | ModuleType):
            return type(value), id(value)
        if isinstance(value, Tensor):  # no part of a state dict
            return self.number(value), value.shape, value.dtype, digest_of_tensor(value)
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
                ]
            case MethodType():
                return [value.__func__, value.__self__]
            case staticmethod() | classmethod():
                return [value.__func__]
            case property():
                return [value.fget]
            case partial():
                return [value.func, value.args, value.keywords]
        if hasattr(value, "__array_interface__"):
            return [value.shape, str(value.dtype), value.tobytes()]
        if getattr(getattr(type(value), "__dataclass_params__", None), "frozen", False):
            return [getattr(value, field.name) for field in fields(value)]
        if _shows_all(value):
            return [self.number(value), vars(value)]
        return [id(value)]


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
