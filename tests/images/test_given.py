"""Tensors, arrays and files are the same image everywhere: found by signature, so that no function is forgotten."""

import inspect

import numpy as np
import pytest
import torch
from optional import zarr
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.images.given import images_of
from normfix.images.sources import whole
from normfix.records.saved import Scaling

PIXELS = np.random.default_rng(0).normal(5, 2, (64, 48)).astype(np.float32)
TENSOR = torch.from_numpy(PIXELS)[None, None]


def network(channels=1):
    """Return a network with one live norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 1)
    ).eval()


@pytest.fixture(scope="module")
def model():
    """A converted network."""
    return normfix.convert(network(), TENSOR).model


def state(module):
    """Return a network's values as bytes."""
    return [value.numpy().tobytes() for value in module.state_dict().values()]


def written(model, image, folder):
    """Return the bytes of a written prediction."""
    out = folder / f"{len(list(folder.iterdir()))}.npy"
    normfix.write_prediction(model, image, str(out), tile=16)
    return out.read_bytes()


def recalibrated(model, image, folder):
    """Return what a fine-tuning run measures."""
    run = normfix.prepare_finetune(normfix.calibrate(model, TENSOR + 3).model, total_steps=1)
    run.recalibrate(image)
    return state(run.model)


USES = {
    "assert_tile_invariant": lambda m, x, _: normfix.assert_tile_invariant(m, x, tile=16).max_sd,
    "calibrate": lambda m, x, _: state(normfix.calibrate(m, x).model),
    "calibrate_": lambda m, x, _: normfix.calibrate_(normfix.calibrate(m, TENSOR).model, x).to_json(),
    "check": lambda m, x, _: normfix.check(m, x, tile=16).to_json(),
    "choose": lambda m, x, _: normfix.choose(network(), x, window=16).record.to_json(),
    "convert": lambda m, x, _: state(normfix.convert(network(), x).model),
    "diagnose": lambda m, x, _: normfix.diagnose(network(), x, tile=16, batches=(1,)).tile_mismatch,
    "FineTuning.recalibrate": recalibrated,
    "halo_curve": lambda m, x, _: normfix.halo_curve(m, x, tile=16).to_json(),
    "predict": lambda m, x, _: normfix.predict(m, x, tile=16).numpy().tobytes(),
    "prove": lambda m, x, _: [(s.name, s.status, s.value) for s in normfix.prove(m, x, 16).steps],
    "scan": lambda m, x, _: normfix.scan(network(), x, fast=True).to_json(),
    "write_prediction": written,
}
"""What each public function that takes images gives for one."""

APART = {"open_image", "read_images", "fold", "Blocks.run"}
"""These make images of files and arrays, take the arguments of a forward, and run over images that are open."""


