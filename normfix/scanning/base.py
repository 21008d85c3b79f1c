"""The base: the copy of a network that everything is derived from, which runs alone and remembers nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.networks.alone import run_alone
from normfix.networks.calling import Caller, NotTaken, evaluating, home_of, take_buffers_
from normfix.networks.copying import as_trained_copy, copy_of, equal_values
from normfix.networks.examples import default_example, fitting_example, probing_part
from normfix.networks.intake import Intake, is_lazy
from normfix.networks.numerics import IDENTITY, deviation
from normfix.networks.randomness import OwnRandomness
from normfix.scanning.sites import materialise_

__all__ = ["Base", "base_of", "require_the_same"]


@dataclass(frozen=True, slots=True)
class Base:
    """A network that everything is derived from, how it is called from here on, and what to scan it with.

    `spares` are copies of it that ran on small inputs already and gave what a copy gives that had run on nothing.
    """

    network: nn.Module
    caller: Caller
    example: Tensor
    spares: list[nn.Module]

    def copy(self) -> nn.Module:
        """Return a copy of the network that is the caller's to change."""
        return self.spares.pop() if self.spares else copy_of(self.network)


def base_of(
    model: nn.Module,
    image: Tensor | None,
    caller: Caller,
    *,
    example: Tensor | None = None,
    as_trained: bool = False,
) -> Base:
    """Return the copy that everything is derived from, materialised.

    Args:
        model: not modified.
        image: (N, C, *space), whose middle is scanned with; None for noise of a shape that the network takes.
        caller: calls it.
        example: what to scan with instead.
        as_trained: let batch and instance norms use the statistics of their input.

    Raises:
        NormfixError: NF106 if the image is none for the network, NF109 if it does not run on the example, NF208 if a
            copy of it runs what is not copied, NF246 if a run depends on those before it.
    """
    base = as_trained_copy(model) if as_trained else copy_of(model)
    trials = _Trials(base, model, caller)
    if example is None:
        intake = trials.intake()
        example = default_example(model, intake) if image is None else fitting_example(model, image, intake)
    given = example.to(*home_of(base))
    with OwnRandomness():
        materialise_(base, caller, given)
    try:
        draws = trials.require_one_network(probing_part(given))
    except NotTaken:
        trials = _Trials(base, model, caller)
        draws = trials.require_one_network(given)
    return Base(base, replace(caller, draws=draws), example, trials.spares())


class _Trials:
    """Two copies of the base that make sure that what runs is a copy alone, and that each run is for itself.

    The first runs on an input before it has seen any, the second after another one of that shape: one on which it was
    tried what the network takes, where there was one.
    """

    def __init__(self, base: nn.Module, model: nn.Module, caller: Caller) -> None:
        self._base, self._model, self._caller = base, model, caller
        self._first: nn.Module | None = None
        self._second: nn.Module | None = None
        self._seen: Mapping[tuple[int, ...], object] = {}

    def intake(self) -> Intake:
        """Return what tells what the network takes, by runs of the second copy."""
        # a lazy copy keeps the first shape that it sees
        self._second = None if is_lazy(self._base) else copy_of(self._base)
        intake = Intake(self._model, self._caller, self._second)
        self._seen = intake.seen
        return intake

    def spares(self) -> list[nn.Module]:
        """Return the copies, for other uses: what they keep of a run was shown not to count."""
        copies = [copied for copied in (self._first, self._second) if copied is not None]
        for copied in copies:
            take_buffers_(copied, self._base)
        return copies

    def require_one_network(self, example: Tensor) -> bool:
        """Make both sure; tell whether the network draws random numbers.

        Raises:
            NormfixError: NF109 if it does not run on the example, NF208 and NF246 as for `base_of`.
        """
        first, draws = _drawing(partial(self._run_first, example))
        if self._second is None or not all(self._seen.values()):
            self._second, self._seen = copy_of(self._base), {}
        self._require_own_values()
        self._require_no_memory(self._second, replace(self._caller, draws=draws), example, first)
        return draws

    def _require_own_values(self) -> None:
        """Make sure that a run writes into no parameter: copies that share them with the network run as well.

        Raises:
            NormfixError: NF246 if one did.
        """
        assert self._first is not None
        ran = dict(self._first.named_parameters())
        for name, parameter in self._base.named_parameters():
            if name in ran and not equal_values(parameter, ran[name]):
                raise NormfixError(
                    "NF246",
                    f"its forward writes into its own parameter {name}, so that each run changes the network. Compute "
                    "what is needed of it anew in every forward, or run it until it keeps its values.",
                    where=type(self._base).__name__,
                )

    def _run_first(self, example: Tensor) -> Tensor:
        self._first = copy_of(self._base)
        watched = replace(self._caller, draws=False)  # what is drawn from a source of its own is not seen
        with evaluating(self._first):
            return run_alone(self._first, self._model, watched, example)

    def _require_no_memory(self, tried: nn.Module, caller: Caller, example: Tensor, first: Tensor) -> None:
        """Run a copy on another input, then on the example: it must give what one gave that had seen nothing before.

        Raises:
            NormfixError: NF246 if it does not, so that "the original's output on an image" is no such thing.
        """
        with torch.no_grad(), evaluating(tried):
            if tuple(example.shape[1:]) not in self._seen:
                caller(tried, example.flip(-1) * 0.5)
            again = caller(tried, example)
        require_the_same(first, again, type(tried).__name__)


def require_the_same(first: Tensor, again: Tensor, name: str) -> None:
    """Refuse a network that gives for one input what depends on those that it ran on before.

    Raises:
        NormfixError: NF246.
    """
    a, b = first.double().nan_to_num(), again.double().nan_to_num()
    bound = IDENTITY.get(first.dtype, 0.0)
    if a.shape == b.shape and deviation(b, a, float(a.std().nan_to_num()) or 1.0)[0] <= bound:
        return
    raise NormfixError(
        "NF246",
        "its output on one input is another after it has run on a different one: it keeps what it computed in an "
        "attribute or buffer, or draws random numbers of its own. Compute it anew in every forward, or reset it.",
        where=name,
    )


def _drawing(run: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """Run a network and tell whether it draws random numbers; if it does, it drew them from a source of our own."""
    source = OwnRandomness()
    with torch.no_grad():
        try:
            with source:
                return run(), source.drawn
        except NotTaken:  # perhaps of being watched
            return run(), False
