"""Zarr images: every codec of the list is read, no other runs, and none unpacks beyond its chunk."""

import bz2
import gzip
import json
import lzma
import os
import resource
import time
import zlib

import numpy as np
import pytest
from optional import NO_ZARR

from normfix.errors import NormfixError
from normfix.images.files import open_windows, read_image

numcodecs = pytest.importorskip("numcodecs", reason=NO_ZARR)
zarr = pytest.importorskip("zarr", reason=NO_ZARR)

RNG = np.random.default_rng(0)
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def _window(path, **options):
    with open_windows(path, ndim=2, channels=1, **options) as image:
        return image.read([(0, n) for n in image.shape[1:]])


def _second(path, **metadata):
    """Write an array of Zarr 2 by hand: 64 x 64 float32 in one chunk."""
    path.mkdir(parents=True)
    known = {
        "zarr_format": 2,
        "shape": [64, 64],
        "chunks": [64, 64],
        "dtype": "<f4",
        "fill_value": 0,
        "order": "C",
    }
    (path / ".zarray").write_text(json.dumps({**known, "compressor": None, "filters": None, **metadata}))
    return path / "0.0"


def _third(path, codecs, chunk=(64, 64), **metadata):
    """Write an array of Zarr 3 by hand: 64 x 64 float32."""
    (path / "c" / "0").mkdir(parents=True)
    known = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [64, 64],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": codecs,
    }
    (path / "zarr.json").write_text(json.dumps({**known, **metadata}))
    return path / "c" / "0" / "0"


COMPRESSORS = [
    None,
    numcodecs.Zlib(),
    numcodecs.GZip(),
    numcodecs.BZ2(),
    numcodecs.LZMA(),
    numcodecs.Zstd(),
    numcodecs.LZ4(),
    numcodecs.Blosc("lz4", shuffle=numcodecs.Blosc.BITSHUFFLE),
    numcodecs.Blosc("zstd"),
]
FILTERS = [[], [numcodecs.Delta("<f4")], [numcodecs.Shuffle(4)], [numcodecs.CRC32(), numcodecs.Zlib()]]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_what_zarr_2_writes_is_read(tmp_path, compressor, filters):
    """Each compressor, alone or after filters, in ragged chunks: windows and whole are the values that were written."""
    array = RNG.integers(0, 9, (70, 45)).astype(np.float32)
    made = zarr.create_array(
        str(tmp_path / "a.zarr"),
        shape=array.shape,
        chunks=(32, 16),
        dtype="float32",
        zarr_format=2,
        compressors=compressor,
        filters=filters or None,
        chunk_key_encoding={"name": "v2", "separator": "/" if filters else "."},
    )
    made[...] = array
    np.testing.assert_array_equal(_window(tmp_path / "a.zarr")[0], array)
    np.testing.assert_array_equal(read_image(tmp_path / "a.zarr", ndim=2, channels=1)[0], array)


@pytest.mark.parametrize("shards", [None, (64, 32)])
@pytest.mark.parametrize("codec", ["none", "gzip", "zstd", "blosc", "crc", "transposed"])
def test_what_zarr_3_writes_is_read(tmp_path, codec, shards):
    """Each codec, alone and inside of shards, with chunks that were never written and end past the edge."""
    compressors = {
        "gzip": zarr.codecs.GzipCodec(),
        "zstd": zarr.codecs.ZstdCodec(level=3, checksum=True),
        "blosc": zarr.codecs.BloscCodec(cname="lz4"),
        "crc": [zarr.codecs.GzipCodec(), zarr.codecs.Crc32cCodec()],
    }.get(codec)
    array = RNG.integers(0, 9, (70, 45)).astype(np.uint16)
    array[32:64, 16:32] = 7
    made = zarr.create_array(
        str(tmp_path / "a.zarr"),
        shape=array.shape,
        chunks=(32, 16),
        shards=shards,
        dtype="uint16",
        fill_value=7,
        compressors=compressors,
        filters=[zarr.codecs.TransposeCodec(order=(1, 0))] if codec == "transposed" else None,
    )
    made[...] = array
    with open_windows(tmp_path / "a.zarr", ndim=2, channels=1) as image:
        np.testing.assert_array_equal(image.read([(3, 70), (11, 40)])[0], array[3:, 11:40])
    np.testing.assert_array_equal(read_image(tmp_path / "a.zarr", ndim=2, channels=1)[0], array)


