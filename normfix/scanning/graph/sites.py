"""Read a captured graph: every norm and every operation over the whole extent, with owner and provenance.

Space is told from channels by shapes at two image sizes, which free symbols or a second export give: what
follows the image's extent is space. A reduction is a node whose output grows more slowly with the image than
its input; it is live if its result meets a map again. An operator nobody listed is unknown, and said to be.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from normfix.networks.frames import innermost
from normfix.networks.graph.capture import WRAPPED, Captured, image_of
from normfix.networks.graph.operators import (
    Normalisation,
    along,
    is_local,
    name_of,
    read_norm,
    taken_by,
    viewed_by,
    written_by,
)
from normfix.networks.graph.parts import owner_of
from normfix.records.sites import Family

__all__ = ["NodeReading", "NodeSite", "read_sites"]

_REDUCED, _SQUARED = 0.75, 1.4  # as in normfix.scanning.sites
_FAMILIES = {
    "batch_norm": Family.BATCH,
    "instance_norm": Family.INSTANCE,
    "group_norm": Family.GROUP,
    "layer_norm": Family.LAYER,
    "rms_norm": Family.RESPONSE,
}
_POOLS = ("adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool", "avg_pool", "max_pool")
_SLIDING = (
    "max_pool",
    "avg_pool",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose",
    "convolution",
    "unfold",
    "im2col",
)
_SHAPING = frozenset(
    {
        "slice",
        "select",
        "narrow",
        "index",
        "index_select",
        "split",
        "chunk",
        "unbind",
        "expand",
        "view",
        "sym_size",
    }
)
_RESIZING = ("upsample_", "_upsample_", "pad", "constant_pad", "reflection_pad", "replication_pad")
_LEAVES = frozenset({"item", "_local_scalar_dense"})
_FAMILY_ALONG = {"softmax": Family.ATTENTION, "_softmax": Family.ATTENTION, "log_softmax": Family.ATTENTION}


@dataclass(frozen=True, slots=True)
class NodeSite:
    """One node that normalises or computes something over space.

    `owner` is the path of the innermost module as `named_modules` first names it, `number` the node's
    position among those of the same owner and function in graph order. `depends` tells whether the operand
    depends on the image: a norm of weights does not, and is not live. `absorbed` tells that whatever depends on a
    live node runs through another reduction, so that nothing is left of it once that one is a constant. `call`
    is the function people called, numbered, where the graph remembers it.
    """

    node: str
    operator: str
    function: str
    owner: str
    number: int
    line: str
    family: Family
    depends: bool
    live: bool
    absorbed: bool = False
    call: str = ""


@dataclass(frozen=True, slots=True)
class NodeReading:
    """What a graph holds: the nodes that matter, and the names of operators nobody knows, with how many."""

    seen: tuple[NodeSite, ...]
    unknown: tuple[tuple[str, int], ...]


def read_sites(captured: Captured, model: nn.Module) -> NodeReading:
    """Read the sites of a captured network.

    Args:
        captured: by `capture`.
        model: the network that was captured, for the names of modules that have several.
    """
    nodes = [node for node in captured.program.graph.nodes if node.op == "call_function"]
    sizes = _Sizes(captured)
    depends = _dependent(captured)
    meeting, free = _meeting(nodes, sizes, depends), _unabsorbed(captured, sizes)
    names = _first_names(model)
    numbers: Counter[tuple[str, str]] = Counter()
    seen, unknown = [], Counter[str]()
    for node in nodes:
        norm = read_norm(node)
        family = _FAMILIES[norm.function] if norm else _family(node, sizes, depends)
        if family is None:
            first = node.all_input_nodes[0] if node.all_input_nodes else node
            if node in depends and not is_local(node, sizes.space(first)):
                unknown[str(node.target)] += 1
            continue
        function = norm.function if norm else name_of(node)
        owner = _owner(node, names)
        operand = norm.operand in depends if norm else True
        seen.append(
            NodeSite(
                node=node.name,
                operator=str(node.target),
                function=function,
                owner=owner,
                number=numbers[owner, function],
                line=innermost(node.meta.get("stack_trace")),
                family=family,
                depends=operand,
                live=operand and (_live(norm, sizes) if norm else node in meeting or _lasts(node, sizes)),
                absorbed=not any(user in free for user in node.users),
                call=str((node.meta.get("torch_fn") or ("",))[0]),
            )
        )
        numbers[owner, function] += 1
    return NodeReading(tuple(seen), tuple(sorted(unknown.items())))


def _owner(node: Node, names: Mapping[str, str]) -> str:
    """Return a node's owner as the network itself names it first."""
    path = owner_of(node)
    path = path[len(WRAPPED) + 1 :] if path == WRAPPED or path.startswith(f"{WRAPPED}.") else path
    return names.get(path, path)


