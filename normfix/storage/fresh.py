"""A new Python, where nothing of this one can help what is tried there."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["run_fresh"]


def run_fresh(script: str, *words: str) -> str:
    """Run a script in a fresh process that finds modules where this one does; return '' or why it failed."""
    paths = os.pathsep.join(p or "." for p in sys.path)
    result = subprocess.run(
        [sys.executable, "-c", script, *words],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    return (result.stderr.strip().splitlines() or ["it died without a word"])[-1] if result.returncode else ""
