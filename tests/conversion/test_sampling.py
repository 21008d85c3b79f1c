"""A sample of blocks: unbiased by its halo, honest about its error, and marked as a sample."""

import numpy as np
import pytest
import torch
from masks import mask_of
from streamed_networks import Shallow
from torch.testing import assert_close

import normfix
from normfix.conversion.sampling import errors
from normfix.errors import NormfixError
from normfix.layers.moments import measure, merge


def _image(*size, seed=1):
    noise = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise**3 * torch.linspace(0.2, 1, size[-1], dtype=torch.float64)


@pytest.fixture(scope="module")
def converted():
    """A converted network of two scales in float64."""
    torch.manual_seed(0)
    return normfix.convert(Shallow().double(), _image(64, 48)).model


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_sample_of_all_blocks_is_exact(converted, with_mask):
    """With a tolerance that needs every block the statistics are those of the whole, and their errors 0."""
    image, mask = _image(60, 52, seed=2), mask_of(60, 52) if with_mask else None
    whole = normfix.calibrate(converted, image, 32, mask=mask)
    done = normfix.calibrate(converted, image, 12, mask=mask, sample=1e-9)
    sample = done.summary.sample
    assert (sample.exact, sample.blocks, sample.error) == (True, sample.of, 0.0)
    assert sample.of == 25
    for name, value in done.model.named_buffers():
        assert_close(value, whole.model.get_buffer(name), rtol=1e-9, atol=1e-11)
    for one, other in zip(done.summary.sites, whole.summary.sites, strict=True):
        assert one.elements == other.elements


@pytest.mark.slow
def test_a_sample_stops_at_its_tolerance_and_says_what_it_is(converted, tmp_path):
    """It stops before all blocks are used, tells errors per site within the tolerance, and is saved as a sample."""
    image = _image(256, 64, seed=3)
    done = normfix.calibrate(converted, image, 8, sample=0.3, seed=1)
    sample = done.summary.sample
    assert not sample.exact
    assert 0 < sample.error <= sample.tolerance
    assert max(max(s.mean_error, s.sd_error) for s in done.summary.sites) == sample.error
    assert normfix.calibrate(converted, image, 32).summary.sample is None
    normfix.save(done, tmp_path / "sampled")
    assert "random sample" in (tmp_path / "sampled" / "README.md").read_text()


@pytest.mark.slow
def test_errors_cover_what_they_should():
    """Over many samples of blocks of unequal size, about 95 % of truths lie within two standard errors."""
    g = torch.Generator().manual_seed(0)
    blocks = [
        torch.randn(1, 1, int(n), generator=g, dtype=torch.float64) * (1 + 0.3 * torch.rand(1, generator=g))
        + torch.randn(1, generator=g)
        for n in torch.randint(20, 60, (120,), generator=g)
    ]
    parts = [measure(block) for block in blocks]
    whole, hits, naive = merge(*parts), torch.zeros(2), torch.zeros(2)
    trials = 400
    for _ in range(trials):
        chosen = [parts[i] for i in torch.randperm(120, generator=g)[:60].tolist()]
        union = merge(*chosen)
        wrong = torch.cat([union.mean - whole.mean, union.var - whole.var]).abs()
        hits += wrong < 2 * torch.cat(errors(chosen, 120))
        single = (union.var / union.count).sqrt()  # as if pixels were independent
        naive += wrong < 2 * torch.cat([single, union.var * (2 / union.count) ** 0.5])
    assert (hits / trials > 0.91).all()
    assert (hits / trials < 0.99).all()
    assert (naive / trials < 0.6)[0]


@pytest.mark.parametrize("tolerance", [0.0, float("nan"), -1.0, "x"])
def test_a_tolerance_is_a_positive_number(converted, tolerance):
    """Anything else is refused."""
    with pytest.raises(NormfixError, match="NF140"):
        normfix.calibrate(converted, _image(64, 48), sample=tolerance)


@pytest.mark.parametrize("seed", [10**30, 1.5, True, None])
def test_a_seed_is_a_whole_number_of_64_bits(converted, seed):
    """torch takes no other."""
    with pytest.raises(NormfixError, match=f"NF140 seed={str(seed)[:4]}"):
        normfix.calibrate(converted, _image(64, 48), sample=0.1, seed=seed)


def test_a_maximum_is_not_estimated():
    """A statistic that a sample says nothing of is refused by name."""

    class Peak(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            x = self.conv(x)
            return x / x.amax((2, 3), keepdim=True)

    model = normfix.convert(Peak().double(), _image(32, 32)).model
    with pytest.raises(NormfixError, match=r"NF139 .*amax"):
        normfix.calibrate(model, _image(32, 32), 8, sample=0.1)


@pytest.mark.slow
def test_masks_and_samples_on_the_command_line(converted, tmp_path):
    """--mask and --sample reach the calibration, from files; the text says how many pixels and blocks."""
    from click.testing import CliRunner

    from normfix.cli import cli

    normfix.save(converted, tmp_path / "fixed", source="streamed_networks:Shallow")
    np.save(tmp_path / "image.npy", _image(48, 64)[0, 0].numpy())
    np.save(tmp_path / "mask.npy", mask_of(48, 64))
    arguments = [
        "calibrate",
        tmp_path / "fixed",
        tmp_path / "image.npy",
        "--arch",
        "streamed_networks:Shallow",
    ]
    arguments += ["-o", tmp_path / "out", "--mask", tmp_path / "mask.npy", "--sample", "1e-9", "--tile", "32"]
    result = CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)
    assert result.exception is None, result.exception
    assert f"{int((mask_of(48, 64) != 0).sum())} pixels ignored" in result.stdout
    assert "all blocks, exact: 4 of 4 blocks" in result.stdout
