"""Images that are read by window, whatever holds them: npy, TIFF, Zarr and OME-Zarr, or any array-like object.

Nothing is read before a window is asked for, and never more than it needs: npy by memory map, TIFF by tiles or
strips (tifffile), Zarr by chunks. Values are scaled window by window with numbers that were measured over the
whole image (normfix.streaming.spread).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfix.errors import NormfixError
from normfix.reading import named_axes, read_image
from normfix.scaling import not_finite
from normfix.streaming.maps import Span

__all__ = ["ArrayLike", "Window", "WindowedImage", "open_image"]


class ArrayLike(Protocol):
    """What numpy, zarr, h5py and dask arrays have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the extents."""

    @property
    def dtype(self) -> Any:
        """Return the numpy dtype."""

    def __getitem__(self, index: Any) -> Any:
        """Return a window as something that np.asarray takes."""


@dataclass(frozen=True, slots=True)
class Window:
    """An array-like image brought into the order (C, *space), still unread.

    `fixed` are axes of extent 1 that are no space and no channels. `close` lets a file go; leaving the context
    does so too.
    """

    array: ArrayLike
    named: str
    fixed: tuple[int, ...] = ()
    where: str = "image"
    close: Callable[[], None] = lambda: None

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
            NormfixError: NF101 if the window cannot be read, NF104 if it has NaN or infinity.
        """
        space = dict(zip([letter for letter in "ZYX" if letter in self.named], spans, strict=True))
        letters = iter(self.named)
        index = tuple(
            0 if axis in self.fixed else slice(*space.get(next(letters), (None,)))
            for axis in range(len(self.array.shape))
        )
        try:
            window = np.asarray(self.array[index])
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise NormfixError(
                "NF101", f"a window of it cannot be read: {reason}. Check that it is whole.", where=self.where
            ) from error
        if window.dtype.kind == "f" and not np.isfinite(window).all():
            raise not_finite(self.where)
        window = window.transpose([self.named.index(letter) for letter in "CZYX" if letter in self.named])
        return window if "C" in self.named else window[np.newaxis]

    def pieces(self, most: int = 1 << 22) -> Iterator[NDArray[Any]]:
        """Yield the whole image in slabs of about `most` values, each pixel once."""
        channels, first, *rest = self.shape
        step = max(1, most // max(1, channels * int(np.prod(rest, dtype=np.int64))))
        whole = [(0, n) for n in rest]
        for start in range(0, first, step):
            yield self.read([(start, min(first, start + step)), *whole])


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


def open_image(path: Path, *, ndim: int, channels: int, axes: str | None = None, level: int = 0) -> Window:
    """Open an image file or folder to be read by window.

    Args:
        path: .npy, .tif or .tiff (tiled and pyramidal too), .zarr (an array, or OME-Zarr), .png (read whole).
        ndim: number of spatial axes the network takes.
        channels: number of channels the network takes.
        axes: one letter per array axis; default: what the file says, or what the shape leaves no doubt about.
        level: of a pyramid, 0 is the finest.

    Raises:
        NormfixError: NF101 if it cannot be opened, NF106 if its axes or dtype do not fit the network.
    """
    suffix = path.suffix.lower()
    if suffix == ".png":
        whole = read_image(path, ndim=ndim, channels=channels, axes=axes)
        return Window(whole, "C" + "ZYX"[-ndim:], where=str(path))
    try:
        array, said, close = _opened(path, suffix, level)
    except NormfixError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise NormfixError("NF101", f"cannot open it: {reason}.", where=str(path)) from error
    try:
        window = windowed(array, said, ndim=ndim, channels=channels, axes=axes, where=str(path))
    except NormfixError:
        close()
        raise
    return replace(window, close=close)


def windowed(
    array: ArrayLike,
    said: str | None = None,
    *,
    ndim: int,
    channels: int,
    axes: str | None = None,
    where: str = "image",
) -> Window:
    """Name the axes of an array-like object; see `open_image`."""
    fixed: tuple[int, ...] = ()
    if axes is None and said is not None:
        fixed = tuple(
            axis
            for axis, (letter, n) in enumerate(zip(said, array.shape, strict=True))
            if n == 1 and letter not in "YX"
        )
        said = "".join(letter for axis, letter in enumerate(said) if axis not in fixed)
        said = None if set(said) & set("QI") else said
    shape = tuple(n for axis, n in enumerate(array.shape) if axis not in fixed)
    named = named_axes(
        shape, np.dtype(array.dtype), ndim=ndim, channels=channels, axes=axes or said, where=where
    )
    return Window(array, named, fixed, where)


_Opened = tuple[ArrayLike, str | None, Callable[[], None]]


def _opened(path: Path, suffix: str, level: int) -> _Opened:
    """Return an array-like, the axes that the file itself names, if any, and what closes it."""
    if suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False), None, lambda: None
    if suffix in (".tif", ".tiff"):
        return _tiff(path, level)
    if (path / "zarr.json").exists() or (path / ".zgroup").exists() or (path / ".zarray").exists():
        return (*_zarr(path, level), lambda: None)
    raise NormfixError("NF101", "it is no .npy, .tif, .png or Zarr image.", where=str(path))


def _tiff(path: Path, level: int) -> _Opened:
    import tifffile
    import zarr

    file = tifffile.TiffFile(path)
    try:
        chosen = _level(file.series[0].levels, level, path)
        return zarr.open_array(chosen.aszarr(), mode="r"), chosen.axes, file.close
    except BaseException:
        file.close()
        raise


def _zarr(path: Path, level: int) -> tuple[ArrayLike, str | None]:
    import zarr

    node: Any = zarr.open(str(path), mode="r")
    if isinstance(node, zarr.Array):
        return node, None
    attributes: dict[str, Any] = dict(node.attrs)
    multiscales = attributes.get("ome", attributes).get("multiscales")
    if not multiscales:
        raise NormfixError(
            "NF101", "it is a Zarr group without OME metadata. Name the array inside it.", where=str(path)
        )
    datasets = _level(multiscales[0]["datasets"], level, path)
    names = [axis["name"] if isinstance(axis, dict) else axis for axis in multiscales[0].get("axes", "tczyx")]
    return node[datasets["path"]], "".join(str(name).upper() for name in names)


def _level(levels: Sequence[Any], level: int, path: Path) -> Any:
    if not 0 <= level < len(levels):
        raise NormfixError("NF101", f"it has {len(levels)} levels, and no level {level}.", where=str(path))
    return levels[level]
