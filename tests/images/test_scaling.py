"""Images are scaled by their formula over the whole image, and never without being told how."""

import numpy as np
import pytest

from normfix.errors import NormfixError
from normfix.images.scaling import scaled
from normfix.records.saved import Scaling
from normfix.records.scalings import parse_scaling

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 60000, (5, 24, 20), dtype=np.uint16)
FLOAT = RNG.normal(3, 2, (2, 24, 20)).astype(np.float32)


def code_of(function, *args, **options) -> str:
    """Return the code of the error a call gives."""
    with pytest.raises(NormfixError) as caught:
        function(*args, **options)
    return caught.value.code


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
    scaling = Scaling(kind="preprocess", function="preprocessing:preprocess_halves")
    np.testing.assert_array_equal(scaled(STACK, scaling), (STACK / 2).astype(np.float32))


def test_a_preprocess_function_cannot_change_its_input():
    """What the function does to its argument in place stays its own."""
    image = FLOAT.copy()
    scaled(image, Scaling(kind="preprocess", function="preprocessing:preprocess_in_place"))
    np.testing.assert_array_equal(image, FLOAT)


@pytest.mark.parametrize(
    "name",
    ["nowhere:f", "preprocessing:missing", "math", "", ":f", "os:path", "os:getcwd"]
    + [f"preprocessing:preprocess_{kind}" for kind in ("flat", "fails")],
)
def test_a_preprocess_function_that_does_not_work_is_refused(name):
    """What cannot be imported, fails or loses an axis is NF107."""
    assert code_of(scaled, FLOAT, Scaling(kind="preprocess", function=name)) == "NF107"
