"""MONAI's own evaluators and inferers: exact tiles give the whole image, and its sliding window does not."""

import pytest
import torch
from torch import nn

import normfix
from normfix.errors import NormfixError

pytest.importorskip("monai")

from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer, SlidingWindowInferer
from monai.networks.nets import BasicUNet

from normfix.integrations.monai import ExactInferer

pytestmark = pytest.mark.filterwarnings("ignore")  # of MONAI's own
CLOSE = 1e-5


def images(count=1, size=(96, 128)):
    """Images that are darker on one side, so that windows have statistics of their own."""
    x = torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(0))
    return x * torch.linspace(0.2, 2, size[1])


@pytest.fixture(scope="module")
def converted():
    """A BasicUNet with instance norms, as MONAI builds it, converted on one image."""
    torch.manual_seed(0)
    done = normfix.convert(BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4)).eval(), images())
    assert done.proof.passed
    return done


@pytest.fixture(scope="module")
def whole(converted):
    """What the original network gives for the whole image."""
    with torch.no_grad():
        return converted.original(images())


def apart(actual, expected):
    """Return the largest difference in sd of what is expected."""
    return float((torch.as_tensor(actual) - expected).abs().max() / expected.std())


def test_it_is_an_inferer_and_gives_the_whole_image(converted, whole):
    """Tiles of the converted network are the original's output for the whole image."""
    inferer = ExactInferer(tile=32)
    assert isinstance(inferer, Inferer)
    assert apart(inferer(images(), converted.model), whole) < CLOSE
    assert apart(inferer(inputs=images(), network=converted.model), whole) < CLOSE


def test_the_sliding_window_does_not(converted, whole):
    """Control: MONAI's windows are far off with the original, and seen at their borders with the converted one too."""
    window = SlidingWindowInferer((64, 64), overlap=0.25, mode="gaussian")
    with torch.no_grad():
        assert apart(window(images(), converted.original), whole) > 0.1
        assert apart(window(images(), converted.model), whole) > 100 * CLOSE


@pytest.mark.slow
def test_an_evaluator_runs_it_on_batches_with_their_metadata(converted):
    """A SupervisedEvaluator: batches of MetaTensors, under autocast, decollated with each image's own metadata."""
    two = images(2)
    items = [{"image": MetaTensor(x, affine=torch.eye(4) * (n + 1)), "label": x} for n, x in enumerate(two)]
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=2),
        network=converted.model,
        inferer=ExactInferer(tile=32),
        amp=True,
        amp_kwargs={"dtype": torch.bfloat16},
        decollate=False,
    )
    evaluator.run()
    pred = evaluator.state.output["pred"]
    with torch.no_grad():
        assert apart(pred, converted.model(two)) < CLOSE
    assert [float(part.affine[0, 0]) for part in decollate_batch(pred)] == [1, 2]


def test_arguments_reach_the_network(converted, whole):
    """What an inferer is given beside the image is the network's, as with MONAI's own."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x, factor, *, shift=0.0):
            return self.body(x) * factor + shift

    network = Scaled().eval()
    with torch.no_grad():
        expected = network(images(), 3.0, shift=1.0)
    assert apart(ExactInferer(tile=32)(images(), network, 3.0, shift=1.0), expected) < CLOSE


@pytest.mark.slow
def test_a_map_of_the_image_among_the_arguments_is_refused(converted):
    """It would be handed whole to every tile."""
    with pytest.raises(NormfixError, match="NF585 condition"):
        ExactInferer(tile=32)(images(), converted.model, condition=images())


def small():
    """A network of one live norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 1)).eval()


def test_a_live_network_is_refused():
    """Without conversion there is no exact tile, and nothing is returned."""
    with pytest.raises(NormfixError, match="NF409"):
        ExactInferer(tile=32)(images(), small())


@pytest.mark.slow
def test_per_image_statistics_are_those_of_each_image():
    """With statistics="per-image" each image of a batch is what the original gives for it."""
    two = images(2) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    done = normfix.convert(small(), images())
    with torch.no_grad():
        expected = done.original(two)
    inferer = ExactInferer(tile=32, statistics="per-image")
    assert apart(inferer(two, done.model), expected) < 10 * CLOSE
    assert apart(ExactInferer(tile=32)(two, done.model), expected) > 0.1


def test_wrappers_of_several_devices_are_looked_through(converted, whole):
    """A network inside DataParallel is the network."""
    assert apart(ExactInferer(tile=32)(images(), nn.DataParallel(converted.model)), whole) < CLOSE


def test_a_function_around_a_network_is_refused(converted):
    """Its statistics cannot be seen, so nothing could be said of its tiles."""
    with pytest.raises(NormfixError, match="NF118"):
        ExactInferer(tile=32)(images(), lambda x: converted.model(x))
