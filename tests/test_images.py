"""Images: read with named axes, scaled over the whole image, and refused by name where they do not fit."""

import re
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from normfix.errors import NormfixError
from normfix.images import (
    ImageFiles,
    Items,
    find_images,
    parse_scaling,
    read_image,
    require_new_image,
    scaled,
    to_tensor,
    write_image,
)
from normfix.records import Scaling

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 60000, (24, 20), dtype=np.uint16)
RGB = RNG.integers(0, 255, (24, 20, 3), dtype=np.uint8)
STACK = RNG.integers(0, 60000, (5, 24, 20), dtype=np.uint16)
FLOAT = RNG.normal(3, 2, (2, 24, 20)).astype(np.float32)
CPU = torch.device("cpu")


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


def preprocess_halves(array):
    """Halve an image."""
    return array / 2


def preprocess_in_place(array):
    """Spoil the array it is given, and return another."""
    array[:] = 0
    return np.ones(array.shape)


def preprocess_flat(array):
    """Forget the channel axis."""
    return array[0]


def preprocess_fails(array):
    """Fail."""
    raise RuntimeError("no licence")


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


def test_a_folder_gives_its_images_sorted(tmp_path):
    """A folder stands for the images in it, in the order of their names, other files apart."""
    for name in ("b.tif", "a.PNG", "c.npy", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images([str(tmp_path)])] == ["a.PNG", "b.tif", "c.npy"]


def test_a_glob_gives_its_images_sorted(tmp_path):
    """A pattern that the shell did not expand is expanded, sorted."""
    for name in ("b.tif", "a.tif", "c.npy"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images([str(tmp_path / "*.tif")])] == ["a.tif", "b.tif"]


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    """A file whose name looks like a pattern is found."""
    (tmp_path / "cell[1].tif").touch()
    assert find_images([str(tmp_path / "cell[1].tif")]) == [tmp_path / "cell[1].tif"]


def test_images_keep_the_order_of_the_arguments(tmp_path):
    """Sorting is within an argument, not across."""
    for name in ("b.tif", "a.tif"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images([str(tmp_path / "b.tif"), str(tmp_path / "a.tif")])] == [
        "b.tif",
        "a.tif",
    ]


