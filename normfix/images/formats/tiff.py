"""TIFF through tifffile: series, levels, OME and ImageJ descriptions, resolution and GeoTIFF tags."""

from __future__ import annotations

import logging
import lzma
import math
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from normfix.errors import NormfixError
from normfix.images.deadline import within
from normfix.images.formats.opened import Choice, Opened, choose, letters_of
from normfix.images.formats.placement import UNITS, Placement, unit_named
from normfix.images.formats.zarr_layout import require_zarr

__all__ = ["create", "open_tiff"]

_GEO = {33550: 12, 33922: 12, 34264: 12, 34735: 3, 34736: 12, 34737: 2}
"""Tags of GeoTIFF and their TIFF types: pixel scale, tie points, transformation, keys, doubles, text."""

_LEAST = {33550: 3, 33922: 6, 34264: 16, 34735: 4, 34736: 1, 34737: 1}
"""How many values such a tag has at least."""

_PIXEL_SCALE, _TIE_POINTS = 33550, 33922


@dataclass(frozen=True, slots=True)
class _Tags:
    """Resolution and GeoTIFF tags as they are."""

    resolution: tuple[float, float] | None
    resolution_unit: int
    geo: tuple[tuple[int, Any], ...]

    def scaled(self, scale: Sequence[Fraction]) -> _Tags | None:
        """Return the tags of a map of another scale, where pixel scale and tie points at a corner say it all."""
        down, right = (float(s) for s in scale[-2:])
        geo = dict(self.geo)
        if geo:
            if _PIXEL_SCALE not in geo or tuple(geo.get(_TIE_POINTS, (1,))[:3]) != (0.0, 0.0, 0.0):
                return None
            x, y, z = geo[_PIXEL_SCALE]
            geo[_PIXEL_SCALE] = (x / right, y / down, z)
        size = self.resolution
        finer = None if size is None else (size[0] * right, size[1] * down)
        if finer is not None and not all(
            2**-32 < n < 2**32 for n in finer
        ):  # what a fraction in a tag can say
            finer = None
        return _Tags(finer, self.resolution_unit, tuple(geo.items()))

    def options(self) -> dict[str, Any]:
        """Return them as tifffile writes them."""
        found: dict[str, Any] = {}
        if self.resolution is not None:
            found = {"resolution": self.resolution, "resolutionunit": self.resolution_unit}
        if self.geo:
            found["extratags"] = [
                (code, _GEO[code], len(value) + (_GEO[code] == 2), value, True) for code, value in self.geo
            ]
        return found


class _Pages:
    """A level of a series: whole through tifffile, windows of it through its tiles or strips (zarr).

    Of a sparse one tifffile would take what follows for what is not stored, so it is read as a window too.
    """

    def __init__(self, level: Any, *, sparse: bool) -> None:
        self._level = level
        self._sparse = sparse
        self._windows: Any = None
        self.shape: tuple[int, ...] = tuple(level.shape)
        self.dtype = np.dtype(level.dtype)
        self.plain = level.keyframe.compression == 1

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        with _complaints("tifffile") as complaints:
            array = self[...] if self._sparse else self._level.asarray()
        if complaints:  # such as a page beyond the end of a truncated file, which is left out of the stack
            raise ValueError(complaints[0])
        return np.asarray(array, dtype)

    def __getitem__(self, index: Any) -> Any:
        if self._windows is None:
            self._windows = self._by_window()
        return self._windows[index]

    def _by_window(self) -> Any:
        """Return what is sliced: the file, or where zarr is not installed all of it in memory."""
        try:
            import zarr
        except ImportError:
            return np.asarray(self)
        return zarr.open_array(self._level.aszarr(level=0), mode="r")


