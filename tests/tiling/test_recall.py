"""An earlier result is given for the very same image only, and memory is bounded."""

import torch

from normfix.tiling import recall
from normfix.tiling.recall import Recalling


def _counted():
    runs = []
    return runs, Recalling(lambda x: runs.append(x.shape) or x * 2)


def test_the_same_image_is_run_once():
    """Equal values are the same image, one other value or another dtype is another image."""
    runs, f = _counted()
    x = torch.randn(1, 1, 6, 6)
    y = x.clone()
    y[0, 0, 5, 5] += 1e-6
    for image in (x, x.clone(), y, x.double(), x):
        assert torch.equal(f(image), image * 2)
    assert len(runs) == 3


def test_an_image_that_was_written_into_is_another():
    """What is kept does not follow the caller's tensor; an image with NaN is never recalled."""
    runs, f = _counted()
    x = torch.randn(1, 1, 6, 6)
    f(x)
    x += 1
    assert torch.equal(f(x), x * 2)
    x[0, 0, 0, 0] = torch.nan
    f(x), f(x)
    assert len(runs) == 4


def test_the_oldest_is_forgotten(monkeypatch):
    """Results that take more than the limit are dropped, the one that was not used for longest first."""
    runs, f = _counted()
    monkeypatch.setattr(recall, "_BYTES", 2 * 2 * 4 * 36)
    a, b, c = torch.randn(3, 1, 1, 6, 6)
    for image in (a, b, a, c, a, b):
        f(image)
    assert len(runs) == 4
