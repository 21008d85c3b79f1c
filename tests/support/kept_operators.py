"""Operators that TorchScript was told of live as long as the process: it knows them by `id` and does not hold them.

Once one is gone (a library that a test defined, or a packet that torch replaced while it imported its compiler), the
next object at its address is taken for it: now and then "builtin cannot be used as a value" for a list of integers.
"""

from typing import Any

from torch.jit import _builtins

_KEPT: list[Any] = []


def keep_operators() -> None:
    """Hold what is registered from here on."""
    register = _builtins._register_builtin

    def kept(function: Any, operator: str) -> None:
        _KEPT.append(function)
        register(function, operator)

    _builtins._register_builtin = kept
