"""NIfTI through nibabel (normfix[nifti]): axes X, Y, Z, then channels; the affine goes with the prediction."""

from __future__ import annotations

import gzip
import math
import shutil
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from normfix.errors import NormfixError
from normfix.images.formats.opened import Opened, nothing
from normfix.images.formats.placement import Placement, unit_named

__all__ = ["compress", "create", "open_nifti"]

_UNITS = {"meter": "meter", "mm": "millimeter", "micron": "micrometer"}


@dataclass(frozen=True, slots=True)
class _Header:
    """A header, for its affines, codes and units."""

    header: Any

    def scaled(self, scale: Sequence[Fraction]) -> _Header | None:
        """Return a header of voxels so much smaller, with the corner of the volume where it was.

        None where its affine lays all voxels in one plane, or nowhere.
        """
        copied, affine = self.header.copy(), self.header.get_best_affine()
        ratio = np.array([1 / float(s) for s in reversed(scale)] + [1.0] * (3 - len(scale)))
        if not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
            return None
        affine[:3, 3] += affine[:3, :3] @ ((ratio - 1) / 2)
        affine[:3, :3] *= ratio
        for get, put in ((copied["sform_code"], copied.set_sform), (copied["qform_code"], copied.set_qform)):
            put(affine, code=int(get))
        if not int(copied["sform_code"]) and not int(copied["qform_code"]):
            copied["pixdim"][1:4] *= ratio
        return _Header(copied)


class _Volume:
    """Values of a volume: as stored, or by slope and intercept where it has them."""

    def __init__(self, image: Any) -> None:
        self._proxy = image.dataobj
        slope, inter = self._proxy.slope, self._proxy.inter
        self.shape: tuple[int, ...] = tuple(self._proxy.shape)
        self.dtype = np.dtype(image.get_data_dtype() if (slope, inter) == (1, 0) else np.float64)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self._proxy[index]).astype(self.dtype, copy=False)


class _Packed(_Volume):
    """Values of a compressed volume, from a stream that goes on from where the last window ended.

    The checksum stands at the end of the stream, so whoever has read the last value has read to there.
    """

    def __init__(self, image: Any, stream: gzip.GzipFile) -> None:
        super().__init__(image)
        self._stream = stream
        self._lock = threading.Lock()
        proxy = image.dataobj
        self._end = int(proxy.offset) + math.prod(self.shape) * proxy.dtype.itemsize

    def __getitem__(self, index: Any) -> Any:
        with self._lock:
            found = super().__getitem__(index)
            if self._stream.tell() == self._end:
                self._require_end()
            return found

    def _require_end(self) -> None:
        """Read to the end, where the checksum of all that came before is compared.

        Raises:
            ValueError: if more follows the values than any program writes there; BadGzipFile for a wrong checksum.
        """
        for _ in range(_BEHIND):
            if not self._stream.read(1 << 16):
                return
        raise ValueError("far more follows its values than its header says")


_BEHIND = 256
"""Pieces of 64 kB behind the values of a compressed volume; there is nothing in what programs write."""


def open_nifti(path: Path) -> Opened:
    """Open a .nii to be read by window; a .nii.gz too, one window after the other from the start."""
    nibabel = _nibabel(path)
    _bound_extensions(path)
    # mapped values would be read after the file was looked at for changes (normfix.images.contents)
    image = nibabel.load(path, mmap=False)
    if not path.name.lower().endswith(".gz"):
        return _opened(image, _Volume(image))
    stream = gzip.open(path)  # noqa: SIM115 - open as long as windows are read
    try:
        kind = type(image)
        image = kind.from_file_map(kind.make_file_map({"image": stream}))
        return _opened(image, _Packed(image, stream), stream.close)
    except BaseException:
        stream.close()
        raise


def _opened(image: Any, volume: _Volume, close: Callable[[], None] = nothing) -> Opened:
    header = image.header
    rank = len(image.shape)
    times = header.get_xyzt_units()[1] in ("sec", "msec", "usec")
    axes = "XYZ"[:rank] + ("T" if times else "C") * (rank > 3) + "C" * (rank > 4)
    if len(set(axes)) < len(axes):
        axes = axes[:3] + "TC"
    axes += "UVW"[: max(0, rank - 5)]  # as NIfTI calls them; let go where their extent is 1
    space = "".join(letter for letter in "ZYX" if letter in axes)
    zooms = dict(zip("XYZ", (float(z) for z in header.get_zooms()), strict=False))
    unit = _UNITS.get(header.get_xyzt_units()[0], "")
    placement = Placement(
        spacing=tuple(zooms[letter] for letter in space),
        unit=unit_named(unit),
        channels_last=rank > 3,
        native=_Header(header),
    )
    return Opened(volume, axes, placement, close)


_EXTENSIONS = 1 << 27
"""Bytes that may lie between the header of a volume and its values: tables of a surface take some tens of MB."""

_MOST_EXTENSIONS = 1000
"""Extensions that are read: nibabel makes an object of each, and the shortest takes eight bytes, compressed none."""


