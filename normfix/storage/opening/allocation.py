"""Bound what is allocated while a file says how large a network is.

A config of a hundred bytes can ask for terabytes of weights, or for a layer more a billion times. The weights
lie in the same file or folder, so a network of them takes memory in proportion to its size. `Sketched` builds
without memory for what is large, so that a network is compared with its weights before it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode,
    _pop_mode_temporarily,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from normfix.errors import NormfixError
from normfix.networks.quiet_imports import import_compiler

__all__ = [
    "PLENTY",
    "Bounded",
    "Sketched",
    "Stored",
    "bounded_by",
    "require_proportion",
    "torch_restored",
    "uncounted",
]

_LEAST, _GROWTH = 256 << 20, 8
"""Initialisation and tables that are not saved take more than the weights; a file of fewer is tiny."""
_CALLS = 100_000
"""New tensors; the largest networks make ten thousand."""
_CALLS_LEAST, _CALLS_EACH = 20_000, 10
"""Tensors that building a network may make, and how many more for each of its weights: modules take time and room."""
_LARGE = 1 << 16
"""Elements of a tensor that a sketch makes without memory; constructors read smaller ones, of depths and the like."""
_FILLED = frozenset(
    {torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default, torch.ops.aten.ones.default}
)
"""What makes a tensor of an extent and of nothing else."""
_SURELY = 1 << 20
"""Elements that a call with tensors may at most make for its result not to be foreseen."""
_MORE, _SLACK, _FEW = 4, 1 << 20, 500
"""How many times the elements and tensors of its weights a network may have, and how many more of these where they are
few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What lies in the weights beside a config: the number of tensors, and of elements that take room there."""

    tensors: int
    elements: int

    @property
    def calls(self) -> int:
        """Return how many tensors may be made to build a network of them."""
        return min(_CALLS, _CALLS_LEAST + _CALLS_EACH * self.tensors)

    @classmethod
    def of(cls, tensors: Iterable[Tensor], path: Path | None = None) -> Stored:
        """Count tensors; what they share or repeat by strides counts once.

        Args:
            tensors: as read.
            path: of the file or folder they were read from, whose bytes bound what they claim.
        """
        rooms: dict[int, int] = {}
        number = 0
        for tensor in tensors:
            number += 1
            room = tensor.untyped_storage()
            rooms[room.data_ptr()] = room.nbytes() // max(1, tensor.element_size())
        elements = sum(rooms.values())
        return cls(
            tensors=number, elements=elements if path is None else min(elements, _GROWTH * _bytes(path))
        )

    @property
    def seconds(self) -> float:
        """Processor time that building a network of these weights may take, imports included.

        Usual are 0.1 s and 1 ms a tensor.
        """
        return 6 + 0.002 * min(self.tensors, _TENSORS) + 2e-7 * self.elements

    @property
    def room(self) -> int:
        """Bytes by which the process may grow meanwhile, imports included."""
        return (768 << 20) + 40 * self.elements


_TENSORS = 5000
"""The largest networks have as many; empty tensors cost nothing, and shall not buy time."""

PLENTY = Stored(tensors=20_000, elements=1 << 30)
"""Of weights that are not known yet."""


def bounded_by(path: Path) -> Bounded:
    """Bound allocations by the size of a file, or of the files in a folder and the folders in it."""
    return Bounded(_bytes(path), str(path))


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [*path.glob("*"), *path.glob("*/*")]
    return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def uncounted() -> Iterator[None]:
    """Leave the counting off for what takes no more memory than the file has that it reads.

    Counting doubles the time of reading ten thousands of small tensors.
    """
    counted = isinstance(_get_current_dispatch_mode(), Bounded)
    with _pop_mode_temporarily() if counted else nullcontext():
        yield


@contextmanager
def torch_restored() -> Iterator[None]:
    """Leave torch's modes as they were, also where an exception from outside came while one of them was being left."""
    modes, functions = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    graded = torch.is_grad_enabled()
    try:
        yield
    finally:
        while torch._C._len_torch_dispatch_stack() > modes:
            _pop_mode()
        while torch._C._len_torch_function_stack() > functions:
            torch.overrides._pop_mode()  # type: ignore[no-untyped-call]
        torch.set_grad_enabled(graded)


