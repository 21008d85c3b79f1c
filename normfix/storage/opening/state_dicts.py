"""Find the weights in what a checkpoint holds, and fit their names to a network, strictly.

Trainers nest state dicts and keep several (the trained weights and their moving average), and wrappers put
words before every name. What is left out is said; what is not certain is refused with the choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normfix.errors import NormfixError, printable
from normfix.networks.copying import copy_of
from normfix.records.saved import Source
from normfix.storage.opening.allocation import Stored
from normfix.storage.opening.factories import build, rebuild
from normfix.storage.opening.request import Loaded, Request

__all__ = ["entries", "fill_", "filled", "places", "prefixes", "weights_in"]

Weights = Mapping[str, Tensor]

_TRAINING = ("optim", "sched", "scaler", "rng", "loops", "callbacks", "logging", "hyper_parameters")
"""Parts of a checkpoint that are not the network's."""
_DEPTH = 3
_COMPILED = "_orig_mod."


def filled(content: Any, path: Path, source: Source, request: Request, *, lent: bool = False) -> Loaded:
    """Build a network and fill it with the weights that a file holds.

    Args:
        content: what the file holds.
        path: the file.
        source: what builds the network: the caller's if the request names an architecture, else the file's.
        request: what the caller wants.
        lent: the caller names the factory, and the file its arguments.

    Raises:
        NormfixError: NF101 no weights, NF105 they do not fit, NF111 the factory fails, NF113 or NF121 a factory or
            arguments of the file's that are not taken unasked, NF119 several fit.
    """
    found = entries(content)
    if not found:
        raise _without_weights(path)
    stored = Stored.of((tensor for group in found.values() for tensor in group.values()), path)
    if request.network is not None:
        model = copy_of(request.network)
    elif request.arch is None:
        model = rebuild(source, stored=stored, trust=request.trust)
    else:
        model = build(source, blank=True, stored=stored if lent else None)
    chosen, prefix = _choice(found, request.weights)
    if len(chosen) > 1:
        chosen = {name: w for name, w in chosen.items() if _fits(w, model)} or chosen
    if len(chosen) > 1:
        raise _several(chosen, path, "sets of weights")
    ((name, weights),) = chosen.items()
    notes = (
        [f"{path.name}: of {', '.join(map(_named, found))} took {_named(name)}."] if len(found) > 1 else []
    )
    left = fill_(model, weights, path, prefix)
    if left:
        notes.append(f"{path.name}: left out {_shown(left)}, which are not of this network.")
    return Loaded(model, source, tuple(notes))


def weights_in(content: Any, path: Path, request: Request) -> dict[str, Weights]:
    """Return the sets of weights in a file, by where they stand, that the caller's choice leaves.

    Raises:
        NormfixError: NF101 if there are none, NF119 if the choice names none.
    """
    found = entries(content)
    if not found:
        raise _without_weights(path)
    return _choice(found, request.weights)[0]


def entries(content: Any, depth: int = _DEPTH) -> dict[str, Weights]:
    """Return every state dict in a nested mapping by its dotted place; "" if it is one itself."""
    found: dict[str, Weights] = {}
    for place, weights in places(content, depth):
        name = ".".join(place)
        # a key that holds dots may have the name of a nested one
        found[name if name not in found else f"{name} ({len(found) + 1})"] = weights
    return found


def places(content: Any, depth: int = _DEPTH) -> Iterator[tuple[tuple[str, ...], Weights]]:
    """Yield every state dict in a nested mapping, each with the keys that lead to it."""
    return _places(content, (), depth)


def _places(content: Any, place: tuple[str, ...], depth: int) -> Iterator[tuple[tuple[str, ...], Weights]]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return
    if content and all(isinstance(value, Tensor) for value in content.values()):
        yield place, content
    elif depth:
        for key, value in content.items():
            if not any(word in key.lower() for word in _TRAINING):
                yield from _places(value, (*place, key), depth - 1)


def _choice(found: dict[str, Weights], wanted: str | None) -> tuple[dict[str, Weights], str | None]:
    """Return the sets of weights the caller means, and the prefix where the choice is one."""
    if wanted is None:
        return found, None
    for name, weights in found.items():
        if wanted == name:
            return {name: weights}, None
    prefix = wanted.rstrip(".") + "."
    inside = {name: weights for name, weights in found.items() if name.startswith(prefix)}
    if inside:
        return inside, None
    within = {name: w for name, w in found.items() if any(key.startswith(prefix) for key in w)}
    if not within:
        names = ", ".join(map(_named, found))
        raise NormfixError(
            "NF119", f"it holds no weights of this name; it holds {names}.", where=f"--weights {wanted}"
        )
    return within, prefix


