"""Pictures of a page: colours that mean what is written beside them, and the seam that is worst."""

import io

import numpy as np
import pytest
from PIL import Image

from normfix.reporting.maps import Maps
from normfix.reporting.panels import GRID, classes, colour_of_class, numbers, rgb
from normfix.reporting.planes import worst_plane, worst_seam
from normfix.reporting.scenes import scenes

RNG = np.random.default_rng(0)


def pixels(png):
    """Return a picture as (rows, columns, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def maps(whole, stitched, cuts, kind, image=None):
    """Return maps without a repair."""
    image = whole[:1] if image is None else image
    return Maps(image, whole, stitched, None, np.abs(stitched - whole), None, cuts, kind)


@pytest.mark.parametrize("top", [255, 1], ids=["bytes", "from 0 to 1"])
def test_an_rgb_image_has_its_own_colours(top):
    """To the bit, whatever else is in it: nothing is quantised or stretched."""
    image = RNG.integers(0, 200, (3, 300, 260)).astype("float32")
    image[0, :9] = 17  # never white, never black
    np.testing.assert_array_equal(pixels(rgb(image * top / 255)), image.transpose(1, 2, 0))


def test_grey_stays_grey_beside_a_bright_scale():
    """A channel is drawn without hue, of which a table of few colours gave it some."""
    shown = pixels(numbers(RNG.random((300, 300)), 0, 1, "gray"))
    assert (shown == shown[..., :1]).all()
    assert len(np.unique(shown[..., 0])) > 200


def test_each_class_has_the_colour_of_its_key():
    """The picture holds the colours of the keys, in the shares that these state, and the grid's on cuts."""
    found = np.repeat(np.arange(4), 75)[None].repeat(300, 0)
    shown = pixels(classes(found, ((), (150,))))
    for number in range(4):
        assert (shown[:, number * 75 + 9] == colour_of_class(number)).all()
    assert (shown[:, 150] == GRID).all(1).sum() == 152
    scores = np.eye(4, dtype="float32")[found].transpose(2, 0, 1)
    keys = scenes(maps(scores, scores, ((), (150,)), "scores"))[1].keys
    assert [(key.name, key.share) for key in keys] == [(f"class {n}", 0.25) for n in range(4)]


def test_many_objects_are_not_named():
    """Instance labels have a colour each, and no key of hundreds."""
    labels = np.arange(90_000, dtype="float32").reshape(1, 300, 300) // 300
    assert scenes(maps(labels, labels, ((150,), ()), "labels"))[1].keys == ()


def test_the_close_up_is_where_tiles_step():
    """A difference that is larger elsewhere, but smooth, is no seam."""
    whole = np.zeros((1, 400, 300), "float32")
    stitched = whole.copy()
    stitched[0, 200:, 100:140] = 0.5
    stitched[0, 20:60, 20:280] = np.linspace(0, 3, 260)
    rows, columns = worst_seam(whole, stitched, ((200,), (150,)), (64, 64))
    assert rows.start < 200 < rows.stop
    assert columns.start < 140
    assert columns.stop > 100
    assert worst_seam(whole, stitched, ((), ()), (64, 64)) is None


def test_a_volume_is_shown_where_it_is_worst_and_where_it_is_cut():
    """The plane of the largest difference; of a volume that is cut along Z alone, one that the cut crosses."""
    apart = np.zeros((1, 12, 30, 40), "float32")
    apart[0, 7] = 1
    plane = worst_plane(apart, ((6,), (15,), (20,)))
    assert plane.words((12, 30, 40)) == "plane YX at Z = 7 of 12"
    assert plane.of(apart).min() == 1
    assert worst_plane(apart, ((6,), (), ())).words((12, 30, 40)).startswith("plane ZX at Y = ")


def test_every_channel_is_drawn_and_named():
    """Masks of their own are rows; an image of two channels is two pictures."""
    whole = RNG.random((3, 64, 64)).astype("float32")
    image = RNG.random((2, 64, 64)).astype("float32")
    scene = scenes(maps(whole, whole * 0.9, ((32,), (32,)), "probability", image))[1]
    assert [row[-2].name for row in scene.rows] == [f"tiles as they are, channel {n} of 3" for n in range(3)]
    assert [d.name for d in scene.rows[0][:2]] == ["image, channel 0 of 2", "image, channel 1 of 2"]
    assert 0 < scene.changed < 0.2