def open_tiff(path: Path, choice: Choice) -> Opened:
    """Open a series and level of a TIFF; see `normfix.images.formats.open_file`."""
    import tifffile

    with _complaints("tifffile") as complaints:
        file = tifffile.TiffFile(path)
        try:
            # Counts in descriptions are followed one by one, and real files have a page each.
            seconds = _SECONDS + path.stat().st_size / _BYTES_A_SECOND
            opened = within(
                seconds, lambda: _opened(file, path, choice), str(path), instead="write it again without them"
            )
        except BaseException:
            file.close()
            raise
    if complaints:
        file.close()
        raise ValueError(complaints[0])
    return opened


def _opened(file: Any, path: Path, choice: Choice) -> Opened:
    _require_short(file, path)
    _require_companions(file, path)
    series = list(file.series)
    number = choose([s.name for s in series], [s.shape for s in series], choice.series, path)
    levels = series[number].levels
    if not 0 <= choice.level < len(levels):
        raise NormfixError(
            "NF101", f"it has {len(levels)} levels, and no level {choice.level}.", where=str(path)
        )
    level = levels[choice.level]
    _bound(level.keyframe, path)
    missing, segments = _missing(level, path)
    if missing:
        require_zarr(
            str(path), f"{missing:,} of {segments:,} tiles or strips are missing, and the others are read"
        )
    placement = _placement(file, series[number], number)
    if choice.level:
        placement = placement.of_level(_extents(levels[0]), _extents(level))
    notes = _unlike_shown(level.keyframe)
    if missing:
        lacking = (
            f"{missing:,} of {segments:,} tiles or strips are missing and read as {level.keyframe.nodata}."
        )
        notes = (lacking, *notes)
    return Opened(_Pages(level, sparse=missing > 0), level.axes, placement, file.close, notes=notes)


def _unlike_shown(page: Any) -> tuple[str, ...]:
    """Return in what a page is read otherwise than viewers show it and libraries for pictures read it."""
    notes = []
    if page.photometric == 0:
        notes.append("it says that 0 is white, for which viewers invert it; it is read as it is stored.")
    if page.photometric == 3:
        notes.append("its values are places in a table of colours, and are read as numbers.")
    tag = page.tags.get("Orientation")
    if tag is not None and tag.value != 1:
        notes.append("it says to show it turned or mirrored; it is read as it is stored.")
    return tuple(notes)


def _missing(level: Any, path: Path) -> tuple[int, int]:
    """Return how many tiles or strips of a level are not stored, as GDAL leaves out empty ones, and how many it has.

    Raises:
        NormfixError: NF101 if a page is missing or nothing is stored, which tifffile would read as zeros, or a
            compressed part goes on behind the end of its file, which not every codec notices.
    """
    pages = list(level.pages) if level.dataoffset is None else [level.keyframe]
    absent = sum(page is None for page in pages)
    if absent:
        raise NormfixError(
            "NF101",
            f"{absent:,} of the {len(pages):,} pages that its description speaks of are not in the file, so they would "
            "be read as zeros. Fetch it again; if it never had them, write it again without them.",
            where=str(path),
        )
    expected = math.prod(level.keyframe.chunked)
    stored = sum(
        sum(
            place > 0 and size > 0 for place, size in zip(page.dataoffsets, page.databytecounts, strict=False)
        )
        for page in pages
    )
    if not stored:
        raise NormfixError("NF101", "none of its pixels are in the file.", where=str(path))
    beyond = sum(map(_beyond, pages))
    if beyond:
        raise NormfixError(
            "NF101",
            f"{beyond:,} of its tiles or strips go on behind the end of the file: it is cut short. Fetch it again.",
            where=str(path),
        )
    return max(0, expected * len(pages) - stored), expected * len(pages)


def _beyond(page: Any) -> int:
    """Return how many of a page's compressed tiles or strips end behind its file."""
    size = page.parent.filehandle.size
    if page.compression == 1:
        return 0
    return sum(
        place + length > size for place, length in zip(page.dataoffsets, page.databytecounts, strict=False)
    )


_SECONDS, _BYTES_A_SECOND = 5.0, 8 << 20
"""Processor time for the descriptions of a small file, and bytes of a file for another second."""

_SEGMENT = 1 << 27
"""Bytes that a tile or strip may always have; a larger one has to be smaller than a few of its image."""

