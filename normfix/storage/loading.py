"""load: what normfix saved, or any network that can be opened, as a module."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from normfix.conversion.rewriting import rewrite
from normfix.errors import NormfixError, reason_of
from normfix.networks.calling import Caller, failures, in_eval_mode
from normfix.networks.copying import copy_of
from normfix.networks.devices import chosen, place_
from normfix.networks.graph.program import ProgramNetwork
from normfix.networks.naming import defined_in, name_of
from normfix.networks.provenance import attach_, keep_in_
from normfix.networks.surroundings import undisturbed
from normfix.records.saved import Saved, Source
from normfix.scanning.sites import materialise_
from normfix.storage.folder import (
    MANIFEST,
    WEIGHTS,
    load_weights_,
    program_beside,
    read_manifest,
    unchanging,
)
from normfix.storage.opening import open_path, open_spec
from normfix.storage.opening.allocation import Stored, bounded_by, uncounted
from normfix.storage.opening.factories import built, dumped, rebuild
from normfix.storage.opening.formats.exported import read_program
from normfix.storage.opening.gate import FACTORIES, library, vouched
from normfix.storage.opening.hub import fetched
from normfix.storage.opening.request import Loaded, Request, require_no_choice
from normfix.storage.opening.tensors import read_weights
from normfix.storage.opening.workload import Workload
from normfix.storage.probe import require_probe
from normfix.storage.programs import SUFFIX, open_program
from normfix.storage.scripts import program_of
from normfix.storage.spec import HUB, require_no_revision

__all__ = ["Architecture", "load", "open_any"]

Architecture = str | nn.Module | Callable[..., nn.Module]
"""What a caller names an architecture by: its name, the network, or a class or function that builds it."""


@undisturbed()
def load(
    spec: str | Path,
    *,
    arch: Architecture | None = None,
    args: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    trust: Sequence[str] = (),
    trust_pickle: bool = False,
    allow_classes: Sequence[str] = (),
    allow_code: Sequence[str] = (),
    weights: str | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Open a folder that normfix saved, or any network `open_model` knows; in eval mode for a folder.

    A folder that does not say how to build its network (it was saved from an object) gives its program.pt2 as a
    module: it computes the same at every size it was exported for, and cannot be trained. `model` or `arch` give
    the network itself.

    Args:
        spec: folder, weights file, checkpoint, pickle, "timm:NAME", "hf-hub:ORG/NAME@REVISION", "pkg.mod:factory" or
            "path/to/file.py:Name".
        arch: the architecture, where the file does not name it or may not: a class, a function that builds it, the
            network itself, or its name, "pkg.mod:factory", "path/to/file.py:Name" or "timm:NAME".
        args: keyword arguments of the factory.
        model: a fresh network to fill (and to convert first, for a folder that normfix saved), instead of calling any
            factory; not modified.
        trust: modules whose factories a file may name, such as ["my_project"].
        trust_pickle: run a pickle.
        allow_classes: classes that a pickle may build, by name or as "package.*".
        allow_code: sha256 of architecture files, of bioimage.io packages, that may run.
        weights: which of several sets of weights in the file, such as "ema".
        revision: branch, tag or commit of a repository.
        device: where the network is put; "auto" is the GPU that is there, else the CPU.

    Raises:
        NormfixError: NF101, NF105, NF108, NF111, NF113, NF115, NF119-NF125, and NF116 of the device: see
            `normfix explain CODE`.
    """
    name, network = _architecture(arch, args)
    request = Request(
        arch=name,
        arch_args=args,
        network=network if model is None else model,
        trust=tuple(trust),
        weights=weights,
        trust_pickle=trust_pickle,
        allow_classes=tuple(allow_classes),
        allow_code=tuple(allow_code),
    )
    chosen(device)  # an unknown name is told before the file is read
    opened = open_any(spec, request, revision=revision).model
    place_(opened, device)
    return opened


def _architecture(
    arch: Architecture | ModuleType | None, args: Mapping[str, Any] | None
) -> tuple[str | None, nn.Module | None]:
    """Return the name of an architecture, or the network itself where it has none that leads to it."""
    if arch is None or isinstance(arch, str):
        return arch, None
    if isinstance(arch, nn.Module):
        return None, arch
    if isinstance(arch, ModuleType):
        inside = (
            ", ".join(f"{arch.__name__}.{key}" for key in defined_in(arch)[:6])
            or "nothing that can be called"
        )
        raise NormfixError(
            "NF111", f"it is a module of Python. Give the class or function in it: {inside}.", where="arch"
        )
    name = name_of(arch)
    return (None, built(arch, args or {})) if name is None else (name, None)


def open_any(spec: str | Path, request: Request, *, revision: str | None = None) -> Loaded:
    """Open as `load` does, with source and notes."""
    if not str(spec):  # as a path, the working directory
        raise NormfixError(
            "NF101", "the name of the network is empty. Give a file, a folder or pkg.module:factory."
        )
    require_no_revision(str(spec), revision)
    if Path(spec).suffix == SUFFIX and os.path.isfile(spec):  # noqa: PTH113 - Path raises where a name is too long
        return _open_program(Path(spec), request)
    request = replace(request, open_script=_open_script)
    if not str(spec).startswith(HUB):
        if os.path.isfile(Path(spec) / MANIFEST):  # noqa: PTH113
            return _open_saved(Path(spec), request)
        return open_spec(str(spec), request)
    folder, origin = fetched(str(spec), revision)
    if (folder / MANIFEST).is_file():
        return _open_saved(folder, request)
    loaded = open_path(folder, request)
    return replace(loaded, source=replace(loaded.source, origin=origin))


