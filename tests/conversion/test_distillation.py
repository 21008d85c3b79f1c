"""Constants are fitted to the original in windows: better on held-out ones, never worse, the same for a seed."""

import copy

import pytest
import torch
from torch import nn

import normfix
from normfix.conversion import distillation
from normfix.conversion.distillation import Distillation, divergence
from normfix.conversion.pooling import windows_of
from normfix.conversion.targets import planned_targets
from normfix.errors import NormfixError
from normfix.images.sources import TensorImage
from normfix.networks.copying import copy_of
from normfix.networks.provenance import declare_window_
from normfix.proof.steps import distilled

SIZE = 32


class Handwritten(nn.Module):
    """A norm by hand, a functional norm and a module, one behind the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (nn.Conv2d(n, 4, 3, padding=1) for n in (1, 4, 4))
        self.norm, self.head = nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        x = self.one(x)
        centred = x - x.mean((2, 3), keepdim=True)
        x = torch.relu(centred / (centred.pow(2).mean((2, 3), keepdim=True) + 1e-3).sqrt())
        x = torch.relu(nn.functional.group_norm(self.two(x), 2))
        return torch.sigmoid(self.head(self.norm(self.three(x))))


def image(seed=0):
    """Noise that is eight times as strong on one side."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, 96, 96, generator=generator) * torch.linspace(0.25, 2, 96)


@pytest.fixture(scope="module")
def done():
    """One conversion."""
    return normfix.convert(Handwritten().eval(), normfix.Measured(image(), f"distilled:{SIZE}"))


@pytest.mark.slow
def test_held_out_windows_agree_better_and_the_proof_says_so(done):
    """All kinds of sites are fitted, the held-out loss falls, and the proof measures it once more."""
    assert len(done.plan.converted) == 4
    found = done.calibration.summary.distilled
    assert found.end < 0.9 * found.start
    assert (found.windows, found.held_out) == (6, 3)
    step = done.proof.step("distilled")
    assert (step.status, step.bound) == ("passed", found.start)
    assert step.value == pytest.approx(found.end, rel=1e-3)
    assert done.proof.passed


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 6], ids=["regression", "embedding"])
def test_groups_are_fitted_whatever_the_output_means(channels):
    """GroupNorms agree better in held-out windows where the output is a number, and where it is a vector."""
    torch.manual_seed(1)
    blocks = [(nn.Conv2d(n, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()) for n in (1, 8)]
    net = nn.Sequential(*blocks[0], *blocks[1], nn.Conv2d(8, channels, 3, padding=1)).eval()
    done = normfix.convert(net, normfix.Measured(image(), f"distilled:{SIZE}"))
    found = done.calibration.summary.distilled
    assert found.end < 0.9 * found.start
    assert done.proof.step("distilled").status == "passed"
    assert done.proof.passed


@pytest.mark.slow
def test_constants_alone_have_moved(done):
    """Every site's constants differ from those it began with, and no weight does."""
    start = normfix.convert(Handwritten().eval(), normfix.Windows(image(), SIZE))
    before, after = dict(start.model.named_buffers()), dict(done.model.named_buffers())
    moved = [n for n, v in before.items() if v.is_floating_point() and not torch.equal(v, after[n])]
    assert len(moved) == 6
    for (name, mine), other in zip(done.model.named_parameters(), start.model.parameters(), strict=True):
        assert torch.equal(mine, other), name
        assert mine.grad is None


@pytest.mark.slow
def test_it_is_the_same_for_a_seed_and_draws_from_no_ones_generator(done):
    """Once more, with the size that a network's file states, gives the same bits, and random numbers stay put."""
    net, state = Handwritten().eval(), torch.get_rng_state()
    declare_window_(net, [SIZE, SIZE])
    again = normfix.convert(net, normfix.Measured(image(), "distilled"))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(done.model.buffers(), again.model.buffers(), strict=True))


@pytest.mark.slow
def test_images_of_any_size_are_fitted_in_windows(done):
    """Measured in stages and read window by window, the held-out windows agree as well."""
    made = normfix.convert(
        Handwritten().eval(), normfix.Measured(image(), f"distilled:{SIZE}"), blocks=normfix.Blocks(tile=48)
    )
    mine, theirs = made.calibration.summary, done.calibration.summary
    assert mine.engine == "stages"
    assert mine.distilled.end == pytest.approx(theirs.distilled.end, rel=0.05)


