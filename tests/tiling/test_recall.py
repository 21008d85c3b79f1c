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


def test_of_many_images_only_the_like_are_compared(monkeypatch):
    """Each tile of thousands is held against those that may be equal to it, not against all before it."""
    compared = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(1) or equal(a, b))
    runs, recalling = _counted()
    images = torch.rand(50, 1, 1, 4, 4)
    for image in [*images, *images, images[0] + 1]:
        assert equal(recalling(image), image * 2)
    assert (len(runs), len(compared)) == (51, 50)


def test_images_that_look_alike_at_a_glance_are_told_apart():
    """One whose sum and corners are another's gets its own answer, as does one with NaN, equal to nothing."""
    runs, recalling = _counted()
    one = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    for image in (one, one[..., [0, 2, 1, 3]], one):
        assert torch.equal(recalling(image), image * 2)
    for _ in range(2):
        recalling(one * float("nan"))
    assert len(runs) == 5
