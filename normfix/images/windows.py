"""Images that are read by window, whatever holds them: a file or any array-like object.

Nothing is read before a window is asked for, and never more than it needs. Values are scaled window by window with
numbers that were measured over the whole image (normfix.images.spread).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfix.errors import NormfixError
from normfix.images.axes import Channels, digest_of_array, settled_axes
from normfix.images.contents import Contents
from normfix.images.formats import why
from normfix.images.formats.opened import ArrayLike, ChangedError
from normfix.images.formats.placement import Placement
from normfix.images.scaling import not_finite, overflown
from normfix.images.sources import Span, slabs

__all__ = ["ArrayLike", "ScaledImage", "Unread", "windowed"]


def _nothing() -> None:
    """Close what needs no closing."""


@dataclass(frozen=True, slots=True)
class Unread:
    """An array-like image brought into the order (C, *space), still unread.

    `fixed` are axes of extent 1 that are no space and no channels. `close` lets a file go; leaving the context
    does so too. `contents` is what was read of the file so far, which `reopen` opens again where it changed or this
    window is sent to another process; `placement` what the file says of where its pixels lie; `notes` what a user
    should know of it; `planes` how many there are along the axis that it is cut along.
    """

    array: ArrayLike
    named: str
    fixed: tuple[int, ...] = ()
    where: str = "image"
    close: Callable[[], None] = _nothing
    contents: Contents | None = None
    reopen: Callable[[], Unread] | None = None
    placement: Placement = field(default_factory=Placement)
    notes: tuple[str, ...] = ()
    planes: int = 1

    def __reduce__(self) -> tuple[Any, ...]:
        if self.reopen is not None:
            return _reopened, (self.reopen, self.contents)
        return Unread, (self.array, self.named, self.fixed, self.where)

    def __enter__(self) -> Unread:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (C, *space)."""
        kept = [n for axis, n in enumerate(self.array.shape) if axis not in self.fixed]
        ordered = tuple(kept[self.named.index(letter)] for letter in "CZYX" if letter in self.named)
        return ordered if "C" in self.named else (1, *ordered)

    @property
    def layout(self) -> str:
        """Return axes, extents and dtype, in words."""
        return f"{self.named} {self.shape} {self.array.dtype}"

    def read(self, spans: Sequence[Span]) -> NDArray[Any]:
        """Return (C, *window) in the array's own dtype.

        Raises:
            NormfixError: NF101 if the window cannot be read, NF104 if it has NaN or infinity, NF331 if the file
                is no longer what it was.
        """
        window = self.raw(spans) if self.contents is None else self._noted(self.contents, spans)
        if window.dtype.kind == "f" and not np.isfinite(window).all():
            raise not_finite(self.where)
        window = window.transpose([self.named.index(letter) for letter in "CZYX" if letter in self.named])
        return window if "C" in self.named else window[np.newaxis]

    def raw(self, spans: Sequence[Span]) -> NDArray[Any]:
        """Return a window with the axes of the array, unchecked.

        Raises:
            NormfixError: NF101 if it cannot be read.
            ChangedError: if the file is seen to be another while it is read.
        """
        space = dict(zip([letter for letter in "ZYX" if letter in self.named], spans, strict=True))
        letters = iter(self.named)
        index = tuple(
            0 if axis in self.fixed else slice(*space.get(next(letters), (None,)))
            for axis in range(len(self.array.shape))
        )
        array = self.array
        if self.contents is not None and self.contents.array is not None:
            array = self.contents.array
        try:
            taken = array[index]
            values = np.asarray(taken)
        except (ChangedError, NormfixError):
            raise
        except Exception as error:
            pixels = ", ".join(f"{start}:{stop}" for start, stop in spans)
            raise NormfixError(
                "NF101",
                f"the window [{pixels}] of it cannot be read: {why(error)}.",
                where=self.where,
            ) from error
        if np.ma.is_masked(taken):
            raise _masked(self.where)
        return values

    def fingerprint(self) -> str:
        """Return what differs if the values do, in one walk over them; what of a file was walked over is known."""
        found = hashlib.sha256()
        if self.contents is not None:
            self._settle(self.contents)
        for spans in slabs(self.shape[1:], self.shape[0]):
            known = None if self.contents is None else self.contents.known(spans)
            if known is None:
                window = self.read(spans)
                known = self.contents.known(spans) if self.contents is not None else digest_of_array(window)
            assert known is not None
            found.update(known)
        if self.contents is not None:
            self.contents.complete = True
        return f"{self.layout} {found.hexdigest()}"

    def confirm(self) -> None:
        """Make sure that what was read of a file is what is in it now.

        Raises:
            NormfixError: NF331 if it is not.
        """
        if self.contents is not None:
            self.contents.confirm(self.layout, self._anew)

    def pieces(self) -> Iterator[NDArray[Any]]:
        """Yield the whole image in slabs, each pixel once."""
        for spans in slabs(self.shape[1:], self.shape[0]):
            yield self.read(spans)
        if self.contents is not None:
            self.contents.complete = True

    def _noted(self, contents: Contents, spans: Sequence[Span]) -> NDArray[Any]:
        """Read a window of a file that is what it was, before and after."""
        self._settle(contents)
        while True:
            try:
                window = self.raw(spans)
            except ChangedError as change:
                contents.compare(self.layout, self._anew, written=change.written)
            except NormfixError:
                self._settle(contents)
                raise
            else:
                if not self._settle(contents):
                    contents.note(spans, window)
                    return window

    def _settle(self, contents: Contents) -> bool:
        return contents.settle(self.layout, self._anew)

    def _anew(self) -> Unread:
        assert self.reopen is not None
        return self.reopen()


