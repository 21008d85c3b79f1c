"""Moments: any partition merges to the whole, and precision survives large means."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import TOLERANCE
from torch.testing import assert_close

from normfix.layers.moments import Moments, measure, merge, pool

EXACT = TOLERANCE[torch.float64]
sizes = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)
magnitudes = st.sampled_from([0.0, 1.0, 1e3, -1e4])


def _draw(extents, mean, seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(mean, 1 + k, (1, 3, n)) for k, n in enumerate(extents)]


def _assert_describes(moments, values):
    """Compare with numpy in float64 on values of shape (C, n); the variance relative to itself."""
    assert moments.count == values.shape[1]
    assert_close(moments.mean, torch.from_numpy(values.mean(1)), **EXACT)
    assert_close(moments.var, torch.from_numpy(values.var(1)), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(sizes, magnitudes, st.integers(0, 2**32 - 1))
def test_any_partition_merges_to_the_whole(extents, mean, seed):
    """Parts of any sizes, also empty ones, merge to the moments of their concatenation."""
    parts = _draw(extents, mean, seed)
    merged = merge(*(measure(torch.from_numpy(part)) for part in parts))
    _assert_describes(merged, np.concatenate([part[0] for part in parts], axis=1))


@settings(deadline=None)
@given(sizes, magnitudes, st.integers(0, 2**32 - 1))
def test_the_order_of_merging_does_not_matter(extents, mean, seed):
    """Merging backwards agrees with merging forwards."""
    parts = [measure(torch.from_numpy(part)) for part in _draw(extents, mean, seed)]
    forwards, backwards = merge(*parts), merge(*reversed(parts))
    assert forwards.count == backwards.count
    assert_close(forwards.mean, backwards.mean, **EXACT)
    assert_close(forwards.m2, backwards.m2, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(sizes, magnitudes, st.sampled_from([1, 2, 3, 6]), st.integers(0, 2**32 - 1))
def test_pooled_groups_equal_a_direct_computation(extents, mean, groups, seed):
    """Group statistics from channel moments are those of all values of the group."""
    values = np.random.default_rng(seed).normal(mean, 2, (6, sum(extents))) + np.arange(6)[:, None]
    parts = np.split(values, np.cumsum(extents)[:-1], axis=1)
    pooled = pool(merge(*(measure(torch.from_numpy(part[None])) for part in parts)), groups)
    together = values.reshape(groups, -1)
    expected_mean, expected_var = (np.repeat(f(together, axis=1), 6 // groups) for f in (np.mean, np.var))
    assert_close(pooled.mean, torch.from_numpy(expected_mean), **EXACT)
    assert_close(pooled.var, torch.from_numpy(expected_var), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(0, 2**32 - 1))
def test_pooling_commutes_with_merging(extents, seed):
    """Pooling each image and merging equals merging the images and pooling."""
    parts = [measure(torch.from_numpy(part.repeat(2, axis=1))) for part in _draw(extents, 5.0, seed)]
    one, other = merge(*(pool(part, 2) for part in parts)), pool(merge(*parts), 2)
    assert_close(one.mean, other.mean, **EXACT)
    assert_close(one.var, other.var, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_a_mean_far_above_the_spread_costs_no_precision(ratio):
    """float32 values with mean/sd of 1e3 and 1e4 have the variance float64 gives."""
    x = torch.randn(2, 3, 50, 40) + ratio
    _assert_describes(measure(x), x.double().transpose(0, 1).flatten(1).numpy())


def test_the_textbook_formula_in_float32_is_wrong_there():
    """Control: E[x^2] - E[x]^2 in float32 misses the variance at mean/sd 1e3 by more than 1 %."""
    x = torch.randn(1, 1, 50, 40) + 1e3
    textbook = x.square().mean() - x.mean().square()
    assert abs(float(textbook / x.double().var(correction=0)) - 1) > 1e-2


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 7), (2, 4, 3, 5), (2, 4, 2, 3, 2)])
def test_batch_and_space_are_counted_per_channel(shape):
    """The count is of values per channel, for every rank from (N, C) on."""
    assert measure(torch.randn(shape)).count == torch.Size(shape).numel() // 4


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 40])
def test_slabs_of_channels_leave_no_trace(channels):
    """Measuring a few channels at a time equals measuring each alone."""
    x = torch.randn(2, channels, 9)
    alone = [measure(x[:, c : c + 1]) for c in range(channels)]
    assert_close(measure(x).mean, torch.cat([m.mean for m in alone]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_it_is_summed(dtype):
    """Moments of a half-precision tensor are those of its values in float64, far beyond its largest integer."""
    x = torch.full((1, 1, 100, 100), 3.0, dtype=dtype)
    assert measure(x).mean.item() == 3.0


def test_nothing_merged_with_something_is_something():
    """A part without values does not spread the NaN that is its mean."""
    something = measure(torch.tensor([[[1.0, 3.0]]]))
    nothing = measure(torch.zeros(1, 1, 0))
    for merged in (merge(something, nothing), merge(nothing, something)):
        assert (merged.count, merged.mean.item(), merged.var.item()) == (2, 2.0, 1.0)


def test_one_group_per_channel_changes_nothing():
    """Pooling into as many groups as channels returns the same object."""
    moments = Moments(4, torch.zeros(3), torch.ones(3))
    assert pool(moments, 3) is moments
