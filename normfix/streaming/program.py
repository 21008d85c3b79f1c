"""A network as a program to be cut: functional, with its sites' operands marked, its sizes known for any image.

The network is captured with one extra output per site, the site's operand at the moment of the call. What the
program works on in place is made functional (`run_decompositions({})` decomposes nothing that is kept as it is),
so that no operation can write into what it reads. Asserts on sizes drop out: nothing that counts depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from normfix.calling import refusals
from normfix.errors import NormfixError
from normfix.graph.capture import WRAPPED, NotCaptured, capture
from normfix.graph.isolation import silence

__all__ = ["Cut", "Program", "Shapes", "captured_program", "is_tensor_node"]

Run = Callable[[nn.Module, Tensor], Any]
Shapes = dict[Node, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a stage may end: the readers of a statistic come a stage later than its operand."""

    site: str
    operand: Node
    readers: frozenset[Node]


@dataclass(frozen=True, slots=True)
class Program:
    """A functional graph of a network.

    `body` holds the graph and, under `network.*`, the network's state; stages share it. `image` is the
    placeholder, `outputs` the tensors the network returns, in the order of their leaves.
    """

    body: GraphModule
    image: Node
    outputs: tuple[Node, ...]
    cuts: tuple[Cut, ...]

    def shapes(self, size: Sequence[int]) -> Shapes:
        """Return the shape of every tensor for an image of this shape (N, C, *space), without computing any.

        Raises:
            NormfixError: NF321 if the program does not take the size.
        """
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, silence():
            image = torch.empty(tuple(size), dtype=self.image.meta["val"].dtype)
            recorder = _Recorder(self.body)
            try:
                recorder.run(mode.from_tensor(image))
            except refusals() as error:
                raise NormfixError(
                    "NF321",
                    f"the captured program does not take an image of {'x'.join(map(str, size))}: "
                    f"{' '.join(str(error).split())[:160]}.",
                    where=type(self.body).__name__,
                ) from error
        return recorder.found

    def refresh_(self, model: nn.Module) -> None:
        """Take the network's state over from the model, after its statistics were set."""
        theirs: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        theirs.update(model.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, mine in (*self.body.named_parameters(), *self.body.named_buffers()):
                given = theirs.get(name.removeprefix(f"{WRAPPED}."))
                if given is not None and given.shape == mine.shape:
                    mine.copy_(given)


def captured_program(model: nn.Module, run: Run, example: Tensor, sites: Sequence[str]) -> Program:
    """Capture a network whose sites are modules, called once each with the operand first.

    Args:
        model: in eval mode, not modified.
        run: calls the model on one image and returns tensors in any nesting.
        example: (N, C, *space).
        sites: paths of the sites' modules.

    Raises:
        NormfixError: NF320 if there is no program, or one that streams cannot follow.
    """
    where = type(model).__name__
    captured = capture(model, partial(_with_operands, run, sites), example)
    if isinstance(captured, NotCaptured):
        raise NormfixError("NF320", f"it cannot be captured as a graph: {captured.reason}.", where=where)
    if not set(range(2, example.dim())) <= set(captured.free):
        raise NormfixError(
            "NF320",
            "its graph holds for one image size only, so no block can be run through it.",
            where=where,
        )
    with silence():
        body = captured.program.run_decompositions({}).module()
    assert isinstance(body, GraphModule)
    return _program(body, sites, where)


@torch.library.custom_op("normfix::operand", mutates_args=())
def _operand(x: Tensor) -> Tensor:
    """Mark a tensor at the moment it enters a site."""
    return x.clone()


@_operand.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _with_operands(
    run: Run, sites: Sequence[str], model: nn.Module, image: Tensor
) -> tuple[Any, tuple[Tensor, ...]]:
    """Run the model and return the operands of its sites as well, in the order of `sites`."""
    found: dict[str, Tensor] = {}

    def mark(site: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if site in found:
            raise NormfixError("NF301", "it is called more than once per image.", where=site)
        given = args[0] if args else kwargs["input"]
        found[site] = marked = _operand(given)
        return ((marked, *args[1:]), kwargs) if args else (args, {**kwargs, "input": marked})

    handles = [
        model.get_submodule(site).register_forward_pre_hook(
            partial(mark, site), prepend=True, with_kwargs=True
        )
        for site in sites
    ]
    try:
        result = run(model, image)
    finally:
        for handle in handles:
            handle.remove()
    missing = [site for site in sites if site not in found]
    if missing:
        raise NormfixError("NF301", "the network does not reach it on this input.", where=missing[0])
    return result, tuple(found[site] for site in sites)


def _program(body: GraphModule, sites: Sequence[str], where: str) -> Program:
    graph = body.graph
    images = [n for n in graph.nodes if n.op == "placeholder"]
    if len(images) != 1:
        raise NormfixError("NF320", "its graph takes several inputs.", where=where)
    leaves = [n for n in tree_leaves(graph.output_node().args[0]) if isinstance(n, Node)]
    outputs, marks = leaves[: len(leaves) - len(sites)], leaves[len(leaves) - len(sites) :]
    operands = [_operand_of(mark, where) for mark in marks]
    for mark in (n for n in graph.nodes if n.target is torch.ops.normfix.operand.default):
        mark.replace_all_uses_with(mark.args[0])
    outputs = [_operand_of(n, where) if n.target is torch.ops.normfix.operand.default else n for n in outputs]
    cuts = tuple(
        Cut(site, operand, _readers(body, site)) for site, operand in zip(sites, operands, strict=True)
    )
    program = Program(body, images[0], tuple(outputs), cuts)
    _require_functional(program)
    return program if cuts else Program(body, images[0], tuple(outputs), _cuts_of_layers(body))


def _operand_of(mark: Node, where: str) -> Node:
    while mark.target in (torch.ops.aten.alias.default, torch.ops.aten.clone.default):
        mark = mark.args[0]  # type: ignore[assignment]
    if mark.target is not torch.ops.normfix.operand.default or not isinstance(mark.args[0], Node):
        raise NormfixError("NF320", f"its graph lost the operand {mark.name} of a site.", where=where)
    return mark.args[0]


def _readers(body: GraphModule, site: str) -> frozenset[Node]:
    """Return the nodes that read the state of a site's module."""
    prefix = f"{WRAPPED}.{site}."
    mine = [n for n in body.graph.nodes if n.op == "get_attr" and f"{n.target}.".startswith(prefix)]
    return frozenset(user for node in mine for user in node.users)


_NORMS = frozenset({"batch_norm", "_native_batch_norm_legit_no_training"})
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})


