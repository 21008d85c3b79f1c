"""Open what people have: nothing in a file runs unless asked.

Weights are read without executing anything. A pickle that needs classes is listed, then refused, unless the
caller trusts it. A factory that the caller names is called.
"""

from __future__ import annotations

import os
import pickle  # noqa: TID251 - for its exception
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, _weights_only_unpickler, nn

from normfix.errors import NormfixError
from normfix.factories import build, dumped, is_name
from normfix.records import Source

__all__ = ["Loaded", "open_model", "read_weights"]

_NESTED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
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
    if is_name(spec) and path.suffix not in (".pt", ".pth", ".ckpt", ".safetensors"):
        source = Source(kind="factory", spec=spec, args=dumped(args))
        return Loaded(build(source), source, _random_weights(spec, args))
    raise NormfixError(
        "NF101", "no such file, and no name of the form timm:NAME or pkg.module:factory.", where=spec[:200]
    )


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
