"""Who feeds whom: the modules before and behind a norm, counting only what has no other use."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from normfix.layers.folding import BATCH_NORMS, STOCK, is_convolution
from normfix.networks.calling import in_eval_mode

__all__ = ["Flow", "Run", "neighbours", "observe", "parents_of"]

Run: TypeAlias = Callable[[nn.Module], Any]
"""Runs a network on an example; returns all it returns."""
Flow: TypeAlias = Callable[[nn.Module], tuple[nn.Module | None, nn.Module | None]]
"""Returns, of a norm, the module that feeds only it and the only one it feeds."""
_METADATA = frozenset({"size", "dim", "numel", "stride", "is_contiguous", "ndimension", "element_size"})


def parents_of(model: nn.Module, child: nn.Module) -> list[nn.Module]:
    """Return each place of a module in a network by the module that holds it."""
    return [parent for parent in model.modules() for module in parent._modules.values() if module is child]


def neighbours(model: nn.Module) -> Flow:
    """Read who feeds whom from plain sequences; a module with two places in the model has no neighbours.

    A sequence inside a module of another class has none either: that class's forward may take parts of it alone.
    """
    sequences = set(_sequences(model))

    def flow(norm: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        parents = parents_of(model, norm)
        if len(parents) != 1 or parents[0] not in sequences:
            return None, None
        row = [None, *parents[0]._modules.values(), None]
        place = row.index(norm)
        before, after = (
            module if module is not None and len(parents_of(model, module)) == 1 else None
            for module in (row[place - 1], row[place + 1])
        )
        return before, after

    return flow


def _sequences(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a network and its parts as far as they are plain sequences all the way down, which run all they hold."""
    if type(model) is nn.Sequential and "forward" not in model.__dict__:
        yield model
        for child in model:
            yield from _sequences(child)


def observe(model: nn.Module, run: Run) -> Flow:
    """See on the example who feeds whom, counting only what has no other use and is called once."""
    was_training = {module: module.training for module in model.modules()}
    watched = [m for m in model.modules() if is_convolution(m) or type(m) in (*STOCK, *BATCH_NORMS)]
    seen = _Observation()
    handles = [hook for module in watched for hook in seen.watch(module)]
    try:
        with torch.no_grad(), seen:
            outputs = run(in_eval_mode(model))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
    return seen.flow({id(leaf) for leaf in tree_leaves(outputs)})


class _Observation(TorchFunctionMode):
    """Records which watched module made a tensor, and in which ones it was used."""

    def __init__(self) -> None:
        super().__init__()
        self._running: list[nn.Module] = []
        self._calls: Counter[nn.Module] = Counter()
        self._outputs: dict[nn.Module, Tensor] = {}  # kept, so that no other tensor takes their ids
        self._users: defaultdict[int, set[nn.Module | None]] = defaultdict(set)

    def watch(self, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def enter(module: nn.Module, _: Any) -> None:
            self._calls[module] += 1
            self._running.append(module)

        def leave(module: nn.Module, _: Any, output: Tensor) -> None:
            self._running.pop()
            self._outputs[module] = output
            self._users.pop(id(output), None)

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _METADATA or (name == "__get__" and not isinstance(result, Tensor)):
            return result
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._users[id(leaf)].add(self._running[-1] if self._running else None)
        return result

    def flow(self, results: set[int]) -> Flow:
        feeds: dict[nn.Module, nn.Module] = {}
        for maker, output in self._outputs.items():
            users = self._users[id(output)]
            once = len(users) == 1 and id(output) not in results and self._calls[maker] == 1
            user = next(iter(users)) if once else None
            if user is not None and self._calls[user] == 1:
                feeds[maker] = user
        fed_by = {user: maker for maker, user in feeds.items()}
        return lambda norm: (fed_by.get(norm), feeds.get(norm))
