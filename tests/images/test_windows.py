"""Images read by window, scaled over the whole, written by block: as if they had been in memory."""

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optional import needs_zarr, zarr

import normfix
from normfix.errors import NormfixError
from normfix.images.files import open_windows
from normfix.images.scaling import scaled, scaling_numbers
from normfix.images.sources import TensorImage
from normfix.images.spread import Spread
from normfix.images.windows import ScaledImage, Unread, windowed
from normfix.images.writing import OutputFile
from normfix.records.saved import Scaling

SPACE = (37, 53)


def _array(channels=2, dtype=np.uint16):
    return np.random.default_rng(0).integers(0, 4000, (channels, *SPACE)).astype(dtype)


def _ome_zarr(path, array, version):
    group = zarr.create_group(store=str(path), zarr_format=2 if version == "0.4" else 3)
    multiscales = [
        {
            "axes": [{"name": n} for n in "tczyx"],
            "datasets": [{"path": "full"}, {"path": "half"}],
        }
    ]
    group.attrs.update(
        {"multiscales": multiscales} if version == "0.4" else {"ome": {"multiscales": multiscales}}
    )
    for name, level in (("full", array), ("half", array[:, ::2, ::2])):
        five = level[None, :, None]
        group.create_array(name, shape=five.shape, chunks=(1, 1, 1, 16, 16), dtype=five.dtype)[...] = five


def _write(path, kind, array):
    match kind:
        case "npy":
            np.save(path / "a.npy", array)
        case "tif":
            tifffile.imwrite(path / "a.tif", array, photometric="minisblack", metadata={"axes": "CYX"})
        case "tiled":
            tifffile.imwrite(
                path / "a.tif",
                array,
                photometric="minisblack",
                tile=(16, 16),
                compression="zlib",
                metadata={"axes": "CYX"},
            )
        case "ome":
            tifffile.imwrite(
                path / "a.ome.tif", array, photometric="minisblack", tile=(16, 32), metadata={"axes": "CYX"}
            )
        case "zarr2" | "zarr3":
            zarr.create_array(
                store=str(path / "a.zarr"), data=array, chunks=(1, 16, 16), zarr_format=int(kind[-1])
            )
        case "0.4" | "0.5":
            _ome_zarr(path / "a.zarr", array, kind)
    return next(path.glob("a*"))


@pytest.mark.parametrize("kind", ["npy", "tif", "tiled", "ome", "zarr2", "zarr3", "0.4", "0.5"])
def test_a_window_of_a_file_is_the_window_of_its_array(kind, tmp_path):
    """Every kind of file gives (C, *space) windows in the order of the network's axes."""
    array = _array()
    with open_windows(_write(tmp_path, kind, array), ndim=2, channels=2) as window:
        assert window.shape == array.shape
        for spans in ([(0, 37), (0, 53)], [(5, 20), (30, 53)], [(36, 37), (0, 1)]):
            (a, b), (c, d) = spans
            np.testing.assert_array_equal(window.read(spans), array[:, a:b, c:d])


def test_levels_of_a_pyramid(tmp_path):
    """`level` chooses the resolution; a level that is not there is an error."""
    array = _array()
    path = _write(tmp_path, "0.5", array)
    np.testing.assert_array_equal(
        open_windows(path, ndim=2, channels=2, level=1).read([(0, 5), (1, 4)]), array[:, ::2, ::2][:, :5, 1:4]
    )
    with pytest.raises(NormfixError, match=r"NF101.*2 levels"):
        open_windows(path, ndim=2, channels=2, level=2)


