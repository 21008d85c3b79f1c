"""A network as a program to be cut: functional, with its sites' operands marked, its sizes known for any image.

The network is captured with two extra outputs per site: the site's operand at the moment of the call, and its
answer. What reads a site's statistic is found by the tensor, whatever name the graph knows it by: a network may
register a module twice, and the graph takes one of its names. The answer keeps such a reader in every graph, so a site
without one is a fault that would leave statistics measured under old constants. What the program works on in place
is made functional, by other names where that is enough and else by tracing it again (`run_decompositions({})`
decomposes nothing that is kept as it is), so that no operation can write into what it reads. Asserts on sizes drop
out: nothing that counts depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from normfix.errors import NormfixError
from normfix.layers.affine import as_in_graphs
from normfix.networks.calling import Unreached, failures, once_each, refusals
from normfix.networks.graph.capture import WRAPPED, NotCaptured, asked_as_text, capture, decomposed
from normfix.networks.graph.isolation import silence
from normfix.networks.graph.multiples import capture_multiples, on_multiples, unfolded
from normfix.networks.graph.operators import name_of
from normfix.networks.graph.sizes import shortening
from normfix.networks.graph.soundness import SoundInterpreter
from normfix.networks.numerics import IDENTITY, deviation
from normfix.tiling.stages.bins import Merging
from normfix.tiling.stages.functional import make_functional_
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.stretches import Resizing

__all__ = [
    "Cut",
    "Pool",
    "Program",
    "Run",
    "Shapes",
    "Stretch",
    "Unguarded",
    "agree",
    "captured_program",
    "compared",
    "computes",
    "extent_of",
    "is_tensor_node",
    "marked",
    "shows_at_once",
]

Run = Callable[[nn.Module, Tensor], Any]
Shapes = dict[Node, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a stage may end: the readers of a statistic come a stage later than its operand."""

    site: str
    operand: Node
    readers: frozenset[Node]


@dataclass(frozen=True, slots=True)
class Pool:
    """What blocks of a map are put together to: a pool to a fixed number of bins, a sum of products."""

    operand: Node
    bins: Merging


@dataclass(frozen=True, slots=True)
class Stretch:
    """A map that is resized by its place in the whole image, from a map or a value of a fixed size."""

    source: Node
    resizing: Resizing


