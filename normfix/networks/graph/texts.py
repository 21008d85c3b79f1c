"""Where a network writes a size as text or looks something up by it while it is captured: no graph records the answer.

A size that is left free is a symbol then. Asked whether it is 64 it says so, and the graph holds where that is the
answer. As text it is the symbol's name, and as a key it is refused: what a network does of `f"{width}"` at one width,
or of a table by width if it goes on without, is in no graph.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from normfix.networks.frames import OURS, TORCH, line_name

__all__ = ["noted_texts", "texts_of"]

_KINDS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_ASKED = ("__repr__", "__hash__")
_OTHERS = (TORCH, OURS, f"{Path(logging.__file__).parent}{os.sep}")
"""Whose code writes sizes down for people, or as names of symbols."""
_UNCACHED = "einops"
"""A library that looks up how to rearrange a shape, and works it out where a key is refused."""

_NOTED: WeakKeyDictionary[Any, dict[str, None]] = WeakKeyDictionary()
"""The lines that asked, by the environment of a capture's symbols."""


@contextmanager
def noted_texts() -> Iterator[None]:
    """Note in this thread where sizes that are symbols are asked for as text or as a key; what they answer stays."""
    here = threading.get_ident()

    def noting(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @functools.wraps(answer)
        def noted(self: Any) -> Any:
            frame = sys._getframe(1)
            module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if threading.get_ident() == here and (answer.__name__, module) != ("__hash__", _UNCACHED):
                _note(self, frame)
            return answer(self)

        return noted

    before = [(kind, name, getattr(kind, name)) for kind in _KINDS for name in _ASKED]
    try:
        for kind, name, answer in before:
            setattr(kind, name, noting(answer))
        yield
    finally:
        for kind, name, answer in before:
            setattr(kind, name, answer)


def texts_of(environment: Any) -> tuple[str, ...]:
    """Return the lines that asked for sizes as text or as a key, in a capture with this environment of symbols."""
    return tuple(_NOTED.get(environment, ()))


def _note(size: Any, frame: Any) -> None:
    file = frame.f_code.co_filename
    if file.startswith(_OTHERS):
        return
    formula = getattr(size.node, "expr", None)
    if getattr(formula, "free_symbols", None):
        _NOTED.setdefault(size.node.shape_env, {})[line_name(file, frame.f_lineno)] = None