def _reopened(reopen: Callable[[], Unread], contents: Contents | None) -> Unread:
    """Open an image in another process, where it must be the one that was opened first."""
    window = reopen()
    if contents is None or window.contents is None:
        return window
    fresh, window = window.contents.origin, replace(window, contents=contents)
    if not contents.settle(window.layout, reopen) and fresh.listing != contents.origin.listing:
        contents.compare(window.layout, reopen, written=True)
    return window


class ScaledImage:
    """A source: a window's values, scaled by (x - offset) / divisor, extended at the end by edge pixels."""

    def __init__(
        self,
        window: Unread,
        *,
        offset: float = 0.0,
        divisor: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        padding: Sequence[int] = (),
    ) -> None:
        self._window, self._offset, self._divisor = window, offset, divisor
        self._dtype, self._device = dtype, torch.device(device)
        self._padding = tuple(padding) or (0,) * (len(window.shape) - 1)

    @property
    def placement(self) -> Placement:
        """Return where the pixels lie, as far as the file says."""
        return self._window.placement

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a user should know of the file, such as chunks that are missing."""
        return tuple(f"{self._window.where}: {text}" for text in self._window.notes)

    @property
    def planes(self) -> int:
        """Return how many planes there are along the axis that the file is cut along."""
        return self._window.planes

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (1, C, *space), padding included."""
        channels, *space = self._window.shape
        return (1, channels, *(n + p for n, p in zip(space, self._padding, strict=True)))

    def close(self) -> None:
        """Let the file go."""
        self._window.close()

    def __enter__(self) -> ScaledImage:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def padded(self, padding: Sequence[int]) -> ScaledImage:
        """Return the same image extended by so many pixels more per axis."""
        return ScaledImage(
            self._window,
            offset=self._offset,
            divisor=self._divisor,
            dtype=self._dtype,
            device=self._device,
            padding=tuple(map(sum, zip(self._padding, padding, strict=True))),
        )

    def fingerprint(self) -> str:
        """Return what differs if the image, its scaling or its padding does; see Source."""
        how = f"({self._offset!r}, {self._divisor!r}) {self._padding} {self._dtype}"
        return f"{self._window.fingerprint()} {how}"

    def confirm(self) -> None:
        """Make sure that what was read of a file is what is in it now: NF331 if it is not."""
        self._window.confirm()

    def read(self, window: Sequence[Span]) -> Tensor:
        """Return (1, C, *window).

        Raises:
            NormfixError: NF104 for values that are not finite, also if they became so by scaling or in the dtype that
                the network computes in; NF101 and NF331 of the file.
        """
        space = self._window.shape[1:]
        inside = [(min(start, n - 1), min(stop, n)) for (start, stop), n in zip(window, space, strict=True)]
        wide = self._window.read(inside).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
            if (self._offset, self._divisor) != (0.0, 1.0):
                wide = (wide - self._offset) / self._divisor
            if self._dtype != torch.float64:
                wide = wide.astype(np.float32)  # as whole images are scaled (normfix.images.scaling)
        x = torch.from_numpy(np.ascontiguousarray(wide))[None]
        for axis, ((start, stop), (first, last)) in enumerate(zip(window, inside, strict=True), start=2):
            if stop - start != last - first:
                x = x.index_select(
                    axis, torch.arange(start - first, stop - first).clamp_max(last - first - 1)
                )
        x = x.to(self._device, self._dtype)
        if not torch.isfinite(x).all():
            raise overflown(self._window.where, str(self._dtype).removeprefix("torch."))
        return x


def _masked(where: str) -> NormfixError:
    return NormfixError(
        "NF104",
        "the image is a masked array, and what its mask hides would be read as if it were seen. Fill it first "
        "(image.filled(0)); what statistics shall leave out is given beside it, as mask=.",
        where=where,
    )


def windowed(
    array: ArrayLike,
    said: str | None = None,
    *,
    ndim: int,
    channels: Channels,
    axes: str | None = None,
    where: str = "image",
) -> Unread:
    """Name the axes of an array-like object; see `files.open_image`."""
    shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    named, fixed = settled_axes(shape, said, dtype, ndim=ndim, channels=channels, axes=axes, where=where)
    return Unread(array, named, fixed, where, placement=Placement(channels_last=named.endswith("C")))
