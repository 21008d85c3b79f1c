"""FrozenStatistic: a pooled, hand-written or otherwise computed value of the extent, held as a constant.

It stands for one call of a function such as `x.mean((2, 3))` and hands back what that call gave on the image
the network was calibrated on, repeated over the batch of the call at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Extreme", "Extremes", "FrozenStatistic", "fitting"]


class Extreme(NamedTuple):
    """What `x.max(dim)` returns, without the places, which no constant can stand for."""

    values: Tensor
    indices: None = None


class Extremes(NamedTuple):
    """What `torch.aminmax` returns, by name or in order; other functions with two results have them in order alone."""

    min: Tensor
    max: Tensor


def fitting(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a value in a dtype: the nearest whole numbers where that holds no others.

    >>> fitting(torch.tensor(1.9999999), torch.int64)
    tensor(2)
    """
    whole = value.is_floating_point() and not dtype.is_floating_point and not dtype.is_complex
    return (value.round() if whole else value).to(dtype)


class FrozenStatistic(nn.Module):
    """Hold the results of one call as buffers `value` (and `second`, for functions with two results).

    Args:
        shape: of a result for one image.
        outputs: how many results the function returns, 1 or 2.
        rank: number of dimensions of the operand.
        sizes: (dimension, extent) pairs of the operand that must be as planned; never space or batch.
        batch: (dimension of the operand, its extent for one image, dimension of the result) along which
            images are stacked; None where the statistic runs over the batch as well.
        selects: the function returns (values, indices), of which only the values are used.
        device: where the buffers are made.
        dtype: of the buffers.
    """

    value: Tensor
    second: Tensor | None
    observer: Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], None] | None

    def __init__(
        self,
        shape: Sequence[int],
        *,
        outputs: int = 1,
        rank: int,
        sizes: Sequence[tuple[int, int]] = (),
        batch: tuple[int, int, int] | None = None,
        selects: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.sizes, self.batch, self.selects = rank, tuple(sizes), batch, selects
        self.observer = None  # given (function, args, kwargs) of each call while calibrating
        self.register_buffer("value", torch.zeros(tuple(shape), device=device, dtype=dtype))
        second = torch.zeros(tuple(shape), device=device, dtype=dtype) if outputs == 2 else None
        self.register_buffer("second", second)

    def forward(self, operand: Tensor, dtype: torch.dtype | None = None) -> object:
        """Return the constants for a call on `operand`, in its dtype or the one the call asks for.

        Raises:
            ValueError: the operand is not of the planned kind.
        """
        if operand.dim() != self.rank:
            raise ValueError(f"expected an operand of {self.rank} dimensions, got {operand.dim()}")
        for dim, extent in self.sizes:
            if operand.shape[dim] != extent:
                raise ValueError(
                    f"expected extent {extent} in dimension {dim}, got a shape of {tuple(operand.shape)}"
                )
        if not self.value.is_floating_point():
            dtype = None
        elif dtype is None and operand.is_floating_point():
            dtype = operand.dtype
        value = self._repeated(self.value, operand, dtype)
        if self.second is not None:
            return Extremes(value, self._repeated(self.second, operand, dtype))
        return Extreme(value) if self.selects else value

    def values(self) -> tuple[Tensor, ...]:
        """Return the stored results for one image."""
        return (self.value,) if self.second is None else (self.value, self.second)

    @torch.no_grad()
    def set_values_(self, *values: Tensor) -> None:
        """Store results in place, each with the elements of the planned shape; what holds whole numbers the nearest."""
        for stored, given in zip(self.values(), values, strict=True):
            stored.copy_(fitting(given, stored.dtype).reshape(stored.shape))

    def extra_repr(self) -> str:
        """Show what is held."""
        return f"{tuple(self.value.shape)}"

    def _repeated(self, value: Tensor, operand: Tensor, dtype: torch.dtype | None) -> Tensor:
        value = value if dtype is None else value.to(dtype)
        if self.batch is None:
            return value.clone()
        source, unit, target = self.batch
        # not Tensor.expand, which functorch.dim replaces by what the compiler of torch 2.6 does not know
        repeats = [1] * value.dim()
        repeats[target] = operand.shape[source] // unit
        return value.repeat(repeats)