def takes_images(function):
    """Tell by its signature whether a function takes an image."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return False
    return any(
        p.name in ("image", "images", "example") or "Given" in str(p.annotation) for p in parameters
    ) and not hasattr(function, "to_json")


def public():
    """Yield every public function and method by its name."""
    for name in normfix.__all__:
        thing = getattr(normfix, name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            yield from (
                (f"{name}.{n}", f) for n, f in vars(thing).items() if inspect.isfunction(f) and n[0] != "_"
            )


def test_every_function_that_takes_images_is_tried():
    """What has an image among its parameters is in the table above, or named apart."""
    assert {name for name, function in public() if takes_images(function)} - APART == set(USES)


def test_a_function_with_an_image_would_be_noticed():
    """Negative control: the look at signatures sees a parameter by its name and by its type."""
    assert takes_images(lambda model, image: None)
    assert not takes_images(lambda model, tile: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", USES)
def test_arrays_and_files_give_what_the_tensor_gives(name, model, tmp_path, monkeypatch):
    """An array with and without channels, a name and a path give to the bit what the tensor gives."""
    monkeypatch.setattr("normfix.proof.prove._FORMS", ())  # they take seconds each, and no image
    np.save(tmp_path / "cells.npy", PIXELS)
    (tmp_path / "out").mkdir()
    forms = [TENSOR, PIXELS, PIXELS[None, None], str(tmp_path / "cells.npy"), tmp_path / "cells.npy"]
    results = [USES[name](model, form, tmp_path / "out") for form in forms]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    "array",
    [np.stack([PIXELS] * 3, -1), np.stack([PIXELS] * 3), np.stack([np.stack([PIXELS] * 3)] * 2)],
    ids=["YXC", "CYX", "NCYX"],
)
def test_channels_are_where_the_network_takes_them(array):
    """Channels first or last is told by the network; with one axis more the first counts images."""
    (image,) = images_of(array, network(channels=3))
    assert image.shape == (2 if array.ndim == 4 else 1, 3, 64, 48)
    assert torch.equal(whole(image)[0, 2], TENSOR[0, 0])


def test_arrays_outside_of_memory_are_read_when_their_turn_comes(tmp_path):
    """A Zarr array is one image, not a collection of its rows."""
    array = zarr.open_array(tmp_path / "a.zarr", mode="w", shape=PIXELS.shape, chunks=(16, 16), dtype="f4")
    array[...] = PIXELS
    (image,) = images_of(array, network())
    assert torch.equal(whole(image), TENSOR)


def test_folders_patterns_arrays_and_tensors_stand_side_by_side(tmp_path):
    """Each name in a list is as many images as it names, in order, beside tensors and arrays."""
    for number, name in enumerate(("b.npy", "a.npy", "c.png.npy")):
        np.save(tmp_path / name, PIXELS + number)
    images = images_of([TENSOR + 9, str(tmp_path / "?.npy"), PIXELS + 8], network())
    assert len(images) == 4
    assert [round(float(whole(image)[0, 0, 0, 0] - PIXELS[0, 0])) for image in images] == [9, 1, 0, 8]
    assert len(images_of(tmp_path, network())) == 3


def test_files_and_arrays_are_scaled_as_the_networks_images_were(tmp_path):
    """What convert was told of its images holds for pixel values afterwards, and not for tensors."""
    pixels = (PIXELS * 20).clip(0, 255).astype(np.uint8)
    np.save(tmp_path / "cells.npy", pixels)
    images = normfix.read_images(tmp_path / "cells.npy", network(), scaling="unit")
    model = normfix.convert(network(), images).model
    expected = normfix.predict(model, torch.from_numpy(pixels / np.float32(255))[None, None], tile=16)
    for form in (pixels, tmp_path / "cells.npy"):
        torch.testing.assert_close(normfix.predict(model, form, tile=16), expected)


def test_integers_without_a_scaling_are_refused():
    """Nobody knows what the network takes, and the message says how to state it in Python."""
    with pytest.raises(NormfixError, match=r"NF107.*normfix\.read_images"):
        normfix.convert(network(), PIXELS.astype(np.uint8))


def test_a_function_that_travels_is_not_run(model, tmp_path):
    """A scaling by a function that the saved folder names is refused for files and arrays (NF113)."""
    stated = Scaling(kind="preprocess", function="os:getcwd")
    normfix.save(normfix.calibrate(model, TENSOR), tmp_path / "saved", scaling=stated)
    saved = normfix.load(tmp_path / "saved", model=network())
    with pytest.raises(NormfixError, match="NF113"):
        normfix.check(saved, PIXELS)
    assert normfix.check(saved, TENSOR, tile=16).passed


@pytest.mark.parametrize("use", [normfix.check, normfix.predict, normfix.diagnose, normfix.scan])
def test_several_images_for_one_are_refused(model, use):
    """Where one image is taken, a list of two is NF530."""
    with pytest.raises(NormfixError, match="NF530"):
        use(model, [PIXELS, PIXELS])


@pytest.mark.parametrize(
    "image", [np.zeros((0, 4, 4)), np.array([None, 1]), np.zeros(5), 7, "missing.tif", "", b"cells"]
)
def test_what_is_no_image_is_refused(model, image):
    """Nothing of another kind ends in another error than one with a code."""
    with pytest.raises(NormfixError, match=r"NF(10[136]|530)"):
        normfix.check(model, image, tile=16)


def test_what_a_masked_array_hides_is_not_read_as_seen(model):
    """A mask of numpy's would be lost: NF104, in memory and by window; control: one that hides nothing is read."""
    shown = np.ma.masked_array(PIXELS, mask=np.zeros_like(PIXELS, dtype=bool))
    hidden = np.ma.masked_greater(PIXELS, 6)
    expected = normfix.predict(model, TENSOR, tile=16)
    torch.testing.assert_close(normfix.predict(model, shown, tile=16), expected)
    for use in (normfix.predict, normfix.calibrate):
        with pytest.raises(NormfixError, match="NF104"):
            use(model, hidden)
    opened = normfix.open_image(hidden, model)
    with pytest.raises(NormfixError, match="NF104"):
        opened.read([(0, 64), (0, 48)])


@pytest.mark.parametrize("image", [TENSOR.to_sparse(), TENSOR.to("meta")], ids=["sparse", "meta"])
def test_tensors_without_values_of_all_pixels_are_no_images(model, image):
    """Sparse tensors and those of the meta device ended in errors of torch: NF106."""
    for use in (normfix.predict, normfix.calibrate):
        with pytest.raises(NormfixError, match="NF106"):
            use(model, image)
