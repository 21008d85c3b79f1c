"""What a network divides by that is computed from frozen statistics alone, and where it is nothing but an eps.

A statistic that vanishes does no harm where it is added or multiplied: a pool of zeros is a pool of zeros. Where the
network divides by it, the quotient of the next image is as large as 1 / eps. So the constants are followed through what
is computed from them, weights and numbers alone, and each value carries whether it is flat:

    a statistic v             where v = 0; a variance or deviation also where it is below the rounding of its operand
    v + eps, max(v, eps)      where v <= eps; eps is a number of at most 0.01, since a larger one amplifies nothing
    a - b                     where the difference is below the rounding of a and b (a range)
    a + b                     where both are
    sum, mean, maximum of v   where all are
    sqrt(v), c v, |v|, v[..]  where v is

Flat values that are divided by, by whatever spelling of a division, are reported with the sites they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from normfix.layers.statistic import FrozenStatistic

__all__ = ["Divisors", "following"]

_LARGEST_EPS = 1e-2

_DIVIDING = frozenset({"div", "true_divide", "divide", "truediv", "itruediv", "floor_divide"})
_INVERTING = frozenset({"rtruediv", "rdiv", "rsqrt", "reciprocal"})
_ADDING = frozenset({"add", "radd", "iadd"})
_SUBTRACTING = frozenset({"sub", "subtract", "isub"})
_BOUNDING = frozenset({"clamp", "clamp_min", "clip", "maximum"})
_REPLACING = frozenset({"where", "masked_fill", "nan_to_num"})
_COMBINING = frozenset({"mul", "multiply", "rmul", "imul", "pow", "square", "abs", "sqrt"})
_REDUCING = frozenset({"mean", "sum", "amax"})
_MOVING = frozenset(
    {"view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "flatten", "getitem"}
    | {"movedim", "repeat", "broadcast_to", "unflatten", "detach", "clone", "contiguous", "alias", "select"}
    | {"slice", "expand_as", "view_as", "double", "float", "half", "bfloat16", "to", "_to_copy", "type_as"}
)


@dataclass(frozen=True, slots=True)
class _Known:
    """A value computed from statistics alone: where it is flat, and the sites it comes from."""

    value: Tensor
    flat: Tensor
    sites: frozenset[str]


class Divisors(TorchFunctionMode):
    """Follows frozen statistics while a network runs; `found` maps sites to the flat values divided by."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._known: dict[int, _Known] = {}  # holds its tensors, so that no other takes their ids
        self.found: dict[str, set[int]] = {}

    def take(self, site: str, module: FrozenStatistic, args: tuple[Any, ...], result: Any) -> None:
        """Begin with what a frozen statistic gave."""
        operand = args[0].detach().double()
        largest = float(operand.abs().max()) if operand.numel() else 0.0
        unit = torch.finfo(module.value.dtype).eps if module.value.is_floating_point() else 0.0
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                # a variance counts in squares, a deviation does not; the smaller bound is right for both
                least = min(unit * largest, (unit * largest) ** 2) if _is_spread(site) else 0.0
                self._note(value, value.abs() <= least, frozenset({site}))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(id(t) in self._known for t in given):
            return func(*args, **kwargs)
        before = [self._flat_or_none(t) for t in given]
        name = _name_of(func)
        operands = _operands(args, kwargs)
        values = [v.clone() if isinstance(v, Tensor) and id(v) in self._known else v for v in operands]
        self._judge(name, operands, kwargs)
        result = func(*args, **kwargs)
        alone = all(known is not None or self._is_constant(t) for t, known in zip(given, before, strict=True))
        if alone and isinstance(result, Tensor) and result.is_floating_point():
            with torch._C.DisableTorchFunction():
                self._follow(name, func, operands, values, args, kwargs, result)
        return result

    def _judge(self, name: str, operands: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Report flat values that this call divides by."""
        exponent = operands[1] if name == "pow" and len(operands) > 1 else None
        if (name in _DIVIDING and len(operands) > 1) or (name == "addcdiv" and len(operands) > 2):
            self._report(operands[1 if name in _DIVIDING else 2])
        elif name in _INVERTING or (isinstance(exponent, int | float) and exponent < 0):
            self._report(operands[0])
        elif name == "batch_norm" and len(operands) > 2:
            numbers = [v for v in operands[3:] if isinstance(v, float)]
            self._report(operands[2], float(kwargs.get("eps", numbers[-1] if numbers else 1e-5)))

    def _report(self, divisor: Any, eps: float = 0.0) -> None:
        known = self._known.get(id(divisor))
        if known is None:
            return
        with torch._C.DisableTorchFunction():
            flat = known.flat | (known.value <= eps) if eps else known.flat
            places = flat.flatten().nonzero().flatten().tolist()
        for site in known.sites if places else ():
            self.found.setdefault(site, set()).update(places)

    def _follow(
        self,
        name: str,
        func: Callable[..., Any],
        operands: Sequence[Any],
        values: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Tensor,
    ) -> None:
        """Say where the result of a call on statistics, weights and numbers alone is flat, if the rules tell."""
        knowns = [self._known[id(v)] for v in operands if isinstance(v, Tensor) and id(v) in self._known]
        sites = frozenset().union(*(k.sites for k in knowns))
        first = knowns[0]
        flat: Tensor | None = None
        if name in _ADDING or name in _BOUNDING:
            flat = _with_eps(knowns, values, kwargs, result)
        elif name in _SUBTRACTING:
            flat = _difference(knowns, values)
        elif name in _REPLACING:
            flat = first.flat | (first.value != result)
        elif name in _COMBINING or name in _DIVIDING:
            flat = first.flat
            for other in knowns[1:]:
                flat = flat | other.flat
        elif name in _REDUCING:
            flat = func(1 - first.flat.to(result.dtype), *args[1:], **kwargs) <= 0
        elif name in _MOVING and operands[0] is first.value:
            flat = func(first.flat.to(first.value.dtype), *args[1:], **kwargs) > 0
        if flat is not None:
            self._note(result, flat.expand_as(result), sites)

    def _note(self, value: Tensor, flat: Tensor, sites: frozenset[str]) -> None:
        self._known[id(value)] = _Known(value, flat, sites)

    def _flat_or_none(self, tensor: Tensor) -> _Known | None:
        return self._known.get(id(tensor))

    def _is_constant(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is no map of the image: a weight, or a single number."""
        return id(tensor) in self._weights or tensor.numel() == 1 or tensor.dtype == torch.bool


@contextmanager
def following(model: nn.Module, sites: Mapping[str, FrozenStatistic]) -> Iterator[Divisors]:
    """Follow the statistics of these sites, by id, while the model runs in the block."""
    divisors = Divisors(model)

    def take(site: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        assert isinstance(module, FrozenStatistic)
        with torch._C.DisableTorchFunction():
            divisors.take(site, module, args, result)

    handles = [module.register_forward_hook(partial(take, site)) for site, module in sites.items()]
    try:
        with divisors:
            yield divisors
    finally:
        for handle in handles:
            handle.remove()


def _with_eps(
    knowns: Sequence[_Known], values: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
) -> Tensor:
    """Return where a sum, or the larger of two, is an eps."""
    flat = knowns[0].flat
    for other in knowns[1:]:
        flat = flat & other.flat
    if len(knowns) > 1:
        return flat
    (value,) = [v for v in values if isinstance(v, Tensor) and v.shape == knowns[0].flat.shape][:1] or [
        knowns[0].value
    ]
    others = [v for v in (*values, kwargs.get("min")) if v is not None and v is not value]
    for eps in others[:1]:
        small = torch.as_tensor(eps, dtype=value.dtype, device=value.device)
        flat = flat | ((value <= small) & (small > 0) & (small <= _LARGEST_EPS))
    return flat


def _difference(knowns: Sequence[_Known], values: Sequence[Any]) -> Tensor:
    if len(knowns) < 2:
        return knowns[0].flat
    a, b = (v for v in values[:2])
    unit = 2 * torch.finfo(a.dtype).eps
    return (a - b).abs() <= unit * torch.maximum(a.abs(), b.abs())


def _is_spread(site: str) -> bool:
    return site.split("/")[-2] in ("var", "std", "var_mean", "std_mean")


def _operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    named = [kwargs[key] for key in ("input", "running_mean", "running_var", "other", "tensor2") if key in kwargs]
    return [*args, *named]


def _name_of(func: Callable[..., Any]) -> str:
    """Return a call's name without what says how it was spelt: `__radd__`, `add_` and `aten.add.Tensor` are alike."""
    if isinstance(func, OpOverload):
        name = func._schema.name.partition("::")[2]
    else:
        name = getattr(func, "__name__", "")
    dunder = name.startswith("__") and name.endswith("__")
    return name.strip("_") if dunder else name.removesuffix("_")