@pytest.mark.slow
def test_tiles_are_exact_and_the_folder_says_what_it_is(done, tmp_path):
    """Saved, loaded and in tiles it is the same; it cannot be measured anew, which is said."""
    normfix.save(done, tmp_path / "fixed")
    loaded = normfix.load(tmp_path / "fixed", model=Handwritten())
    whole = loaded(image())
    torch.testing.assert_close(whole, done.model(image()), rtol=0, atol=0)
    assert (normfix.predict(loaded, image(), tile=32) - whole).abs().max() < 1e-4
    with pytest.raises(NormfixError, match="NF559"):
        normfix.calibrate(loaded, image())


def bench(done, **options):
    """A fit of the network, from the constants it has."""
    model = copy_of(done.model)
    targets = planned_targets(model, done.plan)
    return model, Distillation(model, targets, done.original, model, "probability", **options)


def windows():
    """Cut the image into nine."""
    return windows_of(TensorImage(image()), (SIZE,), None)


def test_a_fit_that_only_gets_worse_changes_nothing(done, monkeypatch):
    """Control: steps far too long are never taken over: the start is kept, to the bit, and it stops early."""
    monkeypatch.setattr(distillation, "_RATE", 50.0)
    model, fit = bench(done)
    before = copy.deepcopy(model.state_dict())
    record, _ = fit.fit_(windows())
    assert record.end == record.start
    assert record.steps < fit.steps
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_constants_that_are_worse_fail_the_step(done):
    """Control: the claim of the proof fails for constants that were spoiled after the fit."""
    summary = done.calibration.summary
    assert distilled(summary, summary.distilled.end).status == "passed"
    assert distilled(summary, 1.1 * summary.distilled.start).status == "failed"


def test_an_interrupted_fit_leaves_the_network_as_it_was(done):
    """Leaves and borrowed methods are gone after an error, and constants are those of before."""
    model, fit = bench(done)
    before = copy.deepcopy(model.state_dict())

    def stop(stage, number, total):
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit.fit_(windows(), stop)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any("_normalize_by_constants" in vars(m) for m in model.modules())
    assert not any(b.requires_grad for b in model.buffers())


@pytest.mark.parametrize("kind", ["probability", "logits", "softmax", "scores", "regression"])
def test_the_loss_fits_the_output(kind):
    """It is 0 for the same output, above 0 for another, and follows what the output means."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 8, 8, generator=generator)
    y = {"probability": x.sigmoid(), "softmax": x.softmax(1)}.get(kind, x)
    assert float(divergence(y, y, kind)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(y.flip(2), y, kind)) > 0.1
    if kind == "scores":  # a shift of all classes changes none
        assert float(divergence(y + 7, y, kind)) == pytest.approx(0, abs=1e-5)
    if kind == "regression":  # in units of each channel
        assert float(divergence(7 * y.flip(2), 7 * y, kind)) == pytest.approx(
            float(divergence(y.flip(2), y, kind))
        )


class Deaf(nn.Module):
    """No gradient passes."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.InstanceNorm2d(1), nn.Conv2d(1, 1, 1)

    def forward(self, x):
        with torch.no_grad():
            return self.head(self.norm(x))


@pytest.mark.parametrize(
    ("net", "size"), [(Deaf(), 32), (Handwritten(), 96)], ids=["no gradient", "one window"]
)
def test_what_cannot_be_fitted_is_refused(net, size):
    """Without a gradient, or with nothing to hold out."""
    with pytest.raises(NormfixError, match="NF558"):
        normfix.convert(net.eval(), normfix.Measured(image(), f"distilled:{size}"))


@pytest.mark.parametrize("stated", [None, [32, "32"], [32.0], []])
def test_a_size_that_no_one_states_is_asked_for(stated):
    """Where neither the caller nor the network's file gives whole numbers, the error says what to write."""
    net = Handwritten().eval()
    declare_window_(net, stated)
    with pytest.raises(NormfixError, match=r"NF587.*distilled:SIZE"):
        normfix.convert(net, normfix.Measured(image(), "distilled"))
