"""Run a captured network stage by stage over blocks of images that need not fit in memory."""

from __future__ import annotations

from normfix.streaming.clusters import Dask
from normfix.streaming.engines import Engine, Local
from normfix.streaming.execution import execute
from normfix.streaming.files import open_image
from normfix.streaming.jobs import resumable, run_of
from normfix.streaming.journal import Journal
from normfix.streaming.manifest import describe
from normfix.streaming.maps import Map, Span, map_of
from normfix.streaming.masks import Masked, counted, mask_of, selected
from normfix.streaming.outlook import Outlook, Step, Watch
from normfix.streaming.program import Program, captured_program
from normfix.streaming.running import Statistic, kept_name
from normfix.streaming.schedules import Schedule, largest_block
from normfix.streaming.scheduling import schedule
from normfix.streaming.sinks import OutputFile
from normfix.streaming.sources import Source, TensorSource, values_digest
from normfix.streaming.spread import scaling_numbers
from normfix.streaming.stores import Kept, Store
from normfix.streaming.windows import WindowedImage, windowed

__all__ = [
    "Dask",
    "Engine",
    "Journal",
    "Kept",
    "Local",
    "Map",
    "Masked",
    "Outlook",
    "OutputFile",
    "Program",
    "Schedule",
    "Source",
    "Span",
    "Statistic",
    "Step",
    "Store",
    "TensorSource",
    "Watch",
    "WindowedImage",
    "captured_program",
    "counted",
    "describe",
    "execute",
    "kept_name",
    "largest_block",
    "map_of",
    "mask_of",
    "open_image",
    "resumable",
    "run_of",
    "scaling_numbers",
    "schedule",
    "selected",
    "values_digest",
    "windowed",
]