@dataclass(frozen=True, slots=True)
class Program:
    """A functional graph of a network.

    `body` holds the graph and, under `network.*`, the network's state; stages share it. `image` is the
    placeholder, `outputs` the tensors the network returns, in the order of their leaves. `whole` are values that are
    read of the whole image, wherever the block is; `flat` tells which dimensions (first, last) of a site's operand are
    one dimension of tokens to the network. `pools` and `stretches` are values that no block has by itself; `biases` are
    of pairs of positions, `numbers` those of the positions of a map. It takes images whose extents are multiples of
    `multiple` pixels. `dtypes` are those of floats that the network computes of the image. `is_told` tells whether the
    conditions of the capture are all: whether the network never wrote a size as text, which no graph follows.
    """

    body: GraphModule
    image: Node
    outputs: tuple[Node, ...]
    cuts: tuple[Cut, ...]
    whole: frozenset[Node] = frozenset()
    flat: dict[str, tuple[int, int]] = field(default_factory=dict)
    pools: dict[Node, Pool] = field(default_factory=dict)
    biases: frozenset[Node] = frozenset()
    numbers: frozenset[Node] = frozenset()
    stretches: dict[Node, Stretch] = field(default_factory=dict)
    multiple: int = 1
    dtypes: frozenset[torch.dtype] = frozenset()
    is_told: bool = True
    known: dict[tuple[int, ...], Shapes] = field(default_factory=dict, compare=False, repr=False)
    """Shapes by the size of the image: finding them takes as long as a pass."""
    taken: dict[tuple[int, ...], bool] = field(default_factory=dict, compare=False, repr=False)
    """Whether the conditions of the capture hold, by the size of the image."""

    @property
    def device(self) -> torch.device:
        """Return where it computes."""
        found: torch.device = self.image.meta["val"].device
        return found

    def shapes(self, size: Sequence[int]) -> Shapes:
        """Return the shape of every tensor for an image of this shape (N, C, *space), without computing any.

        Raises:
            NormfixError: NF321 if the program does not take the size.
        """
        size = tuple(size)
        if size not in self.known:
            self.known[size] = self._shapes(size)
        return self.known[size]

    def recompiled(self, **changes: Any) -> Program:
        """Return the program with these fields, after its graph was changed in place: shapes are found anew."""
        self.body.graph.lint()
        self.body.recompile()
        leaves = [n for n in tree_leaves(self.body.graph.output_node().args[0]) if isinstance(n, Node)]
        return replace(self, known={}, outputs=tuple(leaves[: len(self.outputs)]), **changes)

    def takes(self, size: Sequence[int]) -> bool:
        """Tell whether an image of this shape is within the conditions that the network was captured under."""
        size = tuple(size)
        if size not in self.taken:
            self.taken[size] = self._takes(size)
        return self.taken[size]

    def _takes(self, size: tuple[int, ...]) -> bool:
        # where torch keeps conditions in a module of their own nothing else need run
        nodes = [n for n in self.body.graph.nodes if n.op == "call_module"]
        alone = bool(nodes) and all(n.all_input_nodes == [self.image] for n in nodes)
        conditions = [self.body.get_submodule(str(n.target)) for n in nodes] if alone else [self.body]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, silence(), torch.no_grad():
            image = mode.from_tensor(
                torch.empty(size, dtype=self.image.meta["val"].dtype, device=self.device)
            )
            try:
                for condition in conditions:
                    condition(image)
            except failures():
                return False
        return True

    def _shapes(self, size: tuple[int, ...]) -> Shapes:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, silence():
            image = torch.empty(size, dtype=self.image.meta["val"].dtype, device=self.device)
            recorder = _Recorder(self.body)
            try:
                recorder.run(mode.from_tensor(image))
            except refusals() as error:
                raise NotInStages(
                    "NF321",
                    f"the captured program does not take an image of {'x'.join(map(str, size))}: "
                    f"{' '.join(str(error).split())[:160]}.",
                    where=type(self.body).__name__,
                ) from error
        return recorder.found

    def refresh_(self, model: nn.Module) -> None:
        """Take the network's state over from the model, after its statistics were set."""
        self.following_(model)()

    def following_(self, model: nn.Module) -> Callable[[], None]:
        """Return what takes the state over from the model, however often: its tensors are written in place meanwhile.

        Tensors of one device are copied in few launches.
        """
        theirs = dict(_state(model))
        kinds: dict[object, list[tuple[Tensor, Tensor]]] = {}
        for name, mine in (*self.body.named_parameters(), *self.body.named_buffers()):
            given = theirs.get(name.removeprefix(f"{WRAPPED}."))
            if given is not None and given.shape == mine.shape:
                # a list of several dtypes, counters among weights, is copied one by one
                kinds.setdefault((mine.dtype, given.dtype, mine.device, given.device), []).append(
                    once_each(mine, given)
                )

        def take() -> None:
            with torch.no_grad():
                for pairs in kinds.values():
                    torch._foreach_copy_([mine for mine, _ in pairs], [given for _, given in pairs])

        return take


