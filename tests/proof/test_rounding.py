"""The identity of a network that rounds much is decided in float64, and only there and only if rounding explains it."""

import pytest
import torch
from torch import nn

import normfix
from normfix.networks.calling import Caller
from normfix.proof.rounding import repeated_in_double
from normfix.proof.steps import identity


class Raw(nn.Module):
    """Norms values that lie far from zero, as raw detector counts do."""

    def __init__(self, groups=2):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.GroupNorm(groups, 4), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        return self.head(self.norm(x))


class Autocast(nn.Module):
    """Computes in bfloat16 whatever it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.head = (
            nn.Conv2d(1, 8, 3, padding=1),
            nn.InstanceNorm2d(8),
            nn.Conv2d(8, 1, 1),
        )

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.relu(self.norm(self.stem(x)))
        return self.head(x.float())


class ByHand(nn.Module):
    """The z-score of an image on a pedestal, written out."""

    def forward(self, x):
        return (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-5)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def step_of(network, image):
    done = normfix.convert(network.eval(), image)
    return done.proof.passed, next(step for step in done.proof.steps if step.name == "identity")


def noise(channels, pedestal, seed=0):
    return torch.randn(1, channels, 64, 64, generator=torch.Generator().manual_seed(seed)) + pedestal


@pytest.mark.parametrize(
    ("network", "image"),
    [
        (Raw, noise(4, 1e4)),
        (lambda: Raw(4), noise(4, 3e5)),
        (Autocast, noise(1, 0)),
        (lambda: nn.Sequential(ByHand(), nn.Conv2d(1, 2, 3, padding=1)), noise(1, 32768)),
    ],
)
def test_rounding_of_the_original_is_no_fault_of_the_conversion(network, image):
    """A right conversion passes where float32 is too coarse to show it, by the bound of float64, and says so."""
    passed, step = step_of(network(), image)
    assert passed
    assert step.bound == 1e-10
    assert step.value <= step.bound
    assert "in float64" in step.note


def test_where_float32_is_enough_float64_is_not_asked():
    """An ordinary network keeps the step in its own dtype."""
    passed, step = step_of(Raw(), noise(4, 0))
    assert passed
    assert (step.bound, step.note) == (1e-4, "")


def _pieces(pedestal=1e4):
    network, image = Raw().eval(), noise(4, pedestal)
    with torch.no_grad():
        return network, image, network(image)


def _frozen(network, image, error=0.0):
    """Convert by hand: a network with the statistics of its norm as constants, `error` sd off."""

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            grouped = image.reshape(1, 2, -1)
            self.mean = (grouped.mean(2) + error * grouped.std(2)).repeat_interleave(2, 1)[..., None, None]
            self.scale = (
                (grouped.var(2, correction=0) + 1e-5).rsqrt().repeat_interleave(2, 1)[..., None, None]
            )
            self.head = network.head

        def forward(self, x):
            return self.head((x - self.mean) * self.scale)

    return Frozen().eval()


def test_a_wrong_conversion_fails_in_float64():
    """Constants that are off by less than float32 can show are off by more than float64 allows."""
    network, image, original = _pieces()
    converted = original + 1e-3 * original.std()
    failed = identity(converted, original)
    step = repeated_in_double(
        failed, network, image, Caller(), (converted, original), lambda net, x: _frozen(net, x, error=1e-6)
    )
    assert failed.status == step.status == "failed"


def test_a_network_that_is_wrong_in_its_own_dtype_only_fails():
    """What is right in float64 may not be more than a few times as far off as the original in float32."""
    network, image, original = _pieces()
    exact = network.double()(image.double())
    network.float()
    own = float((original - exact).abs().max())
    for factor, status in ((2, "passed"), (20, "failed")):
        converted = exact.float()
        converted[0, 0, 5, 5] += factor * own
        step = repeated_in_double(
            identity(original + 1, original), network, image, Caller(), (converted, original), _frozen
        )
        assert step.status == status


def test_a_result_that_is_all_rounding_proves_nothing():
    """An original that is a whole sd from its own exact output excuses nothing."""
    network, image, original = _pieces()
    noise_only = original + 2 * original.std()
    step = repeated_in_double(
        identity(original, noise_only), network, image, Caller(), (original, noise_only), _frozen
    )
    assert step.status == "failed"


def test_a_network_that_takes_no_float64_says_so():
    """Without float64 there is no decision, and the failed step stays with the reason."""

    class Single(Raw):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise ValueError("single precision only")
            return super().forward(x)

    network, image, original = Single().eval(), noise(4, 1e4), torch.rand(1, 1, 64, 64)
    step = repeated_in_double(
        identity(original + 1, original), network, image, Caller(), (original + 1, original), _frozen
    )
    assert step.status == "failed"
    assert "cannot be repeated in float64" in step.note
