"""Open what people have: nothing in a file runs unless asked.

Weights are read without executing anything. A pickle that needs classes is listed, then refused, unless the
caller trusts it. A factory named by the caller is imported; one named by a saved folder only if it is a network
class of a package on FACTORIES, or a public function of a module on BUILDERS, and then only with arguments
that name no file or address: `timm.models.load_checkpoint` or a `checkpoint_path` would open what the
folder's author chose.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pickle  # noqa: TID251 - for its exception
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, _weights_only_unpickler, nn

from normfix.errors import NormfixError
from normfix.records import Source

__all__ = ["BUILDERS", "FACTORIES", "Loaded", "build", "dumped", "open_model", "read_weights", "rebuild"]

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

_NESTED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_OPENS = re.compile(r"path|file|url|dir|cfg|config|checkpoint|hub|cache", re.IGNORECASE)
_LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # how torch.save before 1.6 began its files


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network, where it came from, and what the user should know."""

    model: nn.Module
    source: Source
    notes: tuple[str, ...] = ()


def open_model(
    spec: str,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
) -> Loaded:
    """Load a network that the caller names.

    Args:
        spec: a weights file (with `arch`), a pickled module (with `trust_pickle`), "timm:NAME" or
            "pkg.mod:factory".
        arch: "pkg.mod:factory" or "timm:NAME", for weights.
        arch_args: keyword arguments of the factory.
        trust_pickle: run the pickle.

    Raises:
        NormfixError: NF101 unreadable, NF102 a pickle that is not trusted, NF105 weights that do not fit,
            NF111 a factory that cannot be imported or fails, NF112 weights without an architecture.
    """
    args = dict(arch_args or {})
    path = Path(spec)
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a name is too long to be a file
        return _open_file(path, arch, args, trust_pickle)
    if _NAME.fullmatch(spec) and path.suffix not in (".pt", ".pth", ".ckpt", ".safetensors"):
        source = Source(kind="factory", spec=spec, args=dumped(args))
        return Loaded(build(source), source, _random_weights(spec, args))
    raise NormfixError(
        "NF101", "no such file, and no name of the form timm:NAME or pkg.module:factory.", where=spec[:200]
    )


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
    try:
        if source.spec.startswith("timm:"):
            factory: Any = importlib.import_module("timm").create_model
            model = factory(
                source.spec.removeprefix("timm:"), **{**args, **({"pretrained": False} if blank else {})}
            )
        else:
            model = _import(source.spec)(**args)
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
            "the folder was saved from an object, so it does not say how to build one. Give the network: "
            "load(folder, model=MyNet()) or load(folder, arch='pkg.mod:factory').",
            where=source.spec,
        )
    if not _allowed(source.spec):
        raise NormfixError(
            "NF113",
            "the folder names this factory, but only network classes and builders of "
            f"{', '.join(FACTORIES)} are called unasked. If you trust it, repeat it: --arch {source.spec} "
            f"(arch={source.spec!r} in Python).",
            where=source.spec,
        )
    opening = sorted(name for name in _names_in(_arguments(source)) if _OPENS.search(name))
    if opening:
        raise NormfixError(
            "NF113",
            f"the folder gives this factory the arguments {', '.join(opening)}, which may open a file or an "
            f"address of its choice: {source.args[:200]}. If you trust it, repeat them: --arch {source.spec} "
            "--arch-args JSON (arch= and args= in Python).",
            where=source.spec,
        )
    return build(source, blank=True)


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file.

    Raises:
        NormfixError: NF101 if it is missing, truncated or malformed.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error


def _open_file(path: Path, arch: str | None, args: dict[str, Any], trust_pickle: bool) -> Loaded:
    if path.is_dir():
        raise NormfixError(
            "NF101", "this folder holds no normfix.json, so it was not saved by normfix.", where=str(path)
        )
    if path.suffix == ".safetensors":
        content: Any = read_weights(path)
    else:
        _require_torch_file(path)
        content = _unpickled(path, trust_pickle)
    if isinstance(content, nn.Module):
        kind = type(content)
        source = Source(kind="object", spec=f"{kind.__module__}:{kind.__qualname__}")
        if arch is not None:
            source = Source(kind="factory", spec=arch, args=dumped(args))
        return Loaded(content, source)
    weights = _state_dict(content, path)
    if arch is None:
        raise NormfixError(
            "NF112",
            f"the file holds {len(weights)} tensors but not the network. Name it: --arch pkg.module:factory "
            "or --arch timm:NAME, with --arch-args '{\"...\": ...}'.",
            where=str(path),
        )
    source = Source(kind="factory", spec=arch, args=dumped(args))
    model = build(source, blank=True)
    _load_strictly(model, weights, path)
    return Loaded(model, source)


