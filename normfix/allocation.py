"""Bound what is allocated while a file says how large a network is.

A config of a hundred bytes can ask for terabytes of weights, or for a layer more a billion times. The weights
lie in the same file or folder, so a network of them takes memory in proportion to its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normfix.errors import NormfixError
from normfix.quiet_imports import import_compiler

__all__ = ["Bounded", "bounded_by"]

_LEAST, _GROWTH = 256 << 20, 8
"""Initialisation and tables that are not saved take more than the weights; a file of fewer is tiny."""
_CALLS = 100_000
"""New tensors; the largest networks make ten thousand."""


def bounded_by(path: Path) -> Bounded:
    """Bound allocations by the size of a file, or of the files in a folder and the folders in it."""
    files = [path] if path.is_file() else [*path.glob("*"), *path.glob("*/*")]
    return Bounded(sum(file.stat().st_size for file in files if file.is_file()), str(path))


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of new tensors before they are made, and refuse those out of proportion.

    Args:
        stored: bytes of the weights.
        where: named in the error.

    Raises:
        NormfixError: NF121.

    Example:
        >>> with Bounded(1 << 20, "w.pt"):
        ...     _ = torch.nn.Conv2d(8, 8, 3)
    """

    def __init__(self, stored: int, where: str) -> None:
        import_compiler()  # which the mode would import on its own terms
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = _LEAST + _GROWTH * stored
        self._calls = _CALLS
        self._where = where

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation unless it makes too much."""
        kwargs = kwargs or {}
        if not any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs))):
            self._count(args, kwargs)
        return func(*args, **kwargs)

    def _count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        device, dtype = kwargs.get("device"), kwargs.get("dtype") or torch.get_default_dtype()
        if device is not None and torch.device(device).type == "meta":
            return
        self._left -= max(_extents((args, kwargs.get("size", 0))), default=0) * dtype.itemsize
        self._calls -= 1
        if self._left < 0 or self._calls < 0:
            raise NormfixError(
                "NF121",
                "it asks for a network far larger than the weights beside it. It is not built; name the network "
                "with --arch if it is right.",
                where=self._where,
            )


def _extents(value: Any) -> Iterator[int]:
    """Yield what a call without tensors may make: the product of each list, and each number itself."""
    if isinstance(value, int | float):
        yield abs(int(value)) if math.isfinite(value) else 0
    elif isinstance(value, list | tuple):
        if value and all(isinstance(n, int) for n in value):
            yield math.prod(max(n, 0) for n in value)
        for inner in value:
            yield from _extents(inner)
