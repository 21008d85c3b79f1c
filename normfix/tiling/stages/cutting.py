"""Cut a program into stages: what each computes, what it reads from the store and what it leaves there.

A node's level is the number of barriers before it: one more than its operand's for what reads a site's statistic.
Stage k computes everything of level k that counts: the operands measured at its end, outputs, and values that
later stages need. What a later stage needs is stored, unless it is a few cheap operations (norm, activation) away
from one stored value: then that one is kept and the rest computed again when it is read. So the map before a norm
is stored, not the one after it, and a skip connection costs nothing that is not there already.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from normfix.layers.affine import normalise, normalise_rectified
from normfix.networks.graph.extents import space_of
from normfix.networks.graph.factors import made_of_the_size
from normfix.networks.graph.operators import name_of
from normfix.tiling.stages.maps import ProgramMaps
from normfix.tiling.stages.overviews import Overview, overview_of, overviews
from normfix.tiling.stages.program import Cut, Program, Shapes, is_tensor_node
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.reuse import reuse_
from normfix.tiling.stages.tokens import ATTEND, ATTEND_BIASED, attend_to_stored, attend_to_stored_biased

__all__ = ["Stage", "cut", "windowed"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: `run(*values, *whole, *biases, *overviews, *sizes)` returns the values of `gives`.

    `reads` are stored values, the image, stretches or numbers, `whole` stored values that every block reads whole,
    `biases` compute those of pairs of positions, `overviews` are values of a fixed size, `sizes` nodes that stand for
    an extent of another value. `stores` and `measures` are among `gives`; `measures` names the site of each,
    and `pools` are those that are put together of what is among them. `before` computes the overviews that it reads;
    `after` those with sites, once it is done, one after the other. `grid` is in pixels per axis; `weight` the bytes
    alive at once per pixel of the image. `is_laid` tells that it makes values of the places of pixels, such as a mask.
    """

    number: int
    run: GraphModule
    reads: tuple[Node, ...]
    whole: tuple[Node, ...]
    biases: tuple[Overview, ...]
    overviews: tuple[Node, ...]
    sizes: tuple[Node, ...]
    gives: tuple[Node, ...]
    stores: tuple[Node, ...]
    measures: tuple[tuple[str, Node], ...]
    returns: tuple[Node, ...]
    grid: tuple[int, ...]
    weight: float
    pools: tuple[Node, ...] = ()
    before: Overview | None = None
    after: tuple[Overview, ...] = ()
    is_laid: bool = False


def cut(
    program: Program,
    maps: ProgramMaps,
    shapes: Shapes,
    *,
    cuts: Sequence[Cut],
    measured: Sequence[str],
    outputs: bool,
) -> list[Stage]:
    """Cut a program at its sites.

    Args:
        program: of the network.
        maps: of the program.
        shapes: at one image size, to weigh values by.
        cuts: where to cut.
        measured: sites whose operands count.
        outputs: whether what the network returns counts.

    Raises:
        NormfixError: NF323 for a value that a later stage needs and that is no map over the image.
    """
    levels = _levels(program, cuts)
    small = overviews(program, maps)
    operands = {c.site: c.operand for c in cuts if c.site in set(measured)}
    measures = {site: node for site, node in operands.items() if node not in small}
    returned = program.outputs if outputs else ()
    for node in (*measures.values(), *returned):
        _require_map(node, maps)
    wanted: dict[int, list[Node]] = {}
    for node in (*operands.values(), *returned):
        wanted.setdefault(levels[node], []).append(node)
    stored, pools = _stored(program, maps, levels, wanted)
    first = {node: levels[node] for node in stored}
    stages: list[Stage] = []
    for level in range(max(wanted) + 1):
        stores = tuple(n for n in stored if first[n] == level)
        pooled = tuple(n for n in pools if levels[program.pools[n].operand] == level)
        goals = (*(n for n in wanted.get(level, ()) if n not in small), *stores)
        gives = tuple(dict.fromkeys((*goals, *(program.pools[n].operand for n in pooled))))
        if gives:
            available = {n for n in stored if first[n] < level} | {program.image}
            stage = _stage(
                program,
                maps,
                shapes,
                number=len(stages),
                gives=gives,
                available=available | {n for n in program.stretches if levels[n] <= level} | program.numbers,
                small=small,
                stores=stores,
                measures=tuple((site, n) for site, n in measures.items() if levels[n] == level),
                returns=tuple(n for n in dict.fromkeys(returned) if levels[n] == level),
            )
            stages.append(replace(stage, pools=pooled))
        sites = [(site, n) for site, n in operands.items() if n in small and levels[n] == level]
        if sites:
            # what it is of was put together when the stage before was done
            seen = overview_of(program, [n for _, n in sites], sites)
            stages[-1] = replace(stages[-1], after=(*stages[-1].after, seen))
    return stages


def windowed(stage: Stage) -> frozenset[Node]:
    """Return the values whose windows a stage reads by kernels alone that take them as they lie; see `_multiply_`."""
    given = [node for node in stage.run.graph.nodes if node.op == "placeholder"]
    return frozenset(
        read
        for read, placeholder in zip(stage.reads, given, strict=False)
        if all(user.target in (normalise, normalise_rectified) for user in placeholder.users)
    )


