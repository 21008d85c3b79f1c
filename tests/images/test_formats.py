"""Image files: which series, axes and level is read, and what of where its pixels lie goes with the prediction."""

import gzip
import importlib.util
import json
import math
import struct
import sys
import zlib
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import imageio.v3 as iio
import nibabel
import numpy as np
import pytest
import tifffile
import torch
from optional import zarr

import normfix
from normfix.demo.data import nuclei_image
from normfix.errors import NormfixError
from normfix.images.axes import write_image
from normfix.images.files import open_windows, read_image
from normfix.images.formats import create, open_file
from normfix.images.formats.opened import Choice
from normfix.images.formats.placement import Placement
from normfix.images.writing import OutputFile

RNG = np.random.default_rng(0)


def _in(package, *parts):
    return Path(importlib.util.find_spec(package).submodule_search_locations[0], *parts)


class Plain(torch.nn.Module):
    """Convolves, normalises, and gives as many channels as asked; with a stride, a coarser map."""

    def __init__(self, ndim=2, channels=1, outputs=1, stride=1):
        super().__init__()
        conv = (torch.nn.Conv2d, torch.nn.Conv3d)[ndim - 2]
        norm = (torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d)[ndim - 2]
        self.conv, self.norm = conv(channels, outputs, 3, stride, padding=1), norm(outputs)

    def forward(self, x):
        return self.norm(self.conv(x))


def _converted(**options):
    torch.manual_seed(0)
    ndim, channels = options.get("ndim", 2), options.get("channels", 1)
    return normfix.convert(Plain(**options), torch.rand(1, channels, *(32,) * ndim)).model


def _predict(model, source, out, **options):
    with normfix.open_image(source, model, scaling=normfix.Scaling(kind="zscore"), **options) as image:
        normfix.write_prediction(model, image, out, tile=32, engine="tiles")
        return normfix.predict(model, image, tile=32, engine="tiles")[0].numpy()


def test_a_real_volume_keeps_its_place():
    """A real MRI in NIfTI is read by window in the order Z, Y, X, and says its spacing."""
    path = _in("nibabel", "tests", "data", "anatomical.nii")
    expected = np.asarray(nibabel.load(path).dataobj).T
    with open_windows(path, ndim=3, channels=1) as window:
        assert window.shape == (1, *expected.shape)
        np.testing.assert_array_equal(window.read([(3, 9), (0, 41), (10, 11)])[0], expected[3:9, :, 10:11])
        zooms = nibabel.load(path).header.get_zooms()
        assert window.placement.spacing == tuple(float(z) for z in reversed(zooms))
    np.testing.assert_array_equal(read_image(path, ndim=3, channels=1)[0], expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_prediction_of_a_volume_lies_where_the_volume_lies(tmp_path, stride):
    """The written NIfTI has the prediction's values and maps the same corner of the grid to the same place."""
    path = _in("nibabel", "tests", "data", "anatomical.nii")
    expected = _predict(_converted(ndim=3, stride=stride), path, tmp_path / "p.nii")
    image, source = nibabel.load(tmp_path / "p.nii"), nibabel.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, expected[0])
    assert image.get_data_dtype().newbyteorder("=") == np.float32
    corner = np.array([-0.5, -0.5, -0.5, 1])
    np.testing.assert_allclose(image.affine @ corner, source.affine @ corner, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(image.affine[:3, :3], stride * source.affine[:3, :3], rtol=1e-5)
    assert image.header["sform_code"] == source.header["sform_code"]


def test_slope_and_intercept_are_applied(tmp_path):
    """Scaled integers are read as the numbers they stand for; compressed files too."""
    image = nibabel.Nifti1Image(RNG.random((5, 6, 7)) * 100, np.eye(4))
    image.header.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "a.nii.gz")
    with open_windows(tmp_path / "a.nii.gz", ndim=3, channels=1) as window:
        found = window.read([(0, 7), (0, 6), (0, 5)])[0]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, image.get_fdata().T, atol=0.01)


@pytest.mark.slow
def test_channels_of_a_volume_come_back_last(tmp_path):
    """Four-dimensional NIfTI without a time unit is channels, which the prediction has in the same place."""
    data = RNG.random((6, 7, 8, 2)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([2, 3, 4, 1])), tmp_path / "a.nii")
    model = _converted(ndim=3, channels=2, outputs=3)
    expected = _predict(model, tmp_path / "a.nii", tmp_path / "p.nii")
    found = nibabel.load(tmp_path / "p.nii")
    np.testing.assert_array_equal(np.asarray(found.dataobj), expected.transpose(3, 2, 1, 0))
    assert found.header.get_zooms()[:3] == (2, 3, 4)
    with pytest.raises(NormfixError, match="NF142"):
        write_image(tmp_path / "plane.nii", np.zeros((2, 4, 4), np.float32))


def test_nifti_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    """The extra is named where nibabel is missing."""
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(NormfixError, match=r"NF143 .*normfix\[nifti\]"):
        open_file(tmp_path / "a.nii")


