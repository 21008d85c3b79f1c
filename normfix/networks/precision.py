"""float32 without shortcuts, and every setting back as it was, through whichever of torch's two interfaces it was made.

The legacy interface (`set_float32_matmul_precision`, `allow_tf32`) and the one of torch 2.9 (`fp32_precision`, of all,
of a backend, of an operation; "none" inherits) share their state, and torch refuses to read the first where the
second contradicts it. So nothing is written that is exact already, and what is written through one is taken back
through the same one:

    parents  ->  legacy  ->  operations          and back:    legacy  ->  parents  ->  operations

An operation that is still inexact once its parents are exact was set itself; one that became exact inherits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

__all__ = ["exact_precision"]

Place: TypeAlias = tuple[str, str]

_PARENTS: tuple[Place, ...] = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_PRODUCTS: tuple[Place, ...] = (("cuda", "matmul"), ("mkldnn", "matmul"))
_LAYERS: tuple[Place, ...] = (("cuda", "conv"), ("cuda", "rnn"))
_OPERATIONS: tuple[Place, ...] = (*_PRODUCTS, *_LAYERS, ("mkldnn", "conv"), ("mkldnn", "rnn"))
_EXACT = ("none", "ieee")


def exact_precision() -> Callable[[], None]:
    """Make float32 arithmetic of the whole process exact; return what brings its settings back.

    What somebody else sets meanwhile stays as he set it.
    """
    legacy = _Legacy()
    if not hasattr(torch._C, "_get_fp32_precision_getter"):  # before torch 2.9
        legacy.make_exact()
        return legacy.restore
    return _made_exact(legacy)


def _made_exact(legacy: _Legacy) -> Callable[[], None]:
    before = {place: _read(place) for place in (*_PARENTS, *_OPERATIONS)}
    parents = []
    for place in _PARENTS:
        if _loose(place):
            _write(place, "ieee")
            parents.append(place)
    own = {place: _read(place) if _loose(place) else "none" for place in _OPERATIONS}
    written = {*legacy.make_exact()}
    for place in _OPERATIONS:
        if _loose(place):
            _write(place, "ieee")
            written.add(place)
    mine = {place: _read(place) for place in (*parents, *written)}

    def restore() -> None:
        changed = {place for place in mine if _read(place) != mine[place]}
        legacy.restore()
        for place in parents:
            if place not in changed:
                _write(place, before[place])
        for place in written - changed:
            _write(place, own[place])
            if _read(place) != before[place]:
                _write(place, before[place])

    return restore


class _Legacy:
    """The settings that have a legacy interface, where that can be read."""

    def __init__(self) -> None:
        self._matmul, self._cudnn = _matmul_precision(), _cudnn_allows()

    def make_exact(self) -> tuple[Place, ...]:
        """Switch off what is on; return the operations whose precision that writes."""
        written: tuple[Place, ...] = ()
        if self._matmul not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
            written += _PRODUCTS
        if self._cudnn:
            torch.backends.cudnn.allow_tf32 = False
            written += _LAYERS
        return written

    def restore(self) -> None:
        """Switch on what was on, where it is still off."""
        if self._matmul not in (None, "highest") and _matmul_precision() == "highest":
            torch.set_float32_matmul_precision(str(self._matmul))
        if self._cudnn and _cudnn_allows() is False:
            torch.backends.cudnn.allow_tf32 = True


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _cudnn_allows() -> bool | None:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return None


def _read(place: Place) -> str:
    return str(torch._C._get_fp32_precision_getter(*place))


def _write(place: Place, precision: str) -> None:
    torch._C._set_fp32_precision_setter(*place, precision)


def _loose(place: Place) -> bool:
    return _read(place) not in _EXACT
