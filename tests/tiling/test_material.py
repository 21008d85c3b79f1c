"""Strips made from an example, and what is made of them, show what they are for."""

import pytest
import torch

from normfix.tiling.material import MAGNITUDES, VARIANTS, ranged, strip, textured

EXAMPLE = torch.rand(1, 2, 24, 20, generator=torch.Generator().manual_seed(0))


def test_a_strip_repeats_its_material_back_and_forth():
    """Strips mirror the example, so that no seam appears."""
    assert strip(torch.tensor([[[1, 2, 3]]]), (8,)).tolist() == [[[1, 2, 3, 3, 2, 1, 1, 2]]]


def test_texture_repeats():
    """The noise is the same on every call, whatever was drawn in between."""
    first = textured(EXAMPLE, (8, 8))
    torch.randn(3)
    assert torch.equal(first, textured(EXAMPLE, (8, 8)))
    assert not torch.equal(first, strip(EXAMPLE, (8, 8)))


@pytest.mark.parametrize("threshold", [2.0, 40.0, 1e3, 1e7])
def test_a_threshold_is_passed_on_one_variant_and_not_on_another(threshold):
    passed = [bool((change(EXAMPLE).abs() > threshold).any()) for change in (*VARIANTS, *MAGNITUDES)]
    assert any(passed)
    assert not all(passed)


@pytest.mark.parametrize("band", [(0.02, 0.1), (3.0, 30.0), (2e5, 2e6)])
def test_any_period_of_a_ranged_image_has_values_in_any_band(band):
    low, high = band
    parts = ranged(textured(EXAMPLE, (64, 64))).abs().unfold(2, 16, 16).unfold(3, 16, 16)
    assert ((parts > low) & (parts < high)).any(-1).any(-1).all()