GEO = [
    (33550, 12, 3, (10.0, 10.0, 0.0), True),
    (33922, 12, 6, (0.0, 0.0, 0.0, 500000.0, 4100000.0, 0.0), True),
    (34735, 3, 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), True),
]


@pytest.mark.parametrize(("suffix", "stride"), [(".tif", 1), (".tif", 2)])
def test_a_prediction_of_a_geotiff_is_a_geotiff(tmp_path, suffix, stride):
    """Coordinate system, pixel scale and tie point are in the prediction; a coarser map has larger pixels."""
    bands = RNG.integers(0, 4000, (3, 64, 48)).astype(np.uint16)
    options = {"photometric": "minisblack", "planarconfig": "separate", "tile": (16, 16), "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", bands, extratags=GEO, **options)
    model = _converted(channels=3, outputs=2, stride=stride)
    expected = _predict(model, tmp_path / "a.tif", tmp_path / f"p{suffix}", axes="CYX")
    with tifffile.TiffFile(tmp_path / f"p{suffix}") as file, tifffile.TiffFile(tmp_path / "a.tif") as source:
        np.testing.assert_array_equal(file.asarray(), expected)
        found, given = file.pages[0].geotiff_tags, source.pages[0].geotiff_tags
        assert found["ProjectedCSTypeGeoKey"] == given["ProjectedCSTypeGeoKey"] == 32633
        assert found["ModelPixelScale"] == [10.0 * stride, 10.0 * stride, 0.0]
        assert found["ModelTiepoint"] == given["ModelTiepoint"]


def test_a_real_microscopy_image_keeps_its_values_through_every_format(tmp_path):
    """A real image of nuclei, with a physical size, is predicted into TIFF, OME-Zarr, npy and NIfTI alike."""
    nuclei = nuclei_image()[:96, :130]
    size = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", nuclei, metadata={"axes": "YX", **size})
    model = _converted(outputs=2)
    for name in ("p.tif", "p.zarr", "p.npy"):
        expected = _predict(model, tmp_path / "a.ome.tif", tmp_path / name)
        with open_windows(tmp_path / name, ndim=2, channels=2) as window:
            np.testing.assert_array_equal(window.read([(0, 96), (0, 130)]), expected)
            if name != "p.npy":
                assert window.placement.spacing == (0.5, 0.25)
                assert window.placement.unit == "micrometer"


def _ome_zarr(path, array, axes, scale, move, labels=()):
    group = zarr.create_group(store=str(path))
    group.create_array("0", shape=array.shape, dtype=array.dtype, chunks=(1, 16, 16))[...] = array
    transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": move}]
    image = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": transforms}]}
    channels = {"channels": [{"label": label} for label in labels]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image], "omero": channels}


@pytest.mark.parametrize("stride", [1, 2])
def test_ome_zarr_metadata_goes_with_the_prediction(tmp_path, stride):
    """Units, scale and translation are carried, moved to the centres of coarser pixels; labels where they apply."""
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": n, "type": "space", "unit": "micrometer"} for n in "yx"]
    array = RNG.random((2, 48, 64)).astype(np.float32)
    _ome_zarr(tmp_path / "a.zarr", array, axes, [1, 0.5, 0.25], [0, 10, 20], ("nuclei", "membrane"))
    model = _converted(channels=2, outputs=2, stride=stride)
    _predict(model, tmp_path / "a.zarr", tmp_path / "p.zarr")
    ome = dict(zarr.open_group(str(tmp_path / "p.zarr"), mode="r").attrs)["ome"]
    (image,) = ome["multiscales"]
    assert image["axes"] == axes
    scale, move = image["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [1.0, 0.5 * stride, 0.25 * stride]
    assert move["translation"] == [0.0, 10 + 0.25 * (stride - 1), 20 + 0.125 * (stride - 1)]
    assert [c["label"] for c in ome["omero"]["channels"]] == ["nuclei", "membrane"]


def test_shards_are_whole_blocks_of_whole_chunks(tmp_path):
    """Every block is a whole number of shards, and a shard of chunks; no two blocks share a file."""
    with OutputFile(tmp_path / "p.zarr") as out:
        out.create((2, 600, 700), torch.float32, (256, 512))
        for y in range(0, 600, 256):
            before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("c/*/*/*")}
            for x in range(0, 700, 512):
                index = (slice(0, 1), slice(0, 2), slice(y, y + 256), slice(x, x + 512))
                out.write(index, torch.full((1, 2, 256, 512), float(y + x + 1)))
            assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    array = zarr.open_group(str(tmp_path / "p.zarr"), mode="r")["0"]
    assert (array.shards, array.chunks) == ((2, 256, 512), (2, 128, 128))
    assert len(list((tmp_path / "p.zarr").rglob("c/*/*/*"))) == 6
    assert (np.asarray(array[0, 256, ::512]) == [257, 769]).all()


