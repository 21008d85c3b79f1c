"""What is whole of a run: a line per block with what was measured of it, and one per barrier.

A line is written out when its block is on the disk, and each carries a digest over the run and all lines before it. A
last line that a kill cut short is dropped, and its block computed again; a line that was changed, moved, repeated or
taken from another run is found.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from normfix.errors import NormfixError
from normfix.layers.laws import Observed, Part
from normfix.layers.moments import Moments

__all__ = ["Journal", "Unwritten", "Written", "is_own_file", "require_file"]

Measured = dict[str, Any]
"""What was measured of a block, by site; under SEALS, the seals of the chunks that it wrote."""

SEALS = ".seals"
"""No module has this path."""


class Journal(Protocol):
    """Which blocks of which stages are whole; `lasts` if a later process will be told."""

    @property
    def lasts(self) -> bool:
        """Tell whether it outlives the process."""

    def blocks(self, stage: int) -> dict[int, Measured]:
        """Return what was measured of the blocks that are whole, by number."""

    def settled(self, stage: int) -> str | None:
        """Return the digest of the statistics after a stage that is done; None if it is not."""

    def note(self, stage: int, block: int, measured: Measured) -> None:
        """Say that a block is whole."""

    def settle(self, stage: int, digest: str) -> None:
        """Say that a stage is done."""


class Unwritten:
    """Forgets: the journal of a run that ends with its process."""

    lasts = False

    def blocks(self, stage: int) -> dict[int, Measured]:
        """Return nothing; see Journal."""
        return {}

    def settled(self, stage: int) -> str | None:
        """Return nothing; see Journal."""
        return None

    def note(self, stage: int, block: int, measured: Measured) -> None:
        """Forget it; see Journal."""

    def settle(self, stage: int, digest: str) -> None:
        """Forget it; see Journal."""


class Written:
    """A journal in a file, read back when it is opened.

    Args:
        path: of the file.
        run: what is computed, as a digest; the journal of another run is not taken for this one's.
    """

    lasts = True

    def __init__(self, path: Path, run: str = "") -> None:
        self._path = path
        self._blocks: dict[int, dict[int, Measured]] = {}
        self._settled: dict[int, str] = {}
        self._sum = _sum(b"", run.encode())
        whole = 0
        for number, line in enumerate(self._lines()):
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                raise self._damaged(number + 1) from error
            whole += len(line) + _HEAD + 1
        try:
            self._file = path.open("ab")
            self._file.truncate(whole)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    @property
    def count(self) -> int:
        """Return how many blocks are whole."""
        return sum(map(len, self._blocks.values()))

    def blocks(self, stage: int) -> dict[int, Measured]:
        """Return what was measured; see Journal."""
        return self._blocks.get(stage, {})

    def settled(self, stage: int) -> str | None:
        """Return the digest; see Journal."""
        return self._settled.get(stage)

    def note(self, stage: int, block: int, measured: Measured) -> None:
        """Write it down; see Journal."""
        self._append({"stage": stage, "block": block, "measured": encoded(measured)})
        self._blocks.setdefault(stage, {})[block] = measured

    def settle(self, stage: int, digest: str) -> None:
        """Write it down; see Journal."""
        self._append({"stage": stage, "statistics": digest})
        self._settled[stage] = digest

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode()
        self._sum = _sum(self._sum, line)
        try:
            self._file.write(b"%s %s\n" % (self._sum.hex().encode(), line))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _lines(self) -> list[bytes]:
        """Return the lines whose sums are right; all but the last must be."""
        if not os.path.lexists(self._path):
            return []
        require_file(self._path)
        try:
            *whole, torn = self._path.read_bytes().split(b"\n")
        except OSError as error:
            raise self._failed(error) from error
        found: list[bytes] = []
        for number, text in enumerate(whole):
            line = text[_HEAD:]
            sum_ = _sum(self._sum, line)
            if text[:_HEAD] != sum_.hex().encode() + b" ":
                if number == len(whole) - 1 and not torn:
                    break
                raise self._damaged(number + 1)
            self._sum = sum_
            found.append(line)
        return found

    def _take(self, entry: dict[str, Any]) -> None:
        stage = entry["stage"]
        if "block" in entry:
            self._blocks.setdefault(stage, {})[entry["block"]] = decoded(entry["measured"])
        else:
            self._settled[stage] = entry["statistics"]

    def _failed(self, error: OSError) -> NormfixError:
        reason = error.strerror or str(error)
        return NormfixError(
            "NF327",
            f"the run's journal cannot be read or written: {reason}. Make room there, or name another --store.",
            where=str(self._path),
        )

    def _damaged(self, line: int) -> NormfixError:
        return NormfixError(
            "NF329",
            f"line {line} is not what was written, so what was computed cannot be told. Delete the folder to start "
            "anew.",
            where=str(self._path),
        )


_HEAD = 17
"""Bytes of a line's digest and the space after it."""


def _sum(before: bytes, line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8, key=before).digest()


_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Moments, Part, Observed)}


def is_own_file(path: Path) -> bool:
    """Tell whether a file stands there: a pipe waits for ever, a device never ends, a link leads elsewhere."""
    return path.is_file() and not path.is_symlink()


def require_file(path: Path) -> None:
    """Refuse what is no file of a run's own.

    Raises:
        NormfixError: NF329.
    """
    if not is_own_file(path):
        raise NormfixError(
            "NF329",
            f"it is no file that a run wrote, so the run cannot be continued. Delete {path.parent.parent} to start "
            "anew.",
            where=str(path),
        )


def encoded(value: Any) -> Any:
    """Return what sites measure as JSON that gives back the same bits."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().numpy()
        data = base64.b64encode(array.tobytes()).decode()
        return {"tensor": str(array.dtype), "shape": list(array.shape), "data": data}
    if is_dataclass(value):
        return {
            "kind": type(value).__name__,
            **{f.name: encoded(getattr(value, f.name)) for f in fields(value)},
        }
    if isinstance(value, tuple | list):
        return [encoded(v) for v in value]
    if isinstance(value, dict):
        return {"sites": [[site, encoded(v)] for site, v in value.items()]}
    return value


def decoded(value: Any) -> Any:
    """Undo `encoded`; sequences come back as tuples."""
    if isinstance(value, list):
        return tuple(decoded(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        array = np.frombuffer(base64.b64decode(value["data"]), value["tensor"])
        return torch.from_numpy(array.copy()).reshape(value["shape"])
    if "sites" in value:
        return {site: decoded(v) for site, v in value["sites"]}
    return _KINDS[value["kind"]](**{name: decoded(v) for name, v in value.items() if name != "kind"})