def captured_program(model: nn.Module, run: Run, example: Tensor, sites: Sequence[str]) -> Program:
    """Capture a network whose sites are modules, called once each with the operand first.

    Args:
        model: in eval mode, not modified.
        run: calls the model on one image and returns tensors in any nesting.
        example: (N, C, *space).
        sites: paths of the sites' modules.

    Raises:
        NormfixError: NF320 if there is no program, or one that streams cannot follow; NF340 if the program
            does not read a site's statistic.
    """
    where = type(model).__name__
    captured = capture(model, marked(run, sites), example)
    if isinstance(captured, NotCaptured):
        raise NotInStages("NF320", f"it cannot be captured as a graph: {captured.reason}.", where=where)
    exported, multiple = captured.program, 1
    if not set(range(2, example.dim())) <= set(captured.free):
        asked = None if captured.formula is None else shortening(captured.formula)
        found = capture_multiples(model, marked(run, sites), example, asked) if asked and asked > 1 else None
        if found is None:
            raise NotInStages(
                "NF320",
                "its graph holds for one image size only, so no block can be run through it.",
                where=where,
            )
        exported, multiple = found.program, found.multiple
        example = on_multiples(example, multiple)
    with silence():
        body = _body(exported, multiple)
        if not make_functional_(body.graph) or not computes(body, model, marked(run, sites), example):
            body = _body(decomposed(exported), multiple)
    told = not asked_as_text(exported)
    return replace(_program(body, sites, _Names(model), where), multiple=multiple, is_told=told)


def _body(exported: ExportedProgram, multiple: int) -> GraphModule:
    body: Any = exported.module()
    assert isinstance(body, GraphModule)
    return body if multiple == 1 else unfolded(body, multiple)


def computes(
    body: GraphModule,
    model: nn.Module,
    run: Run,
    example: Tensor,
    *,
    guarded: bool = True,
    dtypes: Collection[torch.dtype] = (),
) -> bool:
    """Tell whether a captured body gives all that a run of the model gives for an example.

    Args:
        body: of a program.
        model: that was captured.
        run: calls it.
        example: (N, C, *space).
        guarded: hold the body to the sizes that it was captured for, too.
        dtypes: that the model rounds values to on the way.
    """
    pairs = compared(body, model, run, example, guarded)
    return pairs is not None and agree(pairs, dtypes)


def shows_at_once(body: GraphModule, model: nn.Module, run: Run, example: Tensor) -> bool:
    """Tell as `computes` does, waiting once for a device; False is no answer.

    It is none on the CPU, for an image of one value, which shows little, and where a value is not finite.
    """
    if example.device.type != "cuda":
        return False
    near = [(example != example.flatten()[0]).any()]
    for a, e in compared(body, model, run, example) or ():
        exact = e.double()
        bound = exact.std(correction=0) * IDENTITY.get(e.dtype, 0.0)
        near.append((a.double() - exact).abs().max() <= bound)
    return len(near) > 1 and len({n.device for n in near}) == 1 and bool(torch.stack(near).all())


def compared(
    body: GraphModule, model: nn.Module, run: Run, example: Tensor, guarded: bool = True
) -> list[tuple[Tensor, Tensor]] | None:
    """Return what a body and a model give, tensor by tensor; None where one does not run or they cannot be the same."""
    try:
        with torch.no_grad(), as_in_graphs():
            expected = tree_leaves(run(model, example))
        with torch.no_grad():
            actual = tree_leaves(body(example) if guarded else Unguarded(body).run(example))
    except failures():  # it is another network, or one of other sizes: capturing it says what is wrong
        return None
    if len(actual) != len(expected) or any(a.shape != e.shape for a, e in zip(actual, expected, strict=True)):
        return None
    return list(zip(actual, expected, strict=True))


def agree(pairs: list[tuple[Tensor, Tensor]], dtypes: Collection[torch.dtype] = ()) -> bool:
    """Tell whether what a body and a model gave is the same, as closely as the narrowest dtype on the way can tell."""
    return all(_are_same(a, e, dtypes) for a, e in pairs)


def _are_same(a: Tensor, e: Tensor, dtypes: Collection[torch.dtype]) -> bool:
    sd = float(e.double().std(correction=0)) or 1.0
    rounded = (e.dtype, *dtypes) if e.is_floating_point() else (e.dtype,)
    return deviation(a, e, sd)[0] <= max(IDENTITY.get(dtype, 0.0) for dtype in rounded)


