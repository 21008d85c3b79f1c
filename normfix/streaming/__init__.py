"""Run a captured network stage by stage over blocks of images that need not fit in memory."""

from __future__ import annotations

from normfix.streaming.execution import Schedule, Statistic, execute
from normfix.streaming.program import Program, captured_program
from normfix.streaming.scheduling import schedule
from normfix.streaming.sources import Source, TensorSource
from normfix.streaming.stores import Store

__all__ = [
    "Program",
    "Schedule",
    "Source",
    "Statistic",
    "Store",
    "TensorSource",
    "captured_program",
    "execute",
    "schedule",
]
