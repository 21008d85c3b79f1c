"""The graph of a network: captured by torch.export, read for statistics, raised back into modules."""

from __future__ import annotations

from normfix.graph.bounds import Bound
from normfix.graph.capture import Captured, NotCaptured, capture, export
from normfix.graph.look import GraphLook, graph_look
from normfix.graph.program import Program
from normfix.graph.raising import raised
from normfix.graph.sites import Seen, read_sites

__all__ = [
    "Bound",
    "Captured",
    "GraphLook",
    "NotCaptured",
    "Program",
    "Seen",
    "capture",
    "export",
    "graph_look",
    "raised",
    "read_sites",
]
