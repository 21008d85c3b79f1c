"""The forms a converted network is used in, each held against its output in eval: one claim per form.

A form that this network cannot be given is inapplicable, with the reason; it never counts as passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from normfix.conversion.lowering import LoweringRecord, attempt_fold, freeze, lower, rounding
from normfix.errors import NormfixError
from normfix.networks.calling import Caller, home_of, in_eval_mode, refusals
from normfix.networks.copying import copy_of
from normfix.networks.graph.isolation import silence
from normfix.networks.graph.program import ProgramNetwork
from normfix.networks.numerics import IDENTITY
from normfix.networks.randomness import OwnRandomness
from normfix.proof.steps import same, unmeasured
from normfix.records.saved import Provenance
from normfix.records.verdicts import ProofStep
from normfix.storage.opening.factories import rebuild
from normfix.storage.portable import require_returnable, returned
from normfix.storage.programs import SUFFIX, NotExportable, WrongProgramError
from normfix.storage.reloading import answers_of, importable
from normfix.storage.saving import save_program, write_draft

__all__ = ["Form", "exported", "folded", "frozen", "portable", "reloaded", "stock"]

_NO_LAYER = "it has no such layer"


@dataclass(frozen=True, slots=True)
class Form:
    """A converted network in eval mode, inputs, and its output for each, which is what forms are compared with.

    `folder` is an empty folder to write forms into. `trusted` tells that the caller named the source.
    """

    model: nn.Module
    caller: Caller
    provenance: Provenance
    inputs: Sequence[Tensor]
    folder: Path
    trusted: bool = False

    def outputs(self, network: nn.Module) -> list[Tensor]:
        """Return a network's outputs for the inputs."""
        return [self.caller(network, image) for image in self.inputs]

    def pairs(self, network: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return the outputs of a form, each beside the model's."""
        return list(zip(self.outputs(network), self.outputs(self.model), strict=True))


def reloaded(bench: Form) -> ProofStep:
    """Save, load in a fresh process and compare."""
    claim = "saved and loaded in a fresh process, it gives the same output"
    caller, source = bench.caller, bench.provenance.source
    if importable(caller.forward_fn) == "":
        reason = "a fresh process cannot import its forward_fn; define it in a module"
        return unmeasured("reloaded", claim, "inconclusive", reason)
    is_program = isinstance(bench.model, ProgramNetwork)
    saved = bench.folder / f"saved{SUFFIX if is_program else ''}"
    if is_program:
        save_program(saved, bench.model, caller, bench.provenance)
    else:
        saved.mkdir()
        write_draft(saved, bench.model, caller, bench.provenance)
        if source.kind == "object" and not (saved / f"program{SUFFIX}").exists():
            reason = (
                "the folder would not say how to build the network, and it cannot be exported. Name what builds it: "
                "source='pkg.mod:factory', --arch on the command line"
            )
            return unmeasured("reloaded", claim, "inconclusive", reason)
    found = answers_of(saved, source, caller, bench.inputs)
    if isinstance(found, str):
        return unmeasured("reloaded", claim, "failed", found)
    pairs = list(zip(found, bench.outputs(bench.model), strict=True))
    return same("reloaded", claim, pairs, _tolerance(bench))


def frozen(bench: Form) -> ProofStep:
    """Compare with constants in place of BatchRenorm."""
    claim = "with FrozenNorm in place of every BatchRenorm, the output is the same to the bit"
    done = freeze(bench.model)
    if not done.record.steps:
        return unmeasured("frozen", claim, "inapplicable", "it has no BatchRenorm: this is its frozen form")
    if not done.record.complete:
        return unmeasured("frozen", claim, "inapplicable", _reasons(done.record))
    return same("frozen", claim, bench.pairs(in_eval_mode(done.model)), 0.0, _count(done.record))


def folded(bench: Form) -> ProofStep:
    """Compare with norms folded into convolutions, in float64 and in the network's own dtype."""
    claim = "with norms folded into convolutions, it is the same function in float64 and the same output to rounding"
    done = attempt_fold(bench.model, lambda network: _everything(bench.caller, network, bench.inputs[-1]))
    if not any(step.done for step in done.record.steps):
        return unmeasured("folded", claim, "inapplicable", _reasons(done.record) or _NO_LAYER)
    bound = max(rounding(home_of(bench.model)[1]), _tolerance(bench))
    own = same("folded", claim, bench.pairs(in_eval_mode(done.model)), bound, _count(done.record))
    if own.status != "passed":
        return own
    double = _folded_in_double(bench, claim)
    return own if double.status == "passed" else double


def _folded_in_double(bench: Form, claim: str) -> ProofStep:
    """Compare in float64, where rounding hides nothing."""
    model, caller = in_eval_mode(copy_of(bench.model).double()), bench.caller
    inputs = [image.double() for image in bench.inputs]
    done = attempt_fold(model, lambda network: caller.in_double(network, inputs[-1]))
    network = in_eval_mode(done.model)
    pairs = [(caller.in_double(network, x), caller.in_double(model, x)) for x in inputs]
    return same("folded", claim, pairs, IDENTITY[torch.float64], "in float64")


def stock(bench: Form) -> ProofStep:
    """Compare with stock batch norm in place of normfix's layers."""
    claim = "with nn.BatchNorm in eval in place of normfix's layers, the output is the same to the bit"
    done = lower(bench.model)
    if not any(step.done for step in done.record.steps):
        return unmeasured("stock", claim, "inapplicable", _reasons(done.record) or _NO_LAYER)
    bound = 0.0
    if _on_accelerator(bench):  # frozen layers are one multiply-add there
        claim, bound = claim.replace("to the bit", "to rounding"), _tolerance(bench)
    return same("stock", claim, bench.pairs(in_eval_mode(done.model)), bound, _count(done.record))


def portable(bench: Form) -> ProofStep:
    """Compare with the original class, filled with weights and statistics under its own names."""
    claim = "the original class with these weights and statistics gives the same output"
    source = bench.provenance.source
    try:
        require_returnable(bench.provenance.plan)
        base = rebuild(source, arch=source.spec if bench.trusted else None)
        network = returned(bench.model, base.to(*home_of(bench.model)))
    except (NormfixError, RuntimeError) as error:  # the latter: weights of other shapes
        return unmeasured("portable", claim, "inapplicable", " ".join(str(error).split())[:300])
    return same("portable", claim, bench.pairs(network), _tolerance(bench))


def exported(bench: Form) -> ProofStep:
    """Export, run the file in a process without normfix, and here on the images."""
    claim = "the exported program gives the same output to the bit, also in a process without normfix"
    path = bench.folder / f"form{SUFFIX}"
    try:
        save_program(path, bench.model, bench.caller, bench.provenance)
    except WrongProgramError as error:
        return unmeasured("exported", claim, "failed", str(error))
    except NotExportable as error:
        return unmeasured("exported", claim, "inapplicable", str(error))
    bound = 0.0
    with silence():
        program = torch.export.load(path)
        if _on_accelerator(bench):
            program = move_to_device_pass(program, bench.inputs[0].device)
            claim, bound = f"{claim} of the CPU, and here to rounding", _tolerance(bench)
        body = program.module()
    pick = bench.caller.pick if bench.caller.forward_fn is None else lambda given: given
    pairs, refused = [], ""
    for image, expected in zip(bench.inputs, bench.outputs(bench.model), strict=True):
        try:
            with OwnRandomness():
                pairs.append((pick(body(image.clone())), expected))
        except refusals():
            refused = f"it takes no {'x'.join(map(str, image.shape))}"
    return same("exported", claim, pairs, bound, refused)


def _everything(caller: Caller, network: nn.Module, image: Tensor) -> Any:
    return caller.everything(network, image)


def _on_accelerator(bench: Form) -> bool:
    return bench.inputs[0].device.type != "cpu"


def _tolerance(bench: Form) -> float:
    return IDENTITY[home_of(bench.model)[1]]


def _count(record: LoweringRecord) -> str:
    done = sum(step.done for step in record.steps)
    left = _reasons(record)
    return f"{done} of {len(record.steps)} layers" + (f"; {left}" if left else "")


def _reasons(record: LoweringRecord) -> str:
    """Return why layers were left, each reason once with the first layer it holds for."""
    reasons: dict[str, str] = {}
    for step in record.steps:
        if not step.done:
            reasons.setdefault(step.detail, step.path or "(root)")
    return "; ".join(f"{path}: {reason}" for reason, path in list(reasons.items())[:3])
