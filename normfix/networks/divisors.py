"""What a network divides by that is computed from frozen statistics alone, and where it is nothing but an eps.

A statistic that vanishes does no harm where it is added or multiplied: a pool of zeros is a pool of zeros. Where the
network divides by it, the quotient of the next image is as large as 1 / eps. So the constants are followed through what
is computed from them, weights and numbers alone, and each value carries whether it is flat:

    a statistic v             where v = 0; a variance or deviation also where it is below the rounding of its operand
    v + eps, max(v, eps)      where v <= eps, for a number of at most 0.01; a larger one amplifies nothing: nowhere
    v or another instead      where the other one is taken (torch.where)
    a - b                     where the difference is below the rounding of a and b (a range)
    a + b                     where both are
    sum, mean, maximum of v   where all are
    sqrt(v), c v, |v|, v[..]  where v is
    log(v + eps)              where v + eps is; exp of it where it is above 100, which is what is multiplied by

Flat values that are divided by, by whatever spelling of a division, are reported with the sites they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from normfix.layers.constant import FrozenStatistic

__all__ = ["Divisors", "following"]

_LARGEST_EPS = 1e-2
_NAMED = ("input", "running_mean", "running_var", "other", "tensor2")

_DIVIDING = frozenset({"div", "true_divide", "divide", "truediv", "itruediv", "floor_divide"})
_INVERTING = frozenset({"rtruediv", "rdiv", "rsqrt", "reciprocal"})
_POWERS = frozenset({"pow", "float_power"})
_EXPONENTIAL = frozenset({"exp", "exp2", "expm1", "rpow"})
_ADDING = frozenset({"add", "radd", "iadd", "hypot", "logaddexp"})
_SUBTRACTING = frozenset({"sub", "subtract", "isub"})
_BOUNDING = frozenset({"clamp", "clamp_min", "clip", "maximum"})
_FILLING = frozenset({"ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"})
_REPLACING = frozenset({"where", "masked_fill", "nan_to_num"})
_COMBINING = frozenset(
    {
        "mul",
        "multiply",
        "rmul",
        "imul",
        "pow",
        "float_power",
        "square",
        "abs",
        "absolute",
        "sqrt",
        "neg",
        "negative",
    }
    | {"log", "log2", "log10", "log1p", "relu"}
)
_REDUCING = frozenset({"mean", "sum", "amax"})
_MOVING = frozenset(
    {"view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "flatten", "getitem"}
    | {"movedim", "repeat", "broadcast_to", "unflatten", "detach", "clone", "contiguous", "alias", "select"}
    | {"slice", "expand_as", "view_as", "double", "float", "half", "bfloat16", "to", "_to_copy", "type_as"}
    | {
        "reshape_as",
        "narrow",
        "swapaxes",
        "swapdims",
        "moveaxis",
        "ravel",
        "tile",
        "flip",
        "roll",
        "t",
        "index_select",
    }
    | {"repeat_interleave", "diagonal", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}
    | {"chunk", "split", "tensor_split", "unbind", "iter", "split_with_sizes", "hsplit", "vsplit"}
)
"""What moves the values of its first argument, one tensor or a list of them; other arguments tell where to."""


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
        self._constants = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._known: dict[int, _Known] = {}  # holds its tensors, so that no other takes their ids
        self.found: dict[str, set[int]] = {}

    def take(self, site: str, law: str, args: tuple[Any, ...], result: Any) -> None:
        """Begin with what a frozen statistic gave."""
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                self._note(value, value.abs() <= _rounding(law, args[0], value.dtype), frozenset({site}))

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
        call = self._call(func, args, kwargs)
        self._judge(call)
        if call.name in _MOVING and args:
            return self._moved(func, args, kwargs)
        alone = all(id(t) in self._known or self._is_constant(t) for t in given)
        result = func(*args, **kwargs)
        if call.name in _EXPONENTIAL:
            self._judge_exponential(call, result)
        if call.name in _FILLING:
            self._constants[id(result)] = result
        elif alone and call.known and isinstance(result, Tensor) and result.is_floating_point():
            with torch._C.DisableTorchFunction():
                flat = call.flat(result)
                if flat is not None:
                    sites: frozenset[str] = frozenset().union(*(k.sites for k in call.known))
                    self._note(result, flat.expand_as(result), sites)
        return result

    def _moved(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Move what is flat as the values are moved."""
        sources = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
        known = [self._known[id(t)] for t in sources if id(t) in self._known]
        alone = all(id(t) in self._known or self._is_constant(t) for t in sources)
        if not known or not alone:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            marks = tree_map(self._mark, args[0])  # before the call: it may work in place
            moved = tree_leaves(func(marks, *args[1:], **kwargs))
        result = func(*args, **kwargs)
        sites: frozenset[str] = frozenset().union(*(k.sites for k in known))
        with torch._C.DisableTorchFunction():
            for value, mark in zip(tree_leaves(result), moved, strict=True):
                if isinstance(value, Tensor) and value.is_floating_point():
                    self._note(value, mark > 0, sites)
        return result

    def _mark(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = self._known.get(id(value))
        return torch.zeros_like(value) if known is None else known.flat.to(value.dtype)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
        """Describe a call before it is made: what it works on in place is copied."""
        operands: list[Any] = [*args, *(kwargs[key] for key in _NAMED if key in kwargs)]
        with torch._C.DisableTorchFunction():
            for place, value in enumerate(operands):
                known = self._known.get(id(value))
                if known is not None:
                    operands[place] = replace(known, value=known.value.clone())
        name = _name_of(func)
        if name == "max":
            name = "maximum" if len(operands) > 1 and isinstance(operands[1], Tensor | _Known) else "amax"
        return _Call(name, func, operands, args[1:], kwargs)

    def _judge(self, call: _Call) -> None:
        """Report flat values that a call divides by."""
        divisor, eps = call.divisor
        if not isinstance(divisor, _Known):
            return
        with torch._C.DisableTorchFunction():
            flat = divisor.flat | (divisor.value <= eps) if eps else divisor.flat
            places = flat.flatten().nonzero().flatten().tolist()
        for site in divisor.sites if places else ():
            self.found.setdefault(site, set()).update(places)

    def _judge_exponential(self, call: _Call, result: Any) -> None:
        """Report flat values whose exponential is large: exp(-log(v) / 2) divides, too."""
        if len(call.known) != 1 or not isinstance(result, Tensor):
            return
        (known,) = call.known
        with torch._C.DisableTorchFunction():
            large = known.flat.expand_as(result) & (result.abs() >= 1 / _LARGEST_EPS)
            places = large.flatten().nonzero().flatten().tolist()
        for site in known.sites if places else ():
            self.found.setdefault(site, set()).update(places)

    def _note(self, value: Tensor, flat: Tensor, sites: frozenset[str]) -> None:
        self._known[id(value)] = _Known(value, flat, sites)

    def _is_constant(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is no map of the image: a weight, or a single number."""
        return id(tensor) in self._constants or tensor.numel() == 1 or tensor.dtype == torch.bool


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that statistics go into; among its operands they stand as _Known, `rest` are the arguments after one."""

    name: str
    func: Callable[..., Any]
    operands: list[Any]
    rest: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def known(self) -> list[_Known]:
        """Return the statistics among the operands."""
        return [value for value in self.operands if isinstance(value, _Known)]

    @property
    def divisor(self) -> tuple[Any, float]:
        """Return what the call divides by, if it divides, and the eps that it adds itself."""
        operands = self.operands
        if self.name in _DIVIDING:
            return operands[1] if len(operands) > 1 else None, 0.0
        if self.name == "addcdiv":
            return operands[2] if len(operands) > 2 else None, 0.0
        if self.name == "batch_norm" and len(operands) > 2:
            numbers = [value for value in operands[3:] if isinstance(value, float)]
            return operands[2], float(self.kwargs.get("eps", numbers[-1] if numbers else 1e-5))
        inverts = self.name in _INVERTING or self._is_negative_power()
        return (operands[0] if inverts else None), 0.0

    def _is_negative_power(self) -> bool:
        exponent = self.operands[1] if self.name in _POWERS and len(self.operands) > 1 else 1
        if isinstance(exponent, Tensor) and exponent.numel() == 1:
            exponent = exponent.item()
        return isinstance(exponent, int | float) and exponent < 0

    def flat(self, result: Tensor) -> Tensor | None:
        """Return where the result is flat, if the rules tell; one of the operands is known."""
        first, *others = self.known
        if self.name in _ADDING or self.name in _BOUNDING:
            return first.flat & others[0].flat if others else self._beside_eps(first)
        if self.name in _SUBTRACTING:
            return _cancelled(first, others[0]) if others else first.flat
        if self.name in _EXPONENTIAL:
            return first.flat & (result.abs() <= _LARGEST_EPS)
        if self.name in _REPLACING:
            return first.flat | (first.value != result)
        if self.name in _COMBINING or self.name in _DIVIDING:
            return first.flat | others[0].flat if others else first.flat
        if not isinstance(self.operands[0], _Known):
            return None
        if self.name in _REDUCING:
            live = self.func(1 - first.flat.to(result.dtype), *self.rest, **self.kwargs)
            return live <= 0  # type: ignore[no-any-return]
        return None

    def _beside_eps(self, known: _Known) -> Tensor:
        """Return where a value is nothing beside the number that is added, or bounds it from below."""
        value = known.value
        numbers = [n for n in (*self.operands, self.kwargs.get("min")) if isinstance(n, int | float | Tensor)]
        if not numbers:
            return known.flat
        eps = torch.as_tensor(numbers[0], dtype=value.dtype, device=value.device)
        return (known.flat | (value.abs() <= eps)) & (eps <= _LARGEST_EPS)


@contextmanager
def following(model: nn.Module, sites: Mapping[str, tuple[FrozenStatistic, str]]) -> Iterator[Divisors]:
    """Follow statistics, given by site with their law, while the model runs in the block."""
    divisors = Divisors(model)

    def take(site: str, law: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        with torch._C.DisableTorchFunction():
            divisors.take(site, law, args, result)

    handles = [
        module.register_forward_hook(partial(take, site, law)) for site, (module, law) in sites.items()
    ]
    try:
        with divisors:
            yield divisors
    finally:
        for handle in handles:
            handle.remove()


def _rounding(law: str, operand: Tensor, dtype: torch.dtype) -> float:
    """Return what a spread of this operand may be by rounding alone; other statistics are flat where they are 0."""
    if not law.startswith(("variance", "deviation")) or not operand.numel():
        return 0.0
    unit = float(operand.detach().double().abs().max()) * torch.finfo(dtype).eps / 2
    return unit**2 if law.startswith("variance") else unit


def _cancelled(a: _Known, b: _Known) -> Tensor:
    """Return where a difference is below the rounding of what it is the difference of."""
    unit = 2 * torch.finfo(a.value.dtype).eps
    return (a.value - b.value).abs() <= unit * torch.maximum(a.value.abs(), b.value.abs())


def _name_of(func: Callable[..., Any]) -> str:
    """Return a call's name without what says how it was spelt: `__radd__`, `add_` and `aten.add.Tensor` are alike."""
    if isinstance(func, OpOverload):
        return func._schema.name.partition("::")[2].removesuffix("_")
    name = getattr(func, "__name__", "")
    dunder = name.startswith("__") and name.endswith("__")
    return name.strip("_") if dunder else name.removesuffix("_")