class Watched:
    """An array-like object that counts the pixels that are read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, 0

    def __getitem__(self, index):
        self.read += self.array[index].size
        return self.array[index]


def test_nothing_but_the_window_is_read():
    """An object with shape, dtype and slicing is asked for the window and for nothing else."""
    watched = Watched(np.moveaxis(_array(), 0, -1))
    window = windowed(watched, ndim=2, channels=2, axes="YXC")
    assert watched.read == 0
    np.testing.assert_array_equal(window.read([(3, 10), (4, 9)]), _array()[:, 3:10, 4:9])
    assert watched.read == 2 * 7 * 5


@pytest.mark.parametrize("kind", ["none", "unit", "zscore", "percentile", "fixed"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_scaling_is_that_of_the_whole_image(kind, dtype):
    """Windows are scaled by the numbers of the whole image, whatever its dtype."""
    array = (_array() % 251).astype(dtype)
    scaling = Scaling(kind=kind, values={"percentile": (1.0, 99.7), "fixed": (3.0, 7.0)}.get(kind, ()))
    window = windowed(array, ndim=2, channels=2, axes="CYX")
    if kind == "unit" and np.dtype(dtype).kind == "f":
        with pytest.raises(NormfixError, match="NF107"):
            scaling_numbers(Spread(window), scaling)
        return
    offset, divisor = scaling_numbers(Spread(window), scaling)
    wide = torch.float64 if dtype == np.float64 else torch.float32
    image = ScaledImage(window, offset=offset, divisor=divisor, dtype=wide)
    expected = torch.from_numpy(scaled(array, scaling))[None, :, 5:31, 7:50]
    torch.testing.assert_close(
        image.read([(5, 31), (7, 50)]), expected, rtol=1e-12 if wide == torch.float64 else 1e-6, atol=1e-12
    )


@settings(deadline=None, max_examples=60)
@given(
    arrays(
        st.sampled_from([np.uint8, np.int16, np.uint32, np.float32, np.float64, np.dtype(">i2")]),
        st.tuples(st.integers(1, 6), st.integers(1, 7)),
    ),
    st.floats(0, 100),
)
def test_percentiles_are_numpys(array, q):
    """Streamed percentiles are numpy's, to the rounding of one interpolation, for every dtype."""
    if array.dtype.kind == "f":
        array = np.nan_to_num(array, nan=0, posinf=1e30, neginf=-1e30).clip(-1e30, 1e30)
    found = Spread(windowed(array, ndim=2, channels=1)).percentiles([q])[0]
    expected = float(np.percentile(array.astype(np.float64), q))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_padding_repeats_the_edge():
    """A window beyond the end is filled with the edge pixels, as a whole image is padded."""
    array = _array(1, np.float32)
    image = ScaledImage(windowed(array, ndim=2, channels=1, axes="CYX")).padded((3, 11))
    assert image.shape == (1, 1, 40, 64)
    whole = torch.nn.functional.pad(torch.from_numpy(array)[None], (0, 11, 0, 3), mode="replicate")
    for spans in ([(0, 40), (0, 64)], [(30, 40), (50, 60)], [(38, 40), (60, 64)]):
        (a, b), (c, d) = spans
        assert torch.equal(image.read(spans), whole[:, :, a:b, c:d])


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".zarr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_in_blocks_is_read_back(suffix, channels, tmp_path):
    """A file written block by block, in any order, holds the whole, cut to its own extents."""
    whole = torch.rand(1, channels, 40, 64)
    path = tmp_path / f"out{suffix}"
    with OutputFile(path) as out:
        out.create((channels, *SPACE), torch.float32, (16, 32))
        for y in (32, 0, 16):
            for x in (32, 0):
                index = (slice(0, 1), slice(0, channels), slice(y, min(40, y + 16)), slice(x, x + 32))
                out.write(index, whole[index])
        assert not path.exists()  # until it is whole
    with open_windows(path, ndim=2, channels=channels) as window:
        found = window.read([(0, n) for n in SPACE])
    np.testing.assert_array_equal(found, whole[0, :, : SPACE[0], : SPACE[1]].numpy())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".zarr"])
