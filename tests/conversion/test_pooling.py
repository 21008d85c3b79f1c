"""Constants of windows: against float64 arithmetic of their own, layer by layer, with every law; proved and kept."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfix
from normfix.conversion.measurement import measure_
from normfix.conversion.pooling import on_grid, windows_of
from normfix.conversion.targets import planned_targets
from normfix.errors import NormfixError
from normfix.images.given import images_of
from normfix.images.sources import TensorImage, whole
from normfix.networks.copying import copy_of
from normfix.networks.provenance import attach_, provenance_of
from normfix.proof.steps import residual
from normfix.records.saved import Saved
from normfix.records.statistics import Statistics, parse_statistics
from normfix.tiling.grid import Geometry

LAWS = ("geometric", "arithmetic", "median", "total")
SIZE = 32


def image(seed=0, size=(64, 96)):
    """An image that is dark on one side, so that windows differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 1, *size, generator=generator) * torch.linspace(0.1, 3, size[1])


def network(norm=lambda: nn.InstanceNorm2d(4)):
    """Two live norms, one behind the other."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), norm()]
    return nn.Sequential(*layers, nn.Conv2d(4, 1, 1)).eval()


def windows(x):
    """Cut (1, c, 64, 96) into its six windows of 32."""
    return [x[..., y : y + SIZE, z : z + SIZE] for y in (0, 32) for z in (0, 32, 64)]


def law(name, values, eps=1e-5):
    """Return mean and variance per channel of windows (1, c, h, w), computed in float64 by themselves."""
    means = torch.stack([v.mean((0, 2, 3)) for v in values])
    variances = torch.stack([v.var((0, 2, 3), correction=0) for v in values])
    if name == "total":
        joint = torch.cat([v.flatten(2) for v in values], 2)
        return joint.mean((0, 2)), joint.var((0, 2), correction=0)
    if name == "median":
        return means.quantile(0.5, 0), variances.quantile(0.5, 0)
    if name == "arithmetic":
        return means.mean(0), variances.mean(0)
    return means.mean(0), (variances + eps).prod(0) ** (1 / len(values)) - eps


def by_hand(net, x, name):
    """Return the constants of both norms, the second measured while the first uses its own."""
    net = net.double()
    first = [net[0](w) for w in windows(x.double())]
    mean, var = law(name, first)
    normed = [F.batch_norm(w, mean, var, eps=1e-5) for w in first]
    second = [net[3](net[2](w)) for w in normed]
    return (mean, var), law(name, second)


@pytest.mark.slow
def test_each_image_of_a_batch_is_a_part_of_its_own():
    """A batch has the constants of its images one by one, by a law of images and by one of windows."""
    images = [image(seed) * (1 + 2 * seed) for seed in range(3)]
    for how in ("images:median", f"windows:{SIZE}"):
        alone, batch = (
            normfix.convert(network(), normfix.Measured(given, how)).model
            for given in (images, torch.cat(images))
        )
        for name, values in alone.state_dict().items():
            torch.testing.assert_close(batch.state_dict()[name], values)


@pytest.fixture(scope="module")
def conversions():
    """One conversion for each law."""
    return {name: normfix.convert(network(), normfix.Windows(image(), SIZE, name)) for name in LAWS}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_constants_are_those_of_the_law(conversions, name):
    """Both norms hold what an independent computation in float64 gives, window by window."""
    for norm, (mean, var) in zip(
        (conversions[name].model[1], conversions[name].model[4]),
        by_hand(network(), image(), name),
        strict=True,
    ):
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_laws_differ(conversions):
    """Control: no two laws give the same variance, so the comparison above tells them apart."""
    variances = [conversions[name].model[4].running_var for name in LAWS]
    for number, one in enumerate(variances):
        for other in variances[:number]:
            assert ((one - other).abs() / one).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_the_proof_holds_for_every_law(conversions, name):
    """Surgery is exact, constants are self-consistent under their law, tiles equal the whole; the output is another."""
    done = conversions[name]
    assert done.proof.passed
    assert done.proof.step("residual").value < 1e-6
    assert (normfix.predict(done.model, image(), tile=16) - done.model(image())).abs().max() < 1e-4
    moved = (done.model(image()) - done.original(image())).abs().max() / done.original(image()).std()
    assert done.proof.shifts[0].max_sd == pytest.approx(float(moved), rel=1e-3)
    if name != "total":  # on windows that cover the image once, that is the whole image's
        assert moved > 0.05


def test_another_law_is_another_residual(conversions):
    """Control: constants of one law are self-consistent under it, and under no other."""
    done = conversions["geometric"]
    taken = images_of(image(), done.model)
    targets = planned_targets(done.model, done.plan)
    for name in LAWS:
        statistics = parse_statistics(f"windows:{SIZE}:{name}")
        summary = measure_(done.model, targets, taken, done.caller, stored=True, statistics=statistics)
        step = residual(summary, torch.float32)
        assert (step.status == "passed") is (name == "geometric")


@pytest.mark.slow
def test_prove_measures_under_the_law_that_travels(conversions):
    """prove passes with the law of the network, and with another that is claimed the residual fails."""
    model = copy_of(conversions["geometric"].model)
    assert normfix.prove(model, image()).step("residual").status == "passed"
    attach_(model, replace(provenance_of(model), statistics=parse_statistics(f"windows:{SIZE}:median")))
    assert normfix.prove(model, image()).step("residual").status == "failed"


@pytest.mark.slow
def test_it_is_kept_by_saving_and_calibrating(conversions, tmp_path):
    """The folder states the law; what is loaded gives the same, and measured anew keeps the law."""
    done = conversions["geometric"]
    normfix.save(done, tmp_path / "fixed")
    saved = json.loads((tmp_path / "fixed" / "normfix.json").read_text())
    assert saved["provenance"]["statistics"] == {
        "kind": "windows",
        "size": [SIZE],
        "law": "geometric",
        "weight": 0.0,
    }
    loaded = normfix.load(tmp_path / "fixed", model=network())
    torch.testing.assert_close(loaded(image()), done.model(image()), rtol=0, atol=0)
    again = normfix.calibrate(loaded, image(1)).model
    expected = normfix.convert(network(), normfix.Windows(image(1), SIZE)).model
    torch.testing.assert_close(again[4].running_var, expected[4].running_var, rtol=1e-6, atol=0)


@torch.no_grad()
def test_groups_are_pooled_as_groups():
    """A GroupNorm's windows have a variance per group, and the law is of these."""
    done = normfix.convert(network(lambda: nn.GroupNorm(2, 4)), normfix.Windows(image(), SIZE, "geometric"))
    net = network().double()
    groups = [net[0](w).reshape(1, 2, -1) for w in windows(image().double())]
    variances = torch.stack([g.var((0, 2), correction=0) for g in groups]) + 1e-5
    expected = (variances.prod(0) ** (1 / 6) - 1e-5).repeat_interleave(2)
    torch.testing.assert_close(done.model[1].running_var.double(), expected, rtol=1e-5, atol=1e-7)
    assert done.proof.passed


