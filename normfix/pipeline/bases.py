"""The base: the copy of a network that everything is derived from, which runs alone and remembers nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfix.calling import Caller, buffers_kept, evaluating, home_of
from normfix.errors import NormfixError
from normfix.numerics import IDENTITY, deviation
from normfix.rewriting import as_trained_copy, copy_of
from normfix.scanning import materialise_

__all__ = ["base_of", "class_of"]


def base_of(
    model: nn.Module,
    example: Tensor,
    caller: Caller,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    as_trained: bool = False,
) -> nn.Module:
    """Return the copy that everything is derived from: materialised, on its device, in its dtype."""
    base = as_trained_copy(model) if as_trained else copy_of(model)
    base.to(device=device, dtype=dtype)
    given = example.to(*home_of(base))
    with torch.random.fork_rng():
        materialise_(base, caller, given)
        try:
            _require_one_network(base, model, caller, _quarter(given))
        except NormfixError as error:
            if error.code != "NF109":
                raise
            _require_one_network(base, model, caller, given)
    return base


def _quarter(example: Tensor) -> Tensor:
    """Return a corner of half the extents, on which most networks run as well."""
    for axis in range(2, example.dim()):
        if example.shape[axis] >= 64:
            example = example.narrow(axis, 0, example.shape[axis] // 2)
    return example


def _require_one_network(base: nn.Module, model: nn.Module, caller: Caller, example: Tensor) -> None:
    """Make sure, on copies, that what runs is the copy alone, and that each run is for itself.

    Raises:
        NormfixError: NF109 if it does not run on the example, NF208 and NF246 as below.
    """
    first = _require_independence(copy_of(base), model, caller, example)
    _require_no_memory(copy_of(base), caller, example, first)


def _require_no_memory(untried: nn.Module, caller: Caller, example: Tensor, first: Tensor) -> None:
    """Run a copy on another input, then on the example: it must give what one gave that had seen nothing before.

    Raises:
        NormfixError: NF246 if it does not, so that "the original's output on an image" is no such thing.
    """
    with evaluating(untried), buffers_kept(untried), torch.no_grad():
        caller(untried, example.flip(-1) * 0.5)
        torch.manual_seed(0)
        again = caller(untried, example)
    a, b = first.double().nan_to_num(), again.double().nan_to_num()
    bound = IDENTITY.get(first.dtype, 0.0)
    if a.shape == b.shape and deviation(b, a, float(a.std().nan_to_num()) or 1.0)[0] <= bound:
        return
    raise NormfixError(
        "NF246",
        "its output on one input is another after it has run on a different one: it keeps what it computed in an "
        "attribute or buffer, or draws random numbers of its own. Compute it anew in every forward, or reset it.",
        where=type(untried).__name__,
    )


def _require_independence(base: nn.Module, model: nn.Module, caller: Caller, example: Tensor) -> Tensor:
    """Run a copy once and make sure that no module of the original runs with it; return what it gave.

    Raises:
        NormfixError: NF208 if one does: a lambda or closure in the network still refers to the original.
    """

    def stop(module: nn.Module, args: object) -> None:
        raise NormfixError(
            "NF208",
            "a lambda or closure in the network refers to the original's modules, which a copy would run as well. "
            "Make it a method or a module.",
            where=type(module).__name__,
        )

    mine = {id(module) for module in base.modules()}
    handles = [
        m.register_forward_pre_hook(stop, prepend=True)
        for m in model.modules()
        if id(m) not in mine and not isinstance(m, torch.jit.ScriptModule)  # which take no hooks
    ]
    try:
        with evaluating(base), buffers_kept(base), torch.no_grad():
            torch.manual_seed(0)
            return caller(base, example)
    finally:
        for handle in handles:
            handle.remove()


def class_of(model: nn.Module) -> str:
    """Return a network's class by its full name."""
    return f"{type(model).__module__}.{type(model).__qualname__}"
