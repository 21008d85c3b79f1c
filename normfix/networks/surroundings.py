"""What a caller has switched on around a call, kept from our own tensors and given back to his network.

`with torch.device("meta")` and torch.set_default_device put every tensor that names no device there, seeded noise and
tables of ours included; torch.inference_mode makes every copy one that can never train. Both are the thread's own, so
a public function runs without them, and the network it calls runs with the device its author counts on. A default that
the network itself sets while it runs ends with its call: it would be that of our tensors too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

__all__ = ["as_given", "own_defaults", "undisturbed"]

_GIVEN: ContextVar[torch.device | None] = ContextVar("normfix_given_device", default=None)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put new tensors on the CPU unless a device is named, and make none that can never train.

    Works as a decorator. Networks that are called inside get the device of before: see `as_given`.
    """
    given = _default_device()
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        if given.type == "cpu":
            yield
            return
        token = _GIVEN.set(given)
        try:
            with torch.device("cpu"):
                yield
        finally:
            _GIVEN.reset(token)


@contextmanager
def own_defaults() -> Iterator[None]:
    """Let what a network makes its default device and dtype while it runs end with its call."""
    device, dtype = _default_device(), torch.get_default_dtype()
    try:
        yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        # beside the caller's own default it would be one too many on torch's stack
        if _GIVEN.get() is None and _default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)


def _default_device() -> torch.device:
    try:
        return torch.get_default_device()
    except AttributeError:  # torch 2.6, once a default was set and taken back
        return torch.empty(0).device


def as_given(home: torch.device) -> Any:
    """Return the context in which a network on `home` finds the caller's default device again.

    On the meta device nothing is computed, so there it finds its own.
    """
    given = _GIVEN.get()
    if given is None:
        return nullcontext()
    device = home if given.type == "meta" else given
    return nullcontext() if device.type == "cpu" else device
