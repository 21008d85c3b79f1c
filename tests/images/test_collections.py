"""Images are found in order, read as often as needed, and refused by name where they do not fit."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from normfix.errors import NormfixError
from normfix.images.collections import ImageFiles, Images
from normfix.images.files import open_windows
from normfix.images.names import find_images
from normfix.images.sources import whole
from normfix.images.windows import ScaledImage, windowed

FLOAT = np.random.default_rng(0).normal(3, 2, (2, 24, 20)).astype(np.float32)
CPU = torch.device("cpu")


def code_of(function, *args, **options) -> str:
    """Return the code of the error a call gives."""
    with pytest.raises(NormfixError) as caught:
        function(*args, **options)
    return caught.value.code


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


def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch):
    """A name that was left empty by mistake takes no images; the folder's own name does."""
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.zeros((4, 4)))
    assert find_images(["."]) == [Path("a.npy")]
    with pytest.raises(NormfixError, match=r"NF101.*name is empty"):
        find_images(["a.npy", ""])


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


OPEN = partial(open_windows, ndim=2, channels=2)


def test_one_file_is_decoded_once_and_several_once_per_pass(tmp_path):
    """However often a single image is asked for, its file is opened once; of several only the last is kept."""
    decoded = []

    def opened(path, **options):
        decoded.append(path.name)
        return OPEN(path, **options)

    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, FLOAT)
    one = ImageFiles([tmp_path / "a.npy"], opened, None)
    for _ in range(3):
        list(one)
    assert decoded == ["a.npy"]
    decoded.clear()
    two = ImageFiles([tmp_path / "a.npy", tmp_path / "b.npy"], opened, None)
    assert [len(list(two)) for _ in range(2)] == [2, 2]
    assert decoded == ["a.npy", "b.npy", "a.npy", "b.npy"]


def test_image_files_can_be_read_twice(tmp_path):
    """Files are read again in each pass, to the same tensors."""
    path = tmp_path / "a.npy"
    np.save(path, FLOAT)
    files = ImageFiles([path], OPEN, None)
    assert torch.equal(*(next(iter(files)) for _ in range(2)))


def test_items_come_in_the_dtype_of_the_network():
    """Images are given in the network's dtype."""
    (image,) = Images.of(torch.zeros(1, 1, 4, 4), CPU, torch.float64)
    assert whole(image).dtype == torch.float64


@pytest.mark.parametrize(
    "images",
    [[], {}, 5, None, (x for x in [torch.zeros(1, 1, 4, 4)]), map(str, [1]), iter([torch.zeros(1, 1, 4, 4)])],
    ids=["list", "dict", "int", "None", "generator", "map", "iterator"],
)
def test_images_that_cannot_be_read_twice_are_refused(images):
    """Emptiness, what cannot be iterated and what can be only once are NF103."""
    assert code_of(Images.of, images, CPU, torch.float32) == "NF103"


@pytest.mark.parametrize(
    "image",
    [np.zeros((1, 1, 4, 4)), "abc", torch.zeros(4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)]
    + [torch.zeros(0, 1, 4, 4), torch.zeros(1, 1, 0, 4)],
    ids=["numpy", "text", "2d", "uint8", "no batch", "no pixels"],
)
def test_an_item_that_is_no_image_is_refused(image):
    """Only floating tensors (N, C, *space) with pixels are images; all else is NF106."""
    assert code_of(list, Images.of([image], CPU, torch.float32)) == "NF106"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_an_item_that_is_not_finite_in_the_networks_dtype_is_refused(value):
    """NaN, infinity, and a double that float32 cannot hold are NF104."""
    image = torch.full((1, 1, 4, 4), value, dtype=torch.float64)
    assert code_of(list, Images.of([image], CPU, torch.float32)) == "NF104"


def test_the_message_counts_the_images():
    """Among several, the message says which image is bad."""
    images = [torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), float("nan"))]
    with pytest.raises(NormfixError, match=re.escape("image 1")):
        list(Images.of(images, CPU, torch.float32))


def test_tensors_and_images_read_by_window_are_taken_together():
    """Each is an image of its extents; one that is read by window makes all be read so."""
    tensor, window = torch.rand(1, 1, 4, 6), ScaledImage(windowed(FLOAT[:1], "CYX", ndim=2, channels=1))
    images = Images.of([tensor, window], CPU, torch.float32)
    assert [image.shape for image in images] == [(1, 1, 4, 6), (1, 1, 24, 20)]
    assert images.by_window
    assert not Images.of([tensor], CPU, torch.float32).by_window
    wider = replace(images, padding=lambda size: [-n % 5 for n in size])
    assert [tuple(whole(image).shape) for image in wider] == [(1, 1, 5, 10), (1, 1, 25, 20)]


def test_what_has_no_length_is_counted_once():
    """A dataset without a length is gone through once to count it, however often its length is asked for."""

    class Dataset:
        passes = 0

        def __iter__(self):
            Dataset.passes += 1
            yield from [torch.zeros(1, 1, 4, 4)] * 2

    images = Images.of(Dataset(), CPU, torch.float32)
    assert (len(images), len(images), Dataset.passes) == (2, 2, 1)


class Augmented:
    """Images of several extents; each pass adds what `change` gives for it, in batches of `batch`."""

    def __init__(self, change, batch=1):
        self.change, self.batch, self.passes = change, batch, 0
        self.images = torch.rand(4, 1, 6, 5)

    def __iter__(self):
        self.passes += 1
        return iter(self.change(self.images.clone(), self.passes).split(self.batch))

    def __len__(self):
        return 4 // self.batch


def _flipped(images, number):
    images[2] = images[2].flip(-1) if number > 2 else images[2]
    return images


def _repeated(images, number):
    images[2] = images[1] if number > 2 else images[2]
    return images


@pytest.mark.parametrize(
    "change",
    [
        lambda images, number: images + number * 1e-6,
        lambda images, number: images[..., number:],
        lambda images, number: images[: 5 - number],
        lambda images, number: images[..., :1].expand(4, 1, 6, 5) if number == 2 else images,
        _flipped,
        _repeated,
    ],
    ids=["noise", "crops", "fewer", "another extent of the same values", "one is turned", "one twice"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_images_that_each_pass_draws_anew_are_refused(change, batch):
    """Constants would be of other images than what was measured before them."""
    images = Images.of(Augmented(change, batch), CPU, torch.float64)
    list(images)
    assert code_of(list, images) == "NF331"


@pytest.mark.parametrize("padding", [None, lambda size: [-n % 4 for n in size]])
def test_the_same_images_in_any_order_and_batches_are_taken(padding):
    """A loader may shuffle; a pass that ends early says nothing of the others, and values are compared as given."""
    source = Augmented(lambda images, number: images.roll(number, 0))
    images = replace(Images.of(source, CPU, torch.float64), padding=padding)
    assert [len(list(images)) for _ in range(3)] == [4, 4, 4]
    source.batch = 2
    next(iter(images))
    assert len(list(images)) == 2
    early = Images.of(Augmented(lambda images, number: images + number), CPU, torch.float64)
    assert next(iter(early)) is not next(iter(early))
    list(early)
    assert code_of(next, iter(early)) == "NF331"
