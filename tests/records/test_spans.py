"""Extents before and after, and numbers per axis."""

import numpy as np
import pytest

from normfix.records.spans import in_strides, per_axis, round_up


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (16, (16, 16)),
        (np.int64(16), (16, 16)),
        ((16, 32), (16, 32)),
        ([np.int32(16), 32], (16, 32)),
        (np.array([16, 32]), (16, 32)),
        ((16,), None),
        ((16, 16, 16), None),
        (16.0, None),
        ((16, 16.5), None),
        (True, None),
        ("16", None),
        ("ab", None),
        (None, None),
        (np.array([1.5, 2.5]), None),
        ([[16], [32]], None),
    ],
    ids=repr,
)
def test_whole_numbers_of_any_library_are_numbers_per_axis(given, found):
    """They come out as Python's; anything else is none."""
    assert per_axis(given, 2) == found
    assert found is None or all(type(n) is int for n in per_axis(given, 2))


@pytest.mark.parametrize("n", [1, 15, 16, 17])
def test_a_halo_in_strides_is_the_least_that_holds_it(n):
    assert in_strides(((n, 0),), (8,)) == ((round_up(n, 8), 0),)
    assert n <= round_up(n, 8) < n + 8
