"""torch-em's function and ours under the same arguments: ours gives the whole image, with its own traps refused."""

import numpy as np
import pytest
import torch
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.integrations.torch_em import predict_with_halo, standardize

CLOSE = 1e-5


class Net(nn.Module):
    """Two levels with instance norms; torch-em asks a network for out_channels."""

    out_channels = 2

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.InstanceNorm2d(6), nn.ReLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.InstanceNorm2d(6))
        self.head = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(6, 2, 3, padding=1))

    def forward(self, x):
        return self.head(torch.relu(self.deep(self.down(x))))


RAW = np.random.default_rng(0).random((96, 128)).astype("float32") * np.linspace(
    20, 200, 128, dtype="float32"
)
IMAGE = torch.from_numpy(standardize(RAW))[None, None]


@pytest.fixture(scope="module")
def converted():
    """The network, converted on the standardised image."""
    torch.manual_seed(0)
    done = normfix.convert(Net().eval(), IMAGE)
    assert done.proof.passed
    return done


@pytest.fixture(scope="module")
def whole(converted):
    """What the original gives for the whole image."""
    with torch.no_grad():
        return converted.original(IMAGE)[0].numpy()


def apart(actual, expected):
    """Return the largest difference in sd of what is expected."""
    return float(np.abs(actual - expected).max() / expected.std())


def test_it_gives_the_whole_image(converted, whole):
    """Blocks of the converted network are the original's output for the image, standardised as a whole."""
    assert apart(predict_with_halo(RAW, converted.model, ["cpu"], (32, 32), (16, 16)), whole) < CLOSE
    assert apart(predict_with_halo(RAW, converted.model, ["cpu"], (32, 64)), whole) < CLOSE


def test_torch_ems_own_does_not(converted, whole):
    """Control: the same call to torch-em differs, with the original and, standardising blocks, with the converted."""
    theirs = pytest.importorskip("torch_em.util.prediction")
    for network in (converted.original, converted.model):
        found = theirs.predict_with_halo(RAW.copy(), network, ["cpu"], (32, 32), (16, 16), disable_tqdm=True)
        assert apart(found, whole) > 0.1


def test_a_halo_that_is_too_small_is_refused(converted):
    """torch-em takes any halo; with less than the network needs the result would be another."""
    with pytest.raises(NormfixError, match="NF410"):
        predict_with_halo(RAW, converted.model, ["cpu"], (32, 32), (2, 2))


def test_blocks_off_the_grid_are_refused(converted):
    """A block of 33 pixels starts every second one out of phase."""
    with pytest.raises(NormfixError, match="NF402"):
        predict_with_halo(RAW, converted.model, ["cpu"], (33, 32))


def test_it_writes_into_what_it_is_given(converted, whole):
    """One output, or pairs of an output and its channels; masked pixels are 0, and postprocess comes before."""
    mask = np.zeros(RAW.shape, dtype="uint8")
    mask[:, 64:] = 1
    foreground, all_ = np.empty(RAW.shape, "float32"), np.empty((2, *RAW.shape), "float32")
    outputs = [(foreground, slice(1, 2)), (all_, slice(None))]
    predict_with_halo(
        RAW, converted.model, ["cpu"], (32, 32), output=outputs, mask=mask, postprocess=lambda x: x + 1
    )
    expected = np.where(mask, whole + 1, 0)
    np.testing.assert_allclose(all_, expected, atol=1e-4)
    np.testing.assert_array_equal(foreground, all_[1])


def test_a_dataset_of_hdf5_is_an_input(converted, whole, tmp_path):
    """What torch-em's users predict lies in HDF5, with channels or without."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file["raw"], file["channels"] = RAW, RAW[None]
        one = predict_with_halo(file["raw"], converted.model, ["cpu"], (32, 32))
        other = predict_with_halo(file["channels"], converted.model, ["cpu"], (32, 32), with_channels=True)
    assert apart(one, whole) < CLOSE
    np.testing.assert_array_equal(one, other)


def test_two_scalings_are_refused(tmp_path):
    """A network that brings its scaling is not given images that were scaled already, and scales what it is given."""
    np.save(tmp_path / "raw.npy", RAW)
    net = Net().eval()
    done = normfix.convert(net, normfix.read_images(tmp_path / "raw.npy", net, scaling="zscore"))
    with pytest.raises(NormfixError, match="NF107"):
        predict_with_halo(RAW, done.model, ["cpu"], (32, 32))
    found = predict_with_halo(RAW, done.model, ["cpu"], (32, 32), preprocess=None)
    with torch.no_grad():
        assert apart(found, done.original(IMAGE)[0].numpy()) < 100 * CLOSE
