"""What was written, opened by its own library in a process where normfix cannot be imported."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from normfix.giving.refusals import NotAlone
from normfix.networks.calling import Caller
from normfix.networks.numerics import IDENTITY, deviation
from normfix.storage.fresh import run_fresh

__all__ = ["alone_sd"]

_HEAD = """
import sys
sys.modules["normfix"] = None
folder, file, exchange, output, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
"""
_TAIL = """
from safetensors.torch import load_file, save_file
given = load_file(exchange + "/image.safetensors")["image"]
results = {}
for name, image in (("output", given), ("double", given.double())):
    with torch.no_grad():
        network.eval()
        result = network.to(image.dtype)(image)
    if output:
        result = result[int(output) if output.isdigit() and not hasattr(result, "keys") else output]
    results[name] = result.clone().contiguous()
save_file(results, exchange + "/output.safetensors")
"""

_DOUBLE = 1e-9
"""In sd: what two processes may differ by in float64."""


def alone_sd(
    folder: Path, file: str, loader: str, caller: Caller, image: Tensor, *, wanted: Tensor, double: Tensor
) -> float:
    """Return how far its own library's output is from what is wanted, in sd of that.

    In float64 a file is told from another whose weights differ by a rounding.

    Args:
        folder: what was written, in a draft's folder, where nothing that is left by a kill stays.
        file: name of the network's file of weights in it.
        loader: Python that makes `network` of `folder` and `file`, strictly, with the library alone.
        caller: says which output counts.
        image: (1, C, *space) on the CPU.
        wanted: the converted network's output for it.
        double: in float64, the output for it of the library's network that was written.

    Raises:
        NotAlone: NF554 if it does not load there or gives something else.
    """
    script = f"{_HEAD}{loader}{_TAIL}"
    with tempfile.TemporaryDirectory(prefix="normfix-", dir=folder.parent) as exchange:
        save_file({"image": image.contiguous()}, Path(exchange) / "image.safetensors")
        output = "" if caller.output is None else str(caller.output)
        reason = run_fresh(script, str(folder), file, exchange, output, str(torch.get_num_threads()))
        if reason:
            raise _refused(f"its own library does not load what was written: {reason}")
        actual = load_file(Path(exchange) / "output.safetensors")
    # which libraries build their networks in, whatever the file holds
    single = IDENTITY[torch.float32]
    apart = _within(max(IDENTITY[wanted.dtype], single), actual["output"], wanted)
    _within(single if wanted.dtype == torch.float64 else _DOUBLE, actual["double"], double)
    return apart


def _within(bound: float, actual: Tensor, wanted: Tensor) -> float:
    if actual.shape != wanted.shape:
        raise _refused(f"its own library gives an output of shape {tuple(actual.shape)}")
    apart = deviation(actual, wanted, float(wanted.double().std()))[0]
    if apart > bound:
        raise _refused(
            f"its own library gives an output that differs by {apart:.1g} sd, more than {bound:.0e}"
        )
    return apart


def _refused(why: str) -> NotAlone:
    return NotAlone("NF554", f"{why}. Nothing was kept.")
