"""The certificate of a saved network: a graph beside its weights, and what is derived of both.

A folder that holds no program gets `graph.pt2`: what torch.export.save writes, with one zero in place of each tensor
that model.safetensors holds, so it is small and says nothing of the weights. Writing and verifying derive the
certificate by the same function, of what is read back through the gate that every program goes through.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_unflatten

from normfix.errors import NormfixError, reason_of
from normfix.images.drafts import UnwritableError
from normfix.networks.calling import Caller, failures
from normfix.networks.devices import bytes_of
from normfix.networks.graph.isolation import silence
from normfix.records.certificates import Certificate, CertifiedSite, Constant, Derivation
from normfix.records.derivations import masked
from normfix.records.plans import Plan
from normfix.records.saved import Provenance
from normfix.records.sites import Scan
from normfix.scanning.graph.guards import guards_of
from normfix.storage.folder import PROGRAM
from normfix.storage.opening import read_program
from normfix.tiling.reach.bounds import bound_of
from normfix.tiling.reach.calls import tensor_of
from normfix.tiling.reach.extents import Unsized

__all__ = ["ForeignProgramError", "certificate_of", "read_graph", "write_graph"]


class ForeignProgramError(NormfixError):
    """A program whose tensors are not those of the weights beside it (NF522)."""


def write_graph(path: Path, program: ExportedProgram) -> None:
    """Write a program without its weights; the program is emptied.

    Args:
        path: of the file.
        program: exported from the network whose state is stored beside it.

    Raises:
        UnwritableError: NF114.
    """
    for name, tensor in list(program.state_dict.items()):
        program.state_dict[name] = _like(tensor, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
    program.example_inputs = None  # torch would write them as a pickle
    whole = io.BytesIO()
    with silence():
        torch.export.save(program, whole)
    try:
        path.write_bytes(whole.getbuffer())
    except OSError as error:
        raise UnwritableError("NF114", f"cannot write there: {error}.", where=path.name) from error


def read_graph(path: Path, weights: Mapping[str, Tensor]) -> ExportedProgram:
    """Read the program of a folder and fill it with the weights beside it, or compare it with them if it has its own.

    Args:
        path: of GRAPH or PROGRAM.
        weights: by all their names.

    Raises:
        ForeignProgramError: NF522 if names, types, shapes or, where it has its own, values differ.
        NormfixError: codes of `read_program`.
    """
    program = read_program(path, most=sum(tensor.nbytes for tensor in weights.values()))
    state = program.state_dict
    if different := sorted(state.keys() ^ weights.keys()):
        raise _foreign(path, f"{different[0]} is in one of them only")
    for name, own in list(state.items()):
        tensor = weights[name]
        if (own.dtype, own.shape) != (tensor.dtype, tensor.shape):
            raise _foreign(path, f"{name} has another type or shape")
        if path.name == PROGRAM and not torch.equal(own, tensor):
            raise _foreign(path, f"{name} has other values")
        state[name] = _like(own, tensor)
    return program


def certificate_of(program: ExportedProgram, name: str, sha256: str, provenance: Provenance) -> Certificate:
    """Derive a certificate from a program that holds its weights.

    Args:
        program: of one image.
        name: of its file.
        sha256: of its file.
        provenance: scan and plan.
    """
    scan = provenance.scan
    constants = tuple(_constants(program))
    read = _read_names(program)
    guards = () if scan.sizes is None else guards_of(program, scan.sizes, scan.smallest_tile)
    return Certificate(
        program=name,
        sha256=sha256,
        constants=constants,
        sites=tuple(_sites(provenance.plan, read)),
        derivations=_derivations(program, provenance),
        guards=guards,
        assumed=_assumed(scan, repeats=any(guard.role == "repeats" for guard in guards)),
    )


def _constants(program: ExportedProgram) -> list[Constant]:
    tensors = {**program.state_dict, **program.constants}
    return [
        Constant(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            sha256=hashlib.sha256(bytes_of(tensor)).hexdigest(),
        )
        for name, tensor in sorted(tensors.items())
        if isinstance(tensor, Tensor)
    ]


def _read_names(program: ExportedProgram) -> frozenset[str]:
    """Return the names of the tensors that the graph reads."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    specs = program.graph_signature.input_specs
    return frozenset(str(spec.target) for spec in specs if spec.target and spec.arg.name in used)


def _sites(plan: Plan, read: frozenset[str]) -> list[CertifiedSite]:
    return [
        CertifiedSite(
            site=decision.site.id,
            action=str(decision.action),
            constants=tuple(sorted(n for n in read if decision.converts and _below(n, decision.target))),
        )
        for decision in plan.decisions
    ]


def _below(name: str, target: str) -> bool:
    return name.startswith(f"{target}.")


def _derivations(program: ExportedProgram, provenance: Provenance) -> tuple[Derivation, ...]:
    returned = [n for n in tree_leaves(program.graph.output_node().args[0]) if isinstance(n, Node)]
    tensors = [node for node in returned if tensor_of(node) is not None]
    counts = _counting(program, provenance)
    stride = provenance.scan.stride
    return tuple(
        _derived(program, number, stride, counts=node is counts) for number, node in enumerate(tensors)
    )


def _counting(program: ExportedProgram, provenance: Provenance) -> Node | None:
    """Return the node of the output that tiles are made of; None where what is named is none."""
    flat = tree_leaves(program.graph.output_node().args[0])
    specification = program.call_spec.out_spec
    marks = [torch.full((), float(number)) for number in range(len(flat))]
    try:
        picked = Caller.of(provenance).pick(tree_unflatten(marks, specification))
    except NormfixError:
        return None
    found = flat[int(picked)]
    return found if isinstance(found, Node) else None


def _derived(
    program: ExportedProgram, output: int, stride: tuple[int, ...] | None, *, counts: bool
) -> Derivation:
    """Derive one output; what cannot be derived says why."""
    try:
        bound = bound_of(program, output)
        steps = bound.lattice if stride is None else stride
        return Derivation(output=output, counts=counts, stride=steps, **bound.stated(steps))
    except Unsized as reason:
        return Derivation(output=output, counts=counts, note=str(reason))
    except failures() as error:
        reason_ = f"deriving failed: {reason_of(error)}"
        return Derivation(output=output, counts=counts, note=reason_)


def _assumed(scan: Scan, *, repeats: bool) -> tuple[str, ...]:
    """Return what was assumed, or only measured, that no program tells."""
    assumed = ["the network runs in eval mode"]
    if scan.reach is not None and scan.reach.used == "measured":
        assumed.append(f"the halo is {scan.reach.words}")
    elif scan.reach is not None and scan.reach.shifts:
        assumed.append(masked(scan.reach.shifts))
    assumed += [
        f"the {look.name} look {look.status}: {look.note}" for look in scan.looks if look.status != "done"
    ]
    if repeats:
        sizes = f"that exact sizes are multiples of {scan.exact_sizes} was run"
        assumed.append(f"{sizes}: the program holds for the multiples in its guards alone")
    if scan.sizes is not None and scan.sizes.unknown:
        assumed += [f"sizes: {reason}" for reason in scan.sizes.unknown]
    return tuple(assumed)


def _like(own: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor as a parameter where the other is one."""
    return nn.Parameter(tensor, own.requires_grad) if isinstance(own, nn.Parameter) else tensor


def _foreign(path: Path, why: str) -> ForeignProgramError:
    return ForeignProgramError(
        "NF522",
        f"it was not exported from the network whose weights lie beside it: {why}. Convert the network again.",
        where=path.name,
    )
