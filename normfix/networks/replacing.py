"""Put modules in the places of others, wherever a network holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["HOOKS", "is_hooked", "replace_"]


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Attributes of a module that hold its hooks and how they are called."""


def replace_(network: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules under all their names, and in attributes that are no submodules: lists, tuples and dictionaries.

    Args:
        network: changed in place.
        new: by what each module is replaced.

    Returns:
        The network: another one where the network itself is replaced.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.ReLU())
        >>> net.order = [net[0]]
        >>> replaced = replace_(net, {net[0]: nn.Tanh()})
        >>> net.order[0] is net[0], net[0]
        (True, Tanh())
    """
    if network in new:
        return new[network]
    seen: set[int] = set()
    for parent in list(network.modules()):
        _with(vars(parent), new, seen)  # submodules among them, under each alias
    return network


def _with(value: Any, new: Mapping[nn.Module, nn.Module], seen: set[int]) -> Any:
    """Return a value with its modules replaced: lists and dictionaries in place, since others may hold them."""
    if isinstance(value, nn.Module):
        return new.get(value, value)
    if not isinstance(value, list | tuple | dict) or id(value) in seen:
        return value
    if isinstance(value, tuple):
        found = [_with(part, new, seen) for part in value]
        if all(a is b for a, b in zip(found, value, strict=True)):
            return value
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    seen.add(id(value))
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        replaced = _with(part, new, seen)
        if replaced is not part:
            value[key] = replaced
    return value


def is_hooked(module: nn.Module) -> bool:
    """Tell whether something is called before or after a module, forward or backward."""
    return any(getattr(module, hooks) for hooks in HOOKS)