def test_groups_re_expressed_per_channel_are_refused():
    """As BatchRenorm a GroupNorm's channels and groups must fit together, which a law would break."""
    with pytest.raises(NormfixError, match="NF588"):
        normfix.convert(network(lambda: nn.GroupNorm(2, 4)), normfix.Windows(image(), SIZE), to="batchrenorm")


def test_windows_cover_the_image_on_the_grid():
    """Every pixel is in a window, windows have one size and start on the stride, also where they do not divide it."""
    geometry = Geometry(stride=(4, 4), halo=((4, 4), (4, 4)), scale=(1, 1), multiple=(4, 4))
    positions = torch.arange(72 * 100.0).reshape(1, 1, 72, 100)
    parts = [whole(w) for w in windows_of(TensorImage(positions), (32,), geometry)]
    assert {part.shape for part in parts} == {(1, 1, 32, 32)}
    assert (on_grid((30, 33), geometry), on_grid((3,), geometry)) == ((28, 32), (4,))
    assert torch.cat([part.flatten() for part in parts]).unique().numel() == positions.numel()
    assert all(int(part[0, 0, 0, 0]) // 100 % 4 == 0 == int(part[0, 0, 0, 0]) % 100 % 4 for part in parts)


def test_windows_cover_an_image_that_the_stride_does_not_divide():
    """A network that takes every size has images that end off the grid: the last window ends where they do."""
    geometry = Geometry(stride=(4, 4), halo=((4, 4), (4, 4)), scale=(1, 1), multiple=(1, 1))
    positions = torch.arange(35 * 30.0).reshape(1, 1, 35, 30)
    parts = [whole(w) for w in windows_of(TensorImage(positions), (16,), geometry)]
    assert torch.cat([part.flatten() for part in parts]).unique().numel() == positions.numel()
    assert {n for part in parts for n in part.shape[2:]} == {16, 18, 19}


@pytest.mark.parametrize(
    "text",
    [
        "windows:",
        "windows:0",
        "windows:8:mode",
        "whole:8",
        "tiles:8",
        "windows:8:total:1",
        "blend:2",
        "distilled:8:total",
        f"windows:{'9' * 5000}",
    ],
)
def test_what_is_no_statistic_is_refused(text):
    """A size or law that is none has a code of its own."""
    with pytest.raises(NormfixError, match="NF587"):
        parse_statistics(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geometric", "median"])
def test_windows_are_measured_in_stages_as_in_passes(conversions, name):
    """Blocks of windows give the constants of the windows themselves, for images that are read by window."""
    done = normfix.convert(
        network(), normfix.Windows(image(), SIZE, name), blocks=normfix.Blocks(tile=16, watch=None)
    )
    assert done.calibration.summary.engine == "stages"
    assert len(done.calibration.summary.images) == 6
    assert done.proof.step("residual").status == "passed"
    for mine, expected in zip(done.model.buffers(), conversions[name].model.buffers(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_masks_leave_windows_out():
    """A window whose pixels are partly ignored would be another one without a word."""
    done = normfix.convert(network(), normfix.Windows(image(), SIZE))
    with pytest.raises(NormfixError, match="NF588"):
        normfix.calibrate(done.model, image(), mask=torch.zeros(64, 96))


@torch.no_grad()
def test_whole_images_are_pooled_by_a_law():
    """images:median holds the medians of each whole image's moments, which is no image's own and not all pixels'."""
    given = [image(0), 3 * image(1), image(2, (32, 64))]
    done = normfix.convert(network(), normfix.Measured(given, "images:median"))
    first = [network().double()[0](x.double()) for x in given]
    mean, var = law("median", first)
    torch.testing.assert_close(done.model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(done.model[1].running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert done.proof.passed


def test_an_older_folder_is_of_whole_images(conversions, tmp_path):
    """What was saved before says nothing of windows, and is read as what it was."""
    normfix.save(conversions["total"], tmp_path / "fixed")
    data = json.loads((tmp_path / "fixed" / "normfix.json").read_text())
    assert Saved.read(data, "").provenance.statistics.kind == "windows"
    del data["provenance"]["statistics"]
    assert Saved.read(data, "").provenance.statistics == Statistics()


def test_the_command_line_refuses_them_too(run):
    """A law that is none is wrong usage, said before anything is opened."""
    result = run(
        "convert", "net:build", "cells.npy", "--to", "frozen", "--statistics", "windows:8:mode", "-o", "x"
    )
    assert result.code == 2
    assert "NF587" in result.err


@pytest.mark.slow
@torch.no_grad()
def test_per_image_statistics_are_what_a_network_was_converted_for(tmp_path):
    """Saved and loaded, it predicts another image as the original does, in tiles, unless stored ones are asked for."""
    normfix.save(normfix.convert(network(), normfix.Measured(image(), "per-image")), tmp_path / "fixed")
    loaded, other = normfix.load(tmp_path / "fixed", model=network()), 3 * image(1)
    torch.testing.assert_close(
        normfix.predict(loaded, other, tile=32), network()(other), rtol=1e-4, atol=1e-4
    )
    stored = normfix.predict(loaded, other, tile=32, statistics="stored")
    torch.testing.assert_close(stored, loaded(other), rtol=1e-4, atol=1e-4)
    assert (stored - network()(other)).abs().max() > 0.1


@pytest.mark.parametrize("stated", [[32, 32, 32], [32] * 1000])
def test_windows_of_another_number_of_axes_are_named(stated):
    """A network's file that states windows for more axes than it has is NF402, to convert and choose alike."""
    plane = Geometry(stride=(2, 2), halo=((2, 2), (2, 2)), scale=(Fraction(1), Fraction(1)), multiple=(2, 2))
    with pytest.raises(NormfixError, match=r"NF402.*states windows"):
        on_grid(stated, plane)
    assert on_grid([33, 18], plane) == (32, 18)
