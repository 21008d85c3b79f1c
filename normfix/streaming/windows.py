"""Images that are read by window, whatever holds them: a file or any array-like object.

Nothing is read before a window is asked for, and never more than it needs. Values are scaled window by window with
numbers that were measured over the whole image (normfix.streaming.spread).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfix.errors import NormfixError
from normfix.formats import ArrayLike, Placement
from normfix.reading import Channels, settled_axes
from normfix.scaling import not_finite
from normfix.streaming.maps import Span
from normfix.streaming.origins import Origin
from normfix.streaming.sources import digest_of

__all__ = ["ArrayLike", "Window", "WindowedImage", "windowed"]


def _nothing() -> None:
    """Close what needs no closing."""


@dataclass(frozen=True, slots=True)
class Window:
    """An array-like image brought into the order (C, *space), still unread.

    `fixed` are axes of extent 1 that are no space and no channels. `close` lets a file go; leaving the context
    does so too. `origin` is the file, which `reopen` opens again where this window is sent to another process;
    `placement` what the file says of where its pixels lie.
    """

    array: ArrayLike
    named: str
    fixed: tuple[int, ...] = ()
    where: str = "image"
    close: Callable[[], None] = _nothing
    origin: Origin | None = None
    reopen: Callable[[], Window] | None = None
    placement: Placement = field(default_factory=Placement)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.reopen is not None:
            return _reopened, (self.reopen, self.origin)
        return Window, (self.array, self.named, self.fixed, self.where)

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (C, *space)."""
        kept = [n for axis, n in enumerate(self.array.shape) if axis not in self.fixed]
        ordered = tuple(kept[self.named.index(letter)] for letter in "CZYX" if letter in self.named)
        return ordered if "C" in self.named else (1, *ordered)

    def read(self, spans: Sequence[Span]) -> NDArray[Any]:
        """Return (C, *window) in the array's own dtype.

        Raises:
            NormfixError: NF101 if the window cannot be read, NF104 if it has NaN or infinity, NF331 if the file
                is no longer what it was.
        """
        self._require_unchanged()
        space = dict(zip([letter for letter in "ZYX" if letter in self.named], spans, strict=True))
        letters = iter(self.named)
        index = tuple(
            0 if axis in self.fixed else slice(*space.get(next(letters), (None,)))
            for axis in range(len(self.array.shape))
        )
        try:
            window = np.asarray(self.array[index])
        except Exception as error:
            self._require_unchanged()
            reason = " ".join(str(error).split())[:160]
            pixels = ", ".join(f"{start}:{stop}" for start, stop in spans)
            raise NormfixError(
                "NF101",
                f"the window [{pixels}] of it cannot be read: {reason}. Check that it is whole.",
                where=self.where,
            ) from error
        self._require_unchanged()
        if window.dtype.kind == "f" and not np.isfinite(window).all():
            raise not_finite(self.where)
        window = window.transpose([self.named.index(letter) for letter in "CZYX" if letter in self.named])
        return window if "C" in self.named else window[np.newaxis]

    def fingerprint(self) -> str:
        """Return what differs if the image does: of its file, else of its values, in one walk over them."""
        layout = f"{self.named} {self.shape} {self.array.dtype}"
        if self.origin is not None:
            return f"{layout} {self.origin.array} {self.origin.fingerprint()}"
        channels, *space = self.shape
        found = digest_of(lambda spans: np.ascontiguousarray(self.read(spans)).tobytes(), space, channels)
        return f"{layout} {found}"

    def _require_unchanged(self) -> None:
        if self.origin is not None:
            self.origin.require_unchanged()

    def pieces(self, most: int = 1 << 22) -> Iterator[NDArray[Any]]:
        """Yield the whole image in slabs of about `most` values, each pixel once."""
        channels, first, *rest = self.shape
        step = max(1, most // max(1, channels * int(np.prod(rest, dtype=np.int64))))
        whole = [(0, n) for n in rest]
        for start in range(0, first, step):
            yield self.read([(start, min(first, start + step)), *whole])


def _reopened(reopen: Callable[[], Window], origin: Origin | None) -> Window:
    """Open an image in another process, where it must be the one that was opened first."""
    window = reopen()
    if origin is not None:
        origin.require_unchanged()
    return window


class WindowedImage:
    """A source: a window's values, scaled by (x - offset) / divisor, extended at the end by edge pixels."""

    def __init__(
        self,
        window: Window,
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
    def shape(self) -> tuple[int, ...]:
        """Return (1, C, *space), padding included."""
        channels, *space = self._window.shape
        return (1, channels, *(n + p for n, p in zip(space, self._padding, strict=True)))

    def close(self) -> None:
        """Let the file go."""
        self._window.close()

    def __enter__(self) -> WindowedImage:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def padded(self, padding: Sequence[int]) -> WindowedImage:
        """Return the same image extended by so many pixels per axis."""
        return WindowedImage(
            self._window,
            offset=self._offset,
            divisor=self._divisor,
            dtype=self._dtype,
            device=self._device,
            padding=padding,
        )

    def fingerprint(self) -> str:
        """Return what differs if the image, its scaling or its padding does; see Source."""
        how = f"({self._offset!r}, {self._divisor!r}) {self._padding} {self._dtype}"
        return f"{self._window.fingerprint()} {how}"

    def read(self, window: Sequence[Span]) -> Tensor:
        """Return (1, C, *window)."""
        space = self._window.shape[1:]
        inside = [(min(start, n - 1), min(stop, n)) for (start, stop), n in zip(window, space, strict=True)]
        wide = self._window.read(inside).astype(np.float64)
        if (self._offset, self._divisor) != (0.0, 1.0):
            wide = (wide - self._offset) / self._divisor
        if self._dtype != torch.float64:
            wide = wide.astype(np.float32)  # as whole images are scaled (normfix.scaling)
        x = torch.from_numpy(np.ascontiguousarray(wide))[None]
        for axis, ((start, stop), (first, last)) in enumerate(zip(window, inside, strict=True), start=2):
            if stop - start != last - first:
                x = x.index_select(
                    axis, torch.arange(start - first, stop - first).clamp_max(last - first - 1)
                )
        return x.to(self._device, self._dtype)


def windowed(
    array: ArrayLike,
    said: str | None = None,
    *,
    ndim: int,
    channels: Channels,
    axes: str | None = None,
    where: str = "image",
) -> Window:
    """Name the axes of an array-like object; see `files.open_image`."""
    shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    named, fixed = settled_axes(shape, said, dtype, ndim=ndim, channels=channels, axes=axes, where=where)
    return Window(array, named, fixed, where, placement=Placement(channels_last=named.endswith("C")))
