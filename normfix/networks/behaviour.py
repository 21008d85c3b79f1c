"""What makes a network compute what it computes, besides the values of its tensors: something to compare.

Modules and their attributes, hooks, and the code of their classes and functions with what it closes over. Two that
compare equal may still differ in what Python does not show (a global variable, memory of foreign libraries).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["behaviour_of"]

_ELSEWHERE = frozenset({"_parameters", "_buffers", "_modules", "training"})
"""What state dicts hold, and what differs in a twin."""

_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, CodeType)
_DEEPEST = 8


def behaviour_of(model: nn.Module) -> object:
    """Return what compares equal as long as the modules, attributes, hooks and code of a network are the same.

    Values of parameters and buffers are no part of it; their names, shapes, dtypes and devices are.
    """
    modules = [
        (path, type(module), id(module), _attributes(module)) for path, module in model.named_modules()
    ]
    tensors = (*model.named_parameters(), *model.named_buffers())
    return (
        modules,
        [_class(kind) for kind in dict.fromkeys(type(module) for module in model.modules())],
        [(name, t.shape, t.dtype, t.device) for name, t in tensors],
    )


def _attributes(module: nn.Module) -> object:
    return [(name, _plain(value)) for name, value in tuple(vars(module).items()) if name not in _ELSEWHERE]


def _class(kind: type) -> object:
    """Return the code and constants of a class, and of those it derives from below nn.Module."""
    own = [c for c in kind.__mro__ if c not in nn.Module.__mro__]
    return [
        (name, _plain(value))
        for c in own
        for name, value in tuple(vars(c).items())
        if name == "__call__" or not name.startswith("__")
    ]


def _plain(value: object, above: tuple[int, ...] = ()) -> object:
    """Return an immutable picture of a value; of what holds itself, or is nested deeply, its identity."""
    if value is None or isinstance(value, _VALUES):
        return type(value), repr(value) if isinstance(value, float) else value
    if id(value) in above or len(above) > _DEEPEST or _is_whole(value):
        return type(value), id(value)
    if isinstance(value, Tensor):  # no part of a state dict
        version = None if value.is_inference() else value._version
        return id(value), version, value.shape, value.dtype
    return type(value), [_plain(part, (*above, id(value))) for part in _parts(value)]


def _is_whole(value: object) -> bool:
    """Tell whether a value is compared elsewhere, or never changes."""
    frozen = getattr(getattr(type(value), "__dataclass_params__", None), "frozen", False)
    return isinstance(value, type | nn.Module) or bool(frozen)


def _parts(value: Any) -> Iterable[object]:
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
    if hasattr(value, "__dict__"):
        return [id(value), vars(value)]
    return [id(value)]


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