def _bound_extensions(path: Path) -> None:
    """Refuse extensions of the header that are longer than what lies before the values, which nibabel reads first.

    Raises:
        NormfixError: NF121; NF101 where nothing lies before the values, not the header either.
    """
    # Size of the header, type of its offset, and where that stands: NIfTI-1, NIfTI-2.
    kinds = {348: ("f", 108), 540: ("q", 168)}
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        head = file.read(540)
        for order in "<>":
            length = int(struct.unpack_from(f"{order}i", head.ljust(4))[0])
            if length not in kinds or len(head) < length:
                continue
            kind, place = kinds[length]
            values = float(struct.unpack_from(f"{order}{kind}", head, place)[0])
            file.seek(length)
            if values == 0:
                raise NormfixError(
                    "NF101",
                    "its values are said to begin at byte 0, where its header is, which would be read as voxels. "
                    "Write it again with the program that made it.",
                    where=str(path),
                )
            extended, count = file.read(1) not in (b"", b"\0"), 0
            problem = extended and not values <= _EXTENSIONS
            place = length + 4
            # For an offset within the header nibabel looks for extensions up to the end of the file.
            values = values if values >= place else float(_EXTENSIONS)
            while extended and not problem and place + 8 <= values:
                count += 1
                file.seek(place)
                sized = file.read(4)
                if len(sized) < 4:
                    break
                size = int(struct.unpack(f"{order}i", sized)[0])
                problem = not 8 <= size <= values - place or count > _MOST_EXTENSIONS
                place += max(8, size)
            if problem:
                raise NormfixError(
                    "NF121",
                    f"its header has extensions of more than the {values:.0f} bytes before its values, or these are "
                    f"more than {_EXTENSIONS >> 20} MiB, or there are more than {_MOST_EXTENSIONS}. It is damaged or "
                    "built to harm.",
                    where=str(path),
                )


_LONGEST = (1 << 15) - 1
"""Pixels of an axis that a header of NIfTI-1 can say."""


def compress(path: Path) -> None:
    """Make a .nii.gz of a .nii under the same name, piece by piece; the same bytes each time."""
    packed = path.with_name(f"{path.name}.packed")
    try:
        with (
            path.open("rb") as source,
            packed.open("wb") as target,
            gzip.GzipFile("", "wb", compresslevel=6, fileobj=target, mtime=0) as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
        packed.replace(path)
    finally:
        packed.unlink(missing_ok=True)


def create(path: Path, shape: Sequence[int], dtype: np.dtype[Any], axes: str, placement: Placement) -> Any:
    """Make a .nii to be written by window, in the order X, Y, Z, C; see `tiff.create`.

    Returns:
        What takes windows in the order of `axes`.
    """
    nibabel = _nibabel(path)
    native = placement.native
    header = (
        nibabel.Nifti1Header.from_header(native.header)
        if isinstance(native, _Header) and max(native.header.get_data_shape()) <= _LONGEST
        else _header(nibabel, placement, axes)
    )
    stored = [axes.index(letter) for letter in "XYZC" if letter in axes]
    extents = [shape[i] for i in stored]
    if "T" in axes:
        raise NormfixError(
            "NF142",
            "a stack along T has no place in NIfTI. Give a name ending in .tif or .zarr.",
            where=path.name,
        )
    if "C" in axes and len(extents) < 4:
        raise NormfixError(
            "NF142",
            "a plane with channels has no place in NIfTI. Give a name ending in .tif or .zarr.",
            where=path.name,
        )
    if max(extents) > _LONGEST:
        raise NormfixError(
            "NF142",
            f"an axis of {max(extents):,} pixels has no place in NIfTI, whose axes end at {_LONGEST:,}. Give a name "
            "ending in .tif or .zarr.",
            where=path.name,
        )
    header.set_data_dtype(dtype)
    header.set_data_shape(extents)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header.set_data_offset(352)
    with path.open("wb") as file:
        header.write_to(file)
        file.write(b"\0" * (352 - file.tell()))
        file.truncate(352 + int(np.prod(extents, dtype=np.int64)) * dtype.itemsize)
    mapped = np.memmap(path, dtype.newbyteorder(header.endianness), "r+", 352, tuple(extents), order="F")
    return mapped.transpose(np.argsort(stored))


def _header(nibabel: Any, placement: Placement, axes: str) -> Any:
    header = nibabel.Nifti1Header()
    sizes = dict(zip([letter for letter in "ZYX" if letter in axes], placement.spacing, strict=False))
    origin = dict(zip([letter for letter in "ZYX" if letter in axes], placement.origin, strict=False))
    affine = np.diag([*(sizes.get(letter, 1.0) for letter in "XYZ"), 1.0])
    affine[:3, 3] = [origin.get(letter, 0.0) for letter in "XYZ"]
    header.set_data_shape([1] * 3)
    header.set_sform(affine, code=2)
    header.set_zooms([sizes.get(letter, 1.0) for letter in "XYZ"])
    units = {name: key for key, name in _UNITS.items()}
    header.set_xyzt_units(units.get(placement.unit, "unknown"))
    return header


def _nibabel(path: Path) -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise NormfixError(
            "NF143", 'NIfTI is read and written with nibabel: pip install "normfix[nifti]".', where=str(path)
        ) from error
    return nibabel
