"""One small module per library: what it writes, and how its own tool reads that.

To add a library, write such a module and name it in LIBRARIES: the first that recognises the original writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from normfix.giving.formats import bioimageio, checkpoint, monai_bundle, nnunet, plain, torch_em, unet3d
from normfix.giving.gift import Gift
from normfix.records.returns import Change
from normfix.records.saved import Source
from normfix.records.sites import Scan
from normfix.storage.opening.request import Request

__all__ = ["LIBRARIES", "Library"]


class Library(Protocol):
    """What each module of this package offers."""

    NAME: str
    """The format, as its users call it."""
    LOADER: str
    """Python that makes `network` of `folder` and the name `file` of its weights, strictly, by the library alone."""

    def recognises(self, original: Path | None) -> bool:
        """Tell whether this library wrote the original; a state dict has none."""
        ...

    def weights(self, original: Path) -> tuple[Path, ...]:
        """Return the original's files of weights, one a network."""
        ...

    def builder(self, original: Path, request: Request) -> Source | None:
        """Return what its files say that builds the network of one file of weights; None where the caller says it."""
        ...

    def place(self, weights: Path | None) -> str:
        """Return the name that a network's file of weights has in what is written."""
        ...

    def candidates(self, source: Source) -> Iterator[Mapping[str, Any]]:
        """Return arguments with which the library may build the network with BatchNorms, the likeliest first."""
        ...

    def write(self, draft: Path, gifts: Sequence[Gift]) -> tuple[Change, ...]:
        """Write its files into an empty folder; return in what they differ from the original's.

        `gifts` are several only where an original has several files of weights.
        """
        ...

    def advice(self, scan: Scan) -> str:
        """Return how its tool is told halo and step, in Markdown."""
        ...


LIBRARIES: tuple[Library, ...] = (
    bioimageio,
    nnunet,
    monai_bundle,
    unet3d,
    torch_em,
    checkpoint,
    plain,
)
"""The libraries, most particular first."""