_INFLATED = 1 << 26
"""Bytes that a strip may unpack to before it is looked at twice."""


_PARTS = 1_000_000
"""Elements, lists or lines of a description; a hundred thousand planes are described by four times as many."""


def _require_short(file: Any, path: Path) -> None:
    """Refuse a description of countless parts, each of which takes some hundred bytes once it is parsed.

    Raises:
        NormfixError: NF121.
    """
    text = str(file.pages.first.description)
    if sum(text.count(mark) for mark in "<[{\n") > _PARTS:
        raise NormfixError(
            "NF121",
            f"its description of {len(text):,} characters has more than {_PARTS:,} parts. It is damaged or built to "
            "harm.",
            where=str(path),
        )


def _require_companions(file: Any, path: Path) -> None:
    """Refuse other files that an image is said to lie in, before they are opened, if they lie elsewhere or are missing.

    tifffile joins their names with the folder, opens whatever that is, and reads zeros where there is nothing.

    Raises:
        NormfixError: NF101 for one that is missing, NF121 for one in another folder or that is no file.
    """
    folder = path.resolve().parent
    for name in _companions(file, path):
        other = folder / name
        if name != Path(name).name or "\\" in name or (other.exists() and other.resolve().parent != folder):
            raise NormfixError("NF121", f"it names {name!r}, which is not in its folder.", where=str(path))
        if other.exists() and not other.is_file():
            raise NormfixError("NF121", f"it names {name!r}, which is no file.", where=str(path))
        if not other.exists():
            raise NormfixError(
                "NF101",
                f"a part of the image lies in {name!r}, which is missing, so it would be read as zeros. Put it beside "
                "it.",
                where=str(path),
            )


