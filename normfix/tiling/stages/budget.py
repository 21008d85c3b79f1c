"""How many bytes are held between stages, in memory and on disk, at a time and at most."""

from __future__ import annotations

__all__ = ["Budget"]


class Budget:
    """Bytes that may be held in memory; None means no limit.

    `lasting` says that every value is on disk, those that fit in memory as well: what a run can continue from.
    """

    def __init__(self, limit: int | None, *, lasting: bool = False) -> None:
        self.limit, self.lasting = limit, lasting
        self.used = self.most = self.on_disk = self.most_on_disk = 0

    def fits(self, size: int) -> bool:
        """Tell whether a value fits in memory beside what is there."""
        return self.limit is None or self.used + size <= self.limit

    def take(self, size: int) -> bool:
        """Reserve room for a value; tell whether it fits in memory."""
        fits = self.fits(size)
        if fits:
            self.used += size
            self.most = max(self.most, self.used)
        if self.lasting or not fits:
            self.on_disk += size
            self.most_on_disk = max(self.most_on_disk, self.on_disk)
        return fits

    def give(self, size: int, in_memory: bool) -> None:
        """Return what was taken."""
        if in_memory:
            self.used -= size
        if self.lasting or not in_memory:
            self.on_disk -= size
