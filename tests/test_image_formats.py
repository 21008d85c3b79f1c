"""Image files: which series, axes and level is read, and what of where its pixels lie goes with the prediction."""

import importlib.util
import json
import sys
from fractions import Fraction
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import torch
import zarr

import normfix
from normfix.demo.data import nuclei_image
from normfix.errors import NormfixError
from normfix.formats import Choice, Placement, open_file
from normfix.reading import read_image, write_image
from normfix.streaming import OutputFile, open_image

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
    with open_image(path, ndim=3, channels=1) as window:
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
    with open_image(tmp_path / "a.nii.gz", ndim=3, channels=1) as window:
        found = window.read([(0, 7), (0, 6), (0, 5)])[0]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, image.get_fdata().T, atol=0.01)


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
        with open_image(tmp_path / name, ndim=2, channels=2) as window:
            np.testing.assert_array_equal(window.read([(0, 96), (0, 130)]), expected)
            if name != "p.npy":
                assert window.placement.spacing == (0.5, 0.25)
                assert window.placement.unit == "micrometer"


def _ome_zarr(path, array, axes, scale, move, labels=()):
    group = zarr.create_group(store=str(path))
    group.create_array("0", data=array, chunks=(1, 16, 16))
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
        for read in (read_image, open_image):
            with pytest.raises(NormfixError, match="NF106"):
                read(path, **options)
        return
    assert read_image(path, **options).shape == expected
    with open_image(path, **options) as window:
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
        with open_image(path, ndim=2, channels=1, series=chosen, level=level) as window:
            np.testing.assert_array_equal(window.read([(4, 20), (3, 17)])[0], expected[4:20, 3:17])
            assert window.placement.spacing == (0.5 * step, 0.5 * step)


@pytest.mark.parametrize("chosen", [None, "2", "other"])
def test_several_series_are_not_guessed_between(series, chosen):
    """Without a choice, or with one that is not there, the names are listed."""
    with pytest.raises(NormfixError, match=r"NF141 .*--series.*0 'label' 8x8, 1 'tissue' 64x48"):
        open_file(series[0], Choice(chosen))


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
