"""Trace what a network reads as `x.data`.

torch.export does not see that attribute being read: what it gives is a tensor that nobody traced, and ends as a constant
without values. `x.detach()` has the same values and is an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["TracedData"]

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class TracedData(TorchFunctionMode):
    """Reads `x.data` as `x.detach()`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func == _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))
