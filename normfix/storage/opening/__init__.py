"""Open what people have: nothing in a file runs unless asked.

Weights are read without executing anything. A pickle that needs classes is listed, then refused, unless the
caller allows those classes or trusts it. A factory that the caller names is called; one that a file names only
if it is on a fixed list. Each format is one module of `formats`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from normfix.errors import NormfixError
from normfix.storage.opening.allocation import bounded_by
from normfix.storage.opening.factories import build
from normfix.storage.opening.formats import FORMATS, Format
from normfix.storage.opening.formats.exported import read_program
from normfix.storage.opening.hub import fetched
from normfix.storage.opening.packages import described_in
from normfix.storage.opening.pretrained import folder_weights
from normfix.storage.opening.request import Loaded, Request, factory, require_no_choice, unreadable
from normfix.storage.opening.state_dicts import filled
from normfix.storage.opening.tensors import read_weights
from normfix.storage.spec import ENDINGS, HUB, is_factory, require_no_revision, require_spec

__all__ = [
    "HUB",
    "Loaded",
    "Request",
    "fetched",
    "open_model",
    "open_path",
    "open_spec",
    "read_program",
    "read_weights",
]


def open_model(
    spec: str,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    allow_classes: tuple[str, ...] = (),
    weights: str | None = None,
    revision: str | None = None,
) -> Loaded:
    """Load a network that the caller names.

    Args:
        spec: a file or folder of one of FORMATS, "timm:NAME", "hf-hub:ORG/NAME@REVISION" or "pkg.mod:factory".
        arch: "pkg.mod:factory" or "timm:NAME", for weights.
        arch_args: keyword arguments of the factory.
        trust_pickle: run the pickle.
        allow_classes: classes that a pickle may build, by name or as "package.*".
        weights: which of several sets of weights in the file.
        revision: branch, tag or commit of a repository.

    Raises:
        NormfixError: NF101 unreadable, NF102 a pickle that is not trusted, NF105 weights that do not fit,
            NF111 a factory that cannot be imported or fails, NF112 weights without an architecture, NF113 a file
            that names what may not run, NF119-NF125: see `normfix explain CODE`.
    """
    request = Request(
        arch=arch,
        arch_args=arch_args,
        weights=weights,
        trust_pickle=trust_pickle,
        allow_classes=allow_classes,
    )
    return open_spec(spec, request, revision)


def open_spec(spec: str, request: Request, revision: str | None = None) -> Loaded:
    """Load what a path or name means."""
    require_no_revision(spec, revision)
    if spec.startswith(HUB):
        folder, origin = fetched(spec, revision)
        loaded = open_path(folder, request)
        return replace(loaded, source=replace(loaded.source, origin=origin))
    path = Path(spec)
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a name is too long to be a file
        return open_path(path, request)
    if not is_factory(spec):
        require_spec(spec)
    require_no_choice(request, spec)
    source = factory(spec, request.arch_args or {})
    notes = _random_weights(spec, request.arch_args or {})
    if request.arch not in (None, spec):
        notes += (f"{spec} names the network itself, so {request.arch} (--arch, arch=) is not used.",)
    return Loaded(build(source), source, notes)


def open_path(path: Path, request: Request) -> Loaded:
    """Load a file or folder by the first format that recognises it."""
    if path.exists() and not path.is_file() and not path.is_dir():
        # Opening a pipe waits for ever, and reading a device never ends.
        raise unreadable(path, "it is a pipe, a device or the like, and no file")
    if described_in(path) == path.name:  # a description means the folder that it describes
        path = path.parent
    for format_ in FORMATS:
        if format_.recognises(path):
            return _opened(format_, path, request)
    if path.is_dir():
        return _open_folder(path, request)
    raise NormfixError(
        "NF101",
        "cannot read this file: it is of no kind that normfix opens (torch.save, .safetensors, .pt2, Lightning). "
        "Check that it exists and is whole.",
        where=str(path),
    )


def _opened(format_: Format, path: Path, request: Request) -> Loaded:
    """Let a format open it, and give whatever a library raises about what a file says the name of that file."""
    bound = bounded_by(path) if request.named is None else nullcontext()
    try:
        with bound:
            return format_.open_network(path, request)
    except NormfixError:
        raise
    except ModuleNotFoundError as error:
        raise NormfixError(
            "NF111", f"{error}. Install the library that wrote it.", where=str(path)
        ) from error
    except Exception as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from error


def _open_folder(path: Path, request: Request) -> Loaded:
    """Fill the network the caller names from a folder of weights; else say what the folder holds."""
    if request.named is not None:
        return filled(folder_weights(path, request), path, request.named, request)
    holds = sorted(p.name for p in path.iterdir() if p.suffix in ENDINGS)
    inside = f"Weights in it: {', '.join(holds[:6])}; give one of them" if holds else "Give a file"
    raise NormfixError(
        "NF101",
        "this folder holds no normfix.json, so it was not saved by normfix, and is of no other kind that is known "
        f"(nnU-Net, pytorch-3dunet, MONAI bundle, transformers, diffusers, timm, smp). {inside} with --arch.",
        where=str(path),
    )


def _random_weights(spec: str, args: Mapping[str, Any]) -> tuple[str, ...]:
    if spec.startswith("timm:") and not args.get("pretrained"):
        return (f"{spec} has random weights; add --arch-args '{{\"pretrained\": true}}' for trained ones.",)
    return ()
