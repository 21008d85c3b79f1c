"""Channels are taken in the order that is asked for, planes of a stack are images; contradictions are refused."""

import json

import numpy as np
import pytest
import tifffile
import torch
from optional import NO_PROGRAMS, zarr

import normfix
from normfix.errors import NormfixError
from normfix.images.files import open_windows
from normfix.images.formats import open_file
from normfix.images.views import Part
from normfix.networks.releases import writes_archives

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 4000, (5, 3, 40, 48), dtype=np.uint16)  # (Z, C, Y, X)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """A saved network of two channels in and three out, whose images are scaled by their range."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.InstanceNorm2d(4), torch.nn.Conv2d(4, 3, 1)
    )
    if not writes_archives():
        pytest.skip(NO_PROGRAMS)
    folder = tmp_path_factory.mktemp("saved")
    np.save(folder / "image.npy", STACK[0, :2])
    done = normfix.convert(net, normfix.read_images(folder / "image.npy", net, scaling="unit"))
    normfix.save(done, folder / "fixed")
    return folder / "fixed"


def zarr_of(path, array):
    """Write a plain Zarr array."""
    made = zarr.open_array(path, mode="w", shape=array.shape, chunks=(8,) * array.ndim, dtype=array.dtype)
    made[...] = array


WRITERS = {
    "channels first.tif": (lambda p, a: tifffile.imwrite(p, a, imagej=True, metadata={"axes": "CYX"}), None),
    "channels last.tif": (
        lambda p, a: tifffile.imwrite(p, np.moveaxis(a, 0, -1), photometric="rgb"),
        None,
    ),
    "first.npy": (np.save, "CYX"),
    "last.npy": (lambda p, a: np.save(p, np.moveaxis(a, 0, -1)), "YXC"),
    "between.npy": (lambda p, a: np.save(p, a.swapaxes(0, 1)), "YCX"),
    "chunks.zarr": (zarr_of, "CYX"),
}


@pytest.mark.parametrize("channels", [(0, 2), (2, 0), (1,), (1, 1), (0, 1, 2)])
@pytest.mark.parametrize("name", WRITERS)
def test_channels_are_those_asked_for(tmp_path, name, channels):
    """In every format and order of axes, whole and by window, channels are taken by their numbers."""
    write, axes = WRITERS[name]
    write(tmp_path / name, STACK[0])
    with open_windows(
        tmp_path / name, ndim=2, channels=len(channels), axes=axes, part=Part(channels=channels)
    ) as window:
        assert window.shape == (len(channels), 40, 48)
        found = window.read([(3, 21), (0, 48)])
    np.testing.assert_array_equal(found, STACK[0][list(channels), 3:21])


@pytest.mark.parametrize(
    ("array", "axes"),
    [(STACK, "ZCYX"), (STACK.swapaxes(0, 1), "CZYX"), (np.moveaxis(STACK, 1, -1), "ZYXC"), (STACK, "TCYX")],
)
def test_planes_are_those_of_the_axis(tmp_path, array, axes):
    """Wherever the axis stands, the plane is at its place, with the channels that are asked for."""
    np.save(tmp_path / "a.npy", array)
    part = Part(channels=(2, 1), slices=axes[0] if "T" in axes else "Z", plane=3)
    with open_windows(tmp_path / "a.npy", ndim=2, channels=2, axes=axes, part=part) as window:
        assert window.planes == 5
        np.testing.assert_array_equal(window.read([(0, 40), (0, 48)]), STACK[3, [2, 1]])


def test_pages_that_are_not_named_are_planes(tmp_path):
    """A TIFF of plain pages is a stack, without naming its axes."""
    tifffile.imwrite(tmp_path / "pages.tif", STACK[:, 0], photometric="minisblack")
    with open_windows(tmp_path / "pages.tif", ndim=2, channels=1, part=Part(slices="Z", plane=4)) as window:
        np.testing.assert_array_equal(window.read([(0, 40), (0, 48)])[0], STACK[4, 0])


def test_the_planes_of_a_stack_are_images_in_python(tmp_path, fixed):
    """They are N of (N, C, Y, X), each scaled by itself."""
    tifffile.imwrite(tmp_path / "s.tif", STACK, imagej=True, metadata={"axes": "ZCYX"})
    model = normfix.load(fixed)
    images = normfix.read_images(tmp_path / "s.tif", model, scaling="zscore", channels=(0, 2), slices="Z")
    (found,) = images
    assert found.shape == (5, 2, 40, 48)
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    with normfix.open_image(STACK[1], model, axes="CYX", channels=(2, 0), scaling=images.scaling) as image:
        assert torch.equal(image.read([(0, 40), (0, 48)])[:, [1, 0]], found[1:2])


