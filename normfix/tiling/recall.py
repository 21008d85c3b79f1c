"""A function that recalls its last answers: what several measurements need of one strip is computed once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Recalling"]

_BYTES = 256 << 20


class Recalling:
    """Calls a network on images, and gives an earlier result where the image is the same in every value.

    The last few results are kept, as long as they take no more than 256 MiB. They are shared, so nobody may write
    into them.

    Example:
        >>> import torch
        >>> double = Recalling(lambda x: 2 * x)
        >>> double(torch.ones(1, 1, 2, 2)) is double(torch.ones(1, 1, 2, 2))
        True
    """

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self._f = f
        self._kept: dict[object, tuple[Tensor, Tensor]] = {}
        self._bytes = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the network's output for an image; raises what the network raises."""
        sketch = _sketch(x)
        known = self._kept.get(sketch)
        if known is not None and torch.equal(known[0], x):
            self._kept[sketch] = self._kept.pop(sketch)  # the last again
            return known[1]
        image = x.clone()
        output = self._f(x)
        self._forget(sketch)
        self._kept[sketch] = image, output
        self._bytes += image.nbytes + output.nbytes
        while self._bytes > _BYTES:
            self._forget(next(iter(self._kept)))
        return output

    def _forget(self, sketch: object) -> None:
        self._bytes -= sum(tensor.nbytes for tensor in self._kept.pop(sketch, ()))


def _sketch(x: Tensor) -> object:
    """Return what is equal for equal images, and rarely for others: thousands of tiles are not all compared."""
    values = x.flatten()
    told = (float(part.sum(dtype=torch.float64)) for part in (values, values[:1], values[-1:]))
    return x.shape, x.dtype, x.device, *told
