"""Whole images of real networks that nobody converted are what they give untiled; and the zoo can say no."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

import normfix

from .catalogue import by_name
from .entry import Entry
from .running import apart, missing
from .whole_table import with_wholes
from .wholes import EQUAL, WHOLES, examine_whole, image_of

EXACT = (
    "diffusers AsymmetricAutoencoderKL",
    "diffusers AutoencoderKL",
    "diffusers AutoencoderKL attention",
    "diffusers AutoencoderKLTemporalDecoder",
    "diffusers UNet2DModel attention",
    "diffusers VQModel",
    "monai AttentionUnet 2D",
    "monai AutoEncoder group 2D",
    "monai AutoencoderKL 2D",
    "monai AutoencoderKL attention 2D",
    "monai BasicUNet group 2D",
    "monai BasicUNet instance affine 2D",
    "monai DynUNet residual 2D",
    "monai HighResNet instance 2D",
    "monai MedNeXt global response 2D",
    "monai MedNeXt group 2D",
    "monai SegResNet group 2D",
    "monai UNet instance 2D",
    "monai UNet residual units 2D",
    "monai VNet 2D",
    "monai VoxelMorphUNet instance 2D",
    "smp Unet resnet18 scse",
    "timm test_byobnet",
    "timm test_efficientnet_gn",
    "timm test_nfnet",
    "torchvision lraspp_mobilenet_v3_large",
    "transformers BitModel",
    "transformers ConvNextV2Backbone",
    "transformers GLPNForDepthEstimation",
    "transformers PvtV2Backbone",
    "transformers RegNetModel y",
    "transformers SegformerForSemanticSegmentation",
    "transformers SegformerModel",
    "transformers SwiftFormerModel",
)
"""Networks with live norms, pools, gates and attention of all positions; docs/zoo.md has all that were tried."""


@pytest.mark.zoo
@pytest.mark.parametrize("name", EXACT)
def test_a_network_as_it_is_gives_its_whole_image_output(name):
    """In two blocks or more, to 1e-9 standard deviations in float64."""
    entry = by_name(name)
    if missing(entry):
        pytest.skip(f"{entry.library} is not installed: pip install normfix[zoo]")
    row = apart(entry, examination=examine_whole)
    assert row["category"] == "exact", row


SMALL = Entry(
    name="small",
    library="torch",
    build=lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4)),
    shape=(1, 1, 32, 32),
)


def _off(by, blocks):
    """Return a predict that is off by so much, in so many blocks."""

    def predict(model, image, **options):
        options["blocks"].watch.blocks = blocks
        with torch.no_grad():
            given = model(image)
        given[..., -1, -1] += by * given.std()
        return given

    return predict


@pytest.mark.parametrize(
    ("by", "blocks", "category"),
    [(0, 8, "exact"), (2 * EQUAL, 8, "wrong"), (float("nan"), 8, "wrong"), (0, 1, "refused")],
)
def test_one_wrong_pixel_and_a_run_in_one_block_are_not_exact(monkeypatch, by, blocks, category):
    """The examination holds what was given against the network itself, and counts how often it was cut."""
    monkeypatch.setattr(normfix, "predict", _off(by, blocks))
    assert examine_whole(SMALL)["category"] == category


def test_statistics_in_passes_are_told_from_stages(monkeypatch):
    """A fallback that the package announces is an outcome of its own, with the reason."""
    predict = _off(0, 8)

    def falling_back(model, image, **options):
        logging.getLogger("normfix").warning(
            "statistics are measured in passes over whole images, for it cannot"
        )
        return predict(model, image, **options)

    monkeypatch.setattr(normfix, "predict", falling_back)
    row = examine_whole(SMALL)
    assert row["category"] == "exact by passes"
    assert row["cause"].endswith("for it cannot")


def test_an_error_that_is_no_refusal_is_a_failure(monkeypatch):
    """What the package refuses is told from what it ends in."""
    for error, category in ((normfix.NormfixError("NF409", "no."), "refused"), (IndexError("no"), "failed")):

        def predict(*_args, error=error, **_options):
            raise error

        monkeypatch.setattr(normfix, "predict", predict)
        row = examine_whole(SMALL)
        assert row["category"] == category
        assert "no" in row["cause"]


def test_a_network_of_one_size_is_none_of_the_packages_doing():
    """What the network itself does not take is told from what the package refuses."""
    fixed = replace(SMALL, build=lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.LayerNorm((32, 32))))
    assert examine_whole(fixed)["category"] == "one size"


def test_the_image_is_longer_than_the_example():
    """Twice along one axis, so that blocks of half the example are a few."""
    assert sorted(image_of(SMALL).shape[2:]) == [32, 64]


def test_the_section_takes_the_place_of_an_earlier_one():
    """What stands around it stays, and every row is in it with its outcome."""
    page = "# Zoo\n\n## Table\n\n| network | result |\n| a | refused |\n| c | converted |\n| d | local |\n"
    rows = [
        {"name": "a", "category": "exact", "image": [1, 1, 32, 64], "apart": 2e-15, "stages": 3, "blocks": 8}
        | {"pass_s": 0.1, "predict_s": 2.0, "cause": ""},
        {"name": "b", "category": "wrong", "image": [1, 1, 8, 8], "cause": "3.0e-06 sd | apart"},
    ]
    text = with_wholes(page, rows)
    assert "| a | 32x64 | 2e-15 | 3 | 8 | 0.1, 2.0 | exact |" in text
    assert "| b | 8x8 |  |  |  |  | wrong: 3.0e-06 sd / apart |" in text
    assert "largest distance of the 1 that are exact: 2.0e-15 sd (a)" in text
    assert all(f"| {name} | {int(name in ('exact', 'wrong'))} |" in text for name in WHOLES)
    assert "| not run | 1 |" in text
    assert with_wholes(text, rows) == text
    assert text.startswith("# Zoo\n")
    assert text.endswith(page.partition("# Zoo\n")[2])
