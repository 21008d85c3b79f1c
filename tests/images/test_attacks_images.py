"""Image files that reach out, wait, or ask for much: what their names promise is what is opened, and little of it."""

from __future__ import annotations

import gzip
import io
import json
import logging
import lzma
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from optional import needs_zarr
from PIL import Image

from normfix.errors import NormfixError
from normfix.images.files import open_windows, read_image
from normfix.images.formats import open_file
from normfix.images.formats.tiff import _complaints, _is_ended
from normfix.storage.opening import open_model

VALUES = np.arange(64, dtype="<f4").reshape(8, 8)


def _png(width: int, height: int, bits: int, kind: int, data: bytes) -> bytes:
    """Return a PNG of packed rows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def _pieces(*pieces: tuple[bytes, bytes], checksum: int = 0) -> bytes:
    """Return a PNG of chunks, whose checksums are off by a number."""
    found = b"\x89PNG\r\n\x1a\n"
    for name, content in pieces:
        right = zlib.crc32(name + content)
        found += struct.pack(">I", len(content)) + name + content + struct.pack(">I", right ^ checksum)
    return found


def _head(width: int, height: int, interlaced: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)


ROWS, END = (b"IDAT", zlib.compress(bytes(8 * 9))), (b"IEND", b"")
FEW = (b"IDAT", zlib.compress(bytes(5 * 9)))


def _written(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


GREY = Image.new("L", (8, 8), 5)
PICTURES = {
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "NF101"),
    "a GIF": (_written(GREY, "GIF"), "NF101"),
    "an animation": (
        _written(GREY, "PNG", save_all=True, append_images=[Image.new("L", (8, 8), 9)]),
        "NF101",
    ),
    "colours of 16 bits": (_png(8, 8, 16, 2, bytes(8 * 49)), "NF101"),
    "rows that are missing": (_pieces(_head(8, 8), FEW, END), "NF101"),
    "rows that are missing in a pass": (_pieces(_head(8, 8, 1), FEW, END), "NF101"),
    "a second, larger header": (_pieces(_head(8, 8), _head(900, 900), ROWS, END), "NF101"),
    "a second header behind its rows": (_pieces(_head(8, 8), ROWS, _head(8, 8), END), "NF101"),
    "a wrong checksum": (_pieces(_head(8, 8), ROWS, END, checksum=1), "NF101"),
    "no end": (_pieces(_head(8, 8), ROWS), "NF101"),
    "many pixels": (_png(13000, 13000, 8, 6, b""), "NF121"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_png_that_is_something_else_is_not_unpacked(tmp_path, name):
    """Other formats, animations, what would be read with a loss, and pictures larger than their file are refused."""
    data, code = PICTURES[name]
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(NormfixError) as caught:
        open_file(tmp_path / "a.png")
    assert caught.value.code == code


def test_an_ordinary_png_is_read(tmp_path):
    """Negative control: grey and colour of 8 bits, grey of 16."""
    for name, image in (("grey", GREY), ("colour", GREY.convert("RGB")), ("deep", GREY.convert("I;16"))):
        image.save(tmp_path / f"{name}.png")
        assert np.all(np.asarray(open_file(tmp_path / f"{name}.png").array) == 5)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (13, 9)])
def test_a_png_of_every_kind_is_whole(tmp_path, mode, size):
    """Negative control: rows of every depth, and of widths that end within a byte, are all found."""
    Image.new(mode, size).save(tmp_path / "a.png")
    opened = open_file(tmp_path / "a.png")
    assert tuple(opened.array.shape[:2]) == size[::-1]


def test_an_interlaced_png_is_whole(tmp_path):
    """Negative control: seven passes of 5 x 3 pixels, some of them empty."""
    passes = b"".join(
        bytes(rows * (1 + columns)) for rows, columns in ((1, 1), (1, 1), (1, 1), (1, 3), (2, 2), (1, 5))
    )
    (tmp_path / "a.png").write_bytes(_pieces(_head(5, 3, 1), (b"IDAT", zlib.compress(passes)), END))
    assert open_file(tmp_path / "a.png").array.shape == (3, 5)


@pytest.mark.parametrize("suffix", [".png", ".npy", ".tif", ".nii", ".nii.gz"])
def test_a_pipe_or_device_is_no_image(tmp_path, suffix):
    """Neither is opened, which would wait or read without end."""
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(NormfixError, match=r"NF101 .* no file"):
            open_file(tmp_path / f"{name}{suffix}")


def test_a_pipe_is_no_checkpoint(tmp_path):
    """A pipe with the ending of a checkpoint, beside a config, is not opened."""
    os.mkfifo(tmp_path / "best.pytorch")
    (tmp_path / "config.yml").write_text("model: {name: UNet3D}")
    with pytest.raises(NormfixError, match=r"NF101 .* no file"):
        open_model(str(tmp_path / "best.pytorch"))


def test_an_archive_is_no_array(tmp_path):
    """An .npz named .npy is refused."""
    file = io.BytesIO()
    np.savez(file, a=VALUES)
    (tmp_path / "a.npy").write_bytes(file.getvalue())
    with pytest.raises(NormfixError, match="NF101"):
        open_file(tmp_path / "a.npy")


def _ome(path: Path, name: str, planes: int = 2) -> Path:
    """Write an OME-TIFF whose second plane lies in another file."""
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="P:0" DimensionOrder="XYZCT" Type="float" SizeX="8" SizeY="8" SizeC="1" SizeT="1" '
        f'SizeZ="{planes}"><TiffData IFD="0" FirstZ="0" PlaneCount="1"/><TiffData IFD="0" FirstZ="1" PlaneCount="1">'
        f'<UUID FileName="{name}">urn:uuid:1</UUID></TiffData></Pixels></Image></OME>'
    )
    tifffile.imwrite(path, VALUES, description=xml, metadata=None)
    return path


@pytest.mark.parametrize(
    ("name", "code"), [("../away/b.ome.tif", "NF121"), ("pipe.ome.tif", "NF121"), ("gone.ome.tif", "NF101")]
)
def test_a_companion_elsewhere_or_missing_is_refused(tmp_path, name, code):
    """Files of other folders and pipes are not opened, and what is missing is not read as zeros."""
    (tmp_path / "here").mkdir()
    (tmp_path / "away").mkdir()
    os.mkfifo(tmp_path / "away" / "b.ome.tif")
    os.mkfifo(tmp_path / "here" / "pipe.ome.tif")
    with pytest.raises(NormfixError) as caught:
        open_file(_ome(tmp_path / "here" / "a.ome.tif", name))
    assert caught.value.code == code


def test_a_companion_beside_is_read(tmp_path):
    """Negative control: a plane in a file of the same folder."""
    tifffile.imwrite(tmp_path / "b.ome.tif", VALUES + 1, metadata=None)
    opened = open_file(_ome(tmp_path / "a.ome.tif", "b.ome.tif"))
    try:
        np.testing.assert_array_equal(np.asarray(opened.array), [VALUES, VALUES + 1])
    finally:
        opened.close()


def test_a_description_of_countless_planes_is_refused(tmp_path):
    """No list of them is made."""
    with pytest.raises(NormfixError, match="NF121"):
        open_file(_ome(tmp_path / "a.ome.tif", "a.ome.tif", planes=10**9))


@pytest.mark.parametrize("extent", ["SizeX", "SizeY"])
def test_extents_that_countless_planes_would_fill_are_refused(tmp_path, extent):
    """As many planes as fill an extent that a description claims are not listed either; a right one is read."""
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, np.stack([VALUES, VALUES]), metadata={"axes": "ZYX"})
    opened = open_file(path)
    opened.close()
    assert opened.array.shape == (2, 8, 8)
    said = tifffile.tiffcomment(path).replace(f'{extent}="8"', f'{extent}="4294967295"')
    tifffile.tiffcomment(path, said.encode())
    with pytest.raises(NormfixError, match="NF121"):
        open_file(path)


def test_an_extension_larger_than_its_header_says_is_not_read(tmp_path):
    """A compressed NIfTI whose extension claims two gigabytes is refused before any of it is unpacked."""
    nibabel = pytest.importorskip("nibabel")
    head = bytearray(nibabel.Nifti1Image(VALUES, np.eye(4)).header.binaryblock)
    head[344:348] = b"n+1\0"
    struct.pack_into("<f", head, 108, 416.0)
    harm = bytes(head) + b"\1\0\0\0" + struct.pack("<ii", 2**31 - 16, 6) + bytes(1000)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(harm))
    with pytest.raises(NormfixError, match="NF121"):
        open_file(tmp_path / "a.nii.gz")
    right = bytes(head) + b"\1\0\0\0" + struct.pack("<ii", 64, 6) + bytes(56) + VALUES.tobytes(order="F")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(right))
    np.testing.assert_array_equal(open_file(tmp_path / "b.nii.gz").array[:, :], VALUES)


def _zarr(folder: Path, **more) -> Path:
    folder.mkdir()
    plain = {
        "zarr_format": 2,
        "shape": [8, 8],
        "chunks": [8, 8],
        "dtype": "<f4",
        "fill_value": 0,
        "order": "C",
    }
    (folder / ".zarray").write_text(json.dumps(plain | {"compressor": None, "filters": None} | more))
    return folder


@needs_zarr
def test_a_filter_that_makes_texts_of_numbers_is_refused(tmp_path):
    """A text of a million characters for each number is not made; another type of numbers is."""
    settings = {"id": "astype", "encode_dtype": "<f4"}
    with pytest.raises(NormfixError, match="NF106"):
        open_file(_zarr(tmp_path / "a.zarr", filters=[settings | {"decode_dtype": "S1000000"}]))
    folder = _zarr(tmp_path / "b.zarr", filters=[settings | {"decode_dtype": "<f8"}], dtype="<f8")
    (folder / "0.0").write_bytes(VALUES.tobytes())
    np.testing.assert_array_equal(open_file(folder).array[:, :], VALUES)


@needs_zarr
def test_folders_of_chunks_that_are_links_in_a_circle_are_refused(tmp_path):
    """They are not looked through without end."""
    folder = _zarr(tmp_path / "a.zarr", shape=[2] * 20, chunks=[1] * 20, dimension_separator="/")
    for name in "01":
        (folder / name).symlink_to(".")
    with pytest.raises(NormfixError, match="NF121"):
        open_file(folder)


@needs_zarr
def test_a_group_of_countless_images_is_refused(tmp_path):
    """They are not opened one by one to be listed."""
    part = {"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "0"}]}
    (tmp_path / "a.zarr").mkdir()
    _zarr(tmp_path / "a.zarr" / "0")
    (tmp_path / "a.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    (tmp_path / "a.zarr" / ".zattrs").write_text(json.dumps({"multiscales": [part] * 20_000}))
    with pytest.raises(NormfixError, match="NF121"):
        open_file(tmp_path / "a.zarr")


def test_countless_extensions_are_not_read(tmp_path):
    """Extensions of eight bytes each, a hundred kilobytes of them, are refused before an object is made of each."""
    nibabel = pytest.importorskip("nibabel")
    head = bytearray(nibabel.Nifti1Image(VALUES, np.eye(4)).header.binaryblock)
    head[344:348] = b"n+1\0"
    parts = struct.pack("<ii", 16, 6) + bytes(8)
    struct.pack_into("<f", head, 108, 352.0 + 16 * 5000)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(head) + b"\1\0\0\0" + parts * 5000))
    with pytest.raises(NormfixError, match="NF121"):
        open_file(tmp_path / "a.nii.gz")


@needs_zarr
def test_chunks_without_end_are_not_looked_for(tmp_path):
    """An array of a chunk for each of its million pixels, of which none is there, is refused; a few are read."""
    with pytest.raises(NormfixError, match="NF121"):
        read_image(_zarr(tmp_path / "a.zarr", shape=[1024, 1024], chunks=[1, 1]), ndim=2, channels=1)
    folder = _zarr(tmp_path / "b.zarr", chunks=[1, 1], fill_value=7)
    assert (read_image(folder, ndim=2, channels=1) == 7).all()


@needs_zarr
def test_metadata_of_countless_lists_is_refused(tmp_path):
    """Ten bytes of it take a hundred in memory."""
    folder = _zarr(tmp_path / "a.zarr", more=[[0]] * 400_000)
    with pytest.raises(NormfixError, match="NF121"):
        open_file(folder)


@needs_zarr
def test_images_of_a_group_are_listed_by_their_metadata(tmp_path, monkeypatch):
    """Their chunks are not looked for, which may lie in one folder under 256 names."""
    part = {"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "0"}]}
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    _zarr(folder / "0")
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    (folder / ".zattrs").write_text(json.dumps({"multiscales": [part] * 4}))
    monkeypatch.setattr("normfix.images.formats.chunk_store._listing", None)
    with pytest.raises(NormfixError, match=r"NF141.*8x8"):
        open_file(folder)


PACKED = {
    "PackBits": (32773, lambda size: b"\x81\0" * (size // 128)),
    "deflate": (8, lambda size: zlib.compress(bytes(size))),
    "xz of two streams": (34925, lambda size: lzma.compress(b"") + lzma.compress(bytes(size), preset=0)),
}


def _strips(path: Path, compression: int, data: bytes, count: int = 1) -> Path:
    """Write a TIFF of 16 x 16 bytes a strip, all strips the same bytes of the file."""
    first = 8 + 2 + 12 * 8 + 4
    place = first + (8 * count if count > 1 else 0)
    starts, lengths = (place, len(data)) if count == 1 else (first, first + 4 * count)
    width, height, bits = (3, 1, 16), (4, 1, 16 * count), (3, 1, 8)
    entries = {256: width, 257: height, 258: bits, 259: (3, 1, compression), 262: (3, 1, 1)}
    entries |= {273: (4, count, starts), 278: (4, 1, 16), 279: (4, count, lengths)}
    table = b"".join(struct.pack("<HHLL", code, *entry) for code, entry in entries.items())
    lists = struct.pack(f"<{2 * count}L", *[place] * count, *[len(data)] * count) if count > 1 else b""
    path.write_bytes(b"II*\0\x08\0\0\0\x08\0" + table + bytes(4) + lists + data)
    return path


@pytest.mark.parametrize("name", PACKED)
def test_a_strip_that_holds_256_bytes_unpacks_to_no_more_than_it_may(tmp_path, name):
    """However it is packed, what comes out is counted before it is made; a right strip is read."""
    compression, pack = PACKED[name]
    harm = _strips(tmp_path / "a.tif", compression, pack(68 << 20))
    with pytest.raises(NormfixError, match="NF121"):
        read_image(harm, ndim=2, channels=1)
    right = _strips(tmp_path / "b.tif", compression, pack(256))
    assert not read_image(right, ndim=2, channels=1).any()


def test_a_page_of_countless_strips_is_refused(tmp_path):
    """A hundred thousand strips, all of the same twelve bytes, are not unpacked one by one; a hundred are read."""
    with pytest.raises(NormfixError, match="NF121"):
        read_image(_strips(tmp_path / "a.tif", 8, zlib.compress(bytes(256)), 100_000), ndim=2, channels=1)
    few = _strips(tmp_path / "b.tif", 8, zlib.compress(bytes(256)), 100)
    assert read_image(few, ndim=2, channels=1).shape == (1, 1600, 16)


def test_a_description_of_countless_elements_is_refused(tmp_path):
    """No tree of them is made."""
    xml = f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org">{"<a/>" * 1_000_001}</OME>'
    tifffile.imwrite(tmp_path / "a.ome.tif", VALUES, description=xml, metadata=None)
    with pytest.raises(NormfixError, match="NF121"):
        open_file(tmp_path / "a.ome.tif")


VOLUME = np.random.default_rng(0).random((6, 50, 40), np.float32)


def _volume(path: Path, change=lambda data: data, behind: int = 0) -> Path:
    """Write a .nii.gz, whose bytes are changed."""
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(VOLUME, np.eye(4)), path)
    data = gzip.decompress(path.read_bytes()) + bytes(behind)
    path.write_bytes(change(gzip.compress(data)))
    return path


DAMAGED = {
    "a wrong checksum": ({"change": lambda data: data[:-8] + bytes(4) + data[-4:]}, "CRC"),
    "a wrong length": ({"change": lambda data: data[:-4] + bytes(4)}, "length"),
    "an end that is missing": ({"change": lambda data: data[:-8]}, "end-of-stream"),
    "a hundred megabytes behind its values": ({"behind": 100 << 20}, "far more follows"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_compressed_volume_is_whole_once_its_last_value_is_read(tmp_path, name):
    """Read whole or in windows, it is refused where its checksum or length does not fit."""
    options, reason = DAMAGED[name]
    path = _volume(tmp_path / "a.nii.gz", **options)
    with pytest.raises(NormfixError, match=f"NF101.*{reason}"):
        read_image(path, ndim=3, channels=1)
    with open_windows(path, ndim=3, channels=1) as image, pytest.raises(NormfixError, match=reason):
        image.read([(39, 40), (0, 50), (0, 6)])


def test_windows_of_a_compressed_volume_go_on_from_each_other(tmp_path, monkeypatch):
    """One after the other they are unpacked once; an earlier one starts again and has the same values."""
    starts = []
    rewind = gzip._GzipReader._rewind
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: (starts.append(1), rewind(self))[1])
    with open_windows(_volume(tmp_path / "a.nii.gz"), ndim=3, channels=1) as image:
        starts.clear()
        found = [image.read([(z, z + 1), (0, 50), (0, 6)]) for z in range(40)]
        assert not starts
        np.testing.assert_array_equal(np.concatenate(found, 1)[0], VOLUME.T)
        np.testing.assert_array_equal(image.read([(0, 1), (0, 50), (0, 6)]), found[0])
        assert starts


def _stack(path: Path, pages: int, said: int, named: bool) -> Path:
    """Write an OME-TIFF of so many pages that says it has others."""
    data = (
        "".join(f'<TiffData IFD="{z}" FirstZ="{z}" PlaneCount="1"/>' for z in range(said))
        if named
        else "<TiffData/>"
    )
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="P:0" DimensionOrder="XYZCT" Type="float" SizeX="8" SizeY="8" SizeC="1" SizeT="1" '
        f'SizeZ="{said}">{data}</Pixels></Image></OME>'
    )
    tifffile.imwrite(
        path, np.stack([VALUES] * pages), description=xml, metadata=None, photometric="minisblack"
    )
    return path


@pytest.mark.parametrize("named", [True, False])
def test_planes_that_are_missing_are_not_read_as_zeros(tmp_path, named):
    """A stack of which pages were lost is refused, whether its description names each or none; a whole one is read."""
    with pytest.raises(NormfixError, match=r"NF101.*2 of the 5 pages"):
        open_file(_stack(tmp_path / "a.ome.tif", 3, 5, named))
    found = read_image(_stack(tmp_path / "b.ome.tif", 5, 5, named), ndim=3, channels=1)
    np.testing.assert_array_equal(found[0], [VALUES] * 5)


def _sparse(path: Path, absent: set[int], compression: str | None = None) -> Path:
    """Write a TIFF of 16 tiles, some of which are not stored, as GDAL writes them."""
    data = np.arange(1, 64 * 64 + 1, dtype=np.float32).reshape(64, 64)
    tifffile.imwrite(path, data, tile=(16, 16), compression=compression, metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for code in (324, 325):
            tag = file.pages[0].tags[code]
            tag.overwrite([0 if n in absent else value for n, value in enumerate(tag.value)])
    return path


@needs_zarr
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiles_that_are_not_stored_are_told(tmp_path, compression):
    """Whole and by window they are the same zeros, and their number is said."""
    path, told = _sparse(tmp_path / "a.tif", {3, 7}, compression), []
    whole = read_image(path, ndim=2, channels=1, tell=told.append)
    with open_windows(path, ndim=2, channels=1) as image:
        np.testing.assert_array_equal(image.read([(0, 64), (0, 64)]), whole)
        assert image.notes
    assert "2 of 16 tiles" in told[0]
    assert (whole == 0).sum() == 2 * 16 * 16


def test_without_zarr_a_sparse_page_is_refused_with_what_to_install(tmp_path, monkeypatch):
    """It is read with zarr alone, and that is what the error names."""
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(NormfixError, match=r"NF143 .*2 of 16 tiles .*normfix\[stream\]"):
        open_file(_sparse(tmp_path / "a.tif", {3, 7}))


def test_a_page_of_which_nothing_is_stored_is_no_image(tmp_path):
    """It is refused rather than read as zeros."""
    with pytest.raises(NormfixError, match=r"NF101.*none of its pixels"):
        open_file(_sparse(tmp_path / "a.tif", set(range(16))))


def test_a_whole_page_has_no_notes(tmp_path):
    """Negative control: pages and strips that are stored are not counted as missing."""
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.ones((5, 64, 64), np.float32),
        rowsperstrip=16,
        compression="zlib",
        photometric="minisblack",
    )
    opened = open_file(tmp_path / "a.tif")
    assert opened.notes == ()
    opened.close()


def _silenced_by_level(logger):
    logger.setLevel(logging.CRITICAL)


def _silenced_by_switch(logger):
    logger.disabled = True  # as logging.config does with loggers that are there


def _silenced_with_all(_):
    logging.disable(logging.CRITICAL)


@pytest.fixture
def tifffiles_logger():
    """The logger of tifffile, and logging, which are as they were afterwards."""
    logger = logging.getLogger("tifffile")
    level, disabled, all_of_it = logger.level, logger.disabled, logging.root.manager.disable
    yield logger
    logger.setLevel(level)
    logger.disabled = disabled
    logging.disable(all_of_it)


@pytest.mark.parametrize("silence", [_silenced_by_level, _silenced_by_switch, _silenced_with_all])
def test_a_stack_that_is_cut_short_is_refused_where_logging_is_silenced(tmp_path, tifffiles_logger, silence):
    """tifffile only logs that pages are missing, and gives the first as the image; a whole stack is read."""
    path, pages = tmp_path / "a.tif", np.stack([VALUES + n for n in range(5)])
    silence(tifffiles_logger)
    tifffile.imwrite(path, pages, bigtiff=True, compression="zlib", photometric="minisblack")
    np.testing.assert_array_equal(read_image(path, ndim=3, channels=1)[0], pages)
    data = path.read_bytes()
    for cut in range(len(data) // 2, len(data), 40):
        path.write_bytes(data[:cut])
        with pytest.raises(NormfixError, match="NF101"):
            read_image(path, ndim=3, channels=1)
    assert "error" not in tifffiles_logger.__dict__


def test_an_error_is_logged_as_before_and_heard_by_all(caplog):
    """Listening takes nothing from those who read the log, and is over with the last listener."""
    logger = logging.getLogger("tifffile")
    with _complaints("tifffile") as first:
        with _complaints("tifffile") as second:
            logger.error("page %d", 3)
            logger.warning("no error")
        logger.error("alone")
    assert (first, second) == (["page 3", "alone"], ["page 3"])
    assert [record.message for record in caplog.records] == ["page 3", "no error", "alone"]
    assert {record.funcName for record in caplog.records} == {
        "test_an_error_is_logged_as_before_and_heard_by_all"
    }


@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_a_compressed_part_behind_the_end_of_a_file_is_told_before_it_is_decoded(tmp_path, tile):
    """Some codecs (JPEG, LZW) complete what is cut; so the place of each part is held against the file's length."""
    path = tmp_path / "a.tif"
    options = {"tile": tile} if tile else {"rowsperstrip": 16}
    tifffile.imwrite(path, np.arange(4096, dtype=np.uint16).reshape(64, 64), compression="zlib", **options)
    assert read_image(path, ndim=2, channels=1).shape == (1, 64, 64)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(NormfixError, match=r"NF101 .*1 of its tiles or strips go on behind the end"):
        open_file(path)


def test_a_jpeg_within_a_tiff_has_to_end():
    """libjpeg goes on with grey behind the last byte; the data of a scan never look like its end."""
    whole = _written(Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)), "JPEG")
    assert _is_ended(whole)
    assert _is_ended(whole + bytes(8))
    assert not any(_is_ended(whole[:cut]) for cut in range(whole.index(b"\xff\xda") + 2, len(whole) - 1))
