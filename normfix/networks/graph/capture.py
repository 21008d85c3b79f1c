"""Capture a network as a graph, before any decomposition, and believe it only once it was replayed.

torch.export runs on a deep copy, with cloned inputs, in eval mode and with a batch of 2, since a batch of 1
would be taken for a constant. Batch and space are left free where the network allows it; where it does not,
fewer of them are, and at last none. The program is then run beside the network itself on the example and,
where sizes are free, on another size and another batch. Whatever torch.export raises is a reason, not an error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from normfix.errors import reason_of
from normfix.networks.calling import failures, resized
from normfix.networks.graph.detaching import TracedData
from normfix.networks.graph.isolation import silence
from normfix.networks.graph.replaying import once_replayed, replay, replays
from normfix.networks.graph.sizes import LongFormulaError, ShortSizes
from normfix.networks.graph.texts import noted_texts, texts_of
from normfix.networks.numerics import exact_arithmetic
from normfix.networks.releases import values_of
from normfix.networks.surroundings import own_defaults

__all__ = [
    "WRAPPED",
    "AsFunction",
    "Captured",
    "NotCaptured",
    "asked_as_text",
    "capture",
    "decomposed",
    "export",
    "exported",
    "extents",
    "free_dimensions",
    "image_of",
    "traced",
]

Run = Callable[[nn.Module, Tensor], Any]
_LIBRARIES = ("mkldnn", "cudnn", "miopen", "nnpack")

WRAPPED = "network"
"""The attribute under which the captured program knows the network: its module paths begin with it."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph that equals the network.

    `free` are the input's dimensions that the program leaves free and that were confirmed on another extent.
    `other` is the same graph at another
    size, for networks whose sizes could not be left free; `shapes` reads both. `replayed` are the input
    shapes on which program and network were compared. `formula` is of a size, and too long for space to be free.
    """

    program: ExportedProgram
    free: tuple[int, ...]
    other: ExportedProgram | None
    replayed: tuple[tuple[int, ...], ...]
    formula: Any = None

    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]] | None]:
        """Return each tensor node's shape at two image sizes; None where only one size is known."""
        return extents(self)


@dataclass(frozen=True, slots=True)
class NotCaptured:
    """There is no graph to believe, and one line says why."""

    reason: str


class AsFunction(nn.Module):
    """The network as a function of one image that returns what counts, however it wants to be called."""

    def __init__(self, network: nn.Module, run: Run) -> None:
        super().__init__()
        self.add_module(WRAPPED, network)
        self._run = run

    def forward(self, image: Tensor) -> Any:
        """Return what counts."""
        return self._run(self.get_submodule(WRAPPED), image)


def capture(
    model: nn.Module,
    run: Run,
    example: Tensor,
    *,
    one_size: bool = False,
    once: bool = False,
    known: Sequence[tuple[Tensor, Tensor]] = (),
) -> Captured | NotCaptured:
    """Capture a network as an exported program before decomposition.

    Args:
        model: a copy of it in eval mode is captured, and compared with it; its modes are not changed.
        run: calls the model on one input and returns a tensor (normfix.networks.calling.Caller does).
        example: (N, C, *space) that the network runs on.
        one_size: the network is known to take no other size, so none is left free: proving that costs minutes.
        once: compare on one image alone, which says nothing of batches: of another size than the example's where
            the program takes it.
        known: images that the network ran on before, each with what it gave.

    Returns:
        A program that was compared with the network, or the reason why there is none.
    """
    try:
        evaluated = not any(module.training for module in model.modules())
        network = AsFunction(model if evaluated else copy.deepcopy(model), run).eval()
        with exact_arithmetic():
            return _captured(network, example[:1].detach(), one_size=one_size, once=once, known=known)
    except failures() as error:  # torch.export runs the network's code and may raise anything
        return NotCaptured(reason_of(error))


def exported(
    model: nn.Module, run: Run, example: Tensor, *, one_size: bool = False
) -> ExportedProgram | NotCaptured:
    """Capture a network without comparing what it gives: for what the program says of sizes.

    Arguments as for `capture`.
    """
    try:
        with exact_arithmetic():
            return export(AsFunction(model, run).eval(), example[:1].detach(), one_size=one_size)
    except failures() as error:
        return NotCaptured(reason_of(error))


