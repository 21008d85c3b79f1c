"""One architecture of the zoo: how it is built and called, and nothing that decides how it fares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Entry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An architecture with random weights.

    `build` imports its library only when called. `shape` is that of a small input, (1, C, *space). `output`
    is the key or index of the output that counts, `call` another calling convention. `dense` tells whether
    the output is a map that follows the input's extent.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    output: str | int | None = None
    call: Callable[[nn.Module, Tensor], Any] | None = None
    dense: bool = True

    @property
    def ndim(self) -> int:
        """Return the number of spatial axes."""
        return len(self.shape) - 2
