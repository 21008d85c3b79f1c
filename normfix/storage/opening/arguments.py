"""Arguments that a file gives a factory: what they may name, how large they may be, which defaults fetch.

A value is refused if it is an address or a path, or a text under a name that says so ("checkpoint_path"), because
what a library does with it is the library's affair. Numbers are refused if they are out of proportion to the weights:
no width, depth or count of a network exceeds the number of its elements, and a list gives a value per layer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from normfix.errors import NormfixError

__all__ = ["blanked", "require_inert", "require_small"]

_OPENS = re.compile(
    r"path|file|url|uri|dir(?!ect)|cfg|config|checkpoint|ckpt|hub|cache$|pretrained|weights|repo(?!rt)|custom_",
    re.IGNORECASE,
)
"""Names of arguments that make a library open or fetch something."""
_NUMBERED = re.compile(r"(?<!drop_)(path|file)$", re.IGNORECASE)
"""Of these, those under which a number stands for a file that is open."""
_PATH = re.compile(r"[/\\]|^\s*[.~]")
_SCHEME_BACKWARDS = re.compile(r"[\w.+-]*?[A-Za-z]")
"""A scheme (hf-hub:, local-dir:, file:, https:) read backwards from its colon: searched for forwards, a text of one
letter over and over would be read from each of them."""
_ENDING = re.compile(
    r"\.(pt|pth|pt2|bin|ckpt|safetensors|pkl|pickle|npz?|json|ya?ml|tar|zip|gz|py|so|onnx|h5)\s*$", re.I
)
_LABELS = ("id2label", "label2id")
"""Names of classes, which are kept and shown, and never looked up."""

_INTEGER, _REAL = 1 << 18, 1 << 24
"""Numbers up to these are in proportion to any weights: extents of images, identities of tokens, bases of rotations."""
_DEPTH, _VALUES, _LIST, _TEXT = 32, 20_000, 4096, 4096
_PER_TENSOR = 16

_FETCHES = re.compile(
    r"(use_)?pretrained(_backbone|_weights)?|(\w+_)?weights(_\w+)?|load_pretrained\w*", re.IGNORECASE
)
"""Names of arguments that say whether, or which, weights are fetched."""
_PLAIN_BLANK = {"pretrained": False, "weights": None, "weights_backbone": None, "encoder_weights": None}


def require_inert(args: Mapping[str, Any], where: str, *, sections: bool = False) -> None:
    """Refuse arguments with which a library would open or fetch something of a file's choice.

    Args:
        args: plain values.
        where: named in the error.
        sections: a name may stand for a section with texts of its own ("text_config"), which are looked at one by one.

    Raises:
        NormfixError: NF113.

    Example:
        >>> require_inert({"encoder_name": "resnet18", "drop_path_rate": 0.1}, "config.json")
    """
    for name, value in _flat(args):
        if _OPENS.search(name) and _names_something(name, value, sections):
            raise _reaching(name, value, where)
        if isinstance(value, str) and (_is_address(value) or _ENDING.search(value)):
            raise _reaching(name, value, where)


def _is_address(text: str) -> bool:
    """Tell whether a text holds a scheme with something behind it, or is a path.

    >>> _is_address("hf-hub:a/b"), _is_address("s3:b"), _is_address("a ratio of 3:4"), _is_address("~x")
    (True, True, False, True)
    """
    # what follows a colon may be another
    parts = text.replace("::", ":.:").split(":")
    found = (
        not after[:1].isspace() and _SCHEME_BACKWARDS.match(before[::-1])
        for before, after in pairwise(parts)
        if after
    )
    return any(found) or _PATH.search(text) is not None


def require_small(args: Any, where: str, *, tensors: int, elements: int) -> None:
    """Refuse arguments out of proportion to weights, before anything is done with them.

    Args:
        args: plain values.
        where: named in the error.
        tensors: number of tensors of the weights.
        elements: number of their elements.

    Raises:
        NormfixError: NF121.
    """
    longest = _LIST + _PER_TENSOR * tensors
    for count, (depth, value) in enumerate(_nested(args)):
        problem = _excess(value, depth, elements)
        if count > max(_VALUES, elements) or (isinstance(value, list) and len(value) > longest):
            problem = "more values than any network of these weights has layers"
        if problem:
            raise NormfixError(
                "NF121",
                f"its configuration holds {problem}, out of proportion to the {tensors} tensors beside it. Nothing "
                "is built; name the network with --arch if it is right.",
                where=where,
            )


def blanked(factory: Callable[..., Any], args: Mapping[str, Any], *, defaults: bool) -> dict[str, Any]:
    """Return arguments of a factory with which it fetches no weights, where these come later.

    Args:
        factory: a class or function.
        args: what it is called with.
        defaults: also override its own defaults that would fetch.
    """
    done = {name: _PLAIN_BLANK.get(name, value) for name, value in args.items()}
    if defaults:
        for name, parameter in _parameters(factory).items():
            value = done.get(name, parameter.default)
            if _FETCHES.fullmatch(name) and parameter.kind not in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            ):
                done |= _blank(name, value, parameter)
    return done


def _blank(name: str, value: Any, parameter: inspect.Parameter) -> dict[str, Any]:
    """Return what stands for "none" where a value, or a default, names weights to fetch."""
    if isinstance(value, bool):
        return {name: False} if value else {}
    kind = type(value)
    chosen = isinstance(value, str) or any(base.__name__ == "WeightsEnum" for base in kind.__mro__)
    if not chosen or parameter.default is inspect.Parameter.empty:
        return {}
    return {name: None}


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}


def _names_something(name: str, value: Any, sections: bool) -> bool:
    """Tell whether a value can name a file: a text, or anything with one in it, or a number of an open file."""
    if isinstance(value, str):
        return bool(value)
    if isinstance(value, Mapping | list):
        return not sections and any(isinstance(inner, str) and inner for _, inner in _nested(value))
    return isinstance(value, int) and not isinstance(value, bool) and _NUMBERED.search(name) is not None


def _reaching(name: str, value: Any, where: str) -> NormfixError:
    return NormfixError(
        "NF113",
        f"it gives the argument {name[:60]} = {str(value)[:80]!r}, with which a library may open a file or an address "
        "that this file chose. If you trust it, write it yourself: --arch pkg.module:factory --arch-args JSON "
        "(arch= and args= in Python).",
        where=where,
    )


def _excess(value: Any, depth: int, elements: int) -> str:
    """Say what of a value is out of proportion, or nothing."""
    if depth > _DEPTH:
        return f"values {depth} deep"
    if isinstance(value, str) and len(value) > _TEXT:
        return f"a text of {len(value)} characters"
    if isinstance(value, float) and float(max(_REAL, elements)) < value < float("inf"):
        return f"the number {value}"
    if isinstance(value, int) and abs(value) > max(_INTEGER, elements):
        return f"the number {value}" if abs(value) < 10**30 else "a number of more than 30 digits"
    return ""


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value under a name with the name it stands under, labels of classes left out."""
    pending = [(name, value)]
    while pending:
        name, value = pending.pop()
        if name:
            yield name, value
        if isinstance(value, Mapping):
            pending.extend((str(key), inner) for key, inner in value.items() if key not in _LABELS)
            # Names are values of whoever wrote them, too.
            yield from (("name of an argument", key) for key in value if isinstance(key, str))
        elif isinstance(value, list | tuple):
            pending.extend((name, inner) for inner in value)


def _nested(value: Any) -> Iterator[tuple[int, Any]]:
    """Yield a value and all that it holds, keys too, with their depths."""
    pending = [(0, value)]
    while pending:
        depth, value = pending.pop()
        yield depth, value
        if depth > _DEPTH:
            continue
        if isinstance(value, Mapping):
            pending.extend((depth + 1, inner) for pair in value.items() for inner in pair)
        elif isinstance(value, list | tuple):
            pending.extend((depth + 1, inner) for inner in value)