def export(module: nn.Module, example: Tensor, *, one_size: bool = False) -> ExportedProgram:
    """Export a module of one image, leaving free as much as it allows.

    Args:
        module: in eval mode; a deep copy is exported.
        example: (1, C, *space).
        one_size: leave no spatial extent free.

    Raises:
        Exception: whatever torch.export raised at the last trial, which frees nothing.
    """
    return _freest(module, example, one_size)[0]


def _freest(
    module: nn.Module, example: Tensor, one_size: bool
) -> tuple[ExportedProgram, LongFormulaError | None]:
    """Return a program that leaves as much free as the module allows, and what kept space from being free, if known."""
    pair, fault = _pair(example), None
    space = range(2, example.dim())
    with_space: list[tuple[Tensor, Sequence[int]]] = [(pair, (0, *space)), (example, space)]
    for given, free in [*([] if one_size else with_space), (pair, (0,))]:
        if fault is not None and len(free) > 1:
            continue
        try:
            program = traced(module, given, free)
        except LongFormulaError as error:
            fault = error
            continue
        except failures():  # the next trial asks for less
            continue
        # a graph of exactly two images, as of a prompt made for each, is that of no single one
        if given is example or 0 in free_dimensions(program):
            return program, fault
    return traced(module, example, ()), fault  # the last trial asks for nothing


def free_dimensions(program: ExportedProgram) -> tuple[int, ...]:
    """Return the dimensions of the program's image whose extent is free."""
    shape = image_of(program).meta["val"].shape
    return tuple(i for i, n in enumerate(shape) if _symbols(n))


def image_of(program: ExportedProgram) -> Node:
    """Return the placeholder of the first input that is a tensor."""
    named = set(program.graph_signature.user_inputs)
    nodes: list[Node] = list(program.graph.nodes)
    for node in nodes:
        if node.op == "placeholder" and node.name in named and isinstance(node.meta.get("val"), Tensor):
            return node
    raise ValueError("the program takes no tensor")


def asked_as_text(program: ExportedProgram) -> tuple[str, ...]:
    """Return the lines that asked for free sizes as text or as a key while a program was captured."""
    free = (n for n in image_of(program).meta["val"].shape if _symbols(n))
    return next((texts_of(n.node.shape_env) for n in free), ())


def extent_of(extent: Any) -> int | None:
    """Return an extent that is a number, also where it was specialised to one; None where it is free."""
    if isinstance(extent, int):
        return extent
    return None if _symbols(extent) else int(extent.node.expr)


def extents(captured: Captured) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]] | None]:
    """Return each tensor node's shape at two image sizes; see Captured.shapes."""
    here = dict(_tensor_nodes(captured.program))
    if captured.other is not None:
        there = dict(_tensor_nodes(captured.other))
        return {name: (_sizes(v), _sizes(there[name])) for name, v in here.items()}
    roots = _roots(captured.program)
    if not roots:
        return dict.fromkeys(here)
    return {name: (_sizes(v), _sizes(v, roots)) for name, v in here.items()}


def _captured(
    network: AsFunction,
    example: Tensor,
    *,
    one_size: bool,
    once: bool,
    known: Sequence[tuple[Tensor, Tensor]],
) -> Captured | NotCaptured:
    program, fault = _freest(network, example, one_size)
    free = free_dimensions(program)
    replayed = []
    images = [image for image, _ in known]
    if once:
        tried: Iterable[list[Tensor]] = [once_replayed(example, free, images)]
    else:
        largest = max((math.prod(_sizes(value)) for _, value in _tensor_nodes(program)), default=0)
        tried = replays(example, free, images, largest)
    for trials in tried:
        for image in trials:
            agree = replay(program, network, image, known)
            if agree is False:
                shape = "x".join(map(str, image.shape))
                return NotCaptured(
                    f"the captured program differs from the network on an input of shape {shape}"
                )
            if agree:
                replayed.append(tuple(image.shape))
                break
    if not replayed:
        return NotCaptured("the captured program could be compared with the network on no input")
    confirmed = tuple(d for d in free if any(shape[d] != example.shape[d] for shape in replayed))
    other = None if one_size or once or _roots(program) else _other(network, example, program)
    formula = None if fault is None else fault.formula
    return Captured(program, confirmed, other, tuple(replayed), formula)


