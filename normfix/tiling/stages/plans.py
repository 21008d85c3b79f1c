"""Plans of stages that outlast the process, in a file beside a saved network: what was measured and proved of a cut.

Nothing of it is believed for its own sake. A plan counts for a cut whose graphs and weights have the fingerprints that
it states, under the releases of normfix and torch that made it, in a file that nobody edited, as far as the graph of
each stage gives the reach that it states; anything else is measured and proved anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from normfix.tiling.stages.reach import Reach

__all__ = ["FILE", "Plan", "keep", "kept"]

FILE = "stages.json"
_SCHEMA = 1
_MOST = 8
"""Plans in a file: to measure and to predict, for images that the stride divides and others, on two devices."""
_LARGEST = 1 << 24
"""Bytes of a file, at most."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A cut that was proved: its fingerprint, and of its stages in order each its own and its reach."""

    cut: str
    stages: tuple[tuple[str, Reach], ...]


def kept(folder: Path) -> list[Plan]:
    """Return the plans beside a network; none where there is no file, or one that cannot be believed."""
    path = folder / FILE
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return []
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("sha256") != _seal(content) or content["made_by"] != _made_by():
            return []
        return [_plan(one) for one in content["plans"][:_MOST]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return []


def keep(folder: Path, plans: Sequence[Plan]) -> None:
    """Write plans into a folder that is being written."""
    content: dict[str, Any] = {
        "schema": _SCHEMA,
        "made_by": _made_by(),
        "plans": [
            {"cut": plan.cut, "stages": [[name, reach.grid, reach.halo] for name, reach in plan.stages]}
            for plan in plans[:_MOST]
        ],
    }
    content["sha256"] = _seal(content)
    (folder / FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _plan(one: dict[str, Any]) -> Plan:
    stages = tuple(
        (
            str(name),
            Reach(tuple(int(n) for n in grid), tuple((int(before), int(after)) for before, after in halo)),
        )
        for name, grid, halo in one["stages"]
    )
    return Plan(str(one["cut"]), stages)


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _made_by() -> list[str]:
    package = sys.modules[__name__.partition(".")[0]]
    return [f"normfix {package.__version__}", f"torch {torch.__version__}"]
