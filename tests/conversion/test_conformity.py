"""Images that are unlike what is stored, or each other, are said; ordinary ones are not."""

import pytest
import torch
from torch import nn

import normfix


def image(seed=0, scale=1.0, offset=0.0):
    """Noise, scaled."""
    return torch.randn(1, 1, 48, 48, generator=torch.Generator().manual_seed(seed)) * scale + offset


def network(norm):
    """A norm behind a convolution."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(6, 1, 3, padding=1)).eval()


def trained():
    """A batch norm whose stored statistics are those of images of scale 1."""
    net = network(nn.BatchNorm2d(6, momentum=None)).train()
    for seed in range(4):
        net(image(seed))
    return net.eval()


def codes(result):
    """Return the codes of its findings."""
    return [finding.code for finding in result.findings]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (image(1), False),
        (image(1, 2.5), False),
        (image(1, 255), True),
        (image(1, 1, 40), True),
        (image(1, 0.1), True),
    ],
    ids=["alike", "brighter", "255 times", "offset", "a tenth"],
)
def test_images_unlike_each_other_are_said(other, said):
    """One scaled by 255, a tenth, or shifted is named; one of another brightness is not."""
    done = normfix.convert(network(nn.InstanceNorm2d(6)), [image(0), other])
    assert codes(done.calibration.summary) == ["NF589"] * said
    assert done.proof.passed
    if said:
        assert "image 1 is" in done.calibration.summary.findings[0].message


@pytest.mark.parametrize(("scale", "said"), [(1.0, False), (255.0, True)])
def test_images_unlike_what_is_stored_are_said(scale, said, caplog):
    """A trained batch norm knows its images: those of another scale are named when converted and when calibrated."""
    normfix.convert(trained(), image(9, scale))
    assert ("NF589" in caplog.text) is said
    assert codes(normfix.calibrate(trained(), image(9, scale)).summary) == ["NF589"] * said
