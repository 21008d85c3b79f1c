"""Raise an exported program into modules: every norm node becomes a stock layer again, where it was.

A node whose tensors lie together at one path (`enc.norm.weight`, `enc.norm.bias`) becomes nn.InstanceNorm2d
and the like at that path; one whose tensors come from elsewhere, and every other statistic, becomes the function
people call for it (normfix.networks.graph.calls), inside the module it was called in
(normfix.networks.graph.parts).
After decomposition the operators have other names and return several tensors, and an instance norm is

    view(x, [1, N C, *space]) -> _native_batch_norm_legit.no_stats -> getitem 0 -> view(., [N, C, *space])

with weights repeated N times; the four become one layer. Everything else of the program stays as it is.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from normfix.networks.graph.calls import norm_call, write_calls_
from normfix.networks.graph.capture import extent_of, free_dimensions, image_of
from normfix.networks.graph.isolation import silence
from normfix.networks.graph.operators import Normalisation, name_of, read_norm
from normfix.networks.graph.parts import module_at, owner_of, part_, put
from normfix.networks.graph.program import ProgramNetwork

__all__ = ["raised", "unlifted"]

_KINDS: Mapping[tuple[str, int], Callable[..., nn.Module]] = {
    ("batch_norm", 2): nn.BatchNorm1d,
    ("batch_norm", 3): nn.BatchNorm1d,
    ("batch_norm", 4): nn.BatchNorm2d,
    ("batch_norm", 5): nn.BatchNorm3d,
    ("instance_norm", 3): nn.InstanceNorm1d,
    ("instance_norm", 4): nn.InstanceNorm2d,
    ("instance_norm", 5): nn.InstanceNorm3d,
}
_BOUNDS = ("r_max", "d_max")
"""Buffers that BatchRenorm has and eval does not read."""

_HELD = ("weight", "bias", "running_mean", "running_var")
_VIEWS = frozenset({"view", "reshape", "_unsafe_view"})


@dataclass(frozen=True, slots=True)
class _Place:
    """A norm in the graph: what it computes, and the nodes that its layer's result replaces."""

    node: Node
    norm: Normalisation
    results: tuple[Node, ...]


def raised(program: ExportedProgram) -> ProgramNetwork:
    """Return a program as a module whose norms are layers; the program is not modified."""
    body = unlifted(program)
    graph = body.graph
    _hold_constants_(body)
    nodes = [node for node in graph.nodes if _place(node) is not None]
    runs = Counter(owner_of(node) for node in nodes)
    for node in nodes:
        place = _place(node)  # read anew, since its operand may have been a norm that was raised
        assert place is not None
        _raise(body, place, single=runs[owner_of(node)] == 1)
    _clean(graph)
    write_calls_(graph)
    part_(body)
    graph.lint()
    shape = image_of(program).meta["val"].shape
    free = free_dimensions(program)
    return ProgramNetwork(body, [None if d in free else extent_of(n) for d, n in enumerate(shape)])


def unlifted(program: ExportedProgram) -> GraphModule:
    """Return a program as a graph module that checks its guards.

    torch leaves the guards out where a program was saved without example inputs: it would then run on sizes
    it was not captured for, and be wrong without a word. Examples of the right shape bring them back.
    """
    given = program.example_inputs
    try:
        if not given:
            named = set(program.graph_signature.user_inputs)
            nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in named]
            program.example_inputs = (tuple(_example(n.meta["val"]) for n in nodes), {})
        with silence():
            body = program.module()
    finally:
        program.example_inputs = given
    assert isinstance(body, GraphModule)
    return body


def _hold_constants_(body: GraphModule) -> None:
    """Make buffers of a network's constants, which torch hangs on a module as plain attributes, in place.

    As such they would stay where they are when the network moves, and be lost with the module that a layer or a
    part takes the place of.
    """
    for node in body.graph.nodes:
        path, _, name = str(node.target).rpartition(".")
        home = module_at(body, path) if node.op == "get_attr" else None
        if home is not None and isinstance(value := vars(home).get(name), torch.Tensor):
            delattr(home, name)
            home.register_buffer(name, value, persistent=False)


