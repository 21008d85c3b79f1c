"""save and load: a folder that appears whole, proved by reading it back in a fresh process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfix.allocation import bounded_by
from normfix.calibration import Calibration
from normfix.calling import Caller, evaluating, home_of
from normfix.errors import NormfixError
from normfix.factories import dumped, rebuild
from normfix.json_record import SCHEMA
from normfix.loading import (
    HUB,
    Loaded,
    Request,
    fetched,
    open_path,
    open_spec,
    read_program,
    read_weights,
    require_repository,
)
from normfix.numerics import IDENTITY, exact_arithmetic
from normfix.pipeline.conversion import Conversion
from normfix.pipeline.fresh import run_fresh
from normfix.programs import (
    SUFFIX,
    export_program,
    open_program,
    require_program_name,
    write_beside,
    write_program,
)
from normfix.provenance import attach_, provenance_of
from normfix.records import CalibrationSummary, Probe, Proof, Provenance, Saved, Source
from normfix.returning import require_returnable, returned, write_original
from normfix.rewriting import copy_of, rewrite
from normfix.saving import (
    MANIFEST,
    PROGRAM,
    WEIGHTS,
    appearing,
    load_weights_,
    program_beside,
    read_manifest,
    seeded_input,
    write_folder,
)
from normfix.scanning import materialise_

__all__ = ["load", "open_any", "require_unconverted", "save", "save_program", "sourced", "write_draft"]

_SEED = 0
_SAMPLES = 64
_LARGEST_PROBE = 1 << 27
"""Values of a probe: 512 pixels cubed; a file must not ask for more."""


def save(
    done: Conversion | Calibration | nn.Module,
    folder: str | Path,
    source: str | None = None,
    args: Mapping[str, Any] | None = None,
    *,
    partial: bool = False,
    portable: bool = False,
) -> None:
    """Write a conversion, or a converted network that was trained further, as a folder, or as a program (.pt2).

    The folder is read back before it appears under its name: in a fresh process where the source can be
    called there, else on a copy of the original network.

    Args:
        done: a conversion, a calibration, or a network that carries its plan.
        folder: must not exist. A name ending in .pt2 becomes an exported program, one file that needs neither
            normfix nor the network's source.
        source: "pkg.mod:factory" or "timm:NAME", if the conversion does not know it.
        args: keyword arguments of the factory, JSON-ready.
        partial: save although sites were kept live or a step of the proof failed. (Refused sites do not hinder.)
        portable: write the original class with new statistics as its own library writes it (a save_pretrained
            folder, timm's files, or a state dict with the original names), where that is exact.

    Raises:
        NormfixError: NF114 if the folder exists or cannot be written, NF501 if the proof did not pass, NF502 if
            the network carries no plan or was converted before, NF503 if reading it back gives another result;
            NF225 and NF226 for programs.
    """
    model, proof, caller, original, calibration = _parts(done)
    provenance = provenance_of(model)
    if provenance is None:
        raise NormfixError(
            "NF502",
            "it carries no plan, so normfix did not convert it. Save what convert returned.",
            where=type(model).__name__,
        )
    if proof is not None and not (proof.passed or proof.partial or partial):
        wrong = ", ".join(f"{s.name} {s.status}" for s in proof.steps if s.status != "passed")
        raise NormfixError(
            "NF501", f"the proof did not pass ({wrong}), so nothing is written.", where=str(folder)
        )
    provenance = sourced(provenance, source, args)
    if original is not None:
        require_unconverted(original)
    if portable:
        _save_portable(Path(folder), model, provenance, caller, original)
        return
    if require_program_name(str(folder), model):
        save_program(Path(folder), model, caller, provenance, proof, calibration)
        return
    with appearing(Path(folder)) as draft:
        write_draft(draft, model, caller, provenance, proof, calibration)
        _read_back(draft, provenance.source, model, original)


def sourced(provenance: Provenance, source: str | None, args: Mapping[str, Any] | None) -> Provenance:
    """Return provenance with the factory that the caller names, if any."""
    if source is None:
        return provenance
    return replace(provenance, source=Source(kind="factory", spec=source, args=dumped(args or {})))


def write_draft(
    draft: Path,
    model: nn.Module,
    caller: Caller,
    provenance: Provenance,
    proof: Proof | None = None,
    calibration: CalibrationSummary | None = None,
) -> None:
    """Write the files of a saved model into an existing folder; nothing is read back yet."""
    if provenance.source.kind == "object" and caller.forward_fn is None:
        with suppress(NormfixError):  # the folder is whole without it
            save_program(draft / PROGRAM, model, caller, provenance, proof, calibration, write_beside)
    write_folder(draft, model, provenance, proof, calibration, _probe(model, caller, provenance))


def _save_portable(
    folder: Path, model: nn.Module, provenance: Provenance, caller: Caller, original: nn.Module | None
) -> None:
    """Write the original class with the converted state, proved equal on the probe's input and read back."""
    require_returnable(provenance.plan)
    base = copy_of(original) if original is not None else rebuild(provenance.source)
    home = home_of(model)
    network = returned(model, base.to(*home))
    shape = (1, *provenance.scan.example[1:])
    wanted = _probed(model, caller, shape, _SEED, home[1])
    _require_same(_probed(network, caller, shape, _SEED, home[1]), wanted, home[1], "the original class")
    with appearing(folder) as draft:
        path = write_original(draft, network, provenance.source)
        source = provenance.source
        named = path.is_file() and source.kind == "factory"
        if path.is_dir() or named:
            args = json.loads(source.args) if named else None
            again = open_path(path, Request(arch=source.spec if named else None, arch_args=args)).model
            _require_same(
                _probed(again.to(*home), caller, shape, _SEED, home[1]), wanted, home[1], "what was written"
            )


def _require_same(actual: Tensor, wanted: Tensor, dtype: torch.dtype, what: str) -> None:
    scale = float(wanted.double().std()) or 1.0
    if actual.shape != wanted.shape or not bool(((actual - wanted).abs() <= IDENTITY[dtype] * scale).all()):
        raise NormfixError(
            "NF412",
            f"{what} does not give the converted network's output, so nothing was written. Save the normfix folder "
            "instead, without --portable.",
        )


def require_unconverted(model: nn.Module) -> None:
    """Refuse a network that was converted before: a folder holds one plan, from the original network on.

    Raises:
        NormfixError: NF502.
    """
    if provenance_of(model) is not None:
        raise NormfixError(
            "NF502",
            "it was converted before, and a folder holds one plan, which starts at the original network. "
            "Convert the original, or measure this one on other images with normfix calibrate.",
            where=type(model).__name__,
        )


def load(
    spec: str | Path,
    *,
    arch: str | None = None,
    args: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    trust_pickle: bool = False,
    allow_classes: tuple[str, ...] = (),
    weights: str | None = None,
    revision: str | None = None,
) -> nn.Module:
    """Open a folder that normfix saved, or any network `open_model` knows; in eval mode for a folder.

    A folder that does not say how to build its network (it was saved from an object) gives its program.pt2 as a
    module: it computes the same at every size it was exported for, and cannot be trained. `model` or `arch` give
    the network itself.

    Args:
        spec: folder, weights file, checkpoint, pickle, "timm:NAME", "hf-hub:ORG/NAME@REVISION" or "pkg.mod:factory".
        arch: the architecture, where the file does not name it or may not.
        args: keyword arguments of the factory.
        model: a fresh network to convert and fill, instead of calling any factory; not modified.
        trust_pickle: run a pickle.
        allow_classes: classes that a pickle may build, by name or as "package.*".
        weights: which of several sets of weights in the file, such as "ema".
        revision: branch, tag or commit of a repository.

    Raises:
        NormfixError: NF101, NF105, NF108, NF111, NF113, NF115, NF119-NF125: see `normfix explain CODE`.
    """
    request = Request(
        arch=arch, arch_args=args, weights=weights, trust_pickle=trust_pickle, allow_classes=allow_classes
    )
    return open_any(spec, request, model=model, revision=revision).model


def open_any(
    spec: str | Path, request: Request, *, model: nn.Module | None = None, revision: str | None = None
) -> Loaded:
    """Open as `load` does, with source and notes."""
    require_repository(str(spec), revision)
    if Path(spec).suffix == SUFFIX and Path(spec).is_file():
        return _open_program(Path(spec))
    if not str(spec).startswith(HUB):
        if (Path(spec) / MANIFEST).is_file():
            return _open_saved(Path(spec), request, model)
        return open_spec(str(spec), request)
    folder, origin = fetched(str(spec), revision)
    if (folder / MANIFEST).is_file():
        return _open_saved(folder, request, model)
    loaded = open_path(folder, request)
    return replace(loaded, source=replace(loaded.source, origin=origin))


def _open_saved(folder: Path, request: Request, model: nn.Module | None) -> Loaded:
    saved = read_manifest(folder)
    source = saved.provenance.source
    if model is None and request.arch is None and source.kind == "object":
        program = program_beside(folder, saved)
        if program is not None:
            return _open_beside(program, saved)
    if model is not None:
        return Loaded(_restored(folder, saved, copy_of(model)), source)
    with bounded_by(folder) if request.arch is None else nullcontext():
        base = rebuild(source, arch=request.arch, arch_args=request.arch_args)
    return Loaded(_restored(folder, saved, base), source)


def _open_beside(path: Path, saved: Saved) -> Loaded:
    """Open the program beside the weights, where the folder does not say how to build the network."""
    known = saved.provenance
    with _belonging(str(path)):
        program, _ = open_program(path, read_program)
        attach_(program, known)
        if saved.probe is not None:
            _require_probe(program, Caller(None, known.output), saved.probe, str(path))
    note = (
        f"{path}: opened as a program, which cannot be trained; for the network itself give it with --arch."
    )
    return Loaded(program, known.source, (note,))


def _open_program(path: Path) -> Loaded:
    """Open a .pt2 file; one that normfix wrote brings plan, geometry and scaling with it."""
    model, saved = open_program(path, read_program)
    source = Source(kind="object", spec="torch.export:ExportedProgram")
    if saved is None:
        return Loaded(model, source)
    known = saved.provenance
    attach_(model, known)
    if saved.probe is not None:
        _require_probe(model, Caller(None, known.output), saved.probe, str(path))
    return Loaded(model, known.source)


def save_program(
    path: Path,
    model: nn.Module,
    caller: Caller,
    provenance: Provenance,
    proof: Proof | None = None,
    calibration: CalibrationSummary | None = None,
    write: Callable[..., None] = write_program,
) -> None:
    """Write a network as a program of one image, which returns all that the network returns."""
    run = None if caller.forward_fn is None else caller
    if run is not None:  # the program returns what counts already
        provenance = replace(provenance, output=None)
    shape = (1, *provenance.scan.example[1:])
    device, dtype = home_of(model)
    program = export_program(model, run, seeded_input(shape, _SEED, dtype).to(device))
    saved = Saved(
        schema=SCHEMA,
        provenance=provenance,
        aliases=(),
        sha256="",
        calibration=calibration,
        proof=proof,
        probe=_probe(model, caller, provenance),
    )
    write(path, program, model, run or (lambda network, image: network(image)), saved)


def _parts(
    done: Conversion | Calibration | nn.Module,
) -> tuple[nn.Module, Proof | None, Caller, nn.Module | None, Any]:
    if isinstance(done, Conversion):
        summary = done.calibration.summary if done.calibration else None
        return done.model, done.proof, done.caller, done.original, summary
    model, summary = (done.model, done.summary) if isinstance(done, Calibration) else (done, None)
    known = provenance_of(model)
    return model, None, Caller(None, known.output if known else None), None, summary


def _restored(folder: Path, saved: Saved, base: nn.Module) -> nn.Module:
    """Carry the saved plan out on a base network, fill it strictly and repeat the probe."""
    known = saved.provenance
    caller = Caller(None, known.output)
    with _belonging(str(folder)):
        example = torch.zeros(1).expand(1, *known.scan.example[1:])  # takes no memory, whatever the file says
        materialise_(base, caller, example)
        model = rewrite(base, known.plan)
        load_weights_(model, read_weights(folder / WEIGHTS), saved, str(folder))
        attach_(model, known)
        if saved.probe is not None:
            _require_probe(model.eval(), caller, saved.probe, str(folder))
    return model.eval()


@contextmanager
def _belonging(where: str) -> Iterator[None]:
    """Turn whatever a plan, probe or network that do not belong together run into, into NF115."""
    try:
        yield
    except NormfixError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise NormfixError(
            "NF115",
            f"plan, weights and probe cannot be carried out on this network: {reason}. The folder was changed, "
            "or the network's code is another version.",
            where=where,
        ) from error


def _probe(model: nn.Module, caller: Caller, provenance: Provenance) -> Probe | None:
    """Return what the model gives for a seeded input; None if it needs a calling convention that is not saved."""
    if caller.forward_fn is not None:
        return None
    dtype = home_of(model)[1]
    shape = (1, *provenance.scan.example[1:])
    if math.prod(shape) > _LARGEST_PROBE:
        return None
    output = _probed(model, caller, shape, _SEED, dtype)
    return Probe(
        shape=shape,
        seed=_SEED,
        dtype=str(dtype).removeprefix("torch."),
        output=tuple(output.shape),
        sd=float(output.double().std()),
        values=_samples(output),
    )


def _require_probe(model: nn.Module, caller: Caller, probe: Probe, where: str) -> None:
    if math.prod(probe.shape) > _LARGEST_PROBE:
        raise NormfixError("NF121", f"its probe has the shape {probe.shape}. It is not made.", where=where)
    dtype: torch.dtype = getattr(torch, probe.dtype)
    output = _probed(model, caller, probe.shape, probe.seed, dtype)
    scale = probe.sd or 1.0
    same = tuple(output.shape) == probe.output and all(
        abs(a - b) <= IDENTITY[dtype] * scale for a, b in zip(_samples(output), probe.values, strict=True)
    )
    if not same:
        raise NormfixError(
            "NF115",
            "the network does not give the output stored with it for the probe input, so it is another base "
            "network or another version of its code. Rebuild it with the version it was converted with.",
            where=where,
        )


def _probed(
    model: nn.Module, caller: Caller, shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> Tensor:
    device = home_of(model)[0]
    with evaluating(model), exact_arithmetic():
        return caller(model, seeded_input(shape, seed, dtype).to(device)).cpu()


def _samples(output: Tensor) -> tuple[float, ...]:
    flat = output.double().flatten()
    places = torch.linspace(0, len(flat) - 1, _SAMPLES).long()
    return tuple(float(v) for v in flat[places])


def _read_back(draft: Path, source: Source, model: nn.Module, original: nn.Module | None) -> None:
    """Reload the draft and compare; the probe is repeated on the way."""
    if source.kind == "factory":
        _read_in_fresh_process(draft, source)
    elif original is not None:
        again = load(draft, model=original)
        _require_equal(again, model, str(draft))
    else:
        stored = read_weights(draft / WEIGHTS)
        mine = model.state_dict()
        if any(not torch.equal(stored[k], mine[k].cpu()) for k in stored):
            raise NormfixError("NF503", "the written weights differ from the network's.", where=str(draft))


def _read_in_fresh_process(draft: Path, source: Source) -> None:
    """Load the folder in a new Python, where nothing of this one can help it."""
    script = (
        "import json, sys, normfix\n"
        "folder, arch, args = sys.argv[1:]\n"
        "normfix.load(folder, arch=arch, args=json.loads(args))\n"
    )
    if reason := run_fresh(script, str(draft), source.spec, source.args):
        raise NormfixError(
            "NF503",
            f"a fresh process could not load what was written: {reason}. Nothing was kept.",
            where=source.spec,
        )


def _require_equal(again: nn.Module, model: nn.Module, where: str) -> None:
    mine, theirs = model.state_dict(), again.state_dict()
    if mine.keys() != theirs.keys() or any(not torch.equal(mine[k].cpu(), theirs[k].cpu()) for k in mine):
        raise NormfixError("NF503", "what was written does not load back as the same network.", where=where)
