"""Saved and loaded in a fresh process, a network must answer what it answers here."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from normfix.networks.calling import Caller, evaluating
from normfix.networks.naming import name_of
from normfix.networks.numerics import exact_arithmetic
from normfix.networks.provenance import provenance_of
from normfix.records.saved import Source
from normfix.storage.fresh import run_fresh
from normfix.storage.loading import load

__all__ = ["answer", "answers_of", "importable"]

_SCRIPT = "import sys; from normfix.storage.reloading import answer; answer(sys.argv[1])"
_ASKED, _GIVEN, _ANSWERED = "asked.json", "given.safetensors", "answered.safetensors"


def answers_of(saved: Path, source: Source, caller: Caller, inputs: Sequence[Tensor]) -> list[Tensor] | str:
    """Load what was saved in a fresh process and return its outputs for the inputs, or why there are none.

    Args:
        saved: folder or .pt2 file; what passes between the processes is written beside it.
        source: of the network; a factory is called there.
        caller: its `forward_fn` must be importable.
        inputs: all of one device.
    """
    named = source.kind == "factory" and saved.is_dir()
    asked = {
        "saved": str(saved),
        "arch": source.spec if named else None,
        "args": json.loads(source.args) if named else None,
        "output": caller.output,
        "forward": importable(caller.forward_fn),
        "device": str(inputs[0].device),
        "threads": torch.get_num_threads(),
    }
    (saved.parent / _ASKED).write_text(json.dumps(asked), encoding="utf-8")
    given = {str(n): image.cpu().contiguous() for n, image in enumerate(inputs)}
    (saved.parent / _GIVEN).write_bytes(save(given))
    if reason := run_fresh(_SCRIPT, str(saved.parent)):
        return reason
    answered = load_file(saved.parent / _ANSWERED)
    return [answered[str(n)].to(image.device) for n, image in enumerate(inputs)]


def answer(folder: str) -> None:
    """Load what was saved and write its outputs: what runs in the fresh process."""
    asked = json.loads((Path(folder) / _ASKED).read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    forward = asked["forward"] and pkgutil.resolve_name(asked["forward"])
    model: nn.Module = load(asked["saved"], arch=asked["arch"], args=asked["args"]).to(asked["device"])
    caller = Caller.of(provenance_of(model), forward, asked["output"])
    given = load_file(Path(folder) / _GIVEN)
    with evaluating(model), exact_arithmetic():
        outputs = {name: caller(model, image.to(asked["device"])) for name, image in given.items()}
    answered = {name: y.cpu().contiguous() for name, y in outputs.items()}
    (Path(folder) / _ANSWERED).write_bytes(save(answered))


def importable(function: Callable[..., Any] | None) -> str | None:
    """Return the name by which another process finds a function, "" if it has none; None for no function."""
    return None if function is None else name_of(function) or ""
