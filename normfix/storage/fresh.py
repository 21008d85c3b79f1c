"""A new Python, where nothing of this one can help what is tried there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

__all__ = ["run_fresh"]


_NOT_HERE = "import sys; sys.path[:] = filter(None, sys.path)\n"
"""Python puts the working directory first for a command."""


def run_fresh(script: str, *words: str, seconds: float | None = None) -> str:
    """Run a script in a fresh process that finds modules where this one does; return '' or why it failed.

    After so many seconds it is ended, which is a reason.

    That is not the working directory, where files of others may lie, unless this process looks there too.
    """
    paths = os.pathsep.join(p or "." for p in sys.path)
    try:
        result = subprocess.run(
            [sys.executable, "-c", f"{_NOT_HERE}{script}", *words],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {seconds:.0f} seconds"
    if result.returncode and result.returncode == -getattr(signal, "SIGXCPU", 0):
        return "it computed for longer than it may"
    return (result.stderr.strip().splitlines() or ["it died without a word"])[-1] if result.returncode else ""
