"""Population laws: any partition gives what one look at everything gives, and both give what numpy gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import TOLERANCE
from torch.testing import assert_close

from normfix.errors import NormfixError
from normfix.layers.laws import finalise, merge, observe

LAWS = {
    "mean": lambda x: (x.mean(1),),
    "total": lambda x: (x.sum(1),),
    "variance": lambda x: (x.var(1, ddof=1),),
    "deviation": lambda x: (x.std(1, ddof=1),),
    "variance_mean": lambda x: (x.var(1, ddof=1), x.mean(1)),
    "deviation_mean": lambda x: (x.std(1, ddof=1), x.mean(1)),
    "norm": lambda x: (np.sqrt((x**2).sum(1)),),
    "maximum": lambda x: (x.max(1),),
    "minimum": lambda x: (x.min(1),),
    "extremes": lambda x: (x.min(1), x.max(1)),
}
EVERY = pytest.mark.parametrize("law", LAWS)


@EVERY
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_partition_is_the_whole(law, data):
    """Values cut into parts anywhere, observed and merged, give numpy's statistic of all of them in float64."""
    n = data.draw(st.integers(2, 40))
    offset = data.draw(st.sampled_from([0.0, 1e3]))
    seed = data.draw(st.integers(0, 99))
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1))))
    parts = [observe(law, part, (1,)) for part in torch.tensor_split(x, cuts, dim=1)]
    found = finalise(law, merge(law, parts), correction=1.0)
    for value, expected in zip(found, LAWS[law](x.numpy()), strict=True):
        assert_close(value.flatten(), torch.from_numpy(expected), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_norms_of_several_images_are_those_of_the_mean_image(power):
    """Of two images cut from one, the p-norm is that of the whole, for half as many values."""
    x = torch.randn(2, 10, dtype=torch.float64)
    parts = [observe("norm", part, (1,), power=power) for part in (x[:, :4], x[:, 4:])]
    (found,) = finalise("norm", merge("norm", parts), images=2, power=power)
    expected = torch.linalg.vector_norm(x, power, dim=1) * 0.5 ** (1 / power)
    assert_close(found.flatten(), expected, **TOLERANCE[torch.float64])


def test_unequal_images_are_weighted_by_their_pixels():
    """Three pixels of 0 and one of 4 have mean 1 and total variance 3, not the mean of two images' values."""
    parts = [observe("variance_mean", torch.tensor(v), (0,)) for v in ([0.0, 0.0, 0.0], [4.0])]
    var, mean = finalise("variance_mean", merge("variance_mean", parts))
    assert (var.item(), mean.item()) == (3.0, 1.0)


def test_what_has_no_law_has_no_union():
    """Two values of a median are refused; one is itself."""
    with pytest.raises(NormfixError, match="NF230"):
        merge("none", [observe("mean", torch.zeros(2), (0,))] * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    """A sum of halves beyond their largest integer is exact."""
    (total,) = finalise("total", observe("total", torch.full((100_000,), 3.0, dtype=dtype), (0,)))
    assert total.item() == 300_000


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_count_of_any_partition_is_exact(data):
    """Ones in parts of any sizes add up to their number, which a mean of them times their number does not."""
    sizes = data.draw(st.lists(st.integers(0, 5000), min_size=1, max_size=12))
    ones = data.draw(st.integers(0, max(sizes)))
    parts = [observe("total", torch.arange(n) < ones, (0,)) for n in sizes]
    (found,) = finalise("total", merge("total", parts))
    assert found.item() == sum(min(n, ones) for n in sizes)
