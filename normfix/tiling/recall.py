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
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Return the network's output for an image; raises what the network raises."""
        for place, (image, output) in enumerate(self._kept):
            if image.dtype == x.dtype and torch.equal(image, x):
                self._kept.append(self._kept.pop(place))
                return output
        image = x.clone()
        output = self._f(x)
        self._kept.append((image, output))
        while sum(t.nbytes for pair in self._kept for t in pair) > _BYTES:
            self._kept.pop(0)
        return output