def _dtypes_of(body: GraphModule) -> frozenset[torch.dtype]:
    """Return the floating dtypes of what is computed of the image."""
    moving: set[Node] = set()
    for node in body.graph.nodes:
        if node.op == "placeholder" or moving.intersection(node.all_input_nodes):
            moving.add(node)
    values = [value for node in moving if isinstance(value := node.meta.get("val"), Tensor)]
    return frozenset(value.dtype for value in values if value.is_floating_point())


def marked(run: Run, sites: Sequence[str]) -> Run:
    """Return what runs a model and returns, after its result, the operands and answers of sites: a program's leaves."""
    return partial(_with_operands, run, sites)


@torch.library.custom_op("normfix::operand", mutates_args=())
def _operand(x: Tensor) -> Tensor:
    """Mark a tensor at the moment it enters a site."""
    return x.clone()


@_operand.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("normfix::answer", mutates_args=())
def _answer(x: Tensor) -> Tensor:
    """Mark what a site gives by one of its values, so that its reading stays in the graph."""
    return x.reshape(-1)[:1].clone()


@_answer.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(1)


def _with_operands(
    run: Run, sites: Sequence[str], model: nn.Module, image: Tensor
) -> tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run the model and return the operands and answers of its sites as well, in the order of `sites`."""
    found: dict[str, Tensor] = {}
    answers: dict[str, Tensor] = {}

    def mark(site: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if site in found:
            raise Unreached("NF301", "it is called more than once per image.", where=site)
        given = args[0] if args else kwargs["input"]
        found[site] = marked = _operand(given)
        return ((marked, *args[1:]), kwargs) if args else (args, {**kwargs, "input": marked})

    def answered(site: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        answers[site] = _answer(next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))

    # what the network's own hooks make of an operand is what its site is given, so they come before the mark
    handles = [
        hook
        for site in sites
        for hook in (
            model.get_submodule(site).register_forward_pre_hook(partial(mark, site), with_kwargs=True),
            model.get_submodule(site).register_forward_hook(partial(answered, site), prepend=True),
        )
    ]
    try:
        result = run(model, image)
    finally:
        for handle in handles:
            handle.remove()
    missing = [site for site in sites if site not in found]
    if missing:
        raise Unreached("NF301", "the network does not reach it on this input.", where=missing[0])
    return result, tuple(found[site] for site in sites), tuple(answers[site] for site in sites)


def _program(body: GraphModule, sites: Sequence[str], names: _Names, where: str) -> Program:
    graph = body.graph
    images = [n for n in graph.nodes if n.op == "placeholder"]
    if len(images) != 1:
        raise NotInStages("NF320", "its graph takes several inputs.", where=where)
    leaves = [n for n in tree_leaves(graph.output_node().args[0]) if isinstance(n, Node)]
    first = len(leaves) - 2 * len(sites)
    outputs, marks, answers = leaves[:first], leaves[first : first + len(sites)], leaves[first + len(sites) :]
    operands = [_operand_of(mark, where) for mark in marks]
    for mark in (n for n in graph.nodes if n.target is torch.ops.normfix.operand.default):
        mark.replace_all_uses_with(mark.args[0])
    # that a cast was seen from this dtype: proofs run in another
    for stated in [n for n in graph.nodes if n.target is torch.ops.aten._assert_tensor_metadata.default]:
        graph.erase_node(stated)
    body.recompile()
    outputs = [_operand_of(n, where) if n.target is torch.ops.normfix.operand.default else n for n in outputs]
    cuts = tuple(
        Cut(site, operand, _readers(body, site, names, answer))
        for site, operand, answer in zip(sites, operands, answers, strict=True)
    )
    program = Program(body, images[0], tuple(outputs), cuts, dtypes=_dtypes_of(body))
    _require_functional(program)
    return program if cuts else replace(program, cuts=_cuts_of_layers(body))


def _operand_of(mark: Node, where: str) -> Node:
    while mark.target in (torch.ops.aten.alias.default, torch.ops.aten.clone.default):
        mark = mark.args[0]  # type: ignore[assignment]
    if mark.target is not torch.ops.normfix.operand.default or not isinstance(mark.args[0], Node):
        raise NotInStages("NF320", f"its graph lost the operand {mark.name} of a site.", where=where)
    return mark.args[0]


def _readers(body: GraphModule, site: str, names: _Names, answer: Node) -> frozenset[Node]:
    """Return the nodes that read the state of a site's module, under whatever name.

    Raises:
        NormfixError: NF340 if what the site gives depends on none of them.
    """
    mine = names.of(site)
    held = [n for n in body.graph.nodes if n.op == "get_attr" and n.target in mine]
    readers = frozenset(user for node in held for user in node.users)
    if not readers & ancestors((answer,)):
        raise NormfixError(
            "NF340",
            "its graph does not read the statistic of this site from the network's state, so what comes after it "
            "would be measured under the old one. Calibrate without tile, store or budget, in passes over whole "
            "images, and please report it with the network.",
            where=site,
        )
    return readers


class _Names:
    """Finds every name of a module's state, by the memory of its tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._at: dict[int, list[tuple[str, int, int]]] = {}
        for name, tensor in _state(model):
            storage, start, end = _place(tensor)
            self._at.setdefault(storage, []).append((f"{WRAPPED}.{name}", start, end))

    def of(self, site: str) -> frozenset[str]:
        """Return the names, in the graph, of a site's buffers and of the parameters that it alone holds.

        Parameters that other modules hold too are not part of any statistic.
        """
        module = self._model.get_submodule(site)
        inside = set(module.modules())
        elsewhere = {
            id(parameter)
            for other in self._model.modules()
            if other not in inside
            for parameter in other.parameters(recurse=False)
        }
        own = [t for t in module.parameters() if id(t) not in elsewhere]
        return frozenset(name for tensor in (*module.buffers(), *own) for name in self._names(tensor))

    def _names(self, tensor: Tensor) -> list[str]:
        storage, start, end = _place(tensor)
        return [name for name, a, b in self._at.get(storage, ()) if a < end and start < b]


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """Return a tensor's storage and the bytes between its first and last element there."""
    storage = tensor.untyped_storage()
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return int(storage._cdata), start * size, (start + int(reach) + 1) * size


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers, those of a module that is registered twice under both names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


