"""Let plan, geometry, scaling and source travel with a converted model, as one plain attribute of it.

What travels describes the model as it was converted. If its modules were changed since, a new head for
instance, or an attribute that its forward reads, `provenance_of` still returns it but `is_current` says that its
geometry no longer counts.
"""

from __future__ import annotations

import dis
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import CodeType, FunctionType

from torch import nn

from normfix.records.saved import Provenance, Scaling

__all__ = [
    "SAID",
    "attach_",
    "declare_scaling_",
    "declared_scaling",
    "is_current",
    "provenance_of",
    "rescale_",
]

SAID = _NAME, _STRUCTURE, _SCALING = "_normfix_provenance", "_normfix_structure", "_normfix_scaling"
"""Attributes that say something of a network and compute nothing."""


def attach_(model: nn.Module, provenance: Provenance) -> None:
    """Attach provenance in place; deep copies and pickles of the model carry it on."""
    model.__dict__[_NAME] = provenance
    model.__dict__[_STRUCTURE] = _structure(model)


def is_current(model: nn.Module) -> bool:
    """Tell whether the model has the modules, attributes and hooks it was converted with; weights may have changed."""
    return model.__dict__.get(_STRUCTURE) == _structure(model)


def provenance_of(model: nn.Module) -> Provenance | None:
    """Return what travels with the model, or None if normfix did not convert it."""
    found = getattr(model, "__dict__", {}).get(_NAME)
    return found if isinstance(found, Provenance) else None


def rescale_(model: nn.Module, scaling: Scaling) -> None:
    """Say in place that the statistics of a converted network are those of images that are scaled so."""
    known = provenance_of(model)
    if known is not None:
        model.__dict__[_NAME] = replace(known, scaling=scaling)


def declare_scaling_(model: nn.Module, scaling: Scaling) -> None:
    """Attach, in place, how the file that a network came from scales its images."""
    model.__dict__[_SCALING] = scaling


def declared_scaling(model: nn.Module) -> Scaling | None:
    """Return how the file that a network came from scales its images; None where none says it."""
    found = getattr(model, "__dict__", {}).get(_SCALING)
    return found if isinstance(found, Scaling) else None


def _structure(model: nn.Module) -> str:
    """Return a digest of names, classes, what modules print, their plain attributes, and how many hooks they have."""
    held = [(path, *_attributes(module)) for path, module in model.named_modules()]
    return hashlib.sha256(repr((repr(model), held)).encode()).hexdigest()


_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OWN = "normfix."
"""Attributes of our layers are schedules of training, which move no geometry."""


def _attributes(module: nn.Module) -> Iterator[object]:
    yield from (len(vars(module)[name]) for name in _HOOKS)
    kind = type(module)
    if not kind.__module__.startswith(_OWN):
        counted = {name: value for name, value in vars(module).items() if _is_plain(value)}
        yield [item for item in counted.items() if item[0] not in _written(kind) and item[0] not in _ALL_HAVE]


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


_ALL_HAVE = frozenset((*vars(nn.Module()), *SAID))


@cache
def _written(kind: type) -> frozenset[str]:
    """Return the attributes that methods write, as those that count calls or keep a size; __init__ is none of them."""
    functions = [f for c in kind.__mro__ for name, f in vars(c).items() if name != "__init__"]
    codes = [f.__code__ for f in functions if isinstance(f, FunctionType)]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(
        i.argval for code in codes for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"
    )
