"""The graph of a network: captured by torch.export and read for statistics."""

from __future__ import annotations

from normfix.graph.capture import Captured, NotCaptured, capture
from normfix.graph.look import GraphLook, graph_look
from normfix.graph.sites import Seen, read_sites

__all__ = ["Captured", "GraphLook", "NotCaptured", "Seen", "capture", "graph_look", "read_sites"]
