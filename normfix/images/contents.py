"""What was read of an image, window by window, as digests: whether it is still the same is asked of its contents.

Size and times of a file are looked at before and after each window is read. Where they changed, everything that was
read so far is read again from the file as it is then: if it agrees, the file was only touched, and reading goes on; if
not, what was computed would be of two images. A window that is read twice must be the same twice, whatever times say.
Where the file was written to before all of it was read, nothing can tell what the rest was, and it is refused.

A program that has mapped a file to write to it changes it without changing its times, once it has begun. So where
values lie in a file as they are (.npy, .nii, plain TIFF), what was read is read once more when the work is done
(`Contents.confirm`): of that moment is then all that was computed from.

So without a change this costs a digest of each window (about a gigabyte per second) and a look at the file, and
reading such files twice; after a change, reading again what was read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from normfix.errors import NormfixError
from normfix.images.axes import changed_meanwhile, digest_of_array
from normfix.images.formats.opened import ArrayLike, ChangedError
from normfix.images.origins import Origin, Stamp
from normfix.images.sources import Span

__all__ = ["Contents", "Readable"]

Spans = tuple[Span, ...]

_TRIES = 5
"""How often a file may change while what was read of it is compared."""


class Readable(Protocol):
    """An image, opened anew."""

    @property
    def array(self) -> ArrayLike:
        """Return the array."""

    @property
    def layout(self) -> str:
        """Return its axes, extents and dtype."""

    def raw(self, spans: Sequence[Span]) -> NDArray[Any]:
        """Return a window as the array has it."""

    def close(self) -> None:
        """Let the file go."""


class Contents:
    """The digests of what was read of a file, and the stamp that it had then.

    `complete` is whether all of it was read; `array` what reads it now, where it had to be opened anew; `plain` whether
    its values lie in the file as they are.
    """

    def __init__(self, origin: Origin, *, plain: bool = False) -> None:
        self.origin, self.plain = origin, plain
        self.complete = False
        self.array: ArrayLike | None = None
        self._seen = origin.seen
        self._digests: dict[Spans, bytes] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_digests": dict(self._digests), "_lock": None, "array": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def known(self, spans: Sequence[Span]) -> bytes | None:
        """Return the digest of a window, if it was read."""
        return self._digests.get(tuple(spans))

    def note(self, spans: Sequence[Span], window: NDArray[Any]) -> None:
        """Keep the digest of a window that was read now.

        Raises:
            NormfixError: NF331 if it was another before.
        """
        digest = digest_of_array(window)
        if self._digests.setdefault(tuple(spans), digest) != digest:
            raise self._changed()

    def settle(self, layout: str, reopen: Callable[[], Readable]) -> bool:
        """Compare what was read with the file as it is, if its stamp changed; tell whether it did.

        Raises:
            NormfixError: NF331 if it is not the same image.
        """
        if self.origin.now() == self._seen:
            return False
        with self._lock:
            now = self.origin.now()
            if now != self._seen:
                self.compare(layout, reopen, written=_written(now) != _written(self._seen))
        return True

    def confirm(self, layout: str, reopen: Callable[[], Readable]) -> None:
        """Read again what was read in this process, where the file's times do not tell whether it changed.

        Raises:
            NormfixError: NF331 if it is not the same image.
        """
        self.settle(layout, reopen)
        if self.plain and self._digests:
            self.compare(layout, reopen, written=False)

    def compare(self, layout: str, reopen: Callable[[], Readable], *, written: bool) -> None:
        """Compare what was read with the file as it is, and go on from there.

        Args:
            layout: of the image when it was opened.
            reopen: opens it as it is now.
            written: whether it was written to since, as far as times tell.

        Raises:
            NormfixError: NF331 if it is not the same image, or that cannot be known.
        """
        with self._lock:
            for _ in range(_TRIES):
                now = self.origin.now()
                if _sizes(now) != _sizes(self._seen) or (written and not self.complete):
                    raise self._changed(gone=not now)
                try:
                    self._same(layout, reopen)
                except ChangedError:
                    continue
                if self.origin.now() == now:
                    self._seen = now
                    return
            raise self._changed()

    def _same(self, layout: str, reopen: Callable[[], Readable]) -> None:
        """Read again what was read, and go on with a Zarr that was opened anew, whose chunks are known by then."""
        try:
            image = reopen()
        except Exception as error:
            raise self._changed() from error
        try:
            if image.layout != layout or any(
                digest_of_array(image.raw(spans)) != digest for spans, digest in list(self._digests.items())
            ):
                raise self._changed()
        except NormfixError as error:
            raise self._changed() from error
        finally:
            image.close()
        if self.origin.listing:
            self.array = image.array

    def _changed(self, *, gone: bool = False) -> NormfixError:
        return changed_meanwhile(self.origin.path, gone=gone)


def _sizes(stamp: Stamp) -> list[tuple[str, int]]:
    return [(name, size) for name, size, *_ in stamp]


def _written(stamp: Stamp) -> list[tuple[str, int, int]]:
    return [(name, size, written) for name, size, written, _ in stamp]