ZEROS = bytes(96 << 20)
BOMBS = {
    "zlib": lambda: zlib.compress(ZEROS, 9),
    "gzip": lambda: gzip.compress(ZEROS),
    "bz2": lambda: bz2.compress(ZEROS),
    "lzma": lambda: lzma.compress(ZEROS, preset=0),
    "zstd": lambda: numcodecs.Zstd().encode(ZEROS),
    "lz4": lambda: numcodecs.LZ4().encode(ZEROS),
    "blosc": lambda: numcodecs.Blosc("zstd").encode(ZEROS),
}


def _grown():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _refused(path, code="NF121"):
    """Both readers refuse it with a code, in seconds and little memory."""
    for read in (_window, lambda p: read_image(p, ndim=2, channels=1)):
        before, started = _grown(), time.monotonic()
        with pytest.raises(NormfixError, match=code):
            read(path)
        assert time.monotonic() - started < 10
        assert _grown() - before < 48


@pytest.mark.parametrize("name", BOMBS)
def test_a_chunk_that_unpacks_to_more_than_it_holds_is_refused(tmp_path, name):
    """A chunk of a few kilobytes' array that would become 96 MB is refused before it does; in one codec or two."""
    bomb = BOMBS[name]()
    chunk = _second(tmp_path / "a.zarr", compressor={"id": name})
    chunk.write_bytes(bomb)
    _refused(tmp_path / "a.zarr")
    packed = zlib.compress(bomb)
    if len(packed) < 60_000:
        chunk = _second(tmp_path / "b.zarr", compressor={"id": "zlib"}, filters=[{"id": name}])
        chunk.write_bytes(packed)
        _refused(tmp_path / "b.zarr")


def test_a_bomb_inside_of_a_shard_is_refused(tmp_path):
    """Chunks of shards are bounded as others are: what they unpack to, and what their index says they are long."""
    inner = [LITTLE, {"name": "zstd", "configuration": {"level": 1, "checksum": False}}]
    shard = {"chunk_shape": [64, 64], "codecs": inner, "index_codecs": [LITTLE], "index_location": "end"}
    bomb = BOMBS["zstd"]()
    for name, length in (("a", len(bomb)), ("b", 2**40)):
        chunk = _third(tmp_path / name, [{"name": "sharding_indexed", "configuration": shard}])
        chunk.write_bytes(bomb + np.array([0, length], "<u8").tobytes())
    _refused(tmp_path / "a")
    _refused(tmp_path / "b", "NF101")


@pytest.mark.parametrize("version", [2, 3])
def test_chunks_far_larger_than_their_array_are_refused(tmp_path, version):
    """An array of 64 x 64 pixels in chunks of 10^9 x 10^9 would take any memory; a chunk somewhat larger is usual."""
    if version == 2:
        _second(tmp_path / "a", chunks=[10**9, 10**9])
        _second(tmp_path / "b", chunks=[256, 256]).write_bytes(bytes(4 << 16))
    else:
        _third(tmp_path / "a", [LITTLE], chunk=(10**9, 10**9))
        _third(tmp_path / "b", [LITTLE], chunk=(256, 256)).write_bytes(bytes(4 << 16))
    _refused(tmp_path / "a")
    assert _window(tmp_path / "b").shape == (1, 64, 64)


@pytest.mark.parametrize(
    "part",
    [
        {"compressor": {"id": "pickle", "protocol": 5}},
        {"filters": [{"id": "pickle"}]},
        {"compressor": {"id": "msgpack2"}},
        {"filters": [{"id": "vlen-array", "dtype": "<f4"}]},
    ],
)
def test_a_codec_off_the_list_never_runs(tmp_path, monkeypatch, part):
    """Pickle and other codecs of objects are refused by name, and their decoders are not called."""
    for codec in (numcodecs.Pickle, numcodecs.MsgPack):
        monkeypatch.setattr(codec, "decode", lambda *a: pytest.fail("it ran"))
    _second(tmp_path / "a.zarr", **part).write_bytes(bytes(1 << 14))
    name = (part.get("compressor") or part["filters"][0])["id"]
    _refused(tmp_path / "a.zarr", f"NF150.*{name!r}")


def test_objects_are_refused_before_their_codecs_are(tmp_path):
    """An array of objects is no image, whatever would decode it."""
    chunk = _second(tmp_path / "a.zarr", dtype="|O", filters=[{"id": "vlen-utf8"}, {"id": "pickle"}])
    chunk.write_bytes(b"x")
    _refused(tmp_path / "a.zarr", "NF106")


def _link(chunk, secret):
    chunk.symlink_to(secret)