def _require_torch_file(path: Path) -> None:
    """Refuse what torch.save did not write, and archives with a wrong checksum, which torch.load ignores."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
        if not start.startswith(b"PK"):
            problem = "" if _LEGACY in start else "torch.save did not write it"
        else:
            problem = _archive_problem(path)
    except Exception as error:  # zipfile raises half a dozen kinds for damaged archives
        raise _unreadable(path, error) from error
    if problem:
        raise NormfixError(
            "NF101", f"cannot read this file: {problem}. Check that it exists and is whole.", where=str(path)
        )


def _archive_problem(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in members:
            return (
                "it is a TorchScript program, which holds no modules to convert; save the state_dict instead"
            )
        if "data.pkl" not in members:
            return "it is an archive, but torch.save did not write it (exported programs are not read)"
        broken = archive.testzip()
        return f"the checksum of {broken} is wrong" if broken else ""


def _unpickled(path: Path, trust: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except pickle.UnpicklingError:
        pass
    except Exception as error:
        raise _unreadable(path, error) from error
    if not trust:
        raise NormfixError(
            "NF102",
            f"the file is a pickle that would import {_wanted(path)}. Loading it runs code; if you trust "
            "where it came from, add --trust-pickle, or save its state_dict and name the network with --arch.",
            where=str(path),
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=False)  # noqa: TID251
    except Exception as error:
        raise _unreadable(path, error) from error


def _wanted(path: Path) -> str:
    try:
        if zipfile.is_zipfile(path):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        else:
            names = _legacy_globals(path)
    except Exception:  # noqa: BLE001 - a listing is a courtesy; whatever the file does wrong, it is refused
        names = []
    shown = ", ".join(names[:8]) or "classes that cannot be listed"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _legacy_globals(path: Path) -> list[str]:
    """List the five pickles of a file in the format before torch 1.6."""
    with path.open("rb") as file:
        return sorted(set().union(*(_weights_only_unpickler.get_globals_in_pkl(file) for _ in range(5))))


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise NormfixError(
            "NF101", "the file holds neither a network nor a state dict of tensors.", where=str(path)
        )
    return {str(k): v for k, v in content.items()}


def _unwrapped(weights: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Strip what DataParallel and torch.compile put before every name, unless the network has it too."""
    own = model.state_dict().keys()
    for prefix in _PREFIXES * 2:
        if weights.keys() != own and all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _load_strictly(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        result = model.load_state_dict(_unwrapped(weights, model), strict=False)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise NormfixError(
            "NF105", f"the weights do not fit this network: {reason}.", where=str(path)
        ) from error
    if result.missing_keys or result.unexpected_keys:
        parts = [
            f"{len(keys)} {kind} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
            for kind, keys in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys))
            if keys
        ]
        raise NormfixError(
            "NF105",
            f"the weights do not fit this network: {' and '.join(parts)}. Check --arch and --arch-args.",
            where=str(path),
        )


def _import(spec: str) -> Any:
    module, _, attribute = spec.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _allowed(spec: str) -> bool:
    """Tell whether a file may name this factory: on a list, and defined there, not merely imported there."""
    package = spec.partition(":")[0].partition(".")[0]
    if package not in FACTORIES or not _NAME.fullmatch(spec):
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


def _random_weights(spec: str, args: Mapping[str, Any]) -> tuple[str, ...]:
    if spec.startswith("timm:") and not args.get("pretrained"):
        return (f"{spec} has random weights; add --arch-args '{{\"pretrained\": true}}' for trained ones.",)
    return ()


def _unreadable(path: Path, error: Exception) -> NormfixError:
    reason = " ".join(str(error).split())[:160]
    return NormfixError(
        "NF101",
        f"cannot read this file: {reason or type(error).__name__}. Check that it exists and is whole.",
        where=str(path),
    )
