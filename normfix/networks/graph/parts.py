"""Give the nodes of a graph back to the modules they were called in.

The nodes of one call of a module follow one another in an exported graph, so they can be taken out and put into
a Part at the module's path, innermost modules first:

    a, [b, c], d     ->     a, call part(0, a), d          with   part.graphs[0] = b, c

Only modules that call a counted function themselves need it. A call whose nodes were torn apart counts as several.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from normfix.networks.graph.operators import name_of
from normfix.networks.graph.program import GUARDS, Submodule

__all__ = ["module_at", "owner_of", "part_", "put", "stack_of"]

_OF_NOBODY = frozenset({"sym_size", "sym_numel", "_assert_scalar", "sym_constrain_range_for_size"})


def part_(body: GraphModule) -> None:
    """Put the nodes of each module that calls a function itself into a Part at its path, in place."""
    _tensors_first(body.graph)
    depths: dict[str, int] = {}
    for node in body.graph.nodes:
        stack = stack_of(node)
        if node.op == "call_function" and _is_written(node) and stack and stack[-1]:
            depths[stack[-1]] = max(depths.get(stack[-1], 0), len(stack))
    for path in sorted(depths, key=lambda path: -depths[path]):
        home = module_at(body, path)
        if home is None or type(home) is nn.Module:
            runs = list(_runs(body.graph, path))
            if all(_below(node, path) for run in runs for node in run):
                _take_out(body, path, Submodule(home), runs)


def stack_of(node: Node) -> tuple[str, ...]:
    """Return the paths of the modules around a node, the innermost last; () where nothing is known."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    paths = [".".join(p.partition("@")[0] for p in str(entry[0]).split(".")) for entry in entries]
    return tuple(paths)


def module_at(body: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, or None."""
    try:
        return body.get_submodule(path)
    except AttributeError:
        return None


def put(body: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer at a path, in place, making what is above it."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in body._modules:
            body.add_module(parent, nn.Module())
        body = body.get_submodule(parent)
    body.add_module(name, layer)


def _is_written(node: Node) -> bool:
    """Tell whether a node calls a function rather than an operator."""
    return not name_of(node) and getattr(node.target, "__module__", "") not in ("_operator", "math")


def _tensors_first(graph: Graph) -> None:
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    for node in list(graph.nodes):
        if node.op == "get_attr":
            first.prepend(node)


def _runs(graph: Graph, path: str) -> Iterator[list[Node]]:
    """Yield the nodes of each call of a module; what only sizes are asked by may lie between them."""
    run: list[Node] = []
    loose: list[Node] = []
    key: Any = None
    for node in graph.nodes:
        call = _call_key(node, path)
        if call is not None and (not run or call == key):
            run += [*(loose if run else ()), node]
            key, loose = call, []
        elif call is not None:
            yield run
            run, key, loose = [node], call, []
        elif run and _of_nobody(node):
            loose.append(node)
        elif run:
            yield run
            run, loose = [], []
    if run:
        yield run


def _call_key(node: Node, path: str) -> Any:
    """Return what tells the calls of a module apart, None for a node outside of it."""
    if node.target == GUARDS:
        return None  # it stands before the first module and has that one's stack
    stack = node.meta.get("nn_module_stack") or {}
    for position, (place, entry) in enumerate(zip(stack_of(node), stack.items(), strict=True)):
        if place == path:
            return [str(entry[0]), str(entry[1][0]), position]
    return None


def _of_nobody(node: Node) -> bool:
    sizes = node.op == "call_function" and not isinstance(node.meta.get("val"), (Tensor, tuple, list))
    return sizes and (name_of(node) in _OF_NOBODY or not name_of(node))


def _below(node: Node, path: str) -> bool:
    return node.op != "call_module" or str(node.target).startswith(f"{path}.")


def _take_out(body: GraphModule, path: str, part: Submodule, runs: Sequence[list[Node]]) -> None:
    put(body, path, part)
    for run in runs:
        taken, inside = Graph(), set(run)
        given = list(dict.fromkeys(n for node in run for n in node.all_input_nodes if n not in inside))
        copies = {node: taken.placeholder(node.name) for node in given}
        results = [node for node in run if any(user not in inside for user in node.users)]
        for node in run:
            copies[node] = taken.node_copy(node, copies.__getitem__)
            if node.op == "call_module":
                copies[node].target = str(node.target).removeprefix(f"{path}.")
        taken.output(tuple(copies[node] for node in results))
        with body.graph.inserting_before(run[0]):
            call = body.graph.call_module(path, (len(part.graphs), *given))
            call.meta["nn_module_stack"] = _around(run[0], path)
            for number, node in enumerate(results):
                result = body.graph.call_function(operator.getitem, (call, number))
                result.meta = {**node.meta, "nn_module_stack": call.meta["nn_module_stack"]}
                node.replace_all_uses_with(result)
        for node in reversed(run):
            body.graph.erase_node(node)
        part.graphs.append(taken)


def _around(node: Node, path: str) -> dict[str, Any]:
    """Return the stack of the modules around a module."""
    stack = node.meta.get("nn_module_stack") or {}
    return dict(list(stack.items())[: stack_of(node).index(path)])


def owner_of(node: Node) -> str:
    """Return the path of the innermost module that made a node, '' for the root or where nothing is known."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    parts = [part.partition("@")[0] for part in path.split(".")]
    return ".".join(parts) if all(part.isidentifier() or part.isdecimal() for part in parts) else ""