def test_a_failed_output_leaves_nothing(suffix, tmp_path):
    """After an error neither the file nor its draft is there."""

    def fail():
        with OutputFile(tmp_path / f"out{suffix}") as out:
            out.create((1, *SPACE), torch.float32, (16, 16))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_are_refused_when_read():
    """NaN in a window is an error with the image's name."""
    array = np.ones((8, 8), np.float32)
    array[3, 3] = np.nan
    window = Unread(array, "YX", where="x.npy")
    with pytest.raises(NormfixError, match=r"NF104 x\.npy"):
        window.read([(0, 8), (0, 8)])
    assert window.read([(4, 8), (0, 8)]).shape == (1, 4, 8)


def test_an_extended_image_is_extended_further():
    """Twice is the sum, in memory and by window: once exact, an image stays what it is."""
    array = np.arange(30, dtype=np.float32).reshape(5, 6)
    net = torch.nn.Conv2d(1, 1, 3)
    for image in (
        normfix.open_image(array, net, scaling="0,1"),
        TensorImage(torch.from_numpy(array)[None, None]),
    ):
        twice = image.padded((3, 0)).padded((0, 2))
        assert twice.shape == (1, 1, 8, 8)
        assert twice.padded((0, 0)).shape == (1, 1, 8, 8)
        assert float(twice.read(((7, 8), (7, 8)))) == 29


@needs_zarr
@pytest.mark.parametrize("chunks", [(1, 1), (1 << 12, 1 << 12)], ids=["countless chunks", "a long image"])
def test_a_folder_that_is_hardly_stored_is_not_walked_over(tmp_path, monkeypatch, chunks):
    """So with the chunks of a Zarr that are not there; controls: a stated scaling, an image that is stored."""
    monkeypatch.setattr("normfix.images.files._LONG", 1 << 20)
    network = torch.nn.Conv2d(1, 1, 3)
    metadata = {"shape": (1 << 13, 1 << 13), "chunks": chunks, "dtype": "u1", "zarr_format": 2}
    zarr.create_array(str(tmp_path / "sparse.zarr"), **metadata)
    stored = zarr.create_array(
        str(tmp_path / "stored.zarr"), shape=(1 << 11, 1 << 11), chunks=(256, 256), dtype="u1"
    )
    stored[...] = np.random.default_rng(0).integers(0, 255, (1 << 11, 1 << 11), dtype=np.uint8)
    with pytest.raises(NormfixError, match="NF121"):
        normfix.open_image(tmp_path / "sparse.zarr", network, scaling="zscore")
    for name, stated in (("sparse.zarr", "unit"), ("stored.zarr", "zscore")):
        with normfix.open_image(tmp_path / name, network, scaling=stated) as image:
            assert image.read([(0, 8), (0, 8)]).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("scaling", ["zscore", "percentile:1,99"])
def test_a_file_that_is_hardly_stored_is_not_walked_over(tmp_path, monkeypatch, scaling):
    """A sparse file costs nothing and takes minutes: NF121; controls: another scaling, a file that is stored."""
    monkeypatch.setattr("normfix.images.files._LONG", 1 << 20)
    network = torch.nn.Conv2d(1, 1, 3)
    np.save(tmp_path / "stored.npy", np.arange(1 << 21, dtype=np.uint8).reshape(1 << 10, -1))
    np.save(tmp_path / "sparse.npy", np.zeros((8, 8), np.uint8))
    with (tmp_path / "sparse.npy").open("r+b") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 13, 1 << 13)}
        )
        file.truncate(file.tell() + (1 << 26))
    if getattr((tmp_path / "sparse.npy").stat(), "st_blocks", 1 << 26) > 100:
        pytest.skip("this file system stores holes, or does not say")
    with pytest.raises(NormfixError, match="NF121"):
        normfix.open_image(tmp_path / "sparse.npy", network, scaling=scaling)
    for name, stated in (("sparse.npy", "unit"), ("stored.npy", scaling)):
        with normfix.open_image(tmp_path / name, network, scaling=stated) as image:
            assert image.read([(0, 8), (0, 8)]).shape == (1, 1, 8, 8)
