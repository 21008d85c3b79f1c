"""Image files are read with named axes and written whole; what does not fit is refused by name."""

import errno
import os
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from normfix.errors import NormfixError
from normfix.images.axes import require_new_image, to_tensor, write_image
from normfix.images.files import read_image

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 60000, (24, 20), dtype=np.uint16)
RGB = RNG.integers(0, 255, (24, 20, 3), dtype=np.uint8)
STACK = RNG.integers(0, 60000, (5, 24, 20), dtype=np.uint16)
FLOAT = RNG.normal(3, 2, (2, 24, 20)).astype(np.float32)


def code_of(function, *args, **options) -> str:
    """Return the code of the error a call gives."""
    with pytest.raises(NormfixError) as caught:
        function(*args, **options)
    return caught.value.code


def tiff(path: Path, array, **options) -> Path:
    """Write a TIFF as other programs do."""
    tifffile.imwrite(path, array, **options)
    return path


def npy(path: Path, array) -> Path:
    """Write a .npy file."""
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("array", "options", "ndim", "channels", "expected"),
    [
        (GREY, {}, 2, 1, GREY[None]),
        (GREY, {"imagej": True}, 2, 1, GREY[None]),
        (STACK, {"imagej": True, "metadata": {"axes": "CYX"}}, 2, 5, STACK),
        (STACK, {"imagej": True, "metadata": {"axes": "ZYX"}}, 3, 1, STACK[None]),
        (STACK, {"metadata": {"axes": "CYX"}, "ome": True}, 2, 5, STACK),
        (STACK, {"metadata": {"axes": "ZYX"}, "ome": True}, 3, 1, STACK[None]),
        (STACK, {"metadata": {"axes": "ZYX"}, "compression": "zlib"}, 3, 1, STACK[None]),
        (STACK, {}, 2, 5, STACK),
        (STACK, {}, 3, 1, STACK[None]),
        (RGB, {"photometric": "rgb"}, 2, 3, np.moveaxis(RGB, -1, 0)),
        (GREY.astype(">u2"), {"byteorder": ">"}, 2, 1, GREY[None]),
        (
            np.stack([STACK, STACK + 1], 1),
            {"imagej": True, "metadata": {"axes": "ZCYX"}},
            3,
            2,
            np.stack([STACK, STACK + 1]),
        ),
    ],
    ids=["yx", "ij-yx", "ij-cyx", "ij-zyx", "ome-cyx", "ome-zyx", "zip", "cyx", "zyx", "rgb", "big", "zcyx"],
)
def test_a_tiff_is_read_channels_first(tmp_path, array, options, ndim, channels, expected):
    """TIFF in each common layout becomes (C, *space) with its values."""
    path = tiff(tmp_path / "image.tif", array, **options)
    np.testing.assert_array_equal(read_image(path, ndim=ndim, channels=channels), expected)


@pytest.mark.parametrize(
    ("array", "channels", "expected"), [(GREY, 1, GREY[None]), (RGB, 3, np.moveaxis(RGB, -1, 0))]
)
def test_a_png_is_read_channels_first(tmp_path, array, channels, expected):
    """Grey PNG of 16 bits and RGB PNG become (C, H, W)."""
    iio.imwrite(tmp_path / "image.png", array)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", ndim=2, channels=channels), expected)


@pytest.mark.parametrize(
    ("array", "channels"), [(GREY, 1), (GREY[None], 1), (FLOAT, 2), (np.moveaxis(FLOAT, 0, -1), 2)]
)
def test_an_npy_is_read_channels_first(tmp_path, array, channels):
    """A .npy with channels first, last or absent becomes (C, H, W)."""
    found = read_image(npy(tmp_path / "image.npy", array), ndim=2, channels=channels)
    assert found.shape == (channels, 24, 20)


