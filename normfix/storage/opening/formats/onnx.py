"""ONNX: named and refused, since what it holds is a graph of another runtime's operators and no modules to convert."""

from __future__ import annotations

from pathlib import Path

from normfix.errors import NormfixError
from normfix.storage.opening.request import Loaded, Request

__all__ = ["open_network", "recognises"]


def recognises(path: Path) -> bool:
    """Recognise a file by its ending: an ONNX file begins with no mark of its own."""
    return path.is_file() and path.suffix == ".onnx"


def open_network(path: Path, request: Request) -> Loaded:
    """Refuse it.

    Raises:
        NormfixError: NF596, with what to do.
    """
    raise NormfixError(
        "NF596",
        "an ONNX file holds a graph of ONNX operators and no modules of PyTorch. The converters to PyTorch that were "
        "tried (onnx2torch, onnx2pytorch) compute sizes with tensors, so that networks with GroupNorm or resizing "
        "cannot be written as ONNX again. Convert what it was exported from: its weights with --arch, TorchScript, or "
        "a program of torch.export.save. The fixed network is written as ONNX again: convert -o FIXED.onnx.",
        where=str(path),
    )
