"""Branches on the image's size: conditions under which a captured graph holds, and which larger images break.

A network that asks `if width > 300` is another network above 300 pixels. No statistic and no dye shows that, and
no tile tried here may be large enough; the guards that torch.export keeps with a graph do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import _subclasses

from normfix.networks.graph.capture import Captured, image_of

__all__ = ["Bound", "broken_when_larger"]

_LARGER = {3: 17, 4: 17, 5: 13}
"""Factor by rank. No multiple of 2, 3, 5 or 7, so that what those divide, and what not, stays as it is: a network that
pads to multiples of 8 is no other for that. Below the 2**31 elements at which kernels branch."""
_NAMES = {3: "NCL", 4: "NCHW", 5: "NCDHW"}


_KERNELS = Path(_subclasses.__file__).parent


@dataclass(frozen=True, slots=True)
class Bound:
    """A condition under which a graph holds, in words, and the extents of the image it is about by dimension."""

    text: str
    condition: Any
    symbols: Mapping[int, Any]

    def breaks(self, size: Sequence[int]) -> bool:
        """Tell whether an image (N, C, *space) of these spatial extents breaks it."""
        extents = {symbol: size[dim - 2] for dim, symbol in self.symbols.items() if dim >= 2}
        return not self.condition.subs(extents)


def broken_when_larger(captured: Captured) -> tuple[Bound, ...]:
    """Return the conditions of a graph with free sizes that do not hold for an image many times as large."""
    shape = image_of(captured.program).meta["val"].shape
    free = {dim: n.node for dim, n in enumerate(shape) if not isinstance(n, int) and n.node.expr.is_Symbol}
    if not any(dim >= 2 for dim in free):
        return ()
    environment: Any = next(iter(free.values())).shape_env
    known = environment.backed_var_to_val
    larger = {
        node.expr: int(known[node.expr]) * (_LARGER.get(len(shape), 13) if dim >= 2 else 1)
        for dim, node in free.items()
    }
    names = {
        node.expr: _NAMES.get(len(shape), "")[dim : dim + 1] or str(node.expr) for dim, node in free.items()
    }
    guards = dict.fromkeys(guard.expr for guard in environment.guards if not _chooses_kernel(guard))
    broken = [
        expr
        for expr in guards
        if expr.free_symbols and expr.free_symbols <= set(larger) and not expr.subs(larger)
    ]
    renamed = {symbol: type(symbol)(name) for symbol, name in names.items()}
    batch = {node.expr: int(known[node.expr]) for dim, node in free.items() if dim < 2}
    symbols = {dim: node.expr for dim, node in free.items()}
    return tuple(Bound(str(expr.subs(renamed)), expr.subs(batch), symbols) for expr in broken)


def _chooses_kernel(guard: Any) -> bool:
    """Tell whether torch asked for a size to choose a kernel, which computes the same as another (a convolution's)."""
    place = getattr(getattr(guard, "sloc", None), "framework_loc", None)
    return Path(getattr(place, "filename", "")).is_relative_to(_KERNELS)
