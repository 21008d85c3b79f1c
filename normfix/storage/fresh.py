"""A new Python, where nothing of this one can help what is tried there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["interpreter", "run_alone", "run_fresh"]


_NOT_HERE = "import sys; sys.path[:] = filter(None, sys.path)\n"
"""Python puts the working directory first for a command."""

_END = "normfix: all of it was run"
"""Printed last: a network's code can end the process before, and well."""


def run_fresh(script: str, *words: str, seconds: float | None = None) -> str:
    """Run a script in a fresh process that finds modules where this one does; return '' or why it failed.

    After so many seconds it is ended, which is a reason.

    That is not the working directory, where files of others may lie, unless this process looks there too.
    """
    paths = os.pathsep.join(p or "." for p in sys.path)
    try:
        whole = f"{_NOT_HERE}{script}\nprint({_END!r})\n"
        result = _run(["-c", whole, *words], {**os.environ, "PYTHONPATH": paths}, seconds)
    except subprocess.TimeoutExpired:
        return f"it took longer than {seconds:.0f} seconds"
    if result.returncode and result.returncode == -getattr(signal, "SIGXCPU", 0):
        return "it computed for longer than it may"
    if not result.returncode and _END not in result.stdout:
        return "what it ran ended the process before it was done"
    return _reason(result)


def run_alone(script: Path, *words: str) -> tuple[str, str]:
    """Run a file in a fresh process that finds modules as a new shell does; return what it printed and why it failed.

    The reason is "" where it did not fail.
    """
    result = _run([str(script), *words], {k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    return result.stdout, _reason(result)


def interpreter() -> str:
    """Return the program that runs Python here."""
    return sys.executable


def _run(
    words: Sequence[str], environment: Mapping[str, str], seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [interpreter(), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )


def _reason(result: subprocess.CompletedProcess[str]) -> str:
    if not result.returncode:
        return ""
    return (result.stderr.strip().splitlines() or ["it died without a word"])[-1]