@pytest.mark.parametrize(
    ("shape", "said", "axes", "ndim", "channels", "expected"),
    [
        ((1, 2, 24, 20), "TCYX", None, 2, 2, (2, 24, 20)),
        ((1, 2, 24, 20), "TCYX", "TCYX", 2, 2, (2, 24, 20)),
        ((1, 2, 24, 20), "TCYX", "CYX", 2, 2, (2, 24, 20)),
        ((1, 24, 20), "ZYX", "ZYX", 3, 1, (1, 1, 24, 20)),
        ((1, 24, 20), "ZYX", None, 3, 1, (1, 1, 24, 20)),
        ((1, 24, 20), "ZYX", "CYX", 2, 1, (1, 24, 20)),
        ((1, 24, 20), "ZYX", "YX", 2, 1, (1, 24, 20)),
        ((1, 24, 20), "ZYX", "YXC", 2, 20, (20, 1, 24)),
        ((2, 24, 20), "TYX", "TYX", 2, 1, None),
    ],
)
def test_axes_name_the_file_as_it_is(tmp_path, shape, said, axes, ndim, channels, expected):
    """--axes names all axes of a file or all but those of extent 1; others than C, Z, Y, X must have extent 1."""
    array = RNG.random(shape).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", array, imagej=True, metadata={"axes": said})
    if said[0] != "Z":  # ImageJ drops single slices, OME keeps them
        tifffile.imwrite(tmp_path / "a.tif", array, ome=True, metadata={"axes": said})
    options = {"ndim": ndim, "channels": channels, "axes": axes}
    if shape[0] == 1 and said[0] == "Z":
        zarr.create_array(store=str(tmp_path / "a.zarr"), data=array, dimension_names=[*said.lower()])
        path = tmp_path / "a.zarr"
    else:
        path = tmp_path / "a.tif"
    if expected is None:
        for read in (read_image, open_windows):
            with pytest.raises(NormfixError, match="NF106"):
                read(path, **options)
        return
    assert read_image(path, **options).shape == expected
    with open_windows(path, **options) as window:
        assert window.shape == expected
        np.testing.assert_array_equal(
            window.read([(0, n) for n in expected[1:]]), read_image(path, **options)
        )


@pytest.fixture
def series(tmp_path):
    """Write a TIFF of two images, the second a pyramid of two levels with a size."""
    path = tmp_path / "two.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(np.zeros((8, 8), np.uint8), metadata={"axes": "YX", "Name": "label"})
        full = RNG.integers(0, 99, (64, 48)).astype(np.uint8)
        size = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        file.write(full, subifds=1, tile=(16, 16), metadata={"axes": "YX", "Name": "tissue", **size})
        file.write(full[::2, ::2], subfiletype=1, tile=(16, 16))
    return path, full


@pytest.mark.parametrize("chosen", ["tissue", "1"])
def test_a_series_is_chosen_by_name_or_number(series, chosen):
    """The series and the level that were asked for are read, whole and by window, with their own pixel size."""
    path, full = series
    for level, step in ((0, 1), (1, 2)):
        expected = full[::step, ::step]
        choice = Choice(chosen, level)
        np.testing.assert_array_equal(read_image(path, ndim=2, channels=1, choice=choice)[0], expected)
        with open_windows(path, ndim=2, channels=1, series=chosen, level=level) as window:
            np.testing.assert_array_equal(window.read([(4, 20), (3, 17)])[0], expected[4:20, 3:17])
            assert window.placement.spacing == (0.5 * step, 0.5 * step)


@pytest.mark.parametrize("chosen", [None, "2", "other"])
def test_several_series_are_not_guessed_between(series, chosen):
    """Without a choice, or with one that is not there, the names are listed."""
    with pytest.raises(NormfixError, match=r"NF141 .*--series.*0 'label' 8x8, 1 'tissue' 64x48"):
        open_file(series[0], Choice(chosen))


@pytest.mark.parametrize("ending", [".npy", ".png", ".nii", ".nii.gz", ".zarr"])
def test_a_choice_that_means_nothing_in_a_single_image_is_refused(tmp_path, ending):
    """A series or level that is not there is named wherever it is asked for; the first of each is there."""
    path, image = tmp_path / f"one{ending}", RNG.integers(0, 255, (12, 16), dtype=np.uint8)
    match ending:
        case ".npy":
            np.save(path, image)
        case ".png":
            iio.imwrite(path, image)
        case ".zarr":
            zarr.create_array(path, data=image)
        case _:
            nibabel.save(nibabel.Nifti1Image(image.T, np.eye(4)), path)
    with open_windows(path, ndim=2, channels=1, series="0", level=0) as window:
        assert np.array_equal(window.read([(0, 12), (0, 16)])[0], image)
    for wrong in ("1", "tissue", "-1", ""):
        with pytest.raises(NormfixError, match=r"NF141 .*holds one image"):
            open_windows(path, ndim=2, channels=1, series=wrong)
    for level in (1, -1):
        with pytest.raises(NormfixError, match=r"NF101 .*1 level, and no level"):
            open_windows(path, ndim=2, channels=1, level=level)


