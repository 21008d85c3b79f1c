"""Tiles: every pixel is written once, and windows start in phase and hold tile and halo."""

import itertools
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from normfix.records.spans import round_up
from normfix.tiling.grid import Geometry, grid, window_sizes

SCALES = [Fraction(1), Fraction(2), Fraction(1, 8), Fraction(3, 2)]


@st.composite
def axes(draw):
    """Draw (size, tile, stride, halo, scale) of one axis, sizes whole in output pixels."""
    scale = draw(st.sampled_from(SCALES))
    stride = scale.denominator * draw(st.integers(1, 6))
    halo = draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
    size = scale.denominator * draw(st.integers(1, 120))
    return size, stride * draw(st.integers(1, 8)), stride, halo, scale


@st.composite
def grids(draw):
    """Draw a grid of one to three axes, as (size, tile, geometry)."""
    many = draw(st.lists(axes(), min_size=1, max_size=2))
    size, tile, stride, halo, scale = zip(*many, strict=True)
    return size, tile, Geometry(stride=stride, halo=halo, scale=scale, multiple=stride)


@settings(deadline=None)
@given(grids())
def test_every_output_pixel_is_written_once(case):
    """The written areas of all tiles cover the output, and none twice."""
    size, tile, geometry = case
    written = np.zeros([int(n * s) for n, s in zip(size, geometry.scale, strict=True)], dtype=int)
    for part in grid(size, tile, geometry):
        written[part.write] += 1
    assert (written == 1).all()


@settings(deadline=None)
@given(grids())
def test_windows_start_in_phase(case):
    """Every window starts on a multiple of the stride."""
    size, tile, geometry = case
    for part in grid(size, tile, geometry):
        assert all(r.start % s == 0 for r, s in zip(part.read, geometry.stride, strict=True))


@settings(deadline=None)
@given(axes())
def test_windows_hold_tile_and_halo(axis):
    """A window holds its tile and the halo on both sides, up to the border of the image."""
    size, tile, stride, halo, scale = axis
    geometry = Geometry(stride=(stride,), halo=(halo,), scale=(scale,), multiple=(stride,))
    for start, part in zip(range(0, size, tile), grid((size,), (tile,), geometry), strict=True):
        (read,) = part.read
        assert 0 <= read.start <= max(0, start - halo[0])
        assert min(size, start + tile + halo[1]) <= read.stop <= size


@settings(deadline=None)
@given(axes())
def test_no_window_is_narrower_than_its_halo(axis):
    """Every window holds both halos and a stride, if the image does; where that is too little, as much as the first."""
    size, tile, stride, halo, scale = axis
    geometry = Geometry(stride=(stride,), halo=(halo,), scale=(scale,), multiple=(stride,))
    full = sum(round_up(h, stride) for h in halo) + stride
    windows = [part.read[0].stop - part.read[0].start for part in grid((size,), (tile,), geometry)]
    assert all(n >= min(size, stride + round_up(halo[1], stride)) for n in windows)
    assert windows[-1] >= min(size, full)
    wide = [part.read[0].stop - part.read[0].start for part in grid((size,), (tile,), geometry, wide=True)]
    assert wide[-1] >= wide[0]
    assert all(n >= m for n, m in zip(wide, windows, strict=True))


@settings(deadline=None)
@given(axes())
def test_kept_and_written_areas_are_the_same_pixels(axis):
    """What is kept of a window lies at the place it is written to, counted from the window's start."""
    size, tile, stride, halo, scale = axis
    geometry = Geometry(stride=(stride,), halo=(halo,), scale=(scale,), multiple=(stride,))
    for part in grid((size,), (tile,), geometry):
        offset = part.read[0].start * scale
        assert part.keep[0].start + offset == part.write[0].start
        assert (part.keep[0].stop is None) == (part.write[0].stop is None)


def test_a_window_covers_an_axis_only_if_it_reads_all_of_it():
    """`covers` is told per axis."""
    geometry = Geometry(stride=(4, 4), halo=((4, 4),) * 2, scale=(Fraction(1),) * 2, multiple=(4, 4))
    (first, _) = grid((8, 32), (8, 16), geometry)
    assert first.covers((8, 32)) == (True, False)


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 64))
def test_padding_reaches_the_next_multiple(n, multiple):
    """A size and its padding are divisible, and no smaller padding is."""
    geometry = Geometry(stride=(1,), halo=((0, 0),), scale=(Fraction(1),), multiple=(multiple,))
    (padding,) = geometry.padding((n,))
    assert (n + padding) % multiple == 0
    assert 0 <= padding < multiple


@settings(deadline=None)
@given(grids())
def test_sizes_of_windows_are_those_of_all_tiles(case):
    """They are computed of the tiles at both ends."""
    found = {tuple(read.stop - read.start for read in part.read) for part in grid(*case)}
    assert set(window_sizes(*case)) == found


def test_tiles_without_end_are_listed_one_by_one():
    """Neither the first tiles nor the sizes of windows wait for the rest, of which there are 10^10."""
    geometry = Geometry(stride=(1, 1), halo=((3, 2),) * 2, scale=(Fraction(1),) * 2, multiple=(1, 1))
    image, tile = (2**31 - 1, 10**6), (16, 16)
    first, second = itertools.islice(grid(image, tile, geometry), 2)
    assert [part.read for part in (first, second)] == [(slice(0, 18),) * 2, (slice(0, 18), slice(13, 34))]
    assert set(window_sizes(image, tile, geometry)) == set(itertools.product((18, 21), (18, 21, 19)))