@pytest.mark.parametrize(
    ("axes", "shape"), [("YX", (1, 4, 6)), ("XY", (1, 6, 4)), ("yx", (1, 4, 6)), ("YXC", None), ("QW", None)]
)
def test_named_axes_decide(tmp_path, axes, shape):
    """Space comes out in the order Z, Y, X whatever the order in the file; other letters are NF106."""
    path = npy(tmp_path / "image.npy", np.zeros((4, 6)))
    if shape is None:
        assert code_of(read_image, path, ndim=2, channels=1, axes=axes) == "NF106"
    else:
        assert read_image(path, ndim=2, channels=1, axes=axes).shape == shape


def test_axes_move_values_with_them(tmp_path):
    """Naming XYZ transposes the values, not just the shape."""
    array = RNG.random((3, 4, 5))
    found = read_image(npy(tmp_path / "image.npy", array), ndim=3, channels=1, axes="XYZ")
    np.testing.assert_array_equal(found, array.transpose(2, 1, 0)[None])


def test_time_is_not_taken_for_channels(tmp_path):
    """A file that says T is not read as if it said C, though the numbers agree."""
    path = tiff(tmp_path / "t.tif", STACK, imagej=True, metadata={"axes": "TYX"})
    assert code_of(read_image, path, ndim=2, channels=5) == "NF106"


@pytest.mark.parametrize(
    ("array", "ndim", "channels"),
    [
        (RGB, 2, 1),
        (GREY, 2, 3),
        (GREY, 3, 1),
        (STACK, 2, 1),
        (np.zeros((2, 24, 2)), 2, 2),
        (np.array(3.0), 2, 1),
        (np.zeros((0, 4)), 2, 1),
        (np.ones((4, 4), complex), 2, 1),
        (np.array([["a", "b"]]), 2, 1),
        (np.zeros((4, 4), "M8[s]"), 2, 1),
        (np.zeros((4, 4), [("a", float)]), 2, 1),
    ],
)
def test_axes_or_values_that_do_not_fit_are_refused(tmp_path, array, ndim, channels):
    """Wrong channels, wrong number of axes, doubt, emptiness and values that are no numbers are NF106."""
    assert code_of(read_image, npy(tmp_path / "x.npy", array), ndim=ndim, channels=channels) == "NF106"


def test_a_stack_for_a_network_of_planes_is_told_of_slices(tmp_path):
    """No names of axes make a 2D network take a stack; taking its planes one by one does."""
    path = npy(tmp_path / "stack.npy", np.zeros((5, 24, 32)))
    with pytest.raises(NormfixError, match="one by one with --slices Z"):
        read_image(path, ndim=2, channels=1)


def test_doubt_about_axes_names_the_file(tmp_path):
    """Among a hundred images, the message says which one is in doubt."""
    path = npy(tmp_path / "doubtful.npy", np.zeros((2, 24, 2)))
    with pytest.raises(NormfixError, match=r"doubtful\.npy"):
        read_image(path, ndim=2, channels=2)


def test_a_pickle_in_an_npy_is_not_run(tmp_path):
    """An .npy with Python objects is refused, and what it would run does not run."""

    class Payload:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    path = tmp_path / "image.npy"
    np.save(path, np.array([Payload()], dtype=object), allow_pickle=True)
    assert code_of(read_image, path, ndim=2, channels=1) == "NF101"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["raw.tif", "zip.tif", "image.png", "image.npy"])
def test_a_truncated_image_is_refused(tmp_path, name, part):
    """A file cut short is NF101, whatever is missing."""
    path = tmp_path / name
    if path.suffix == ".tif":
        tiff(path, STACK, compression="zlib" if name == "zip.tif" else None, metadata={"axes": "ZYX"})
    elif path.suffix == ".png":
        iio.imwrite(path, RGB)
    else:
        npy(path, STACK)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    channels, ndim = (3, 2) if path.suffix == ".png" else (1, 3)
    assert code_of(read_image, path, ndim=ndim, channels=channels) == "NF101"


