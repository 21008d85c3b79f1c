"""Numbers and arrays of numpy in a checkpoint, read without numpy's own functions.

Trainers store the best score as `numpy.float64`, and torch's safe mode refuses the file for it. What stands here takes
the place of the functions that such a pickle names: a number comes out as Python's, of a kind and length that are
checked, and an array as nothing, since weights are tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

__all__ = ["STAND_INS"]

_KIND = re.compile(r"[fiu][1248]|b1")


class _Kind:
    """What a pickle says of a dtype: its letter and width, and the order of its bytes."""

    def __init__(self, text: object = "", *_: object) -> None:
        self.text = text if isinstance(text, str) else ""
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


class _Array:
    """An array, which no network is filled with."""

    def __init__(self, *_: object) -> None:
        return

    def __setstate__(self, state: object) -> None:
        return


def _scalar(kind: object, data: object = b"", *_: object) -> bool | int | float | None:
    """Return a number; None for what is none, such as a text or a date."""
    if not isinstance(kind, _Kind) or not isinstance(data, bytes) or not _KIND.fullmatch(kind.text):
        return None
    dtype = np.dtype(f"{kind.order}{kind.text}")
    if len(data) != dtype.itemsize:
        raise ValueError("a number of numpy's that is longer or shorter than its kind")
    number: bool | int | float = np.frombuffer(data, dtype)[0].item()
    return number


STAND_INS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "numpy.dtype": _Kind,
        "numpy.ndarray": _Array,
        **{
            f"numpy.{core}.multiarray.{name}": function
            for core in ("core", "_core")
            for name, function in (("scalar", _scalar), ("_reconstruct", _Array))
        },
    }
)
"""By the names that numpy 1 and 2 write."""
