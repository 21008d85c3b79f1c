"""What a network divides by that is computed from frozen statistics alone, and where it is nothing but an eps.

A statistic that vanishes does no harm where it is added or multiplied: a pool of zeros is a pool of zeros. Where the
network divides by it, the quotient of the next image is as large as 1 / eps. So whatever is computed from statistics,
weights and numbers alone is computed as well from statistics v that are other than these, its twins:

    nothing    0, but what is below the rounding of its operand as it is
    ordinary   v + u and, drawn anew, v + w, with u and w in 1..2: statistics of an image with structure
    little     v + 1e-3
    rounded    v as another order of summation may give it

Where such a value enters a product or a quotient with the image, its gain g is its magnitude, or one over that. It is
flat where the statistic decides nothing, g(v) >= 0.7 g(nothing) or g(rounded) is another, and an eps decides all:

    g(v) >= 10,  g(v) >= 10 g(ordinary)             it multiplies what an image with structure would not be
    g(little) >= 10,  g(little) >= 10 g(v)          something else was put in its place (torch.where)

That holds however the value is spelt: no function on the way has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from normfix.layers.constant import FrozenStatistic
from normfix.networks.functions import BLANK, FILLED, LIKE

__all__ = ["Divisors", "following"]

_GAIN = 10.0
"""What multiplies by less amplifies nothing."""
_DECIDES_NOTHING = 0.7
"""A variance at its eps makes the gain 0.71 of what it is at a variance of zero."""
_LITTLE = 1e-3

_DIVIDING = frozenset({"div", "true_divide", "divide", "truediv", "itruediv", "floor_divide"})
_INVERTING = frozenset({"rtruediv", "rdiv", "rsqrt", "reciprocal", "pow", "float_power"})
_MULTIPLYING = frozenset(
    {"mul", "multiply", "rmul", "imul", "addcmul", "einsum", "tensordot", "matmul", "rmatmul", "bmm", "mm"}
    | {"baddbmm", "addmm", "linear", "conv1d", "conv2d", "conv3d"}
)
_FILLING = FILLED & BLANK - {"empty_like", "new_empty"}
_BATCH_NORM = "batch_norm"
_NAMED = ("other", "tensor2")


@dataclass(frozen=True, slots=True)
class _Known:
    """A value computed from statistics alone, its twins, and the sites it comes from."""

    value: Tensor
    nothing: Tensor
    ordinary: tuple[Tensor, Tensor]
    little: Tensor
    rounded: Tensor
    sites: frozenset[str]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the twins."""
        return (self.nothing, *self.ordinary, self.little, self.rounded)

    def flat(self, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """Return where its gain is what an eps, and not the statistic, decides."""
        own, nothing, first, second, little, rounded = (
            gain(tensor.double()) for tensor in (self.value, *self.tensors)
        )
        idle = own >= _DECIDES_NOTHING * nothing
        idle |= (rounded - own).abs() >= 0.5 * own
        amplifies = (own >= _GAIN) & (own >= _GAIN * torch.minimum(first, second))
        replaced = (little >= _GAIN) & (little >= _GAIN * own)
        return idle & (amplifies | replaced)


class Divisors(TorchFunctionMode):
    """Follows frozen statistics while a network runs; `found` maps sites to the flat values divided by."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._constants = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._known: dict[int, _Known] = {}  # holds its tensors, so that no other takes their ids
        self._noise = Generator().manual_seed(0)
        self.found: dict[str, set[int]] = {}

    def take(self, site: str, law: str, args: tuple[Any, ...], result: Any) -> None:
        """Begin with what a frozen statistic gave."""
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                self._known[id(value)] = self._statistic(value, _rounding(law, args[0], value), site)

    def _statistic(self, value: Tensor, rounding: Tensor, site: str) -> _Known:
        ordinary = [value + self._drawn(torch.rand, value) + 1 for _ in range(2)]
        return _Known(
            value,
            torch.where(value.abs() <= rounding, value, 0.0),
            (ordinary[0], ordinary[1]),
            value + _LITTLE,
            value + rounding * self._drawn(torch.randn, value),
            frozenset({site}),
        )

    def _drawn(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        return draw(like.shape, generator=self._noise, dtype=torch.float64).to(like.device, like.dtype)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [self._known[id(t)] for t in given if id(t) in self._known]
        name = _name_of(func)
        counting = given[:1] if name in LIKE else given
        alone = all(id(t) in self._known or self._is_constant(t) for t in counting)
        with torch._C.DisableTorchFunction():
            if known:
                self._judge(name, args, kwargs, alone=alone)
            twins = self._twins(func, args, kwargs) if known and alone else []
        result = func(*args, **kwargs)
        if known:
            self._note(result, twins, frozenset().union(*(k.sites for k in known)))
        elif alone or name in _FILLING:
            self._constants |= {id(t): t for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result

    def _twins(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[list[Any]]:
        """Make the call on every kind of twin, which what works in place changes as it changes the value."""
        results = []
        for kind in range(5):
            own, named = tree_map(partial(self._twin, kind), (args, dict(kwargs)))
            try:
                results.append(tree_leaves(func(*own, **named)))
            except (RuntimeError, ValueError):  # a matrix of twins may have no root
                return []
        return results

    def _twin(self, kind: int, value: Any) -> Any:
        known = self._known.get(id(value)) if isinstance(value, Tensor) else None
        return value if known is None else known.tensors[kind]

    def _note(self, result: Any, twins: list[list[Any]], sites: frozenset[str]) -> None:
        """Follow what a call gave; without twins what it worked on in place is followed no longer."""
        for place, value in enumerate(tree_leaves(result)):
            if not isinstance(value, Tensor):
                continue
            self._known.pop(id(value), None)
            if twins:
                nothing, first, second, little, rounded = (leaves[place] for leaves in twins)
                self._known[id(value)] = _Known(value, nothing, (first, second), little, rounded, sites)

    def _judge(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, alone: bool) -> None:
        """Report flat values that a call divides by, or multiplies the image by."""
        operands = [*args, *(kwargs[key] for key in _NAMED if key in kwargs)]
        if name in _DIVIDING:
            self._report(operands[1:2], torch.reciprocal)
        elif name == "addcdiv":
            self._report(operands[2:3], torch.reciprocal)
        elif name == _BATCH_NORM:
            variance, eps = _variance(args, kwargs)
            self._report([variance], lambda v: (v + eps).rsqrt())
        elif name in _INVERTING and alone:
            self._report(operands[:1], _inverse(name, operands))
        elif name in _MULTIPLYING and not alone:
            self._report(tree_leaves(operands), lambda v: v)

    def _report(self, operands: list[Any], gain: Callable[[Tensor], Tensor]) -> None:
        for operand in operands:
            known = self._known.get(id(operand))
            if known is None:
                continue
            places = known.flat(lambda v: gain(v).abs()).flatten().nonzero().flatten().tolist()
            for site in known.sites if places else ():
                self.found.setdefault(site, set()).update(places)

    def _is_constant(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is no map of the image: a weight, what is made of weights, or a single number."""
        return id(tensor) in self._constants or tensor.numel() == 1 or tensor.dtype == torch.bool


def _inverse(name: str, operands: list[Any]) -> Callable[[Tensor], Tensor]:
    """Return how an inverting call, such as a negative power, makes a gain; a positive power makes none."""
    if name == "rsqrt":
        return torch.rsqrt
    if name not in ("pow", "float_power"):
        return torch.reciprocal
    exponent = operands[1] if len(operands) > 1 else 1
    if isinstance(exponent, Tensor):
        exponent = exponent.double()
    elif not isinstance(exponent, int | float):
        exponent = 1
    return lambda v: v.abs().pow(exponent) * bool(torch.as_tensor(exponent < 0).all())


def _variance(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, float]:
    """Return the variance that a batch norm divides by, and the eps that it adds."""
    numbers = [value for value in args[3:] if isinstance(value, float)]
    eps = kwargs.get("eps", numbers[-1] if numbers else 1e-5)
    return kwargs.get("running_var", args[2] if len(args) > 2 else None), float(eps)


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


def _rounding(law: str, operand: Tensor, value: Tensor) -> Tensor:
    """Return what a statistic may be by rounding alone: a spread of its operand, any other of its own magnitude."""
    eps = torch.finfo(value.dtype).eps
    if not law.startswith(("variance", "deviation")) or not operand.numel():
        return 2 * eps * value.abs()
    unit = operand.detach().double().abs().max() * eps / 2
    return (unit.square() if law.startswith("variance") else unit).to(value.dtype).expand_as(value)


def _name_of(func: Callable[..., Any]) -> str:
    """Return a call's name without what says how it was spelt: `__radd__`, `add_` and `aten.add.Tensor` are alike."""
    if isinstance(func, OpOverload):
        return func._schema.name.partition("::")[2].removesuffix("_")
    name = getattr(func, "__name__", "")
    dunder = name.startswith("__") and name.endswith("__")
    return name.strip("_") if dunder else name.removesuffix("_")
