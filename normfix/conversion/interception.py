"""Replace chosen calls inside a module's forward by submodules, keeping the module's class, methods and keys.

An intercepted owner gets a dynamic subclass of its own class (same name, `isinstance` holds, picklable)
whose forward runs the original forward under a TorchFunctionMode. The mode is made anew for every call of
forward, so threads and recomputation do not share a counter; it counts calls of each function and hands the
planned ones to the submodule of that site. If the calls at run time are not the planned ones, by their number
(in eval mode), rank, channels or reduced dimensions, forward raises and names the site: a lost interception
would be invisible on the image the statistics came from.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normfix.errors import NormfixError
from normfix.layers.base import ChannelNorm
from normfix.layers.constant import FrozenStatistic
from normfix.layers.keys import FrozenKeys, FrozenOperand
from normfix.networks.functions import (
    COUNTED,
    NORMS,
    arguments_of,
    by_position,
    operand_of,
    reduced_by,
    with_operand,
)

__all__ = ["Intercept", "InterceptedNorm", "intercept_", "obstacle", "release_"]

_PLANNED = "_normfix_intercepts"
_FUNCTIONS: dict[Callable[..., Any], str] = {
    **COUNTED,
    **{function: name for name, function in NORMS.items()},
}


@dataclass(frozen=True, slots=True)
class Intercept:
    """Hand the `index`-th of `visible` calls of `function` inside the owner's forward to its submodule `target`.

    For a statistic that is no norm, `operand` tells which of the call's tensors is reduced and `dims` along
    which dimensions, where the call's arguments say so.
    """

    function: str
    index: int
    visible: int
    target: str
    site: str
    operand: int = 0
    dims: tuple[int, ...] = ()


class InterceptedNorm(nn.Module):
    """The replacement of one normalising call: `norm` normalises, the call's own affine map is kept.

    In eval mode the result is w (s x̂ + t) + b, with w and b from the call and s, t the affine map of `norm`
    (absent unless group statistics were turned into channel statistics).
    """

    norm: ChannelNorm

    def __init__(self, norm: ChannelNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise `input` (N, C, *space); `weight` and `bias` are (C,) or None."""
        scale, shift = self.norm.weight, self.norm.bias
        if scale is None or shift is None:
            return self.norm.normalize(input, weight, bias)
        if weight is not None:
            scale, shift = weight * scale, weight * shift
        if bias is not None:
            shift = shift + bias
        return self.norm.normalize(input, scale, shift)


def obstacle(owner: nn.Module) -> str:
    """Say why this module's forward cannot be intercepted, or return ''."""
    if "forward" in owner.__dict__:
        return (
            "its forward is set on the instance, which bypasses the class and would stay live without a word"
        )
    if type(owner).__module__.startswith("torch.jit"):
        return "it is a TorchScript module"
    return ""


def intercept_(owner: nn.Module, intercepts: tuple[Intercept, ...]) -> None:
    """Make the owner's forward hand the planned calls to their submodules, in place.

    Args:
        owner: must hold a submodule of each target name: an InterceptedNorm, FrozenStatistic, FrozenKeys or
            FrozenOperand.
        intercepts: of this owner; added to those it has.

    Raises:
        NormfixError: NF206 where forward cannot be intercepted.
    """
    if reason := obstacle(owner):
        raise NormfixError("NF206", f"cannot intercept its calls: {reason}.", where=type(owner).__name__)
    before: tuple[Intercept, ...] = owner.__dict__.get(_PLANNED, ())
    owner.__dict__[_PLANNED] = before + intercepts
    if not before:
        owner.__class__ = _subclass(type(owner))


def release_(owner: nn.Module, target: str) -> None:
    """Let calls through again that were handed to a submodule of this name, and remove it, in place."""
    planned: tuple[Intercept, ...] = owner.__dict__[_PLANNED]
    owner.__dict__[_PLANNED] = tuple(intercept for intercept in planned if intercept.target != target)
    holder, _, name = target.rpartition(".")
    delattr(owner.get_submodule(holder), name)


_SUBCLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(base: type[nn.Module]) -> type[nn.Module]:
    known = _SUBCLASSES.get(base)
    return known or _SUBCLASSES.setdefault(base, _make_subclass(base))  # at once, whichever thread was first


