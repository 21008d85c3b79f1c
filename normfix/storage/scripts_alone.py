"""Make a program of a TorchScript archive: what a fresh process runs, with little memory.

Arguments: a folder with script.pt, the bytes by which the process may grow, the number of threads. It writes
program.pt2 and answer.json into the folder.
"""

from __future__ import annotations

import json
import math
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from normfix.images.headroom import lacks_memory, written_bytes
from normfix.networks.calling import failures
from normfix.networks.graph.isolation import silence
from normfix.networks.quiet_imports import import_compiler
from normfix.storage.script_source import objection
from normfix.storage.transcription import Refusal, transcribed

if sys.platform == "linux":
    import resource

__all__ = ["main"]

_READING, _BYTES_A_SECOND = 10, 4 << 20
"""Seconds of processor time to read and check an archive in, and bytes of it for each more; MONAI's networks take 2."""


def main() -> None:
    """Transcribe the archive that the arguments name, and write down what came of it."""
    folder, room, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    import_compiler()
    _bound(room)
    answer: dict[str, Any]
    try:
        _require_inert(folder / "script.pt")
        with _hurried((folder / "script.pt").stat().st_size) as take_time:
            transcript = transcribed(
                lambda: torch.jit.load(folder / "script.pt", map_location="cpu"),  # type: ignore[no-untyped-call]
                take_time,
            )
        with silence():
            torch.export.save(transcript.program, folder / "program.pt2")
        dtype = str(transcript.dtype).removeprefix("torch.")
        answer = {"found": f"within {transcript.max_sd:.1g} sd of it in {dtype}"}
    except Refusal as refusal:
        answer = {"refused": str(refusal), "code": refusal.code}
    except failures() as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        answer = {"refused": reason, "code": "NF121" if lacks_memory(error) else "NF123"}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _require_inert(path: Path) -> None:
    """Refuse an archive whose source would run when it is read, before it is."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            met = objection(archive.read(name)) if name.endswith(".py") else ""
            if met:
                raise Refusal(f"its {name[:80]} holds {met}", "NF121")


@contextmanager
def _hurried(size: int) -> Iterator[Callable[[], None]]:
    """Let the process compute for a few seconds and no more, where the system can, until what is given is called.

    Reading and checking is all in C++, which no exception of Python stops: the system ends the process.
    """
    if sys.platform != "linux":
        yield lambda: None
        return
    _limit_(resource.RLIMIT_CPU, math.ceil(time.process_time()) + _READING + size // _BYTES_A_SECOND)

    def take_time() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))

    try:
        yield take_time
    finally:
        take_time()


def _bound(room: int) -> None:
    """Let the process grow by so many bytes and no more, where the system can."""
    if sys.platform == "linux":
        _limit_(resource.RLIMIT_DATA, written_bytes() + room)


def _limit_(kind: int, most: int) -> None:
    """Let the process take so much of something and no more, or less where it is held to less."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
