"""Run examinations one after the other, each in a forked process of its own with a time and a memory limit."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .entry import Entry
from .examining import examine

__all__ = ["apart", "done_before", "missing", "run_all"]

MEMORY = 8

Examination = Callable[[Entry, Callable[[dict[str, Any]], None]], dict[str, Any]]
"""Gets an entry and what is told before each long step; returns a row."""


def apart(
    entry: Entry,
    limit: int = 180,
    patience: int = 5,
    *,
    memory: int = MEMORY,
    examination: Examination = examine,
) -> dict[str, Any]:
    """Examine one network in a process of its own; what hangs or eats the machine ends there.

    `limit` is in seconds of processor time, so that a busy machine changes no outcome; by the clock it may take
    `patience` times as long. `memory` is in GiB.
    """
    torch.set_num_threads(1)  # before the fork: threads do not survive it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("normfix.api")
        import_module(entry.library)  # once, for all children
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(entry, theirs, limit, memory, examination), daemon=True)
    start = time.perf_counter()
    child.start()
    theirs.close()
    row: dict[str, Any] = {"name": entry.name, "library": entry.library, "step": "start"}
    ended = False
    while not ended and (left := start + limit * patience - time.perf_counter()) > 0 and ours.poll(left):
        try:
            row = ours.recv()
        except EOFError:
            ended = True
    if not ended:
        child.kill()
    child.join()
    if "category" not in row:
        crashed = ended and "place" not in row and child.exitcode != -signal.SIGXCPU
        row["category"] = "failed" if crashed else "timeout"
        ending = f", the process ended with {child.exitcode}" if crashed else ""
        row["cause"] = f"during {row['step']}{_reason(row)}{ending}"
    row.setdefault("seconds", round(time.perf_counter() - start, 1))
    return row


def missing(entry: Entry) -> bool:
    """Tell whether the library of an entry is not installed here."""
    return find_spec(entry.library) is None


def run_all(
    entries: Iterable[Entry],
    results: Path,
    limit: int,
    *,
    memory: int = MEMORY,
    examination: Examination = examine,
) -> Iterator[dict[str, Any]]:
    """Examine what has no row yet, appending a row to the file after each."""
    for entry in entries:
        row = apart(entry, limit, memory=memory, examination=examination)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        yield row


def done_before(results: Path) -> dict[str, dict[str, Any]]:
    """Return the last row of each name."""
    if not results.exists():
        return {}
    return {row["name"]: row for row in map(json.loads, results.read_text().splitlines())}


def _reason(row: dict[str, Any]) -> str:
    """Say where a network was when its time was over, and what one forward pass of it costs."""
    place = f", in {row['place']}" if "place" in row else ""
    match row.get("pass_s"):
        case [single, double]:
            cost = f"; a pass of the example takes {single} s in float32 and {double} s in float64"
        case float() as untiled:
            cost = f"; the untiled pass takes {untiled} s"
        case _:
            cost = ""
    return place + cost


def _place(frame: FrameType | None) -> str:
    """Return the functions of the package that were at work, the innermost first."""
    found: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "normfix" in path.parts and path.parent.name not in ("normfix", "networks"):
            name = f"{frame.f_code.co_name} of {path.parent.name}/{path.name}"
            found += [name] if name not in found and "<" not in name else []
        frame = frame.f_back
    return " < ".join(found[:4])


def _child(entry: Entry, pipe: Connection, limit: int, memory: int, examination: Examination) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 60))
    send: Callable[[dict[str, Any]], None] = pipe.send
    seen: dict[str, Any] = {}

    def report(row: dict[str, Any]) -> None:
        seen.update(row)
        send(row)

    def over(_signal: int, frame: FrameType | None) -> None:
        send(seen | {"place": _place(frame)})
        os.kill(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGXCPU, over)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = examination(entry, report)
        send(row | {"seconds": round(time.process_time(), 1)})
