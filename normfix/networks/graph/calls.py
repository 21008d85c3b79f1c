"""Write operators as the functions people call: `aten.mean.dim` as torch.mean, `aten.instance_norm` as F.instance_norm.

Census, plan and interception know functions, so a graph written this way is scanned and converted like the
network it came from. The functions call the very operators they replace. What a composite function such as
`x.norm(dim=...)` left in the graph (`aten.linalg_vector_norm`) gets the function's name back where the graph
remembers it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from normfix.networks.functions import ATTENTION, COUNTED
from normfix.networks.graph.operators import Normalisation, name_of

__all__ = ["function_of", "norm_call", "write_calls_"]

_NORMS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "batch_norm": F.batch_norm,
        "instance_norm": F.instance_norm,
        "group_norm": F.group_norm,
        "layer_norm": F.layer_norm,
    }
)
_LINALG = ("linalg_norm", "linalg_vector_norm")
_SAME = {f"_adaptive_avg_pool{n}d": f"adaptive_avg_pool{n}d" for n in (2, 3)}
_VALUES = frozenset(f"adaptive_max_pool{n}d" for n in (1, 2, 3))
"""Operators that return places too, and whose functions return the values alone."""

_AS_THEY_ARE = frozenset({"normalize", "softmax", "log_softmax", "tensordot", "multi_head_attention_forward"})
"""Functions that no operator is written as: composites, and those that no constant can stand for."""


def _function(name: str) -> Callable[..., Any]:
    place: Any = torch.linalg if name in _LINALG else F if "_pool" in name or name in ATTENTION else torch
    found: Callable[..., Any] = getattr(place, name.removeprefix("linalg_") if name in _LINALG else name)
    return found


_FUNCTIONS = {name: _function(name) for name in sorted(set(COUNTED.values()) - _AS_THEY_ARE)}


def function_of(node: Node) -> Callable[..., Any] | None:
    """Return the function that people call for this operator, None for one that is not counted."""
    name = name_of(node)
    if (
        name == "linalg_vector_norm"
        and (node.meta.get("torch_fn") or ("", ""))[1].rpartition(".")[2] == "norm"
    ):
        name = "norm"  # torch.linalg.norm keeps an operator of its own
    return _FUNCTIONS.get(_SAME.get(name, name))


def write_calls_(graph: Graph) -> None:
    """Replace the counted operators of a graph by their functions, in place."""
    for node in list(graph.nodes):
        function = function_of(node) if node.op == "call_function" else None
        if function is not None and (name_of(node) not in _VALUES or _values_alone_(graph, node)):
            node.target = function
            if function is torch.norm:
                # in programs from files, arguments have the names of the operator, linalg_vector_norm
                node.kwargs = {"p" if name == "ord" else name: v for name, v in node.kwargs.items()}


def norm_call(norm: Normalisation) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Return a live norm as a function and its keyword arguments; None for what is not live or has none."""
    if not norm.computes or norm.running_mean is not None or norm.function not in _NORMS:
        return None
    settings: dict[str, dict[str, Any]] = {
        "batch_norm": {"running_mean": None, "running_var": None, "training": True},
        "instance_norm": {},
        "group_norm": {"num_groups": norm.groups},
        "layer_norm": {"normalized_shape": tuple(norm.normalized_shape)},
    }
    given = {**settings[norm.function], "weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
    return _NORMS[norm.function], given


def _values_alone_(graph: Graph, node: Node) -> bool:
    """Let the users of an operator's first result use the node itself; False if the second is used."""
    users = list(node.users)
    if any(u.target is not operator.getitem or (u.args[1] != 0 and u.users) for u in users):
        return False
    for user in users:
        if user.args[1] == 0:
            user.replace_all_uses_with(node)
        graph.erase_node(user)
    return True