def _levels(program: Program, cuts: Sequence[Cut]) -> dict[Node, int]:
    """Return how many barriers stand before each node.

    What reads a site's state may be computed before its operand is (`weight * 2`), and waits for it all the same.

    Raises:
        NotInStages: NF323 if an operand is computed from what is measured on it.
    """
    operands_of: dict[Node, list[Node]] = {}
    for one in cuts:
        for reader in one.readers:
            operands_of.setdefault(reader, []).append(one.operand)
    before = {n: [*n.all_input_nodes, *operands_of.get(n, ())] for n in program.body.graph.nodes}
    levels: dict[Node, int] = {}
    try:
        for node in TopologicalSorter(before).static_order():
            after = [levels[n] + 1 for n in operands_of.get(node, ())]
            levels[node] = max((0, *(levels[n] for n in node.all_input_nodes), *after))
    except CycleError as error:
        raise NotInStages(
            "NF323",
            "what a site is measured on is computed from the state that holds its statistic.",
            where=str(error.args[1][0]),
        ) from error
    return levels


def _stored(
    program: Program, maps: ProgramMaps, levels: Mapping[Node, int], wanted: Mapping[int, Sequence[Node]]
) -> tuple[list[Node], list[Node]]:
    """Return the values to store and the pools to put together, in the order of the graph.

    From the last stage backwards: what a stage reads across a barrier is stored or computed again; what is
    stored or pooled is wanted by the stage that computes it first.
    """
    stored: set[Node] = set()
    pools: set[Node] = set()
    leaves = _Leaves(program, maps)
    for level in sorted(range(max(wanted) + 1), reverse=True):
        operands = {program.pools[n].operand for n in pools}
        goals = [*wanted.get(level, ()), *(n for n in (*stored, *operands) if levels[n] == level)]
        pending, seen = list(goals), set(goals)
        while pending:
            node = pending.pop()
            if node in program.pools:
                pools.add(node)
                continue
            if node in program.numbers:
                continue
            stretch = program.stretches.get(node)
            for parent in node.all_input_nodes if stretch is None else (stretch.source,):
                if parent in seen or parent not in maps.moving or parent is program.image:
                    continue
                seen.add(parent)
                # tokens have no place to be stored at, and are computed again
                is_stored = (
                    levels[parent] < level
                    and parent in maps.maps
                    and parent not in program.stretches
                    and parent not in program.numbers
                    and not leaves.is_recomputed(parent)
                )
                if is_stored or parent in program.whole or (stretch is not None and parent in maps.maps):
                    _require_map(parent, maps)
                    stored.add(parent)
                else:
                    pending.append(parent)
    order = list(program.body.graph.nodes)
    return [n for n in order if n in stored], [n for n in order if n in pools]


class _Leaves:
    """Finds the one expensive value that a cheap one is computed from, if it is one."""

    def __init__(self, program: Program, maps: ProgramMaps) -> None:
        self._image = program.image
        self._maps = maps
        self._found: dict[Node, Node | None] = {}

    def is_recomputed(self, node: Node) -> bool:
        """Tell whether a value is a few cheap operations away from one other value, which is a map."""
        leaf = self._leaf(node)
        return leaf is not None and leaf is not node and leaf in self._maps.maps

    def _leaf(self, node: Node) -> Node | None:
        """Return the value that a node is cheaply computed from: itself if it is expensive, None if several."""
        if node not in self._found:
            self._found[node] = self._search(node)
        return self._found[node]

    def _search(self, node: Node) -> Node | None:
        if node is self._image or not _is_cheap(node):
            return node
        leaves = {self._leaf(n) for n in node.all_input_nodes if n in self._maps.moving}
        single = leaves.pop() if len(leaves) == 1 else None
        return single if single is not None or node not in self._maps.maps else None


_CHEAP = frozenset(
    {"batch_norm", "_native_batch_norm_legit_no_training", "dropout", "feature_dropout", "clone", "alias"}
    | {"contiguous", "view", "reshape", "permute", "transpose", "unsqueeze", "squeeze", "expand", "slice"}
    | {"select", "cat"}
)


def _is_cheap(node: Node) -> bool:
    if node.target is operator.getitem:
        return _is_cheap(node.args[0])  # type: ignore[arg-type]
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or name_of(node) in _CHEAP


def _require_map(node: Node, maps: ProgramMaps) -> None:
    if node not in maps.maps or not is_tensor_node(node):
        raise NotInStages(
            "NF323",
            f"its value ({node.target}) is needed across a barrier, but it is no map over the image.",
            where=node.name,
        )