@pytest.mark.parametrize("pattern", ["", "missing.tif", "*.nope", "x" * 5000, "a\0b", "empty"])
def test_a_pattern_without_images_is_refused(tmp_path, monkeypatch, pattern):
    """An empty folder, a missing file, a pattern that matches nothing and impossible names are NF101."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert code_of(find_images, [pattern]) == "NF101"


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("none", lambda x: x),
        ("unit", lambda x: x / 65535),
        ("zscore", lambda x: (x - x.mean()) / x.std()),
        (
            "percentile:1,99.8",
            lambda x: (x - np.percentile(x, 1)) / (np.percentile(x, 99.8) - np.percentile(x, 1)),
        ),
        ("100,25", lambda x: (x - 100) / 25),
        ("-1.5e2,0.5", lambda x: (x + 150) / 0.5),
    ],
)
def test_scaling_follows_its_formula(text, formula):
    """Each kind of scaling equals its formula on the whole image, in float32."""
    found = scaled(STACK, parse_scaling(text))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, formula(STACK.astype(np.float64)).astype(np.float32))


def test_scaling_is_of_the_whole_image():
    """Negative control: scaling a tile by itself is something else."""
    tile = STACK[:, :8, :8]
    assert not np.allclose(
        scaled(tile, Scaling(kind="zscore")), scaled(STACK, Scaling(kind="zscore"))[:, :8, :8]
    )


def test_doubles_stay_double():
    """A float64 image keeps its precision."""
    assert scaled(FLOAT.astype(np.float64), None).dtype == np.float64


def test_unit_of_signed_integers_uses_their_range():
    """An int16 image is divided by 32767."""
    assert scaled(np.array([[[32767, 0]]], np.int16), Scaling(kind="unit")).max() == 1


@pytest.mark.parametrize("array", [STACK, STACK.astype(bool), STACK.astype(np.int64)])
def test_an_integer_image_needs_a_stated_scaling(array):
    """Integers without --scale are NF107: there is no silent default."""
    assert code_of(scaled, array, None) == "NF107"


def test_a_float_image_is_taken_as_it_is():
    """Floats without --scale go in unchanged."""
    np.testing.assert_array_equal(scaled(FLOAT, None), FLOAT)


def test_unit_is_for_integers():
    """A float image has no range to divide by."""
    assert code_of(scaled, FLOAT, Scaling(kind="unit")) == "NF107"


@pytest.mark.parametrize("kind", ["zscore", "percentile:1,99"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1])
def test_a_constant_image_has_no_spread(kind, value):
    """A constant is NF107 also where its deviation rounds to a little more than 0."""
    assert code_of(scaled, np.full((1, 100, 100), value), parse_scaling(kind)) == "NF107"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["none", "zscore", "percentile:1,99"])
def test_an_image_that_is_not_finite_is_refused(bad, kind):
    """One NaN or infinite pixel is NF104."""
    image = FLOAT.copy()
    image[0, 3, 4] = bad
    assert code_of(scaled, image, parse_scaling(kind)) == "NF104"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "None",
        "percentile:",
        "percentile:1",
        "percentile:5,5",
        "percentile:9,1",
        "percentile:-1,99",
        "percentile:0,101",
        "percentile:nan,99",
        "1,2,3",
        "1,0",
        "1,-2",
        "nan,1",
        "0,inf",
        "inf,1",
        "1,nan",
    ],
)
def test_a_scaling_without_sense_is_refused(text):
    """What is no scaling is NF107."""
    assert code_of(parse_scaling, text) == "NF107"


@pytest.mark.parametrize("kind", ["percentile", "fixed"])
@pytest.mark.parametrize("numbers", [(), (1.0,), (99.0, 1.0, 2.0), (1.0, float("inf"))])
def test_a_stored_scaling_with_wrong_numbers_is_refused(kind, numbers):
    """A scaling that was edited in a file is NF107, not a failure inside numpy."""
    assert code_of(scaled, FLOAT, Scaling(kind=kind, values=numbers)) == "NF107"


def test_a_preprocess_function_gets_the_whole_array():
    """--preprocess applies the named function to (C, *space)."""
    scaling = Scaling(kind="preprocess", function="test_images:preprocess_halves")
    np.testing.assert_array_equal(scaled(STACK, scaling), (STACK / 2).astype(np.float32))


def test_a_preprocess_function_cannot_change_its_input():
    """What the function does to its argument in place stays its own."""
    image = FLOAT.copy()
    scaled(image, Scaling(kind="preprocess", function="test_images:preprocess_in_place"))
    np.testing.assert_array_equal(image, FLOAT)


@pytest.mark.parametrize(
    "name",
    ["nowhere:f", "test_images:missing", "math", "", ":f", "os:path", "os:getcwd"]
    + [f"test_images:preprocess_{kind}" for kind in ("flat", "fails")],
)
def test_a_preprocess_function_that_does_not_work_is_refused(name):
    """What cannot be imported, fails or loses an axis is NF107."""
    assert code_of(scaled, FLOAT, Scaling(kind="preprocess", function=name)) == "NF107"


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


def test_image_files_can_be_read_twice(tmp_path):
    """Files are read anew in each pass, to the same tensors."""
    path = npy(tmp_path / "a.npy", FLOAT)
    files = ImageFiles([path], 2, 2, None)
    assert torch.equal(*(next(iter(files)) for _ in range(2)))


def test_a_tensor_has_a_batch_axis():
    """(C, *space) becomes (1, C, *space) with equal values."""
    assert torch.equal(to_tensor(FLOAT), torch.from_numpy(FLOAT)[None])


def test_items_come_in_the_dtype_of_the_network():
    """Images are given in the network's dtype."""
    (item,) = Items.of(torch.zeros(1, 1, 4, 4), CPU, torch.float64)
    assert item.dtype == torch.float64


@pytest.mark.parametrize(
    "images",
    [[], {}, 5, None, (x for x in [torch.zeros(1, 1, 4, 4)]), map(str, [1]), iter([torch.zeros(1, 1, 4, 4)])],
    ids=["list", "dict", "int", "None", "generator", "map", "iterator"],
)
def test_images_that_cannot_be_read_twice_are_refused(images):
    """Emptiness, what cannot be iterated and what can be only once are NF103."""
    assert code_of(Items.of, images, CPU, torch.float32) == "NF103"


@pytest.mark.parametrize(
    "image",
    [np.zeros((1, 1, 4, 4)), "abc", torch.zeros(4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)]
    + [torch.zeros(0, 1, 4, 4), torch.zeros(1, 1, 0, 4)],
    ids=["numpy", "text", "2d", "uint8", "no batch", "no pixels"],
)
def test_an_item_that_is_no_image_is_refused(image):
    """Only floating tensors (N, C, *space) with pixels are images; all else is NF106."""
    assert code_of(list, Items.of([image], CPU, torch.float32)) == "NF106"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_an_item_that_is_not_finite_in_the_networks_dtype_is_refused(value):
    """NaN, infinity, and a double that float32 cannot hold are NF104."""
    image = torch.full((1, 1, 4, 4), value, dtype=torch.float64)
    assert code_of(list, Items.of([image], CPU, torch.float32)) == "NF104"


def test_the_message_counts_the_images():
    """Among several, the message says which image is bad."""
    images = [torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), float("nan"))]
    with pytest.raises(NormfixError, match=re.escape("image 1")):
        list(Items.of(images, CPU, torch.float32))
