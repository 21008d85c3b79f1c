"""Import the parts of torch whose import changes the process, and put back what they change.

torch's compiler is imported by the first mode that watches operators; it sets an environment variable for processes
of its own, which are not started here, and brings sympy, which adds to the warning filters.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["environment_kept", "import_compiler"]

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_PARTS = ("torch.utils._sympy.functions", "torch._dynamo")
_LOCK = threading.Lock()
_IMPORTED: set[str] = set()


def import_compiler() -> None:
    """Import torch's compiler, once, leaving environment and warning filters as they were."""
    with _LOCK:
        if _IMPORTED.issuperset(_PARTS):
            return
        before = list(warnings.filters)
        with environment_kept():
            for part in _PARTS:
                importlib.import_module(part)
                _IMPORTED.add(part)
        for added in [item for item in warnings.filters if item not in before]:
            warnings.filters.remove(added)  # type: ignore[attr-defined]


@contextmanager
def environment_kept() -> Iterator[None]:
    """Take out afterwards what torch's compiler writes into the environment."""
    before = os.environ.get(_CACHE)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_CACHE, None)