def fill_(model: nn.Module, weights: Weights, path: Path, prefix: str | None = None) -> list[str]:
    """Load weights into a network strictly, in place; return the names outside of the network that were left.

    Raises:
        NormfixError: NF105 names or shapes that do not fit, NF119 several prefixes that fit.
    """
    own = model.state_dict().keys()
    weights = _uncompiled(weights, own)
    fitting = prefixes(weights, own)
    if prefix is not None:  # below it there may be a wrapper's prefix
        fitting = [p for p in fitting if p.startswith(prefix)] or [prefix]
    if len(fitting) > 1:
        raise _several(fitting, path, "prefixes")
    cut = fitting[0] if fitting else _common(weights, own)
    inside = {key.removeprefix(cut): value for key, value in weights.items() if key.startswith(cut)}
    _require_real(model, inside, path)
    try:
        result = model.load_state_dict(inside, strict=False)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise NormfixError(
            "NF105", f"the weights do not fit this network: {reason}.", where=str(path)
        ) from error
    if result.missing_keys or result.unexpected_keys:
        parts = [
            f"{len(keys)} {kind} ({_shown(keys)})"
            for kind, keys in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys))
            if keys
        ]
        raise NormfixError(
            "NF105",
            f"the weights do not fit this network: {' and '.join(parts)}. Check --arch and --arch-args.",
            where=str(path),
        )
    return [key for key in weights if not key.startswith(cut)]


def _require_real(model: nn.Module, weights: Weights, path: Path) -> None:
    """Refuse integers and complex numbers for real weights, which torch would copy without their scale or half."""
    own = model.state_dict()
    for name, tensor in weights.items():
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            raise NormfixError(
                "NF105",
                f"{printable(name)} is {str(tensor.dtype).removeprefix('torch.')}, and the network's is real; a "
                "quantised network's weights mean nothing without their scales. Give the weights before that.",
                where=str(path),
            )


def _uncompiled(weights: Weights, own: Any) -> Weights:
    """Drop what torch.compile puts before the names of each module it wraps."""
    if any(_COMPILED in key for key in own):
        return weights
    return {key.replace(_COMPILED, ""): value for key, value in weights.items()}


def prefixes(weights: Weights, own: Any) -> list[str]:
    """Return what may stand before the network's own names: "", "module.", "model.net.", ..."""
    needed = [key for key in own if not key.endswith("num_batches_tracked")]  # files of old lack these
    if not needed:
        return [""]
    longest = max(needed, key=len)
    ends = [key.removesuffix(longest) for key in weights if key.endswith(longest)]
    right = [p for p in ends if (not p or p.endswith(".")) and all(p + key in weights for key in needed)]
    return [""] if "" in right else right


def _common(weights: Weights, own: Any) -> str:
    """Return what wrappers put before every name, where no prefix makes the names fit."""
    prefix = "module."
    return prefix if all(key.startswith(prefix) for key in weights) and not _starts(own, prefix) else ""


def _starts(keys: Any, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _fits(weights: Weights, model: nn.Module) -> bool:
    own = model.state_dict()
    plain = _uncompiled(weights, own)
    return any(
        all(plain[p + key].shape == tensor.shape for key, tensor in own.items() if p + key in plain)
        for p in prefixes(plain, own.keys())
    )


def _several(choices: Any, path: Path, what: str) -> NormfixError:
    names = ", ".join(_named(name) for name in choices)
    return NormfixError(
        "NF119",
        f"several {what} fit this network: {names}. Say which with --weights (a moving average is usually "
        "called ema or averaged).",
        where=str(path),
    )


def _without_weights(path: Path) -> NormfixError:
    return NormfixError(
        "NF101", "the file holds neither a network nor a state dict of tensors.", where=str(path)
    )


def _named(name: str) -> str:
    return printable(name[:200].rstrip(".")) or "the whole file"


def _shown(keys: list[str]) -> str:
    return ", ".join(printable(key[:200]) for key in keys[:4]) + (", ..." if len(keys) > 4 else "")