_NORMS = frozenset({"batch_norm", "_native_batch_norm_legit_no_training"})
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})


def extent_of(size: Node) -> tuple[Node, int]:
    """Return the value and the dimension whose extent a node stands for."""
    of, dim = size.args[0], size.args[1]
    assert isinstance(of, Node)
    assert isinstance(dim, int)
    return of, dim


def _cuts_of_layers(body: GraphModule) -> tuple[Cut, ...]:
    """Return cuts for a network without sites: before its norms, or after its convolutions."""
    norms = [n for n in body.graph.nodes if name_of(n) in _NORMS]
    if norms:
        return tuple(Cut(n.name, n.args[0], frozenset({n})) for n in norms if isinstance(n.args[0], Node))
    convolutions = [n for n in body.graph.nodes if name_of(n) in _CONVOLUTIONS]
    return tuple(Cut(n.name, n, frozenset(n.users)) for n in convolutions)


def _require_functional(program: Program) -> None:
    """Refuse what works in place on what it reads, which would write into the store.

    Raises:
        NormfixError: NF322.
    """
    needed = ancestors((*program.outputs, *(c.operand for c in program.cuts)))
    for node in needed:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise NotInStages("NF322", "it writes into its operand.", where=str(node.target))


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


class Unguarded(SoundInterpreter):
    """Runs a graph without its asserts on sizes."""

    def run_node(self, n: Node) -> Any:
        """Run a node; an assert gives nothing."""
        return None if n.op == "call_module" else super().run_node(n)


class _Recorder(Unguarded):
    """Runs a graph and keeps the shapes of its tensors."""

    def __init__(self, body: GraphModule) -> None:
        super().__init__(body, garbage_collect_values=True)
        self.found: Shapes = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = tuple(int(e) for e in result.shape)
        return result