def _require_planes(root: ElementTree.Element, path: Path, page: int) -> None:
    """Refuse a description of more planes than a folder has bytes: a list of them is made before any is read.

    tifffile lists as many as all that is described would fill; a `page`, the file's first, has so many values.

    Raises:
        NormfixError: NF121.
    """
    files = [path, *(other for other in path.parent.glob("*.tif*") if other.is_file())]
    stored = sum(file.stat().st_size for file in files)
    for pixels in root.iter():
        if not pixels.tag.endswith("Pixels"):
            continue
        sizes = {letter: int(pixels.get(f"Size{letter}", "1")[:20]) for letter in "ZCTYX"}
        counts = [part.get("PlaneCount", "1") for part in pixels if part.tag.endswith("TiffData")]
        planes = [math.prod(sizes[letter] for letter in "ZCT"), *(int(count[:20]) for count in counts)]
        planes.append(math.prod(sizes.values()) // max(1, page))
        if max(planes) > stored:
            raise NormfixError(
                "NF121",
                f"its description has {max(planes):,} planes, and there are {stored:,} bytes. It is damaged or built "
                "to harm.",
                where=str(path),
            )


def _companions(file: Any, path: Path) -> set[str]:
    """Return the names of other files that tifffile would open for this one."""
    import tifffile

    names: set[str] = set()
    if file.is_ome and file.ome_metadata:
        root = ElementTree.fromstring(file.ome_metadata)
        _require_planes(root, path, int(file.pages.first.size))
        for one in root.iter():
            own = one.text is not None and one.text == root.get("UUID")
            if one.tag.endswith("UUID") and not own:
                names.add(one.get("FileName", ""))
    index = path.parent / "NDTiff.index"
    if file.is_ndtiff and index.is_file():
        names |= {str(entry[1]) for entry in tifffile.read_ndtiff_index(index)}
    elif file.is_ndtiff:
        names.add(index.name)
    if file.is_mmstack:
        names |= {other.name for other in path.parent.glob("*_MMStack*.tif")}
    return {name for name in names if name and name.lower() != path.name.lower()}


def _bound(page: Any, path: Path) -> None:
    """Let the segments (tiles, strips) of a page unpack to no more than they hold.

    tifffile without imagecodecs unpacks whatever comes; a segment that could become large is counted first.

    Raises:
        NormfixError: NF121 for segments that no image has.
    """
    dtype = np.dtype(page.dtype or np.uint8)
    size, whole = (int(np.prod(n, dtype=object)) * dtype.itemsize for n in (page.chunks, page.shape))
    if size > max(_SEGMENT, 4 * whole):
        raise NormfixError(
            "NF121",
            f"its tiles of {'x'.join(map(str, page.chunks))} have {size:,} bytes, and the page has {whole:,}. It is "
            "damaged or built to harm.",
            where=str(path),
        )
    segments, stored = len(page.dataoffsets), path.stat().st_size
    if segments > _SEGMENTS + stored // _BYTES_A_SEGMENT:
        raise NormfixError(
            "NF121",
            f"its page lies in {segments:,} tiles or strips, and the file has {stored:,} bytes. It is damaged or built "
            "to harm; write it again with larger tiles if it is right.",
            where=str(path),
        )
    decode, most = page.decode, max(size, whole) + _INFLATED

    def bounded(data: bytes | None, index: int, **options: Any) -> Any:
        if data is not None and not _unpacks_within(data, page.compression, most):
            raise NormfixError(
                "NF121",
                f"its segment {index} unpacks to more than the {size:,} bytes that it holds. It is damaged or "
                "built to harm, and was not unpacked.",
                where=str(path),
            )
        if data is not None and page.compression in _JPEG and not _is_ended(data):
            raise NormfixError(
                "NF101",
                f"the JPEG of its segment {index} ends before its picture does, and would be grey from there.",
                where=str(path),
            )
        return decode(data, index, **options)

    page.__dict__["decode"] = bounded


_SEGMENTS, _BYTES_A_SEGMENT = 1 << 16, 256
"""Tiles or strips that a page may always have, and bytes of the file for each one more."""

_DICTIONARY = 1 << 28
"""Bytes that an xz stream may ask for as its dictionary."""


_JPEG = frozenset({6, 7, 34892, 33007})


def _is_ended(data: bytes) -> bool:
    """Tell whether a JPEG has an end behind its last scan, where libjpeg goes on with grey if there is none."""
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")


def _unpacks_within(data: bytes, compression: int, most: int) -> bool:
    """Tell whether no more than so many bytes come out of a segment; what comes out is thrown away."""
    if compression in (8, 32946):
        return len(data) * 1032 <= most or _inflates_within(data, zlib.decompressobj, most)
    if compression == 34925:
        return _inflates_within(data, lambda: lzma.LZMADecompressor(memlimit=_DICTIONARY), most)
    return compression != 32773 or len(data) * 64 <= most or _runs_within(data, most)


def _inflates_within(data: bytes, opened: Callable[[], Any], most: int) -> bool:
    """Count what comes out, in pieces, of every stream in it: xz unpacks one behind the other."""
    total, piece, stream = 0, 1 << 16, opened()
    for start in range(0, len(data), piece):
        given = data[start : start + piece]
        while given or not getattr(stream, "needs_input", True):
            found = stream.decompress(given, 1 << 20)
            total += len(found)
            if total > most:
                return False
            given = getattr(stream, "unconsumed_tail", b"")
            if stream.eof:
                if not isinstance(stream, lzma.LZMADecompressor):
                    return True
                given, stream = stream.unused_data, opened()
    return True


def _runs_within(data: bytes, most: int) -> bool:
    """Count the runs of PackBits: a byte says how often the next one stands there, or how many are as they are."""
    total = place = 0
    while place < len(data) and total <= most:
        head = data[place]
        if head > 128:
            total, place = total + 257 - head, place + 2
        elif head < 128:
            total, place = total + head + 1, place + head + 2
        else:
            place += 1
    return total <= most


def create(
    path: Path,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    axes: str,
    placement: Placement,
    *,
    shown: tuple[float, float] | None = None,
) -> Any:
    """Make a TIFF to be written by window: OME where size or channels are known, GeoTIFF as it came.

    Where nothing is known of the pixels it is a hyperstack of ImageJ, if that holds the array. Up to 4 GiB no file is
    a BigTIFF, which ImageJ does not open.

    Args:
        path: of the file.
        shape: of the array.
        dtype: of the array.
        axes: a letter per axis of the array.
        placement: of the pixels.
        shown: darkest and brightest value; such an array is a hyperstack wherever that can hold it.
    """
    import tifffile

    tags = placement.native if isinstance(placement.native, _Tags) else None
    small = math.prod(shape) * dtype.itemsize < _CLASSIC_BYTES
    known = tags or placement.spacing or placement.channels or placement.channels_last
    bare = len(shape) > 1 and not known
    held = dtype.name in _IMAGEJ and small and _is_in_order(axes)
    if (bare or (shown and not (tags and tags.geo))) and held:
        return tifffile.memmap(
            path,
            shape=tuple(shape),
            dtype=dtype,
            imagej=True,
            photometric="minisblack",
            **_imagej(axes, placement, shown),
        )
    options = {} if tags is None else tags.options()
    described: dict[str, Any] = {"axes": axes}
    sizes = placement.spacing if placement.unit in UNITS and not (tags and tags.geo) else ()
    for letter, size in zip(letters_of("ZYX"[-len(sizes) :] if sizes else ""), sizes, strict=True):
        described[f"PhysicalSize{letter}"] = size
        described[f"PhysicalSize{letter}Unit"] = UNITS[placement.unit]
    if "C" in axes and len(placement.channels) == shape[axes.index("C")]:
        described["Channel"] = {"Name": [_NO_XML.sub("\ufffd", name) for name in placement.channels]}
    if axes[-1] == "C":
        options["planarconfig"] = "contig"
        described["axes"] = axes = axes[:-1] + "S"
    grey = "minisblack" if len(shape) > 1 else None  # else 3 or 4 channels would become RGB
    ome = len(described) > 1 or "C" in axes  # a plain TIFF does not say what its pages are
    return tifffile.memmap(
        path,
        shape=tuple(shape),
        dtype=dtype,
        bigtiff=not small,
        photometric=grey,
        ome=ome,
        metadata=described,
        **options,
    )


_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML can hold, not even as a number: a description with one of them is not read by anybody."""

_IMAGEJ = ("uint8", "uint16", "float32")
"""Types of pixels that ImageJ's own TIFF holds."""

_CLASSIC_BYTES = (1 << 32) - (1 << 20)
"""Bytes of pixels that a TIFF holds which is no BigTIFF."""


def _is_in_order(axes: str) -> bool:
    """Tell whether axes are in the order that ImageJ's hyperstacks have: channels of a volume before Z are not."""
    order = "TZCYX"
    return set(axes) <= set(order) and [*axes] == sorted(axes, key=order.index)


def _imagej(axes: str, placement: Placement, shown: tuple[float, float] | None) -> dict[str, Any]:
    """Return axes, size of pixels and range of values, where they are known, as ImageJ has them."""
    described: dict[str, Any] = {"axes": axes}
    if shown is not None:
        described["min"], described["max"] = shown
    sizes = dict(zip("XYZ", reversed(placement.spacing), strict=False))
    if placement.unit not in UNITS or "X" not in sizes:
        return {"metadata": described}
    described["unit"] = placement.unit.replace("micrometer", "um")
    if "Z" in sizes:
        described["spacing"] = sizes["Z"]
    return {"metadata": described, "resolution": (1 / sizes["X"], 1 / sizes["Y"])}


def _extents(level: Any) -> list[int]:
    named = dict(zip(level.axes, level.shape, strict=True))
    return [named[letter] for letter in "ZYX" if letter in named]


def _placement(file: Any, series: Any, number: int) -> Placement:
    page = series.keyframe
    letters = "".join(letter for letter in "ZYX" if letter in series.axes)
    last = series.axes[-1:] in ("S", "C") and series.axes[-3:-1] == "YX"
    tags = _tags(page)
    base = Placement(channels_last=last, native=tags)
    if file.is_ome and file.ome_metadata:
        return _ome(file.ome_metadata, number, letters, base)
    described = file.imagej_metadata or {}
    unit = unit_named(described.get("unit"))
    if tags is None or tags.resolution is None or 0 in tags.resolution:
        return base
    physical = {2: "inch", 3: "centimeter"}.get(tags.resolution_unit, "")
    unit = unit if unit in UNITS else physical
    sizes = {"X": 1 / tags.resolution[0], "Y": 1 / tags.resolution[1], "Z": described.get("spacing", 0)}
    if not unit or not all(sizes.get(letter) for letter in letters):
        return base
    return replace(base, spacing=tuple(float(sizes[letter]) for letter in letters), unit=unit)


def _ome(xml: str, number: int, letters: str, base: Placement) -> Placement:
    """Read physical sizes and channel names of an image in OME-XML."""
    images = [e for e in ElementTree.fromstring(xml).iter() if e.tag.endswith("}Image") or e.tag == "Image"]
    if number >= len(images):
        return base
    pixels = next(e for e in images[number].iter() if e.tag.endswith("Pixels"))
    names = tuple(e.get("Name", "") for e in pixels if e.tag.endswith("Channel"))
    base = replace(base, channels=names if all(names) else ())
    sizes = [pixels.get(f"PhysicalSize{letter}") for letter in letters]
    units = {unit_named(pixels.get(f"PhysicalSize{letter}Unit", "µm")) for letter in letters}
    if not all(sizes) or len(units) != 1:
        return base
    return replace(base, spacing=tuple(float(size or 0) for size in sizes), unit=units.pop())


def _tags(page: Any) -> _Tags | None:
    def value(name: str | int) -> Any:
        tag = page.tags.get(name)
        return None if tag is None else tag.value

    x, y = value("XResolution"), value("YResolution")
    told = x is not None and y is not None and x != (1, 1) and 0 not in (*x, *y)
    size = (x[0] / x[1], y[0] / y[1]) if told else None
    geo = tuple((code, found) for code in _GEO if (found := _geo(page, code)) is not None)
    return _Tags(size, int(value("ResolutionUnit") or 1), geo) if size or geo else None


def _geo(page: Any, code: int) -> Any:
    """Return a tag of GeoTIFF, its text as the bytes that it is, whose places keys count; None for what is none."""
    tag = page.tags.get(code)
    kinds = {12: (11, 12)}.get(_GEO[code], (_GEO[code],))
    if tag is None or int(tag.dtype) not in kinds or tag.count < _LEAST[code]:
        return None
    if _GEO[code] != 2:
        return tag.value if isinstance(tag.value, tuple) else (tag.value,)
    file = page.parent.filehandle
    file.seek(tag.valueoffset)
    return bytes(file.read(tag.valuebytecount)).rstrip(b"\0") or None


@contextmanager
def _complaints(name: str) -> Iterator[list[str]]:
    """Collect the errors that a library only logs.

    Whoever finds it talkative silences its logger, or all of logging, so what it tells is heard before that is asked.
    """
    found: list[str] = []
    logger = logging.getLogger(name)
    with _LISTENING:
        if not _LISTENERS:
            logger.__dict__["error"] = _heard(logger.error)
        _LISTENERS[id(found)] = found
    try:
        yield found
    finally:
        with _LISTENING:
            del _LISTENERS[id(found)]
            if not _LISTENERS:
                del logger.__dict__["error"]


_LISTENERS: dict[int, list[str]] = {}
_LISTENING = threading.Lock()


def _heard(told: Callable[..., None]) -> Callable[..., None]:
    """Return how a logger logs an error, with everybody listening."""

    def error(message: object, *args: Any, **options: Any) -> None:
        text = str(message) % args if args else str(message)
        for found in list(_LISTENERS.values()):
            found.append(text)
        told(message, *args, **{**options, "stacklevel": options.get("stacklevel", 1) + 1})

    return error