def _stage(
    program: Program,
    maps: ProgramMaps,
    shapes: Shapes,
    *,
    number: int,
    gives: tuple[Node, ...],
    available: set[Node],
    small: frozenset[Node],
    stores: tuple[Node, ...],
    measures: tuple[tuple[str, Node], ...],
    returns: tuple[Node, ...],
) -> Stage:
    inside, read, sizes = _inside(gives, available | small | program.biases, maps)
    reads = tuple(n for n in read if n not in program.whole | small | program.biases)
    biases = tuple(n for n in read if n in program.biases)
    whole = tuple(n for n in read if n in program.whole)
    seen = tuple(n for n in read if n in small)
    sources = (program.stretches[n].source for n in reads if n in program.stretches)
    needed = tuple(dict.fromkeys((*seen, *(n for n in sources if n not in maps.maps))))
    for node in inside:
        if node in maps.moving and is_tensor_node(node) and not any(maps.scales[node]):
            raise NotInStages(
                "NF323",
                f"its value ({node.target}) depends on the whole image, not on a block.",
                where=node.name,
            )
    order = [n for n in program.body.graph.nodes if n in inside]
    for node in made_of_the_size(order, maps.moving, space_of(program.image), maps.laid):
        raise NotInStages(
            "NF324",
            f"its value ({node.target}) is computed with the size of the image, and blocks have another.",
            where=node.name,
        )
    graph = Graph()
    copies: dict[Node, Node] = {
        n: graph.placeholder(n.name) for n in (*reads, *whole, *biases, *seen, *sizes)
    }
    for node in order:
        copies[node] = copy = graph.node_copy(node, lambda n: copies[n])
        if copy.target in _STORED:
            copy.target = _STORED[copy.target]
            # a worker that a graph is sent to traces its code, and is not to look into this call
            copy.meta["is_wrapped"] = True
    graph.output(tuple(copies[n] for n in gives))
    reuse_(graph)
    if program.device.type != "cpu":
        _multiply_(graph)
    graph.lint()
    ndim = len(maps.maps[program.image].dims)
    values = [n for n in (*order, *reads) if n in maps.moving]
    return Stage(
        number=number,
        run=GraphModule(program.body, graph),
        reads=reads,
        whole=whole,
        biases=tuple(overview_of(program, [n]) for n in biases),
        overviews=seen,
        before=overview_of(program, needed) if needed else None,
        sizes=sizes,
        gives=gives,
        stores=stores,
        measures=measures,
        returns=returns,
        grid=maps.grid(values, ndim),
        is_laid=not maps.laid.isdisjoint(inside),
        weight=_weight(order, reads, gives, shapes) / math.prod(shapes[program.image][2:]),
    )


def _multiply_(graph: Graph) -> None:
    """Let norms by constants be computed as the layers compute them; see normfix.layers.affine."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.batch_norm.default and len(node.args) == _BATCH_NORM:
            x, weight, bias, mean, var, training, _, eps, _ = node.args
            if training or mean is None or var is None:
                continue
            node.target, node.args = normalise, (x, weight, bias, mean, var, eps)
            (user, *others) = node.users
            if user.target in _RECTIFIED and not others:
                node.target = normalise_rectified
                user.replace_all_uses_with(node)
                graph.erase_node(user)


_RECTIFIED = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


_STORED: dict[Any, Callable[..., Tensor]] = {ATTEND: attend_to_stored, ATTEND_BIASED: attend_to_stored_biased}
"""What an attention is in a stage: keys and values are read band by band."""

_BATCH_NORM = 9
"""Arguments of aten.batch_norm."""


def _inside(
    gives: Sequence[Node], available: set[Node], maps: ProgramMaps
) -> tuple[set[Node], tuple[Node, ...], tuple[Node, ...]]:
    """Return what a stage computes, the values it reads and the extents it is told."""
    inside: set[Node] = set()
    reads: dict[Node, None] = {}
    pending = list(gives)
    while pending:
        node = pending.pop()
        if node in inside or node in reads:
            continue
        if node in available:
            reads[node] = None
            continue
        inside.add(node)
        if node.target is not torch.ops.aten.sym_size.int:
            pending += node.all_input_nodes
    sizes = [
        n
        for n in inside
        if n.target is torch.ops.aten.sym_size.int and n.args[0] not in inside and n.args[0] not in reads
    ]
    for node in sizes:
        if node.args[0] not in maps.maps:
            raise NotInStages(
                "NF323", "its extent is needed, but it is no map over the image.", where=str(node.args[0])
            )
    inside -= set(sizes)
    return inside, tuple(sorted(reads)), tuple(sorted(sizes))


def _weight(order: Sequence[Node], reads: Sequence[Node], gives: Sequence[Node], shapes: Shapes) -> float:
    """Return the largest number of bytes alive at once while a stage runs on a whole image."""

    def size(node: Node) -> float:
        value = node.meta.get("val")
        if node not in shapes or node.op == "get_attr" or not isinstance(value, torch.Tensor):
            return 0.0
        return float(math.prod(shapes[node]) * value.element_size())

    last: dict[Node, int] = {}
    for position, node in enumerate(order):
        for parent in node.all_input_nodes:
            last[parent] = position
    last.update(dict.fromkeys(gives, len(order)))
    alive, most = sum(map(size, reads)), 0.0
    dead: dict[int, list[Node]] = {}
    for node, position in last.items():
        dead.setdefault(position, []).append(node)
    for position, node in enumerate(order):
        alive += size(node)
        most = max(most, alive)
        alive -= sum(map(size, dead.get(position, ())))
    return max(most, alive)
