"""What a run computes, by parts: two runs whose parts agree end with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from normfix.errors import NormfixError
from normfix.images.sources import Image
from normfix.networks.devices import bytes_of
from normfix.tiling.stages.chunks import sync
from normfix.tiling.stages.journal import require_file
from normfix.tiling.stages.schedule import Schedule

__all__ = ["Parts", "describe", "digest_of_parts", "require_same", "write_manifest"]

Parts = dict[str, str]
"""What is computed, in words or as a digest, by what a user would call it."""

_FORMAT = "2"


def describe(
    schedule: Schedule, images: Sequence[Image], tile: Sequence[int], statistics: Sequence[str]
) -> Parts:
    """Return all that the bytes of a run depend on; not workers, budget, engine or where the result goes.

    Threads and the processor's instructions are among it: they change the order of sums.
    """
    program = schedule.program
    value = program.image.meta["val"]
    return {
        "format": _FORMAT,
        "versions": f"normfix {_version()}, torch {torch.__version__}",
        "network": _digest(
            *(stage.run.code for stage in schedule.stages),
            repr(
                [(stage.grid, reach) for stage, reach in zip(schedule.stages, schedule.reaches, strict=True)]
            ),
        ),
        "weights": _weights(schedule),
        "images": "; ".join(image.fingerprint() for image in images),
        "blocks": "x".join(map(str, tile)),
        "statistics": ", ".join(statistics) or "as they are",
        "precision": f"{str(value.dtype).removeprefix('torch.')} on {value.device}",
        "threads": str(torch.get_num_threads()),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _version() -> str:
    """Return this package's version; its metadata is not there where the source is run as it lies."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)


def require_same(path: Path, parts: Parts) -> bool:
    """Compare with the manifest of an unfinished run; tell whether there is one.

    Raises:
        NormfixError: NF328 if it is of something else, NF329 if it cannot be read.
    """
    if not os.path.lexists(path):
        return False
    require_file(path)
    try:
        with path.open(encoding="utf-8") as file:
            found = json.loads(file.read(_LONGEST))
        known = {str(name): str(value) for name, value in found["parts"].items()}
        told = found["digest"]
    except OSError as error:
        raise _failed(path, error) from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise _damaged(path) from error
    if told != digest_of_parts(known):
        raise _damaged(path)
    other = [name for name in parts if known.get(name) != parts[name]]
    if other:
        shown = ", ".join(
            f"{name} ({known.get(name, 'none')}, now {parts[name]})" if name in _SHOWN else name
            for name in other
        )
        raise NormfixError(
            "NF328",
            f"it holds an unfinished run with other {shown}. Repeat the command that began it, name another --store, "
            f"or delete {path.parent.parent} to give that run up.",
            where=str(path.parent.parent),
        )
    return True


_LONGEST = 1 << 24
"""Characters of a manifest that are read; an image takes a hundred."""
_SHOWN = ("versions", "blocks", "statistics", "precision", "threads", "processor")


def digest_of_parts(parts: Parts) -> str:
    """Return what stands for a run: equal for two runs whose parts agree."""
    return _digest(repr(sorted(parts.items())))


def write_manifest(path: Path, parts: Parts) -> None:
    """Write the manifest, whole or not at all."""
    content = {"parts": parts, "digest": digest_of_parts(parts)}
    _write_whole(path, json.dumps(content, indent=1))


def _write_whole(path: Path, text: str) -> None:
    """Write a file under another name, wait until it is on the disk and give it its name.

    Raises:
        NormfixError: NF327 if it cannot be written.
    """
    draft = path.with_name(f".{path.name}-draft")
    try:
        draft.write_text(text, encoding="utf-8")
        sync(draft)
        draft.replace(path)
        if os.name == "posix":
            sync(path.parent)
    except OSError as error:
        raise _failed(path, error) from error


def _weights(schedule: Schedule) -> str:
    found = hashlib.sha256()
    body = schedule.program.body
    for name, value in (*body.named_parameters(), *body.named_buffers()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(bytes_of(value))
    return found.hexdigest()[:16]


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _failed(path: Path, error: OSError) -> NormfixError:
    reason = error.strerror or str(error)
    return NormfixError(
        "NF327",
        f"it cannot be read or written: {reason}. Make room there, or name another --store.",
        where=str(path),
    )


def _damaged(path: Path) -> NormfixError:
    return NormfixError(
        "NF329",
        f"it is not what was written, so the run cannot be continued. Delete {path.parent.parent} to start anew.",
        where=str(path),
    )
