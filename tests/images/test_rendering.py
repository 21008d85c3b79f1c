"""Classes, probabilities and masks are what their names say, open in Fiji, and are refused where they mean nothing."""

import sys

import numpy as np
import pytest
import tifffile
import torch
from optional import needs_programs
from torch import nn

import normfix
from normfix.cli import main
from normfix.errors import NormfixError
from normfix.images.formats import open_file
from normfix.images.rendering import Rendering

IMAGE = torch.rand(1, 1, 64, 48, generator=torch.Generator().manual_seed(0))


def network(channels, last=None):
    """Return a converted network with so many channels, ending in an activation."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, channels, 1)]
    net = nn.Sequential(*layers, *([last] if last else []))
    return normfix.convert(net.eval(), IMAGE).model


@pytest.fixture(scope="module")
def three():
    """A network of three channels, and its raw prediction."""
    model = network(3)
    return model, normfix.predict(model, IMAGE, tile=16)


@pytest.fixture(scope="module")
def one():
    """A network of one channel, and its raw prediction."""
    model = network(1)
    return model, normfix.predict(model, IMAGE, tile=16)


def test_classes_are_the_largest_channel(three):
    """Their numbers are uint8 in one channel."""
    model, raw = three
    found = normfix.predict(model, IMAGE, tile=16, as_="classes")
    assert (found.dtype, found.shape) == (torch.uint8, (1, 1, 64, 48))
    assert torch.equal(found[0, 0].long(), raw[0].argmax(0))


@pytest.mark.parametrize("logits", [None, "softmax", "sigmoid"])
def test_probabilities_are_of_the_logits_that_are_said(three, logits):
    """Several channels exclude each other unless the sigmoid is asked for."""
    model, raw = three
    found = normfix.predict(model, IMAGE, tile=16, as_="probabilities", logits=logits)
    torch.testing.assert_close(found, raw.sigmoid() if logits == "sigmoid" else raw.softmax(1))


@pytest.mark.parametrize("threshold", ["", ":0.5", ":0.35"])
def test_a_mask_is_255_above_the_threshold(one, threshold):
    """Of one channel, by the sigmoid, as Fiji has masks."""
    model, raw = one
    found = normfix.predict(model, IMAGE, tile=16, as_=f"mask{threshold}")
    expected = raw.sigmoid() > float(threshold[1:] or 0.5)
    assert found.dtype == torch.uint8
    assert torch.equal(found == 255, expected)
    assert torch.equal(found == 0, ~expected)


def test_each_channel_is_a_mask_where_that_is_said(three):
    """Three independent masks need the word sigmoid."""
    model, raw = three
    found = normfix.predict(model, IMAGE, tile=16, as_="mask", logits="sigmoid")
    assert torch.equal(found == 255, raw > 0)


def test_probabilities_are_left_where_the_network_gives_them():
    """A network that ends in a softmax is thresholded and written as it is with logits none."""
    model = network(2, nn.Softmax(1))
    raw = normfix.predict(model, IMAGE, tile=16)
    assert torch.equal(normfix.predict(model, IMAGE, tile=16, as_="probabilities", logits="none"), raw)
    assert torch.equal(
        normfix.predict(model, IMAGE, tile=16, as_="mask:0.4", logits="none") == 255, raw > 0.4
    )


def test_many_classes_have_wider_numbers():
    """Over 256 classes are uint16."""
    values = torch.zeros(1, 300, 2, 2)
    values[:, 299] = 1
    found = Rendering("classes").of(values)
    assert (found.dtype, int(found.int().max())) == (torch.uint16, 299)


REFUSED = {
    "a mask of three channels": (3, None, "mask", None, "NF534"),
    "classes of one channel": (1, None, "classes", None, "NF534"),
    "a softmax of one channel": (1, None, "probabilities", "softmax", "NF534"),
    "classes that do not exclude each other": (3, None, "classes", "sigmoid", "NF534"),
    "raw logits": (3, None, "raw", "softmax", "NF534"),
    "probabilities taken for logits": (2, nn.Softmax(1), "probabilities", None, "NF535"),
    "a sigmoid taken for logits": (1, nn.Sigmoid(), "mask", None, "NF535"),
    "logits taken for probabilities": (3, None, "mask", "none", "NF535"),
    "a threshold of 1": (1, None, "mask:1", None, "NF534"),
    "a threshold that is none": (1, None, "mask:half", None, "NF534"),
    "a threshold left out": (1, None, "mask:", None, "NF534"),
    "a threshold of classes": (3, None, "classes:0.5", None, "NF534"),
    "another word": (3, None, "labels", None, "NF534"),
    "another activation": (3, None, "probabilities", "tanh", "NF534"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_nothing_is_refused(tmp_path, name):
    """In memory and in a file, and no file is left."""
    channels, last, as_, logits, code = REFUSED[name]
    model = network(channels, last)
    with pytest.raises(NormfixError, match=code):
        normfix.predict(model, IMAGE, tile=16, as_=as_, logits=logits)
    with pytest.raises(NormfixError, match=code):
        normfix.write_prediction(model, IMAGE, tmp_path / "p.tif", tile=16, as_=as_, logits=logits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["tiles", "stages"])
@pytest.mark.parametrize("ending", [".tif", ".npy", ".zarr", ".nii"])
def test_files_hold_what_memory_does(three, tmp_path, engine, ending):
    """Written block by block or whole, in every format, classes are those of `predict`."""
    model, raw = three
    shape, dtype = normfix.write_prediction(
        model, IMAGE, tmp_path / f"p{ending}", tile=16, engine=engine, as_="classes"
    )
    assert (shape, dtype) == ((1, 64, 48), "uint8")
    opened = open_file(tmp_path / f"p{ending}")
    found = np.array(opened.array[(slice(None),) * len(opened.array.shape)]).squeeze()
    opened.close()
    np.testing.assert_array_equal(found.T if ending == ".nii" else found, raw[0].argmax(0).numpy())


FIJI = {
    "classes": ("uint8", "YX", 2),
    "probabilities": ("float32", "CYX", 1),
    "raw": ("float32", "CYX", None),
}


@pytest.mark.parametrize("as_", FIJI)
def test_a_tiff_is_a_hyperstack_of_imagej(three, tmp_path, as_):
    """Tifffile's reader of ImageJ's format sees axes, range and values, and it is no BigTIFF, which ImageJ refuses."""
    model, _ = three
    normfix.write_prediction(model, IMAGE, tmp_path / "p.tif", tile=16, as_=as_)
    with tifffile.TiffFile(tmp_path / "p.tif") as file:
        assert file.is_imagej
        assert not file.is_bigtiff
        brightest = file.imagej_metadata.get("max")
        assert (file.series[0].dtype.name, file.series[0].axes, brightest) == FIJI[as_]
        assert file.imagej_metadata.get("channels", 1) == (1 if as_ == "classes" else 3)
        np.testing.assert_array_equal(
            file.asarray(), normfix.predict(model, IMAGE, tile=16, as_=as_)[0].numpy().squeeze()
        )


@needs_programs
def test_a_stack_of_masks_is_a_hyperstack_with_its_spacing(one, tmp_path, monkeypatch, capsys):
    """Planes along Z are slices in Fiji, with the size of their pixels, from the command line."""
    planes = np.concatenate([IMAGE[0].numpy() + n for n in range(4)])
    tifffile.imwrite(
        tmp_path / "s.tif",
        planes,
        imagej=True,
        resolution=(4, 4),
        metadata={"axes": "ZYX", "spacing": 2.0, "unit": "um"},
    )
    normfix.save(normfix.calibrate(one[0], IMAGE), tmp_path / "saved")
    words = ["predict", tmp_path / "saved", tmp_path / "s.tif", "--slices", "Z", "--as", "mask:0.4"]
    monkeypatch.setattr(
        sys, "argv", ["normfix", *map(str, words), "--tile", "16", "-o", str(tmp_path / "p.tif")]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0, capsys.readouterr().err
    with tifffile.TiffFile(tmp_path / "p.tif") as file:
        assert (file.series[0].axes, file.series[0].shape) == ("ZYX", (4, 64, 48))
        assert file.imagej_metadata["slices"] == 4
        assert (file.imagej_metadata["spacing"], file.imagej_metadata["unit"]) == (2.0, "um")
        assert file.pages[0].tags["XResolution"].value == (4, 1)
        assert set(np.unique(file.asarray())) == {0, 255}


def test_colours_of_the_image_are_no_colours_of_classes(tmp_path):
    """An RGB image, whose channels are last, gives one plane of classes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 3, 1)).eval()
    pixels = np.random.default_rng(0).random((64, 48, 3)).astype(np.float32)
    np.save(tmp_path / "rgb.npy", pixels)
    model = normfix.convert(net, pixels).model
    for as_ in ("classes", "probabilities"):
        normfix.write_prediction(model, tmp_path / "rgb.npy", tmp_path / f"{as_}.tif", tile=16, as_=as_)
        with tifffile.TiffFile(tmp_path / f"{as_}.tif") as file:
            assert file.series[0].axes == FIJI[as_][1]
