"""With which arguments a factory builds its network with BatchNorms: found by its signature, not in a list of classes.

Where the value of an argument, given or by default and also within a mapping, names an instance or group norm, the word
is changed in the style that it is written in: "instance" becomes "batch", "GroupNorm" "BatchNorm", "gn" "bn". Where the
name alone says norm, or no name does and the factory takes others, the usual words are tried. Whether what is built
is the same network, the proof says.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["batch_word", "switched"]

_WORDS = ("batch", "BatchNorm", "batch_norm", "bn", "BATCH", "BN", True)
"""What libraries call a BatchNorm, for an argument whose present value tells nothing."""
_GROUPED = ("num_groups", "num_channels", "track_running_stats")
"""Settings of a group or instance norm that a BatchNorm does not take, or must not be given."""

Place = tuple[str, ...]


def switched(factory: Callable[..., Any], args: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Return arguments that may build the network with BatchNorms, the likeliest first.

    Args:
        factory: a class or function.
        args: what it was called with.

    >>> def unet(channels, norm=("group", {"num_groups": 4})): ...
    >>> next(switched(unet, {"channels": 8}))
    {'channels': 8, 'norm': ['batch', {}]}
    """
    places = dict(_places({**_defaults(factory), **args}))
    spoken = {place: forms for place, value in places.items() if (forms := _forms(value))}
    tried = {_key(args)}
    silent = {place for place in places if place not in spoken and _is_norm(place[-1])}
    if not spoken and not silent and _takes_more(factory):
        silent = {("norm",)}
    for choice in (*_together(spoken), *_alone(spoken), *_guesses(silent)):
        new = _with(args, choice)
        if _key(new) not in tried:
            tried.add(_key(new))
            yield new


def batch_word(word: str) -> str | None:
    """Return what a word for an instance or group norm is for a BatchNorm, None for another word.

    >>> batch_word("INSTANCE"), batch_word("torch.nn.modules.instancenorm.InstanceNorm3d"), batch_word("layer")
    ('BATCH', 'torch.nn.modules.batchnorm.BatchNorm3d', None)
    """
    if word.lower() in ("in", "gn"):
        return "BN" if word.isupper() else "bn"
    found = re.sub("instance|group", lambda m: _in_case("batch", m[0]), word, flags=re.IGNORECASE)
    return None if found == word else re.sub("_nvfuser$", "", found, flags=re.IGNORECASE)


def _in_case(word: str, like: str) -> str:
    return word.upper() if like.isupper() else word.capitalize() if like[0].isupper() else word


def _defaults(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of a factory's arguments."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a class without a signature
        return {}
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {p.name: p.default for p in named if p.default is not p.empty}


def _takes_more(factory: Callable[..., Any]) -> bool:
    """Tell whether a factory hands on arguments that its signature does not name, as torch-em's UNet2d does."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    return factory is not dict and any(p.kind is p.VAR_KEYWORD for p in parameters)


def _is_norm(name: str) -> bool:
    return "norm" in name.lower() or name.lower() in ("bn", "use_bn")


def _places(args: Mapping[str, Any], inside: Place = ()) -> Iterator[tuple[Place, Any]]:
    for name, value in args.items():
        if isinstance(value, Mapping):
            yield from _places(value, (*inside, str(name)))
        elif isinstance(value, str | list | tuple | bool | None):
            yield (*inside, str(name)), value


def _forms(value: Any) -> list[Any]:
    """Return a value of the same form that names a BatchNorm, if this one names an instance or group norm."""
    if isinstance(value, str):
        word = batch_word(str(value))
        return [] if word is None else [word]
    if not isinstance(value, Sequence) or len(value) != 2 or not isinstance(value[0], str):
        return []
    word, settings = batch_word(str(value[0])), value[1]
    if word is None or not isinstance(settings, Mapping):
        return []
    kept = {name: setting for name, setting in settings.items() if name not in _GROUPED}
    return [[word, kept], [word, {**kept, "affine": True}]]


def _together(spoken: Mapping[Place, list[Any]]) -> list[dict[Place, Any]]:
    """Change all that name a norm at once, each to its first form, then each to its last."""
    if not spoken:
        return []
    return [{place: forms[end] for place, forms in spoken.items()} for end in (0, -1)]


def _alone(spoken: Mapping[Place, list[Any]]) -> list[dict[Place, Any]]:
    return [{place: form} for place, forms in spoken.items() for form in forms]


def _guesses(places: set[Place]) -> list[dict[Place, Any]]:
    return [{place: word} for place in sorted(places) for word in _WORDS]


def _with(args: Mapping[str, Any], choice: Mapping[Place, Any]) -> dict[str, Any]:
    new = copy.deepcopy(dict(args))
    for place, value in choice.items():
        holder = new
        for name in place[:-1]:
            holder = holder[name]
        holder[place[-1]] = value
    return new


def _key(args: Mapping[str, Any]) -> str:
    return json.dumps(args, sort_keys=True, default=str)