def _cuts_of_layers(body: GraphModule) -> tuple[Cut, ...]:
    """Return cuts for a network without sites: before its norms, or after its convolutions."""
    calls = [n for n in body.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    norms = [n for n in calls if n.target._schema.name.partition("::")[2] in _NORMS]
    if norms:
        return tuple(Cut(n.name, n.args[0], frozenset({n})) for n in norms if isinstance(n.args[0], Node))
    convolutions = [n for n in calls if n.target._schema.name.partition("::")[2] in _CONVOLUTIONS]
    return tuple(Cut(n.name, n, frozenset(n.users)) for n in convolutions)


def _require_functional(program: Program) -> None:
    """Refuse what works in place on what it reads, which would write into the store.

    Raises:
        NormfixError: NF322.
    """
    needed = ancestors((*program.outputs, *(c.operand for c in program.cuts)))
    for node in needed:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise NormfixError("NF322", "it writes into its operand.", where=str(node.target))


def ancestors(nodes: Sequence[Node]) -> set[Node]:
    """Return the nodes and everything they are computed from."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def is_tensor_node(node: Node) -> bool:
    """Tell whether a node stands for one tensor (not for a size or several tensors)."""
    return isinstance(node.meta.get("val"), Tensor)


class _Recorder(Interpreter):
    """Runs a graph and keeps the shapes of its tensors."""

    def __init__(self, body: GraphModule) -> None:
        super().__init__(body, garbage_collect_values=True)
        self.found: Shapes = {}

    def run_node(self, n: Node) -> Any:
        if n.op == "call_module":  # asserts on sizes
            return None
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = tuple(int(e) for e in result.shape)
        return result