@pytest.mark.parametrize("ending", [".tif", ".npy", ".zarr", ".nii"])
@pytest.mark.parametrize("letter", ["Z", "T"])
def test_a_stack_is_predicted_plane_by_plane(run, fixed, tmp_path, letter, ending):
    """Each plane of the output is the prediction of that plane alone, in a stack with the same axis."""
    tifffile.imwrite(tmp_path / "s.tif", STACK, imagej=True, metadata={"axes": f"{letter}CYX"})
    words = (fixed, tmp_path / "s.tif", "--slices", letter, "--channels", "1,0", "--tile", "16")
    code, _, err = run("predict", *words, "-o", tmp_path / f"p{ending}")
    if (letter, ending) == ("T", ".nii"):
        assert (code, "NF142" in err) == (2, True)
        return
    assert code == 0, err
    opened = open_file(tmp_path / f"p{ending}")
    found = np.array(opened.array[(slice(None),) * 4])
    opened.close()
    if opened.axes is not None:
        found = found.transpose([opened.axes.index(a) for a in f"{letter}CYX"])
    scaled = torch.from_numpy(STACK[:, [1, 0]] / np.float32(65535)).float()
    expected = normfix.predict(normfix.load(fixed), scaled, tile=16)
    torch.testing.assert_close(torch.from_numpy(found.astype(np.float32)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("imagej", [True, False])
def test_a_stack_keeps_the_size_of_its_pixels(run, fixed, tmp_path, imagej):
    """Spacing of planes and pixels goes with the prediction of a stack."""
    sizes = (
        {"spacing": 2.0, "unit": "um"}
        if imagej
        else {f"PhysicalSize{a}": n for a, n in (("Z", 2.0), ("Y", 0.5), ("X", 0.5))}
    )
    tifffile.imwrite(
        tmp_path / "s.ome.tif" if not imagej else tmp_path / "s.tif",
        STACK[:, :2],
        imagej=imagej,
        metadata={"axes": "ZCYX", **sizes},
        **({"resolution": (2.0, 2.0)} if imagej else {}),
    )
    source = next(tmp_path.glob("s.*"))
    assert run("predict", fixed, source, "--slices", "Z", "--tile", 16, "-o", tmp_path / "p.zarr")[0] == 0
    assert open_file(tmp_path / "p.zarr").placement.spacing == (2.0, 0.5, 0.5)


@pytest.mark.slow
def test_a_stack_is_checked_calibrated_and_converted(run, fixed, tmp_path):
    """All planes count, in one verdict and in common statistics."""
    tifffile.imwrite(tmp_path / "s.tif", STACK[:, :2], imagej=True, metadata={"axes": "ZCYX"})
    words = (tmp_path / "s.tif", "--slices", "Z")
    assert run("check", fixed, *words, "--tile", 16)[0] == 0
    code, out, err = run("calibrate", fixed, *words, "-o", tmp_path / "again.pt2", "--format", "json")
    assert code == 0, err
    assert json.loads(out)["images"] == [[5, 2, 40, 48]]


REFUSED = {
    "channels it has not": (("--channels", "0,3"), "NF532"),
    "channels of what has none": (("--channels", "0,1", "--axes", "ZTYX"), "NF532"),
    "planes of no axis": (("--slices", "T", "--channels", "0,1"), "NF533"),
    "a stack without planes": (("--channels", "0,1"), "NF106"),
    "another number of channels": (("--slices", "Z", "--channels", "0,1,2"), "NF106"),
    "words": (("--channels", "red"), "channels"),
    "below zero": (("--channels", "-1"), "channels"),
    "an axis of the plane": (("--slices", "X"), "slices"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(run, fixed, tmp_path, name):
    """What contradicts the file or the network is said before anything is predicted."""
    tifffile.imwrite(tmp_path / "s.tif", STACK, imagej=True, metadata={"axes": "ZCYX"})
    words, code = REFUSED[name]
    done = run("predict", fixed, tmp_path / "s.tif", *words, "-o", tmp_path / "p.tif")
    assert (done[0], code in done[2]) == (2, True), done[2]
    assert not (tmp_path / "p.tif").exists()


def test_a_network_of_three_axes_takes_z_itself(tmp_path):
    """Planes along Z are none for a network that takes Z."""
    np.save(tmp_path / "a.npy", STACK)
    with pytest.raises(NormfixError, match="NF533"):
        open_windows(tmp_path / "a.npy", ndim=3, channels=3, axes="ZCYX", part=Part(slices="Z"))
