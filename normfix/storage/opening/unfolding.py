"""Whether values that share their parts stay small when they are written out, and whether they end at all.

A pickle may put one list into another twice, that into a third twice, and so on: forty lists that are a million million
once something writes them out, looks for names in them or turns them into text. Or it puts a dict into itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["is_out_of_proportion"]

_ALWAYS, _OFTEN = 1_000_000, 4
"""Values that may always be written out, and how often each may be beyond them: a state dict may have four names."""
_CONTAINERS = (dict, list, tuple, set, frozenset)


def is_out_of_proportion(content: object) -> bool:
    """Tell whether plain containers hold themselves, or far more values than there are once shared ones count again.

    Args:
        content: values of any kind; what is no dict, list, tuple or set counts as one.

    Example:
        >>> shared = [1]
        >>> is_out_of_proportion([shared, shared])
        False
        >>> for _ in range(40):
        ...     shared = [shared, shared]
        >>> is_out_of_proportion(shared)
        True
    """
    sizes: dict[int, int] = {}
    around: set[int] = set()
    stored = 0
    pending = [(content, False)] if isinstance(content, _CONTAINERS) else []
    while pending:
        value, is_whole = pending.pop()
        key = id(value)
        parts = _parts(value)
        if is_whole:
            around.discard(key)
            inner = [sizes[id(part)] - 1 for part in parts if isinstance(part, _CONTAINERS)]
            sizes[key] = 1 + len(parts) + sum(inner)
            stored += 1 + len(parts)
        elif key in around:
            return True
        elif key not in sizes:
            around.add(key)
            pending.append((value, True))
            pending.extend((part, False) for part in parts if isinstance(part, _CONTAINERS))
    return sizes.get(id(content), 1) > _ALWAYS + _OFTEN * stored


def _parts(value: Any) -> Collection[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