def _make_subclass(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _PLANNED not in self.__dict__:
            # made of a planned one by its class, as a slice of a sequence is: its calls are its owner's
            return base.forward(self, *args, **kwargs)
        calls = _Calls(self)
        with calls:
            output = base.forward(self, *args, **kwargs)
        # not where the mode ends: Dynamo before torch 2.8 loses the counts of a mode with an __exit__ of its own
        calls.require_planned()
        return output

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base,), self.__dict__.copy()

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        copied: nn.Module = base.__deepcopy__(self, memo)  # type: ignore[attr-defined]
        for name, held in self._modules.items():
            if name not in copied._modules:
                copied.add_module(name, copy.deepcopy(held, memo))
        copied.__dict__[_PLANNED] = self.__dict__[_PLANNED]
        if type(copied) not in _SUBCLASSES.values():
            copied.__class__ = _subclass(type(copied))
        return copied

    members = {
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if hasattr(base, "__deepcopy__"):  # torch.fx makes a copy of another class, of what its graph calls alone
        members["__deepcopy__"] = deepcopy
    return type(base.__name__, (base,), members)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    kind = _subclass(base)
    return kind.__new__(kind)


class _Calls(TorchFunctionMode):
    """Counts the calls of one forward and redirects the planned ones."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner = owner
        self._planned = {(i.function, i.index): i for i in owner.__dict__[_PLANNED]}
        self._expected = {i.function: i.visible for i in owner.__dict__[_PLANNED]}
        self._counts = dict.fromkeys(self._expected, 0)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # looked up apart: a compiler does not find this Python method among the built-in ones
        name = "norm" if func is Tensor.norm else _FUNCTIONS.get(func)
        if name is None or name not in self._counts:
            return func(*args, **kwargs)
        index = self._counts[name]
        self._counts[name] = index + 1
        planned = self._planned.get((name, index))
        if planned is None:
            return func(*args, **kwargs)
        target = _submodule(self._owner, planned.target)
        try:
            if isinstance(target, FrozenKeys):
                return _attended(planned, target, func, args, kwargs)
            if isinstance(target, FrozenOperand):
                return _multiplied(planned, target, func, args, kwargs)
            if isinstance(target, FrozenStatistic):
                return _constant(planned, target, func, args, kwargs)
            given = _bind(planned.function, args, kwargs)
            return target(given["input"], given.get("weight"), given.get("bias"))
        except ValueError as error:
            raise NormfixError(
                "NF207", f"the call does not fit the plan: {error}.", where=planned.site
            ) from error

    def require_planned(self) -> None:
        """Refuse a forward that made other calls than the plan expects.

        Raises:
            NormfixError: NF207.
        """
        for planned in self._planned.values():
            made, expected = self._counts[planned.function], planned.visible
            if made <= planned.index or (made != expected and not self._owner.training):
                raise NormfixError(
                    "NF207",
                    f"the plan expects {expected} calls of {planned.function} here, but {made} were made, so the "
                    "statistic may be live elsewhere. Scan and convert this network anew.",
                    where=planned.site,
                )


def _submodule(owner: Any, path: str) -> Any:
    """Return a submodule; a compiler of torch 2.6 that keeps modules whole follows no get_submodule."""
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def _constant(
    planned: Intercept,
    target: FrozenStatistic,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> object:
    """Return the frozen results of a call after making sure that it is the planned one."""
    operand = operand_of(args, kwargs, planned.operand)
    given = arguments_of(planned.function, args, kwargs)
    if planned.dims and reduced_by(planned.function, given, operand.dim()) != planned.dims:
        raise ValueError(f"expected a reduction of dimensions {planned.dims}")
    if target.observer is not None:
        target.observer(func, args, kwargs)
    return target(operand, given.get("dtype"))


def _attended(
    planned: Intercept,
    target: FrozenKeys,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> object:
    """Return the attention of a call's queries to the keys that are held."""
    given = arguments_of(planned.function, args, kwargs)
    if target.observer is not None:
        target.observer(given["key"], given["value"])
    return target(func, given)


def _multiplied(
    planned: Intercept,
    target: FrozenOperand,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> object:
    """Return a product with the operand that is held in place of its own."""
    operand = operand_of(args, kwargs, planned.operand)
    if target.observer is not None:
        target.observer(operand)
    return with_operand(func, args, kwargs, planned.operand, target(operand))


# The order of parameters after `input` in torch.nn.functional; bound by hand because inspect.signature inside
# a compiled forward breaks the graph.
_PARAMETERS = {
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "instance_norm": (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "use_input_stats",
        "momentum",
        "eps",
    ),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
}


def _bind(function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**by_position(_PARAMETERS[function], args), **kwargs}