def require_proportion(model: nn.Module, stored: Stored, where: str) -> None:
    """Refuse a network of many more elements, or tensors, than the weights that shall fill it.

    Raises:
        NormfixError: NF121.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    if sum(sizes) > _MORE * stored.elements + _SLACK or len(sizes) > _MORE * stored.tensors + _FEW:
        raise _too_large(where)


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of new tensors before they are made, and refuse those out of proportion.

    Args:
        stored: bytes of the weights.
        where: named in the error.
        calls: new tensors that may be made.

    Raises:
        NormfixError: NF121.

    Example:
        >>> with Bounded(1 << 20, "w.pt"):
        ...     _ = torch.nn.Conv2d(8, 8, 3)
    """

    def __init__(self, stored: int, where: str, calls: int = _CALLS) -> None:
        import_compiler()  # which the mode would import on its own terms
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = _LEAST + _GROWTH * stored
        self._calls = calls
        self._where = where

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation unless it makes too much."""
        kwargs = kwargs or {}
        if _makes_nothing(func):
            self._count_views(func, args)
            return self._in_place(func, args, kwargs)
        if func in _FILLED and not _on_meta(kwargs):
            # a file has tens of thousands of these, and looking at each on the meta device takes longer than reading it
            number = math.prod([max(n, 0) for n in args[0]])
            if number <= _LARGE:
                self._count(number * _dtype_of(kwargs).itemsize)
                return func(*args, **kwargs)
        result = self._foreseen(func, args, kwargs)
        return func(*args, **kwargs) if result is None else result

    def require_kept(self) -> None:
        """Refuse what a library went on with although an operation was refused.

        Raises:
            NormfixError: NF121.
        """
        if self._left < 0 or self._calls < 0:
            raise _too_large(self._where)

    def _count_views(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Count the views that a tensor falls into when it is iterated over."""
        if _unbinds(func) and args[0].dim():
            self._calls -= args[0].shape[args[1] if len(args) > 1 else 0]
            self.require_kept()

    def _in_place(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _foreseen(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count what a call would make; return the result if it has been made without memory."""
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        extents = max(_extents((args, kwargs.get("size", 0))), default=0)
        if tensors:
            most = math.prod([max(1, t.numel()) for t in tensors]) * max(1, extents)
            if most <= _SURELY and not any(t.is_meta for t in tensors):
                self._count(0)
                return None
        elif _on_meta(kwargs):
            self._count(0)
            return None
        made = _without_memory(func, args, kwargs)
        if made is None:
            self._count(extents * _dtype_of(kwargs).itemsize if not tensors else 0)
            return None
        self._count(sum(t.numel() * t.element_size() for t in tree_leaves(made) if isinstance(t, Tensor)))
        return self._taken(made, tensors)

    def _taken(self, made: Any, tensors: list[Tensor]) -> Any:
        """Return a result without memory if it shall be the result."""
        return made if any(t.is_meta for t in tensors) else None

    def _count(self, size: int) -> None:
        self._left -= size
        self._calls -= 1
        self.require_kept()


class Sketched(Bounded):  # type: ignore[no-untyped-call]
    """Count as Bounded does, but take no memory for large tensors: they are left on the meta device.

    A network that is built within has the shapes it would have, and its elements are counted against its weights.
    What reads the values of a large tensor fails.
    """

    def _in_place(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        mixed = {t.is_meta for t in tensors if t.dim()} == {True, False}
        if not mixed:
            return func(*args, **kwargs)
        _without_memory(func, args, kwargs)
        return args[0]

    def _taken(self, made: Any, tensors: list[Tensor]) -> Any:
        large = any(t.numel() > _LARGE for t in tree_leaves(made) if isinstance(t, Tensor))
        return made if large or any(t.is_meta for t in tensors) else None


def _too_large(where: str) -> NormfixError:
    return NormfixError(
        "NF121",
        "it asks for a network far larger than the weights beside it. It is not built; name the network "
        "with --arch if it is right.",
        where=where,
    )


@cache
def _makes_nothing(func: Any) -> bool:
    """Tell whether an operation makes no new memory: it writes into its operand, or looks at it anew."""
    schema = getattr(func, "_schema", None)
    aliased = schema is not None and any(value.alias_info is not None for value in schema.arguments)
    return aliased and "resize" not in str(func)


@cache
def _unbinds(func: Any) -> bool:
    return "unbind" in str(func)


def _on_meta(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _dtype_of(kwargs: dict[str, Any]) -> torch.dtype:
    dtype = kwargs.get("dtype")
    return dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()


def _without_memory(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operation gives on the meta device; None where only the values tell."""
    alone = not any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs)))
    if alone or kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("meta")}
        kwargs.pop("pin_memory", None)
    try:
        args, kwargs = tree_map_only(Tensor, _hollow, (args, kwargs))
        return func(*args, **kwargs)
    except Exception:  # noqa: BLE001 - operators without such a form raise several kinds
        return None


def _hollow(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _extents(value: Any) -> Iterator[int]:
    """Yield what a call without tensors may make: the product of each list, and each number itself."""
    if isinstance(value, int | float):
        yield abs(int(value)) if math.isfinite(value) else 0
    elif isinstance(value, list | tuple):
        if value and all(isinstance(n, int) for n in value):
            yield math.prod(max(n, 0) for n in value)
        for inner in value:
            yield from _extents(inner)