@pytest.mark.parametrize(("wrong", "code"), [({"series": "1"}, "NF141"), ({"level": 2}, "NF101")])
def test_an_array_has_no_series_and_no_pyramid(wrong, code):
    """What is no file is one image too."""
    array = RNG.random((12, 16), dtype=np.float32)
    assert normfix.open_image(array, Plain(), series="0").shape == (1, 1, 12, 16)
    with pytest.raises(NormfixError) as caught:
        normfix.open_image(array, Plain(), **wrong)
    assert caught.value.code == code


def test_channels_come_back_where_they_were(tmp_path):
    """Channels last in the image are last in the prediction, in TIFF and npy; first stay first."""
    model = _converted(channels=3, outputs=2)
    tifffile.imwrite(tmp_path / "a.tif", RNG.integers(0, 255, (40, 48, 3), dtype=np.uint8), photometric="rgb")
    expected = _predict(model, tmp_path / "a.tif", tmp_path / "p.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "p.tif"), np.moveaxis(expected, 0, -1))
    _predict(model, tmp_path / "a.tif", tmp_path / "p.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), np.moveaxis(expected, 0, -1))
    np.testing.assert_array_equal(read_image(tmp_path / "p.tif", ndim=2, channels=2), expected)
    np.save(tmp_path / "b.npy", RNG.random((3, 40, 48)).astype(np.float32))
    assert _predict(model, tmp_path / "b.npy", tmp_path / "q.npy").shape == np.load(tmp_path / "q.npy").shape


def test_no_size_is_made_up(tmp_path):
    """Negative control: an image without a size gives a prediction without one, in TIFF and in Zarr."""
    np.save(tmp_path / "a.npy", RNG.random((32, 40)).astype(np.float32))
    model = _converted()
    for name in ("p.tif", "p.zarr"):
        _predict(model, tmp_path / "a.npy", tmp_path / name)
        opened = open_file(tmp_path / name)
        opened.close()
        assert opened.placement == Placement()
    assert "unit" not in json.dumps(dict(zarr.open_group(str(tmp_path / "p.zarr")).attrs))


def test_a_map_of_another_scale_covers_the_same_place():
    """Twice as many pixels have half the spacing, and their first centre lies a quarter of a pixel back."""
    placed = Placement(spacing=(2.0, 4.0), origin=(10.0, 0.0), unit="micrometer").scaled(
        [Fraction(2), Fraction(1)]
    )
    assert (placed.spacing, placed.origin) == ((1.0, 4.0), (9.5, 0.0))


def _volume(path):
    """Write a volume with a place, and return its affine."""
    affine = np.array([[0, -2, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 1], [0, 0, 0, 1.0]])
    data = RNG.random((20, 24, 18)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return affine


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tiles", "stages"])
def test_a_compressed_volume_is_the_uncompressed_one(tmp_path, engine):
    """A .nii.gz that is written has the bytes of the .nii, its affine with it, and the same bytes each time."""
    affine = _volume(tmp_path / "a.nii.gz")
    model = _converted(ndim=3)
    for name in ("p.nii", "p.nii.gz", "q.nii.gz"):
        with normfix.open_image(tmp_path / "a.nii.gz", model) as image:
            normfix.write_prediction(model, image, tmp_path / name, tile=16, engine=engine)
    packed = (tmp_path / "p.nii.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "p.nii").read_bytes()
    assert packed == (tmp_path / "q.nii.gz").read_bytes()
    found = nibabel.load(tmp_path / "p.nii.gz")
    np.testing.assert_array_equal(found.affine, affine)
    np.testing.assert_array_equal(found.get_fdata(), nibabel.load(tmp_path / "p.nii").get_fdata())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "p.nii", "p.nii.gz", "q.nii.gz"]


def _written(path, window):
    with OutputFile(path) as out:
        out.create((1, 4, 5, 6), torch.float32, (4, 5, 6))
        out.write(window, torch.ones([s.stop for s in window]))


def test_a_compressed_volume_is_whole_or_not_there(tmp_path, monkeypatch):
    """Where compressing fails nothing is left; a whole image is written the same way."""
    write_image(tmp_path / "a.nii.gz", np.ones((1, 4, 5, 6), np.float32))
    assert nibabel.load(tmp_path / "a.nii.gz").get_fdata().shape == (6, 5, 4)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(NormfixError, match=r"NF114.*No space left"):
        write_image(tmp_path / "b.nii.gz", np.ones((1, 4, 5, 6), np.float32))
    window = tuple(slice(0, n) for n in (1, 1, 4, 5, 6))
    with pytest.raises(NormfixError, match=r"NF114.*No space left"):
        _written(tmp_path / "c.nii.gz", window)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def _nifti(path, dims, data=bytes(4096), code=16, bits=32, count=None, offset=352.0):
    """Write a NIfTI by hand, whatever its header says."""
    header = bytearray(348)
    struct.pack_into("<i", header, 0, 348)
    extents = [len(dims) if count is None else count, *dims, *[1] * 8][:8]
    struct.pack_into("<8h", header, 40, *extents)
    struct.pack_into("<hh", header, 70, code, bits)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<ff", header, 108, offset, 1.0)
    header[344:348] = b"n+1\0"
    content = bytes(header) + bytes(4) + data
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def _npy(path, shape, kind="<f4", data=b""):
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + data)
    return path


def _zarr(path, **metadata):
    path.mkdir()
    known = {
        "zarr_format": 2,
        "shape": [8, 8],
        "chunks": [8, 8],
        "dtype": "<f4",
        "fill_value": 0,
        "order": "C",
    }
    (path / ".zarray").write_text(json.dumps({**known, "compressor": None, "filters": None, **metadata}))
    (path / "0.0").write_bytes(bytes(256))
    return path


def _ome(path, axes, **dataset):
    path.mkdir()
    (path / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    _zarr(path / "0", shape=[2, 8, 8], chunks=[2, 8, 8])
    images = [{"axes": axes, "datasets": [{"path": "0", **dataset}]}]
    (path / ".zattrs").write_text(json.dumps({"multiscales": images}))
    return path


def _group(path, **attributes):
    path.mkdir()
    (path / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    (path / ".zattrs").write_text(json.dumps(attributes))
    return path


def _tiff(path, **tags):
    """Write a TIFF of 8 x 8 pixels and change what its tags say."""
    tifffile.imwrite(path, np.zeros((8, 8), np.uint16))
    content = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", content, 4)[0]
    for place in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        name = tifffile.TIFF.TAGS[struct.unpack_from("<H", content, place)[0]]
        if name in tags:
            struct.pack_into("<HII", content, place + 2, 4, 1, tags[name])
    path.write_bytes(content)
    return path


NAMES = [{"name": "c"}, {"name": "y"}, {"name": "x"}]

ODD = {
    "a NIfTI of seven dimensions": (lambda p: _nifti(p / "a.nii", [2] * 7), "NF106"),
    "a NIfTI of six, two of them long": (lambda p: _nifti(p / "a.nii", [4, 4, 4, 1, 2, 2]), "NF106"),
    "a compressed NIfTI of seven": (lambda p: _nifti(p / "a.nii.gz", [2] * 7), "NF106"),
    "a NIfTI of no dimension": (lambda p: _nifti(p / "a.nii", [], count=0), "NF10[16]"),
    "a NIfTI of -3 dimensions": (lambda p: _nifti(p / "a.nii", [4, 4, 4], count=-3), "NF101"),
    "a NIfTI with a negative extent": (lambda p: _nifti(p / "a.nii", [4, -4, 4]), "NF106"),
    "a NIfTI without pixels": (lambda p: _nifti(p / "a.nii", [4, 0, 4]), "NF106"),
    "a NIfTI far larger than its file": (lambda p: _nifti(p / "a.nii", [32767] * 3), "NF1(01|21)"),
    "a compressed one": (lambda p: _nifti(p / "a.nii.gz", [32767] * 3), "NF1(01|21)"),
    "a NIfTI of colours": (lambda p: _nifti(p / "a.nii", [8, 8, 8], code=128, bits=24), "NF106"),
    "a NIfTI of complex numbers": (lambda p: _nifti(p / "a.nii", [8, 8, 8], code=32, bits=64), "NF106"),
    "a NIfTI whose data is nowhere": (lambda p: _nifti(p / "a.nii", [8, 8, 8], offset=1e30), "NF101"),
    "npy far larger than its file": (lambda p: _npy(p / "a.npy", (10**9, 10**9)), "NF101"),
    "npy beyond integers": (lambda p: _npy(p / "a.npy", (2**62, 4)), "NF101"),
    "npy of a negative extent": (lambda p: _npy(p / "a.npy", (-1, 5), data=bytes(80)), "NF101"),
    "npy without pixels": (lambda p: _npy(p / "a.npy", (0, 5)), "NF106"),
    "npy of a number": (lambda p: _npy(p / "a.npy", (), data=bytes(4)), "NF106"),
    "npy of records": (
        lambda p: _npy(p / "a.npy", (8, 8), [("a", "<f4"), ("b", "|u1")], bytes(320)),
        "NF106",
    ),
    "npy of objects": (lambda p: _npy(p / "a.npy", (8, 8), "|O", bytes(512)), "NF101"),
    "npy of text": (lambda p: _npy(p / "a.npy", (8, 8), "<U4", bytes(1024)), "NF106"),
    "npy of dates": (lambda p: _npy(p / "a.npy", (8, 8), "<M8[s]", bytes(512)), "NF106"),
    "Zarr without pixels": (lambda p: _zarr(p / "a", shape=[0, 8]), "NF106"),
    "Zarr of a negative extent": (lambda p: _zarr(p / "a", shape=[-8, 8]), "NF101"),
    "Zarr of a number": (lambda p: _zarr(p / "a", shape=[], chunks=[]), "NF101"),
    "Zarr of records": (lambda p: _zarr(p / "a", dtype=[["a", "<f4"], ["b", "|u1"]]), "NF106"),
    "Zarr whose chunks have fewer axes": (lambda p: _zarr(p / "a", chunks=[8]), "NF101"),
    "Zarr of half a pixel": (lambda p: _zarr(p / "a", shape=[8.5, 8]), "NF101"),
    "Zarr in no order": (lambda p: _zarr(p / "a", order="X"), "NF101"),
    "OME-Zarr with an axis too few": (lambda p: _ome(p / "a", NAMES[1:]), "NF106"),
    "OME-Zarr with axes too many": (lambda p: _ome(p / "a", [{"name": "t"}, *NAMES]), "NF106"),
    "OME-Zarr with an axis twice": (lambda p: _ome(p / "a", [NAMES[1], *NAMES[1:]]), "NF106"),
    "OME-Zarr with axes without names": (lambda p: _ome(p / "a", [{"type": "space"}] * 3), "NF106"),
    "OME-Zarr with a word for an axis": (lambda p: _ome(p / "a", [{"name": "channel"}, *NAMES[1:]]), "NF106"),
    "OME-Zarr whose axes are a number": (lambda p: _ome(p / "a", 5), "NF101"),
    "OME-Zarr with a scale of two axes": (
        lambda p: _ome(p / "a", NAMES, coordinateTransformations=[{"type": "scale", "scale": [1, 2]}]),
        "NF101",
    ),
    "OME-Zarr with one number for the scale of three axes": (
        lambda p: _ome(p / "a", NAMES, coordinateTransformations=[{"type": "scale", "scale": 0.5}]),
        "the scale of its coordinate transformations is not one number for each of its 3 axes",
    ),
    "OME-Zarr whose scale is a list of one": (
        lambda p: _ome(p / "a", NAMES, coordinateTransformations=[{"type": "scale", "scale": [0.5]}]),
        "the scale of its coordinate transformations is not one number for each of its 3 axes",
    ),
    "OME-Zarr moved by texts": (
        lambda p: _ome(
            p / "a", NAMES, coordinateTransformations=[{"type": "translation", "translation": [*"123"]}]
        ),
        "the translation of its coordinate transformations is not one number for each of its 3 axes",
    ),
    "a plate of OME-Zarr": (lambda p: _group(p / "a", plate={"wells": [{"path": "A/1"}]}), "such as A/1/0"),
    "a well of OME-Zarr": (lambda p: _group(p / "a", well={"images": [{"path": "0"}]}), "such as 0"),
    "TIFF without a width": (lambda p: _tiff(p / "a.tif", ImageWidth=0), "NF101"),
    "TIFF far larger than its file": (
        lambda p: _tiff(p / "a.tif", ImageWidth=2**31, ImageLength=2**31),
        "NF101",
    ),
    "TIFF of 77 bits": (lambda p: _tiff(p / "a.tif", BitsPerSample=77), "NF10[16]"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore")  # of libraries about what they are shown
def test_what_is_no_image_is_refused_by_name(tmp_path, name):
    """Whole or by window, what a header should not say is an error of normfix with the file's name, and no other."""
    make, code = ODD[name]
    path = make(tmp_path)
    ndim = 3 if ".nii" in path.name else 2
    with pytest.raises(NormfixError, match=code):
        read_image(path, ndim=ndim, channels=1)
    with pytest.raises(NormfixError, match=code), open_windows(path, ndim=ndim, channels=1) as image:
        image.read([(0, n) for n in image.shape[1:]])


@pytest.mark.slow
def test_a_strip_that_unpacks_to_more_than_it_holds_is_refused(tmp_path):
    """A TIFF whose strip of 150 kB would become 150 MB is refused; one that is as long as it says is read."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((512, 512), np.uint16), compression="zlib", rowsperstrip=512)
    assert not read_image(path, ndim=2, channels=1).any()
    bomb, content = zlib.compress(bytes(150 << 20)), bytearray(path.read_bytes())
    start = struct.unpack_from("<I", content, 4)[0]
    for place in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        known = {273: len(content), 279: len(bomb)}.get(struct.unpack_from("<H", content, place)[0])
        if known is not None:
            struct.pack_into("<HII", content, place + 2, 4, 1, known)
    path.write_bytes(content + bomb)
    with pytest.raises(NormfixError, match=r"NF121.*segment 0 unpacks to more"):
        read_image(path, ndim=2, channels=1)
    with pytest.raises(NormfixError, match=r"NF121"), open_windows(path, ndim=2, channels=1) as image:
        image.read([(0, 4), (0, 4)])


def test_a_small_file_is_not_unpacked_to_a_large_image(tmp_path, monkeypatch):
    """A .nii.gz of 60 kB with 60 MB is refused whole and read by window; a tenth of it is read whole too."""
    monkeypatch.setattr("normfix.images.files._LARGE", 10 << 20)
    for name, depth in (("a.nii.gz", 60), ("b.nii.gz", 6)):
        _nifti(tmp_path / name, [1024, 1024, depth], bytes(depth << 20), code=2, bits=8)
    with pytest.raises(NormfixError, match=r"NF121.*--tile"):
        read_image(tmp_path / "a.nii.gz", ndim=3, channels=1)
    with open_windows(tmp_path / "a.nii.gz", ndim=3, channels=1) as image:
        assert not image.read([(0, 2), (0, 9), (0, 9)]).any()
    assert read_image(tmp_path / "b.nii.gz", ndim=3, channels=1).shape == (1, 6, 1024, 1024)


def test_axes_of_extent_one_beyond_the_fifth_are_let_go(tmp_path):
    """A NIfTI of seven dimensions of which three are long is a volume."""
    path = _nifti(tmp_path / "a.nii", [8, 8, 16, 1, 1, 1, 1])
    assert read_image(path, ndim=3, channels=1).shape == (1, 16, 8, 8)
    with open_windows(path, ndim=3, channels=1) as image:
        assert image.shape == (1, 16, 8, 8)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_volume_without_a_place_is_written_as_a_tiff(channels, tmp_path):
    """Several channels of a volume are no hyperstack of ImageJ, whose channels come after Z: they are OME then."""
    volume = np.arange(channels * 60, dtype=np.float32).reshape(channels, 3, 4, 5)
    with OutputFile(tmp_path / "a.tif") as file:
        file.create(volume.shape, torch.float32, volume.shape[1:])
        file.write((slice(0, 1), *(slice(0, n) for n in volume.shape)), torch.from_numpy(volume)[None])
    with tifffile.TiffFile(tmp_path / "a.tif") as written:
        assert written.series[0].axes == ("ZYX" if channels == 1 else "CZYX")
        assert written.is_imagej == (channels == 1)
        np.testing.assert_array_equal(written.asarray(), volume.squeeze())


def _created(path: Path, like: Path, *, stride: int = 1, shape: tuple[int, ...] = (4, 5), axes: str = "YX"):
    """Write zeros where an image lies, one value for each `stride` pixels of it."""
    with open_windows(like, ndim=len(axes.replace("C", "")), channels=1) as window:
        placement = window.placement.scaled([Fraction(1, stride)] * (len(window.shape) - 1))
    create(path, shape, np.dtype("f4"), axes, placement)[...] = 0
    return path


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("text", ["Gauß-Krüger|".encode(), "Gauß-Krüger|".encode("latin-1")])
def test_names_in_a_geotiff_are_kept_byte_by_byte(tmp_path, text, stride):
    """Keys count the bytes of a text, in whichever encoding it is; tifffile writes ASCII alone of what it decodes."""
    tags = [*GEO[:2], (34735, 3, 8, (1, 1, 0, 1, 1026, 34737, len(text), 0), True), (34737, 2, 0, text, True)]
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5), np.float32), extratags=tags, metadata=None)
    _created(tmp_path / "b.tif", tmp_path / "a.tif", stride=stride)
    with tifffile.TiffFile(tmp_path / "a.tif") as given, tifffile.TiffFile(tmp_path / "b.tif") as found:
        assert found.pages[0].tags[34737].value == given.pages[0].tags[34737].value
        assert found.pages[0].tags[34737].count == len(text) + 1
        assert found.pages[0].tags[34735].value == given.pages[0].tags[34735].value


@pytest.mark.parametrize(
    "tag",
    [
        (33550, 12, 1, 10.0, True),
        (33550, 2, 0, "ten", True),
        (33922, 12, 2, (0.0, 0.0), True),
        (34735, 2, 0, "x", True),
    ],
)
def test_tags_of_no_geotiff_are_left_out(tmp_path, tag):
    """Tags of another type or length than GeoTIFF gives them end no prediction."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5), np.float32), extratags=[tag], metadata=None)
    with tifffile.TiffFile(_created(tmp_path / "b.tif", tmp_path / "a.tif", stride=3)) as found:
        assert tag[0] not in found.pages[0].tags


def test_a_resolution_that_no_tag_can_say_is_left_out(tmp_path):
    """Pixels become so small that their number per inch is no fraction of a TIFF any more."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5), np.float32), resolution=(4e9, 4e9), metadata=None)
    with open_windows(tmp_path / "a.tif", ndim=2, channels=1) as window:
        placement = window.placement.scaled([Fraction(3)] * 2)
    create(tmp_path / "b.tif", (12, 15), np.dtype("f4"), "YX", placement)[...] = 0
    assert read_image(tmp_path / "b.tif", ndim=2, channels=1).shape == (1, 12, 15)


@pytest.mark.parametrize(
    ("name", "written"),
    [("\x1b[31m", "\ufffd[31m"), ("DAPI\0", "DAPI\ufffd"), ("\ud800", "\ufffd")],
    ids=["escape", "zero", "half"],
)
def test_names_of_channels_that_no_xml_holds_are_written_without_it(tmp_path, name, written):
    """A TIFF that we write can be read: control characters and halves of pairs are replaced in its description."""
    placement = Placement(channels=(name, "µ<&>"))
    create(tmp_path / "a.tif", (2, 4, 5), np.dtype("f4"), "CYX", placement)[...] = 0
    with open_windows(tmp_path / "a.tif", ndim=2, channels=2) as window:
        assert window.placement.channels == (written, "µ<&>")


@pytest.mark.parametrize(("size", "unit"), [("0", "mm"), ("-0.5", "µm"), ("nan", "µm"), ("1e400", "µm")])
@pytest.mark.parametrize("suffix", [".tif", ".nii"])
def test_sizes_of_pixels_that_are_none_are_not_believed(tmp_path, size, unit, suffix):
    """A prediction of an OME-TIFF whose pixels have no positive size has no size, in every format."""
    image = np.zeros((4, 5), np.float32)
    described = {"axes": "YX", "PhysicalSizeX": 8.5, "PhysicalSizeXUnit": unit, "PhysicalSizeY": 8.5}
    tifffile.imwrite(tmp_path / "a.ome.tif", image, metadata=described | {"PhysicalSizeYUnit": unit})
    xml = tifffile.tiffcomment(tmp_path / "a.ome.tif")
    tifffile.tiffcomment(tmp_path / "a.ome.tif", xml.replace('"8.5"', f'"{size}"').encode())
    with open_windows(
        _created(tmp_path / f"b{suffix}", tmp_path / "a.ome.tif"), ndim=2, channels=1
    ) as window:
        assert window.placement.spacing in ((), (1.0, 1.0))
        assert window.placement.unit == ""


@pytest.mark.parametrize("affine", [0.0, math.nan])
def test_a_volume_that_lies_nowhere_has_a_prediction(tmp_path, affine):
    """A header whose affine is flat or no number goes with a map of the same scale, and is left out of any other."""
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4)), tmp_path / "a.nii")
    damaged = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<12f", damaged, 280, *[affine] * 12)
    (tmp_path / "a.nii").write_bytes(damaged)
    for stride, shape in ((1, (6, 5, 4)), (2, (3, 3, 2))):
        path = _created(
            tmp_path / f"{stride}.nii", tmp_path / "a.nii", stride=stride, shape=shape, axes="ZYX"
        )
        assert nibabel.load(path).shape == shape[::-1]


def test_an_axis_that_nifti_cannot_say_is_refused(tmp_path):
    """32,767 pixels are the most; a coarser map of a longer volume in NIfTI-2 fits again."""
    with pytest.raises(NormfixError, match=r"NF142 b\.nii: an axis of 32,768 pixels"):
        create(tmp_path / "b.nii", (2, 32768), np.dtype("u1"), "YX", Placement())
    nibabel.save(nibabel.Nifti2Image(np.zeros((40000, 2, 2), np.uint8), np.eye(4)), tmp_path / "a.nii")
    path = _created(tmp_path / "c.nii", tmp_path / "a.nii", stride=2, shape=(1, 1, 20000), axes="ZYX")
    assert nibabel.load(path).header.get_zooms() == (2, 2, 2)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_is_not_read_as_voxels(tmp_path, kind, suffix):
    """nibabel begins where a header says, be it at byte 0, and gives values that are the header's own bytes."""
    path = tmp_path / f"a{suffix}"
    nibabel.save(kind(np.zeros((4, 5, 6), np.float32), np.eye(4)), path)
    open_ = gzip.open if suffix == ".nii.gz" else open
    with open_(path, "rb") as file:
        damaged = bytearray(file.read())
    struct.pack_into(*(("<f", damaged, 108) if kind is nibabel.Nifti1Image else ("<q", damaged, 168)), 0)
    with open_(path, "wb") as file:
        file.write(damaged)
    with pytest.raises(NormfixError, match=r"NF101.*byte 0"):
        open_file(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"photometric": "miniswhite"}, "0 is white"),
        ({"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "table of colours"),
        ({"photometric": "minisblack", "extratags": [(274, 3, 1, 3, True)]}, "turned or mirrored"),
        ({"photometric": "minisblack", "extratags": [(274, 3, 1, 1, True)]}, ""),
    ],
)
def test_a_tiff_that_viewers_show_otherwise_is_told(tmp_path, options, said):
    """It is read as it is stored; what it says of showing it is a note."""
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    with closing(open_file(tmp_path / "a.tif")) as opened:
        assert np.array_equal(np.asarray(opened.array), pixels)
        assert len(opened.notes) == bool(said)
        assert said in "".join(opened.notes)
