"""One function measures: in passes, in stages, on a sample, with masks, and under stored statistics."""

import numpy as np
import pytest
import torch
from streamed_networks import Shallow
from torch.testing import assert_close

import normfix
from normfix.conversion.measurement import measure_
from normfix.conversion.sampling import Sample
from normfix.conversion.targets import planned_targets
from normfix.images.collections import Images
from normfix.images.sources import TensorImage
from normfix.networks.calling import Caller
from normfix.tiling.geometry import geometry_of

WAYS = {
    "stages": {"blocks": normfix.Blocks(tile=16)},
    "one block": {"blocks": normfix.Blocks(tile=64)},
    "a mask of nothing": {"mask": np.zeros((48, 64))},
    "all blocks": {"sample": Sample(1e-12), "blocks": normfix.Blocks(tile=16)},
}
"""How to measure the same statistics otherwise than in passes over the whole."""


def _image(seed):
    return torch.rand(1, 1, 48, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3


@pytest.fixture(scope="module")
def converted():
    """A converted network in float64."""
    torch.manual_seed(0)
    return normfix.convert(Shallow().double(), _image(1))


@pytest.fixture
def measured(converted):
    """Measure on another image, in the network itself; return the summary and the statistics."""
    before = {name: value.clone() for name, value in converted.model.named_buffers()}

    def run(images=None, **options):
        model, geometry = converted.model, geometry_of(converted.scan)
        targets = planned_targets(model, converted.plan)
        images = Images.of([_image(2)], torch.device("cpu"), torch.float64) if images is None else images
        summary = measure_(model, targets, images, Caller(), geometry=geometry, **options)
        return summary, {name: value.clone() for name, value in model.named_buffers()}

    yield run
    converted.model.load_state_dict(before, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_measures_the_same(measured, way):
    """Stages, one block, a mask of nothing and a sample of everything give what passes give."""
    passes, expected = measured()
    summary, statistics = measured(**WAYS[way])
    assert (passes.engine, summary.engine) == ("passes", "stages")
    for name, value in statistics.items():
        assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, *WAYS.values()], ids=["passes", *WAYS])
def test_stored_statistics_are_compared_and_kept(measured, converted, options):
    """Under the statistics of another image the residual is large, and nothing changes."""
    before = {name: value.clone() for name, value in converted.model.named_buffers()}
    summary, statistics = measured(stored=True, **options)
    assert all(torch.equal(value, before[name]) for name, value in statistics.items())
    assert max(site.mean_shift for site in summary.sites) > 0.01


def test_images_read_by_window_are_measured_in_stages(measured):
    """Whoever hands over windows is not read whole, though nothing else was said."""
    assert (
        measured(Images.of([TensorImage(_image(2))], torch.device("cpu"), torch.float64))[0].engine
        == "stages"
    )
