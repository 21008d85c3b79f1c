"""What an exported form of a converted network is, and how it was compared in a fresh process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from normfix.records.encoding import Record

__all__ = ["Export"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export(Record):
    """One file for another runtime, and what that runtime gave for it.

    `versions` are pairs such as ("opset", "20"). `free` are the dimensions of (N, C, *space) whose extent is free,
    `shapes` the inputs that were compared. `max_sd` is the largest difference from the converted network, in standard
    deviations of its output, `tiles_sd` that of stitched tiles from the whole, both computed by the form itself; None
    where tiles could not be compared, and `note` says why. Each difference was held against the larger of 1e-5 and
    four noise floors, of which the widest was `limit_sd`. `sizes` are those it may be used for, () for all.
    """

    form: Literal["onnx", "torchscript"]
    versions: tuple[tuple[str, str], ...]
    free: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    max_sd: float
    tiles_sd: float | None
    limit_sd: float
    sizes: tuple[str, ...] = ()
    note: str = ""

    @property
    def words(self) -> str:
        """Say it in a line."""
        axes = ("batch", "channels", "depth", "height", "width")
        names = [axes[d] if d < 2 else axes[d - len(self.shapes[0])] for d in self.free]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions)
        tiles = self.note if self.tiles_sd is None else f"its tiles {self.tiles_sd:.1e} sd from its whole"
        sizes = f" Only for {'; '.join(self.sizes)}." if self.sizes else ""
        return (
            f"{self.form} ({versions}), free: {', '.join(names) or 'nothing'}; in a fresh process "
            f"{self.max_sd:.1e} sd from the network, {tiles} (limit {self.limit_sd:.0e}).{sizes}"
        )