@pytest.mark.parametrize(
    "how", [_link, lambda chunk, secret: os.mkfifo(chunk), lambda c, s: c.symlink_to("/dev/zero")]
)
def test_chunks_are_files_of_the_image(tmp_path, how):
    """A chunk that is a link out of the folder, a pipe or a device is not read; a link within the folder is."""
    (tmp_path / "secret").write_bytes(bytes(1 << 14))
    how(_second(tmp_path / "a.zarr"), tmp_path / "secret")
    _refused(tmp_path / "a.zarr")
    chunk = _second(tmp_path / "b.zarr")
    (tmp_path / "b.zarr" / "kept").write_bytes(bytes(1 << 14))
    chunk.symlink_to("kept")
    assert _window(tmp_path / "b.zarr").shape == (1, 64, 64)


@pytest.mark.parametrize("place", ["../other", "/{}/other", "x/../../other", "link"])
def test_an_image_names_no_array_outside_of_it(tmp_path, place):
    """Paths of OME-Zarr that lead out of the folder are refused, links too."""
    _second(tmp_path / "other").write_bytes(bytes(1 << 14))
    group = tmp_path / "a.zarr"
    group.mkdir()
    (group / "link").symlink_to(tmp_path / "other")
    (group / ".zgroup").write_text('{"zarr_format": 2}')
    datasets = [{"path": place.format(str(tmp_path).lstrip("/"))}]
    (group / ".zattrs").write_text(json.dumps({"multiscales": [{"axes": ["y", "x"], "datasets": datasets}]}))
    _refused(group)


@pytest.mark.parametrize(("version", "name"), [(2, ".zarray"), (3, "zarr.json")])
def test_metadata_that_says_two_things_is_refused(tmp_path, version, name):
    """Two shapes in one object, of which programs take different ones; one shape is read."""
    path = tmp_path / "a.zarr"
    zarr.create_array(str(path), data=np.ones((8, 8), np.float32), zarr_format=version)
    assert _window(path).shape == (1, 8, 8)
    text = (path / name).read_text()
    (path / name).write_text(text.rstrip()[:-1] + ', "shape": [4, 8]}')
    _refused(path, "NF101")


def test_consolidated_metadata_is_not_what_is_read(tmp_path):
    """Copies of metadata in a group do not replace those of the arrays."""
    group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=2)
    group.create_array("0", shape=(8, 8), dtype="float32", chunks=(8, 8), compressors=None)[...] = 3
    axes = [{"name": n, "type": "space"} for n in "yx"]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}]}]
    zarr.consolidate_metadata(str(tmp_path / "a.zarr"), zarr_format=2)
    copies = tmp_path / "a.zarr" / ".zmetadata"
    copies.write_text(copies.read_text().replace('"shape": [', '"shape": [1, '))
    np.testing.assert_array_equal(_window(tmp_path / "a.zarr"), np.full((1, 8, 8), 3))


@pytest.mark.parametrize("shards", [None, (8, 8)])
def test_missing_chunks_are_told(tmp_path, shards):
    """Chunks that are missing read as the fill value, and their number is said; of a whole image nothing is."""
    array = RNG.random((16, 16), np.float32)
    path = str(tmp_path / "a.zarr")
    made = zarr.create_array(path, shape=array.shape, dtype=array.dtype, chunks=(4, 4), shards=shards)
    made[...] = array
    with open_windows(tmp_path / "a.zarr", ndim=2, channels=1) as image:
        assert image.notes == ()
    files = sorted(p for p in (tmp_path / "a.zarr" / "c").rglob("*") if p.is_file())
    files[0].unlink()
    told = []
    found = read_image(tmp_path / "a.zarr", ndim=2, channels=1, tell=told.append)
    (text,) = told
    assert f"1 of {len(files)} chunks are missing and read as the fill value, 0.0" in text
    edge = (shards or made.chunks)[0]
    assert not found[0, :edge, :edge].any()
    assert (found[0, edge:] == array[edge:]).all()


@pytest.mark.parametrize("stray", ["01", "\u0661"], ids=["zero", "arabic"])
@pytest.mark.parametrize("version", [2, 3])
def test_a_file_that_is_named_nearly_as_a_chunk_is_none(tmp_path, version, stray):
    """Files called 01 or by digits of another script stand for no missing chunk."""
    made = zarr.create_array(
        str(tmp_path / "a.zarr"), data=np.ones((8, 8), "f4"), chunks=(4, 4), zarr_format=version
    )
    assert made.nchunks == 4
    chunk = tmp_path / "a.zarr" / ("1.1" if version == 2 else "c/1/1")
    chunk.rename(chunk.with_name(chunk.name[:-1] + stray))
    with open_windows(tmp_path / "a.zarr", ndim=2, channels=1) as image:
        (text,) = image.notes
    assert text.startswith("1 of 4 chunks are missing")