def _other(network: nn.Module, example: Tensor, program: ExportedProgram) -> ExportedProgram | None:
    """Export at a second size; None if the network takes none of those tried with the same graph."""
    names = [(node.name, str(node.target)) for node in program.graph.nodes]
    for step in (32, 64):
        try:
            found = traced(network, resized(example, [n + step for n in example.shape[2:]]), ())
        except failures():  # this size is not accepted
            continue
        if [(node.name, str(node.target)) for node in found.graph.nodes] == names:
            return found
    return None


def traced(module: nn.Module, example: Tensor, free: Sequence[int]) -> ExportedProgram:
    """Export a copy of a module, leaving these dimensions of its image free, if what it computes allows it.

    Raises:
        LongFormulaError: sizes that follow are formulas that nobody can reason about.
        Exception: whatever else torch.export raised.
    """
    program = _traced(module, example, free, backends_off=False)
    return _traced(module, example, free, backends_off=True) if _is_tied(program) else program


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """Trace a program again, of functional operators alone, and of nothing that is needed to train it.

    Where a network switches gradients on (torch.enable_grad), its parameters would have torch trace the way back too.
    """
    held = program.state_dict
    trained = {name: value for name, value in held.items() if value.requires_grad}
    # names of the same values: the parameters may be the caller's, who trains them meanwhile
    held.update({name: nn.Parameter(value.detach(), False) for name, value in trained.items()})
    try:
        functional: ExportedProgram = program.run_decompositions({})
    finally:
        held.update(trained)
    functional.state_dict.update(
        {name: trained[name] for name in trained.keys() & functional.state_dict.keys()}
    )
    return functional


def _traced(
    module: nn.Module, example: Tensor, free: Sequence[int], *, backends_off: bool
) -> ExportedProgram:
    sizes = ShortSizes()
    try:
        with (
            own_defaults(),
            silence(backends_off=backends_off),
            noted_texts(),
            torch.no_grad(),
            sizes,
            TracedData(),
        ):
            return torch.export.export(
                copy.deepcopy(module),
                (example.clone(),),
                dynamic_shapes=(dict.fromkeys(free, Dim.AUTO) or None,),
                strict=False,
            )
    except failures() as error:
        if sizes.fault is None:
            raise
        raise sizes.fault from error


def _is_tied(program: ExportedProgram) -> bool:
    """Tell whether an operator of one library of kernels is in the graph, as of recurrent layers in oneDNN."""
    return any(name in str(node.target) for node in program.graph.nodes for name in _LIBRARIES)


def _pair(example: Tensor) -> Tensor:
    """Return a batch of two different images made from one."""
    return torch.cat([example[:1], example[:1].flip(-1)])


def _tensor_nodes(program: ExportedProgram) -> Iterator[tuple[str, Any]]:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
            value = value[0]  # of what returns several tensors the first counts
        if isinstance(value, Tensor):
            yield node.name, value


def _roots(program: ExportedProgram) -> dict[Any, int]:
    """Return a value for each symbol in the image's spatial extents: twice what it was captured at."""
    free = [n for n in image_of(program).meta["val"].shape[2:] if _symbols(n)]
    hints = {symbol: values_of(n.node.shape_env)[symbol] for n in free for symbol in _symbols(n)}
    return {symbol: 2 * int(hint) for symbol, hint in hints.items()}


def _symbols(extent: Any) -> frozenset[Any]:
    """Return the symbols in an extent: none in a number, nor in one that was specialised to a number."""
    return frozenset() if isinstance(extent, int) else frozenset(extent.node.expr.free_symbols)


def _sizes(value: Any, replaced: dict[Any, int] | None = None) -> tuple[int, ...]:
    sizes = []
    for n in value.shape:
        if isinstance(n, int):
            sizes.append(n)
            continue
        known = {**values_of(n.node.shape_env), **(replaced or {})}
        resolved = n.node.expr.subs(known)
        sizes.append(int(resolved) if resolved.is_number else 1)  # depends on the values of data
    return tuple(sizes)
