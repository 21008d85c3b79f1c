"""Build networks by name, "pkg.mod:factory" or "timm:NAME": any that the caller names, few that a file may.

A factory named by a saved folder is called only if it is a network class of a package on FACTORIES, or a
public function of a module on BUILDERS, and then only with arguments that name no file or address:
`timm.models.load_checkpoint` or a `checkpoint_path` would open what the folder's author chose.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from normfix.errors import NormfixError
from normfix.records import Source

__all__ = ["BUILDERS", "FACTORIES", "build", "classes_named", "dumped", "is_allowed", "is_name", "rebuild"]

FACTORIES = (
    "torchvision",
    "timm",
    "monai",
    "segmentation_models_pytorch",
    "transformers",
    "diffusers",
    "normfix",
)
"""Packages whose network classes a saved folder may name."""

BUILDERS = (
    "torchvision.models",
    "timm.models",
    "monai.networks.nets",
    "segmentation_models_pytorch",
    "normfix.demo.network",
)
"""Modules, with what is below them, whose public functions build networks, so that a folder may name them."""

_FORMATS = re.compile(r"normfix\.loading\.formats\.\w+:network")
"""Builders of the loaders' own, which check their arguments themselves."""

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_OPENS = re.compile(r"path|file|url|dir|cfg|config|checkpoint|hub|cache", re.IGNORECASE)


_BLANK = {"pretrained": False, "weights": None, "weights_backbone": None, "encoder_weights": None}
"""What arguments become that would fetch or open weights, where weights come later."""


def build(source: Source, *, blank: bool = False) -> nn.Module:
    """Call a factory the caller chose.

    Args:
        source: of kind "factory".
        blank: the weights come later, so do not fetch pretrained ones.

    Raises:
        NormfixError: NF111 if it cannot be imported, fails, or returns no nn.Module; NF108 if its arguments are
            no JSON object.
    """
    args = _arguments(source)
    if blank:
        args = {name: _BLANK.get(name, value) for name, value in args.items()}
    try:
        if source.spec.startswith("timm:"):
            factory: Any = importlib.import_module("timm").create_model
            model = factory(source.spec.removeprefix("timm:"), **args)
        else:
            model = _import(source.spec)(**args)
    except NormfixError:
        raise
    except ModuleNotFoundError as error:
        hint = f"install {error.name}, or name its folder in PYTHONPATH"
        if error.name == "timm":
            hint = 'pip install "normfix[timm]"'
        raise NormfixError("NF111", f"{error}. Next: {hint}.", where=source.spec) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise NormfixError(
            "NF111", f"{type(error).__name__}: {reason}. Check the name and --arch-args.", where=source.spec
        ) from error
    if not isinstance(model, nn.Module):
        raise NormfixError(
            "NF111", f"it returned {type(model).__name__}, not an nn.Module.", where=source.spec
        )
    return model


def rebuild(
    source: Source, *, arch: str | None = None, arch_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the architecture a saved folder names, or the one the caller repeats.

    Raises:
        NormfixError: NF113 if the folder names a factory that may not be called unasked.
    """
    if arch is not None:
        args = _arguments(source) if arch_args is None and arch == source.spec else dict(arch_args or {})
        return build(Source(kind="factory", spec=arch, args=dumped(args)), blank=True)
    if source.kind == "object":
        raise NormfixError(
            "NF113",
            "the folder was saved from an object, so it does not say how to build one, and it holds no program.pt2 "
            "to run instead. Give the network: load(folder, model=MyNet()) or load(folder, arch='pkg.mod:factory').",
            where=source.spec,
        )
    if not is_allowed(source.spec):
        raise NormfixError(
            "NF113",
            "the folder names this factory, but only network classes and builders of "
            f"{', '.join(FACTORIES)} are called unasked. If you trust it, repeat it: --arch {source.spec} "
            f"(arch={source.spec!r} in Python).",
            where=source.spec,
        )
    opening = sorted(name for name in _names_in(_arguments(source)) if _OPENS.search(name))
    if opening and not _FORMATS.fullmatch(source.spec):
        raise NormfixError(
            "NF113",
            f"the folder gives this factory the arguments {', '.join(opening)}, which may open a file or an "
            f"address of its choice: {source.args[:200]}. If you trust it, repeat them: --arch {source.spec} "
            "--arch-args JSON (arch= and args= in Python).",
            where=source.spec,
        )
    return build(source, blank=True)


def classes_named(names: Iterable[str]) -> dict[str, type]:
    """Import classes that the caller allows a pickle to build, by their dotted names.

    Raises:
        NormfixError: NF122 if one of them is no class, NF111 if it cannot be imported.
    """
    found = {}
    for name in names:
        kind = _dotted(name)
        if not inspect.isclass(kind):
            raise NormfixError(
                "NF122",
                f"it is {type(kind).__name__}, and only classes can be allowed one by one. If you trust the file, "
                "run it: --trust-pickle.",
                where=name,
            )
        found[name] = kind
    return found


def _dotted(name: str) -> Any:
    """Import "pkg.mod.Class.Inner", trying the longest module first."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                found = getattr(found, part)
        except (ImportError, AttributeError):
            continue
        return found
    raise NormfixError("NF111", "it cannot be imported here. Install its package as it was.", where=name)


def is_name(text: str) -> bool:
    """Tell whether a text has the form pkg.mod:factory or timm:NAME.

    >>> is_name("torchvision.models:resnet18"), is_name("model.pt")
    (True, False)
    """
    return _NAME.fullmatch(text) is not None


def dumped(args: Mapping[str, Any]) -> str:
    """Return a factory's arguments as JSON text, the same for equal arguments.

    Raises:
        NormfixError: NF111 if they are not JSON-ready, so that they could not travel with the network.
    """
    try:
        return json.dumps(dict(args), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise NormfixError(
            "NF111",
            f"arguments of a factory travel as JSON: {error}. Write a factory that takes plain values.",
            where="--arch-args",
        ) from error


def _import(spec: str) -> Any:
    module, _, attribute = spec.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def is_allowed(spec: str) -> bool:
    """Tell whether a file may name this factory: on a list, and defined there, not merely imported there."""
    if _FORMATS.fullmatch(spec):
        return True
    package = spec.partition(":")[0].partition(".")[0]
    if package not in FACTORIES or not is_name(spec):
        return False
    if spec.startswith("timm:"):
        return True
    try:
        found = _import(spec)
    except Exception as error:
        raise NormfixError(
            "NF111", f"{type(error).__name__}: {error}. Install {package} as it was.", where=spec
        ) from error
    home = str(getattr(found, "__module__", ""))
    if inspect.isclass(found):
        return issubclass(found, nn.Module) and _is_below(home, FACTORIES)
    if not inspect.isfunction(found):
        return False
    public = not any(part.startswith("_") for part in (*home.split("."), found.__name__))
    return public and _is_below(home, BUILDERS)


def _is_below(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def _names_in(value: object) -> Iterator[str]:
    """Yield every name in arguments, however deep."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _names_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _names_in(inner)


def _arguments(source: Source) -> dict[str, Any]:
    try:
        args = json.loads(source.args)
    except (ValueError, RecursionError) as error:
        raise NormfixError("NF108", f"its arguments are no JSON: {error}.", where=source.spec) from error
    if not isinstance(args, dict):
        raise NormfixError(
            "NF108", f"its arguments are no JSON object: {source.args[:80]}.", where=source.spec
        )
    return args
