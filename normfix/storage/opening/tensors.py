"""Read .safetensors: names, types, shapes and bytes, and nothing that could run."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from normfix.errors import NormfixError
from normfix.storage.opening.archives import start_of
from normfix.storage.opening.request import unreadable

__all__ = ["read_weights"]

_LARGEST_HEADER = 32 << 20
"""A header takes about 100 bytes a tensor; reading JSON takes ten times its size in memory."""
_TENSORS = 150_000
"""The largest networks have ten thousand; those of no elements take no room in a file."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file.

    Raises:
        NormfixError: NF101 if it is missing, truncated or malformed, NF121 if its header is huge.
    """
    length = int.from_bytes(start_of(path, 8).ljust(8, b"\0"), "little")
    try:
        if length > path.stat().st_size:
            raise unreadable(path, "its header is longer than the file")
        if length > _LARGEST_HEADER:
            raise NormfixError(
                "NF121", f"its header claims {length} bytes. It is not opened.", where=str(path)
            )
        if start_of(path, 8 + length).count(b"{") > _TENSORS:
            raise NormfixError(
                "NF121", f"its header names more than {_TENSORS} tensors. It is not opened.", where=str(path)
            )
        return load_file(path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise unreadable(path, error) from error