@pytest.mark.parametrize("part", [0.3, 0.5, 0.7, 0.9])
def test_a_stack_that_lost_its_last_pages_is_refused(tmp_path, part):
    """Pages beyond the end of a truncated file are not left out silently."""
    pages = [Image.fromarray(page) for page in STACK]
    pages[0].save(
        tmp_path / "stack.tif", save_all=True, append_images=pages[1:], compression="tiff_adobe_deflate"
    )
    data = (tmp_path / "stack.tif").read_bytes()
    (tmp_path / "stack.tif").write_bytes(data[: int(len(data) * part)])
    assert code_of(read_image, tmp_path / "stack.tif", ndim=3, channels=1) == "NF101"


def test_the_whole_stack_of_the_same_kind_is_read(tmp_path):
    """Negative control: untruncated, the pages are all there."""
    pages = [Image.fromarray(page) for page in STACK]
    pages[0].save(
        tmp_path / "stack.tif", save_all=True, append_images=pages[1:], compression="tiff_adobe_deflate"
    )
    np.testing.assert_array_equal(read_image(tmp_path / "stack.tif", ndim=3, channels=1)[0], STACK)


def test_a_compression_that_needs_another_package_says_so(tmp_path):
    """An LZW file, which tifffile alone does not decode, names the package to install."""
    Image.fromarray(GREY).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    try:
        import imagecodecs  # noqa: F401 - with it, the file is read
    except ImportError:
        with pytest.raises(NormfixError, match="pip install imagecodecs"):
            read_image(tmp_path / "lzw.tif", ndim=2, channels=1)
    else:
        np.testing.assert_array_equal(read_image(tmp_path / "lzw.tif", ndim=2, channels=1)[0], GREY)


@pytest.mark.parametrize("name", ["missing.tif", "missing.png", "missing.npy", "text.txt"])
def test_what_is_no_image_is_refused(tmp_path, name):
    """A missing file and a text file are NF101."""
    (tmp_path / "text.txt").write_text("hello")
    assert code_of(read_image, tmp_path / name, ndim=2, channels=1) == "NF101"


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".tiff", ".TIF"])
@pytest.mark.parametrize("shape", [(1, 9, 10), (2, 9, 10), (3, 9, 10), (4, 9, 10), (1, 5, 9, 10), (1, 64)])
def test_a_written_image_reads_back(tmp_path, shape, suffix):
    """Any number of channels and axes is read back with equal values."""
    image = RNG.random(shape).astype(np.float32)
    write_image(tmp_path / f"out{suffix}", image)
    found = read_image(tmp_path / f"out{suffix}", ndim=len(shape) - 1, channels=shape[0])
    np.testing.assert_array_equal(found, image)


def test_writing_leaves_no_draft(tmp_path):
    """Only the image is in the folder afterwards."""
    write_image(tmp_path / "out.tif", FLOAT)
    assert [p.name for p in tmp_path.iterdir()] == ["out.tif"]


@pytest.mark.parametrize("name", ["old.tif", "old.npy"])
def test_an_existing_file_is_not_overwritten(tmp_path, name):
    """Writing over something is NF114, and the file keeps its bytes."""
    (tmp_path / name).write_text("mine")
    assert code_of(write_image, tmp_path / name, FLOAT) == "NF114"
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["out.png", "out", "missing/out.tif"])
def test_an_output_that_cannot_be_written_is_refused_beforehand(tmp_path, name):
    """Another kind of file or a missing folder is NF114 before anything is computed."""
    assert code_of(require_new_image, tmp_path / name) == "NF114"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs POSIX")
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_a_full_disk_is_an_error_and_no_crash(tmp_path, monkeypatch, suffix):
    """Room is taken before the file is mapped, where writing without it would end the process."""

    def full(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    assert code_of(write_image, tmp_path / f"out{suffix}", FLOAT) == "NF114"
    assert not list(tmp_path.iterdir())


def test_a_tensor_has_a_batch_axis():
    """(C, *space) becomes (1, C, *space) with equal values."""
    assert torch.equal(to_tensor(FLOAT), torch.from_numpy(FLOAT)[None])
