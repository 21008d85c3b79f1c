"""Run a captured network stage by stage over blocks of images that need not fit in memory."""

from __future__ import annotations

from normfix.streaming.execution import Schedule, Statistic, execute
from normfix.streaming.program import Program, captured_program
from normfix.streaming.scheduling import schedule
from normfix.streaming.sinks import OutputFile
from normfix.streaming.sources import Source, TensorSource
from normfix.streaming.spread import scaling_numbers
from normfix.streaming.stores import Kept, Store
from normfix.streaming.windows import WindowedImage, open_image, windowed

__all__ = [
    "Kept",
    "OutputFile",
    "Program",
    "Schedule",
    "Source",
    "Statistic",
    "Store",
    "TensorSource",
    "WindowedImage",
    "captured_program",
    "execute",
    "open_image",
    "scaling_numbers",
    "schedule",
    "windowed",
]
