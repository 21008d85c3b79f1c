"""Find the arguments whose network, filled with the constants, is the converted network, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.giving.refusals import WAYS_ON, Unequal, Unfit
from normfix.giving.transfer import fill_
from normfix.networks.calling import Caller, in_eval_mode
from normfix.networks.copying import double_of
from normfix.networks.numerics import deviation, exact_arithmetic
from normfix.records.saved import Source
from normfix.storage.opening.factories import build, dumped, rebuild
from normfix.storage.opening.gate import is_allowed, present

__all__ = ["Match", "built", "matched"]

_SAME = 1e-9
"""The largest difference in float64, in sd, at which two networks are the same; eps and biases move into constants."""
_MOST = 40
"""Ways to call a factory that are tried."""
_SWITCH = "If you know the argument, name it: --switch NAME=VALUE."


@dataclass(frozen=True, slots=True)
class Match:
    """The arguments, the network that they build, filled and in float64, and its distance in sd."""

    args: Mapping[str, Any]
    network: nn.Module
    double_sd: float


def matched(
    converted: nn.Module,
    caller: Caller,
    image: Tensor,
    source: Source,
    candidates: Iterable[Mapping[str, Any]],
) -> Match:
    """Return the first arguments that build the converted network.

    Args:
        converted: in eval mode; not modified.
        caller: calls it.
        image: (1, C, *space) in float64.
        source: of its architecture.
        candidates: arguments to try.

    Raises:
        Unfit: NF551 if no arguments build a network that can hold the constants.
        Unequal: NF552 if one holds them and gives another output.
    """
    double = double_of(converted)
    unlike: list[NormfixError] = []
    with exact_arithmetic():
        wanted = caller.in_double(double, image)
        spread = float(wanted.std())
        if not spread > 0:
            raise Unequal(
                "NF552", "the converted network's output is constant on noise, so equality shows nothing."
            )
        for number, args in enumerate(candidates):
            if number == _MOST:
                break
            try:
                library = in_eval_mode(built(source, args).double())
                fill_(library, double, lambda network: caller.in_double(network, image))
                actual = caller.in_double(library, image)
            except NormfixError as error:
                unlike.append(error)
                continue
            if actual.shape == wanted.shape:
                apart = deviation(actual, wanted, spread)[0]
                if apart <= _SAME:
                    return Match(args, library, apart)
                unlike.append(_unequal(apart, args))
    raise _refusal(source, unlike)


def built(source: Source, args: Mapping[str, Any]) -> nn.Module:
    """Build a network of an architecture that is known, with other arguments; bounded if a file may name it."""
    named = replace(source, spec=present(source.spec), args=dumped(args))
    return rebuild(named) if is_allowed(named.spec) else build(named, blank=True)


def _unequal(apart: float, args: Mapping[str, Any]) -> Unequal:
    return Unequal(
        "NF552", f"built with {dumped(args)[:200]}, it holds the constants and differs by {apart:.1g} sd."
    )


def _refusal(source: Source, unlike: list[NormfixError]) -> NormfixError:
    """Return why nothing matched: the nearest miss first."""
    for kind in (Unequal, Unfit):
        for error in unlike:
            if isinstance(error, kind):
                return kind(
                    error.code,
                    f"{error.message} {len(unlike)} ways to call it were tried. {_SWITCH} {WAYS_ON}",
                    where=source.spec,
                )
    tried = (
        f"{len(unlike)} were tried, and none builds ({unlike[0]})" if unlike else "none has norm in its name"
    )
    return Unfit(
        "NF551",
        f"it has no argument that switches its norms to BatchNorm: {tried}. {_SWITCH} {WAYS_ON}",
        where=source.spec,
    )