def _example(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    shape = [n if isinstance(n, int) else int(n.node.hint or 2) for n in value.shape]
    # takes no memory, however large an image the program is fixed to
    return torch.zeros((), dtype=value.dtype).expand(shape)


def _place(node: Node) -> _Place | None:
    norm = read_norm(node)
    if norm is None:
        return None
    if not norm.first:
        return _Place(node, norm, (node,))
    taken = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(taken) < len(node.users) or any(number != 0 and user.users for number, user in taken.items()):
        return None  # something reads the statistics themselves
    if 0 not in taken:
        return None
    return _joined(node, norm, taken[0]) or _Place(node, norm, (taken[0],))


def _joined(node: Node, norm: Normalisation, result: Node) -> _Place | None:
    """Return the instance norm that a batch norm over N C channels is a part of, or None."""
    inner, users = norm.operand, list(result.users)
    if norm.function != "batch_norm" or norm.running_mean is not None or name_of(inner) not in _VIEWS:
        return None
    operand = inner.all_input_nodes[0]
    before, within = operand.meta["val"].shape, inner.meta["val"].shape
    if len(before) != len(within) or inner.args[1][0] != 1 or len(before) < 3:  # type: ignore[index]
        return None
    restores = all(name_of(u) in _VIEWS and str(u.meta["val"].shape) == str(before) for u in users)
    tensors = [_unrepeated(t) for t in (norm.weight, norm.bias)]
    if not users or not restores or any(t is False for t in tensors):
        return None
    found = replace(norm, function="instance_norm", operand=operand, weight=tensors[0], bias=tensors[1])
    return _Place(node, found, tuple(users))


def _unrepeated(tensor: Any) -> Any:
    """Return what was repeated once per image, None for None, False for anything else."""
    if tensor is None:
        return None
    if isinstance(tensor, Node) and name_of(tensor) == "repeat" and len(tensor.args[1]) == 1:  # type: ignore[arg-type]
        return tensor.args[0]
    return False


def _raise(body: GraphModule, place: _Place, *, single: bool) -> None:
    norm, path = place.norm, owner_of(place.node)
    layer = _stock(body, norm, path) if single and path else None
    written = None if layer is not None else norm_call(norm)
    with body.graph.inserting_before(place.node):
        if layer is not None:
            put(body, path, layer)
            call = body.graph.call_module(path, (norm.operand,))
        elif written is not None:
            function, given = written
            call = body.graph.call_function(function, (norm.operand,), given)
        else:
            return
    call.meta = dict(place.results[0].meta)
    for result in place.results:
        result.replace_all_uses_with(call)


def _stock(body: GraphModule, norm: Normalisation, path: str) -> nn.Module | None:
    """Return the layer whose whole forward is this node, holding the tensors at its path, or None."""
    given = {name: getattr(norm, name) for name in _HELD}
    held = {name: node for name, node in given.items() if node is not None}
    if any(node.op != "get_attr" or node.target != f"{path}.{name}" for name, node in held.items()):
        return None
    tracking = norm.function in ("batch_norm", "instance_norm")
    if ("weight" in held) != ("bias" in held) or (tracking and ("running_mean" in held) == norm.computes):
        return None
    home = module_at(body, path)
    own = {} if home is None else {**dict(home.named_parameters()), **dict(home.named_buffers())}
    read = {node.target for node in body.graph.nodes if node.op == "get_attr" and node.users}
    idle = {name for name in _BOUNDS if f"{path}.{name}" not in read}
    if set(own) - idle - {"num_batches_tracked"} != set(held) or (home is not None and list(home.children())):
        return None  # a norm of a convolution's weights, a subclass that does more
    layer = _new(norm, "weight" in held)
    for name in held if layer is not None else ():
        setattr(layer, name, own[name])
    if layer is not None and "num_batches_tracked" in own and hasattr(layer, "num_batches_tracked"):
        layer.num_batches_tracked = own["num_batches_tracked"]
    return layer


def _new(norm: Normalisation, affine: bool) -> nn.Module | None:
    shape = norm.operand.meta["val"].shape
    features, rank = extent_of(shape[1]) if len(shape) > 1 else None, len(shape)
    if norm.function == "layer_norm":
        extents = [extent_of(n) for n in norm.normalized_shape if not isinstance(n, Node)]
        if len(extents) < len(norm.normalized_shape) or None in extents:
            return None
        return nn.LayerNorm([n for n in extents if n is not None], norm.eps, affine)
    if features is None:
        return None
    kind = _KINDS.get((norm.function, rank))
    if kind is not None:
        return kind(features, norm.eps, norm.momentum, affine, not norm.computes)
    return nn.GroupNorm(norm.groups, features, norm.eps, affine) if norm.function == "group_norm" else None


def _clean(graph: Graph) -> None:
    """Remove what the layers replaced, and checks of dtypes, which a program in float64 would not pass."""
    for node in reversed(list(graph.nodes)):
        spare = node.op == "get_attr" or name_of(node) in _VIEWS | {"repeat"} or read_norm(node) is not None
        spare = spare or node.target is operator.getitem
        if name_of(node) == "_assert_tensor_metadata" or (spare and not node.users):
            graph.erase_node(node)
        elif name_of(node) in ("to", "_to_copy") and isinstance(dtype := _cast(node), torch.dtype):
            with graph.inserting_before(node):
                cast = graph.call_method("to", (node.args[0], dtype))
            cast.meta = dict(node.meta)
            node.replace_all_uses_with(cast)
            graph.erase_node(node)


def _cast(node: Node) -> Any:
    """Return the dtype that a node casts to, where it does nothing else."""
    if name_of(node) == "to" and str(node.target).endswith(".dtype"):
        return node.args[1] if len(node.args) == 2 and not node.kwargs else None
    return node.kwargs.get("dtype") if list(node.kwargs) == ["dtype"] and len(node.args) == 1 else None
