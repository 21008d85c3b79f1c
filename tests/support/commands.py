"""The command line as tests run it: what a run gives, and a run on a terminal."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Run", "on_terminal"]


class Run(NamedTuple):
    """What a run of the command line gave."""

    code: int
    out: str
    err: str


def on_terminal(command: Sequence[str], environment: Mapping[str, str], *streams: str) -> bytes:
    """Run a command of whose streams ("stdout", "stderr") these are a terminal; return all that it wrote there."""
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(
        command,
        stdout=child if "stdout" in streams else subprocess.DEVNULL,
        stderr=child if "stderr" in streams else subprocess.DEVNULL,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(child)
    seen = b""
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:
            break
        if not data:
            break
        seen += data
    assert process.wait() == 0
    os.close(parent)
    return seen