def _open_saved(folder: Path, request: Request) -> Loaded:
    require_no_choice(request, str(folder))
    with unchanging(folder):
        loaded = _opened(folder, request)
    keep_in_(loaded.model, folder)
    return loaded


def _opened(folder: Path, request: Request) -> Loaded:
    saved = read_manifest(folder)
    source, model = saved.provenance.source, request.network
    if request.named is None and source.kind == "object":
        program = program_beside(folder, saved)
        if program is not None:
            return _open_beside(program, saved)
    notes = saved.doubt(str(folder / MANIFEST))
    weights = read_weights(folder / WEIGHTS)
    named = _named(source, request)
    saved = replace(saved, provenance=replace(saved.provenance, source=named))
    if model is not None:
        return Loaded(_restored(folder, saved, copy_of(model), weights), named, notes)
    stored = Stored.of(weights.values())
    with bounded_by(folder) if request.arch is None else nullcontext():
        base = rebuild(
            source, arch=request.arch, arch_args=request.arch_args, stored=stored, trust=request.trust
        )
    return Loaded(_restored(folder, saved, base, weights), named, notes)


def _named(source: Source, request: Request) -> Source:
    """Return what builds the network, as the caller says it, if at all.

    What only the file says, and nothing was built by, would be called when the network is saved again or given back.
    """
    if request.arch is not None:
        repeated = request.arch_args is None and request.arch == source.spec
        args = source.args if repeated else dumped(request.arch_args or {})
        return replace(source, kind="factory", spec=request.arch, args=args)
    return source if request.network is None else vouched(source, request.trust)


def _open_beside(path: Path, saved: Saved) -> Loaded:
    """Open the program beside the weights, where the folder does not say how to build the network."""
    known = saved.provenance
    with _belonging(str(path)):
        program, inside = open_program(path, read_program)
        if inside is not None:  # it may return what counts alone
            known = replace(known, output=inside.provenance.output)
        attach_(program, known)
        if saved.probe is not None and not program.unproved:
            with Workload(path.stat().st_size, str(path), math.prod(saved.probe.shape)):
                require_probe(program, Caller.of(known), saved.probe, str(path))
    note = (
        f"{path}: opened as a program, which cannot be trained; for the network itself give it with --arch."
    )
    notes = (note, *_unproved(program), *saved.doubt(str(path.with_name(MANIFEST))))
    return Loaded(program, known.source, notes)


def _unproved(program: ProgramNetwork) -> tuple[str, ...]:
    return (program.unproved,) if program.unproved else ()


def _open_program(path: Path, request: Request) -> Loaded:
    """Open a .pt2 file; one that normfix wrote brings plan, geometry and scaling with it."""
    require_no_choice(request, str(path))
    model, saved = open_program(path, read_program)
    source = Source(kind="object", spec="torch.export:ExportedProgram")
    if saved is None:
        return Loaded(model, source, _unproved(model))
    named = _named(saved.provenance.source, request)
    if request.arch is None and library(named.spec) not in FACTORIES:
        named = vouched(named, request.trust)
    known = replace(saved.provenance, source=named)
    attach_(model, known)
    if saved.probe is not None and not model.unproved:
        with (
            _belonging(str(path)),
            Workload(path.stat().st_size, str(path), math.prod(saved.probe.shape)),
        ):
            require_probe(model, Caller.of(known), saved.probe, str(path))
    return Loaded(model, named, (*_unproved(model), *saved.doubt(str(path))))


def _open_script(path: Path) -> Loaded:
    """Open a TorchScript archive as the program that torch makes of it."""
    with uncounted(), program_of(path) as (program, found):
        try:
            model, _ = open_program(program, read_program)
        except NormfixError as error:
            # what was made of it lies in a temporary file, which nobody knows
            message = error.message.replace(str(program), str(path))
            raise NormfixError(error.code, message, where=str(path)) from error
        model.unproved = model.unproved.replace(str(program), str(path))
    source = Source(kind="object", spec="torch.jit:ScriptModule")
    return Loaded(model, source, (found, *(_unproved(model))))


def _restored(folder: Path, saved: Saved, base: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Carry the saved plan out on a base network, fill it strictly and repeat the probe."""
    known = saved.provenance
    caller = Caller.of(known)
    with _belonging(str(folder)):
        example = torch.zeros(1).expand(1, *known.scan.example[1:])  # takes no memory, whatever the file says
        materialise_(base, caller, example)
        with bounded_by(folder):
            model = rewrite(base, known.plan)
        load_weights_(model, weights, saved, str(folder))
        attach_(model, known)
        if saved.probe is not None:
            size = (folder / WEIGHTS).stat().st_size
            with Workload(size, str(folder), math.prod(saved.probe.shape), generous=True):
                require_probe(in_eval_mode(model), caller, saved.probe, str(folder))
    return in_eval_mode(model)


@contextmanager
def _belonging(where: str) -> Iterator[None]:
    """Turn whatever a plan, probe or network that do not belong together run into, into NF115."""
    try:
        yield
    except NormfixError:
        raise
    except failures() as error:
        reason = reason_of(error)
        raise NormfixError(
            "NF115",
            f"plan, weights and probe cannot be carried out on this network: {reason}. The folder was changed, "
            "or the network's code is another version.",
            where=where,
        ) from error
