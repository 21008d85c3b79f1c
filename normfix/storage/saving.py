"""save: a folder that appears whole, proved by reading it back in a fresh process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normfix.conversion.results import Calibration, Conversion
from normfix.errors import NormfixError
from normfix.images.drafts import UnwritableError
from normfix.networks.calling import Caller, evaluating, home_of
from normfix.networks.copying import copy_of, cpu_twin_of
from normfix.networks.graph.raising import unlifted
from normfix.networks.numerics import IDENTITY
from normfix.networks.provenance import has_known_values, provenance_of
from normfix.networks.surroundings import undisturbed
from normfix.records.certificates import Certificate
from normfix.records.exports import Export
from normfix.records.measurements import CalibrationSummary
from normfix.records.saved import Probe, Provenance, Scaling, Source
from normfix.records.sites import Scan
from normfix.records.verdicts import Proof
from normfix.scanning.renewal import renewed
from normfix.storage.certificate import certificate_of, read_graph, write_graph
from normfix.storage.exports import is_export_name, write_export
from normfix.storage.folder import GRAPH, PROGRAM, WEIGHTS, appearing, digest_of, seeded_input, write_folder
from normfix.storage.fresh import run_fresh
from normfix.storage.loading import load
from normfix.storage.opening import open_path
from normfix.storage.opening.factories import dumped, rebuild
from normfix.storage.opening.request import Request
from normfix.storage.opening.tensors import read_weights
from normfix.storage.portable import require_returnable, returned, write_original
from normfix.storage.probe import SEED, probe_of, probed, require_probe, saved_inside
from normfix.storage.programs import export_program, require_program_name, write_beside, write_program
from normfix.tiling.stages.cache import keep_plans

__all__ = ["require_unconverted", "save", "save_program", "sourced", "write_draft"]


@undisturbed()
def save(
    done: Conversion | Calibration | nn.Module,
    folder: str | Path,
    source: str | Source | None = None,
    args: Mapping[str, Any] | None = None,
    *,
    scaling: Scaling | None = None,
    partial: bool = False,
    portable: bool = False,
) -> Export | None:
    """Write a conversion, or a converted network that was trained further: a folder, a program (.pt2), .onnx or .ts.

    The folder is read back before it appears under its name: in a fresh process where the source can be
    called there, else on a copy of the original network.

    Args:
        done: a conversion, a calibration, or a network that carries its plan.
        folder: must not exist. A name ending in .pt2 becomes an exported program, one file that needs neither
            normfix nor the network's source; in .onnx or .ts a form for ONNX runtimes or TorchScript.
        source: "pkg.mod:factory" or "timm:NAME", if the network does not know it, or where else its architecture comes
            from.
        args: keyword arguments of the factory, JSON-ready.
        scaling: how the images were scaled, to travel with the model; default: as it knows.
        partial: save although sites were kept live or a step of the proof failed. (Refused sites do not hinder.)
        portable: write the original class with new statistics as its own library writes it (a save_pretrained
            folder, timm's files, or a state dict with the original names), where that is exact.

    Returns:
        Of an .onnx or .ts file what it is and how it was compared; None of folders and programs.

    Raises:
        NormfixError: NF114 if the folder exists or cannot be written, NF501 if the proof did not pass, NF502 if
            the network carries no plan or was converted before, NF503 if reading it back gives another result;
            NF225 and NF226 for programs, NF590 and NF591 for other forms.
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
    if not has_known_values(model):  # a file that is read knows no weights but its own
        device, dtype = home_of(model)
        noise = seeded_input((1, *provenance.scan.example[1:]), SEED, dtype).to(device)
        provenance = replace(provenance, scan=renewed(model, provenance, noise, caller, reweighted=True))
    provenance = sourced(provenance, source, args)
    if scaling is not None:
        provenance = replace(provenance, scaling=scaling)
    if original is not None:
        require_unconverted(original)
    if portable:
        _save_portable(Path(folder), model, provenance, caller, original)
        return None
    if is_export_name(folder):
        return write_export(Path(folder), model, caller, provenance, proof, calibration)
    if require_program_name(str(folder), model):
        save_program(Path(folder), model, caller, provenance, proof, calibration)
        return None
    with appearing(Path(folder)) as draft:
        write_draft(draft, model, caller, provenance, proof, calibration)
        keep_plans(model, draft)
        _read_back(draft, provenance.source, model, original)
    return None


def sourced(
    provenance: Provenance, source: str | Source | None, args: Mapping[str, Any] | None
) -> Provenance:
    """Return provenance with the source or factory that the caller names, if any."""
    if source is None:
        return provenance
    if isinstance(source, str):
        source = Source(kind="factory", spec=source, args=dumped(args or {}))
    return replace(provenance, source=source)


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
        try:
            save_program(draft / PROGRAM, model, caller, provenance, proof, calibration, write_beside)
        except UnwritableError:  # half of it may be there
            raise
        except NormfixError:  # the folder is whole without it
            pass
    probe = probe_of(model, caller, provenance)
    certificate = _certificate(draft, model, caller, provenance, probe)
    write_folder(draft, model, provenance, proof, calibration, probe, certificate)


def _certificate(
    draft: Path, model: nn.Module, caller: Caller, provenance: Provenance, probe: Probe | None
) -> Certificate:
    """Derive the certificate of what is in a folder, to which a graph is added where it holds no program."""
    if reason := _underivable(caller, provenance.scan):
        return Certificate(program="", reason=reason)
    name = PROGRAM if (draft / PROGRAM).exists() else GRAPH
    try:
        if name == GRAPH:
            write_graph(draft / GRAPH, _exported(model, caller, provenance).program)
        state = model.state_dict()
        weights = {key: value.detach().cpu() for key, value in state.items() if isinstance(value, Tensor)}
        program = read_graph(draft / name, weights)
        if probe is not None:
            require_probe(unlifted(program), caller, probe, name)
        return certificate_of(program, name, digest_of(draft / name), provenance)
    except UnwritableError:
        raise
    except NormfixError as error:  # the folder is whole without it, and says why
        (draft / GRAPH).unlink(missing_ok=True)
        return Certificate(program="", reason=str(error))


def _underivable(caller: Caller, scan: Scan) -> str:
    """Return why nothing can be derived of a network from a program alone, "" where it can be tried."""
    if caller.forward_fn is not None:
        return "it is called by a forward_fn, which no folder holds"
    if scan.draws:
        return "it draws random numbers, which are others on a tile whatever the graph says"
    if scan.reach is None:
        return "no geometry was found for it, so there is none to derive"
    return "" if scan.reach.lattice else scan.reach.note


def _save_portable(
    folder: Path, model: nn.Module, provenance: Provenance, caller: Caller, original: nn.Module | None
) -> None:
    """Write the original class with the converted state, proved equal on the probe's input and read back."""
    require_returnable(provenance.plan)
    base = copy_of(original) if original is not None else rebuild(provenance.source)
    home = home_of(model)
    network = returned(model, base.to(*home))
    shape = (1, *provenance.scan.example[1:])
    wanted = probed(model, caller, shape, SEED, home[1])
    _require_same(probed(network, caller, shape, SEED, home[1]), wanted, home[1], "the original class")
    with appearing(folder) as draft:
        path = write_original(draft, network, provenance.source)
        source = provenance.source
        named = path.is_file() and source.kind == "factory"
        if path.is_dir() or named:
            args = json.loads(source.args) if named else None
            again = open_path(path, Request(arch=source.spec if named else None, arch_args=args)).model
            _require_same(
                probed(again.to(*home), caller, shape, SEED, home[1]), wanted, home[1], "what was written"
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
    exported = _exported(model, caller, provenance)
    model, run = exported.model, exported.run
    if run is not None:  # the program returns what counts already
        provenance = replace(provenance, output=None)
    saved = saved_inside(model, caller, provenance, proof, calibration)
    write(path, exported.program, model, run or caller.everything, saved)


@dataclass(frozen=True, slots=True)
class _Exported:
    """A program, the network on the CPU that it was exported from, and how that is called unless with the image."""

    program: ExportedProgram
    model: nn.Module
    run: Caller | None


def _exported(model: nn.Module, caller: Caller, provenance: Provenance) -> _Exported:
    """Export a converted network on the CPU."""
    model = cpu_twin_of(model)  # a program of the CPU runs everywhere, and can be moved
    shape = (1, *provenance.scan.example[1:])
    device, dtype = home_of(model)
    image = seeded_input(shape, SEED, dtype).to(device)
    run: Caller | None = caller
    if caller.forward_fn is None:
        with evaluating(model), torch.no_grad():
            run = None if caller.is_open(model, image) else caller
    return _Exported(export_program(model, run, image), model, run)


def _parts(
    done: Conversion | Calibration | nn.Module,
) -> tuple[nn.Module, Proof | None, Caller, nn.Module | None, Any]:
    if isinstance(done, Conversion):
        summary = done.calibration.summary if done.calibration else None
        return done.model, done.proof, done.caller, done.original, summary
    model, summary = (done.model, done.summary) if isinstance(done, Calibration) else (done, None)
    known = provenance_of(model)
    return model, None, Caller.of(known), None, summary


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