class _Sizes:
    """How extents follow the image's."""

    def __init__(self, captured: Captured) -> None:
        self._shapes = captured.shapes()
        image = self._shapes[image_of(captured.program).name]
        self._unit = _log_ratio((1, *image[0][2:]), (1, *image[1][2:])) if image else 1.0
        self._plain = {n.name: _first(n.meta["val"]) for n in captured.program.graph.nodes if "val" in n.meta}

    def known(self, node: Node) -> bool:
        """Tell whether a node gives a tensor."""
        return node.name in self._shapes

    def growth(self, node: Node) -> float:
        """Return the exponent of a node's extent: 1 grows as the image does, 0 not at all."""
        pair = self._shapes.get(node.name)
        if pair is not None:
            return _log_ratio(*pair) / self._unit
        shape = getattr(self._plain.get(node.name), "shape", ())
        return float(any(isinstance(n, int) and n > 1 for n in shape[2:]))

    def inputs(self, node: Node) -> float:
        """Return the exponent of the fastest growing operand."""
        return max((self.growth(n) for n in taken_by(node)), default=0.0)

    def space(self, node: Node) -> frozenset[int]:
        """Return a node's dimensions that follow the image's extent."""
        pair = self._shapes.get(node.name)
        if pair is None:
            return frozenset(range(2, len(getattr(self._plain.get(node.name), "shape", ()))))
        return frozenset(i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b)


def _first(value: object) -> object:
    """Return what counts of what a node gives."""
    return value[0] if isinstance(value, list | tuple) and value else value


def _family(node: Node, sizes: _Sizes, depends: frozenset[Node]) -> Family | None:
    name = name_of(node)
    if node not in depends or not name:
        return None
    if name.startswith(("fft_", "_fft_")):
        return Family.OTHER
    if name == "scaled_dot_product_attention" or name.startswith("_scaled_dot_product"):
        return Family.ATTENTION if sizes.inputs(node) >= _REDUCED else None
    slides = name.startswith(_SLIDING) and sum(n in depends for n in node.all_input_nodes) == 1
    if sizes.growth(node) > _SQUARED * max(1.0, sizes.inputs(node)) and not slides:
        return Family.ATTENTION
    if _reduces(node, sizes):
        return Family.POOL if name.startswith(_POOLS) else Family.REDUCTION
    first = node.all_input_nodes[0] if node.all_input_nodes else node
    if set(along(node)) & sizes.space(first):
        return _FAMILY_ALONG.get(name, Family.OTHER)
    return None


def _reduces(node: Node, sizes: _Sizes) -> bool:
    name = name_of(node)
    shaping = name in _SHAPING | _LEAVES or name.startswith(_RESIZING)
    if not name or shaping or not sizes.known(node) or read_norm(node) is not None:
        return False
    into = sizes.inputs(node)
    return _REDUCED <= into <= _SQUARED and sizes.growth(node) < _REDUCED * into


def _lasts(node: Node, sizes: _Sizes) -> bool:
    return sizes.growth(node) >= _REDUCED


def _live(norm: Normalisation, sizes: _Sizes) -> bool:
    if not norm.computes:
        return False
    space = sizes.space(norm.operand)
    rank = len(norm.operand.meta["val"].shape)
    if norm.function in ("layer_norm", "rms_norm"):
        return bool(space & set(range(rank - len(norm.normalized_shape), rank)))
    if norm.function == "group_norm":
        return any(dim >= 2 for dim in space)
    return True


def _dependent(captured: Captured) -> frozenset[Node]:
    """Return the nodes whose values, not only sizes, depend on the image; also through what was written to."""
    image = image_of(captured.program)
    found, bases, tainted = {image}, {image: image}, {image}
    for node in captured.program.graph.nodes:
        viewed = viewed_by(node)
        bases[node] = bases.get(viewed, viewed) if viewed else node
        if node.op == "call_function" and any(s in found or bases[s] in tainted for s in taken_by(node)):
            found.add(node)
            tainted.update(bases[written] for written in written_by(node))
    return frozenset(found | {node for node, base in bases.items() if base in tainted})


def _meeting(nodes: list[Node], sizes: _Sizes, depends: frozenset[Node]) -> frozenset[Node]:
    """Return the reductions whose result meets a map again, or leaves tensors."""
    carried: dict[Node, frozenset[Node]] = {}
    met: frozenset[Node] = frozenset()
    for node in nodes:
        inherited = frozenset[Node]().union(*(carried.get(n, frozenset()) for n in node.all_input_nodes))
        if sizes.growth(node) >= _REDUCED or name_of(node) in _LEAVES:
            met |= inherited
        carried[node] = inherited | ({node} if node in depends and _reduces(node, sizes) else frozenset())
    return met


def _unabsorbed(captured: Captured, sizes: _Sizes) -> frozenset[Node]:
    """Return the nodes from which a path leads to the result, or out of tensors, past every reduction."""
    found: set[Node] = set()
    for node in reversed(captured.program.graph.nodes):
        leads = any(user in found for user in node.users) and not _reduces(node, sizes)
        if leads or node.op == "output" or name_of(node) in _LEAVES:
            found.add(node)
    return frozenset(found)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return for every path of a module the first one, under which the census knows it."""
    first: dict[int, str] = {}
    return {
        path: first.setdefault(id(module), path)
        for path, module in model.named_modules(remove_duplicate=False)
    }


def _log_ratio(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return math.log(max(1, math.prod(b)) / max(1, math.prod(a)))
