"""A statistic that is divided by and vanishes on every calibration image is refused, or named if it is allowed."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfix
from normfix.cli import main
from normfix.errors import NormfixError
from normfix.proof import subject, values
from normfix.records.encoding import Record
from normfix.records.measurements import CalibrationSummary


class Dead(nn.Module):
    """Normalises after a ReLU; channels 0 and 2 answer to bright objects alone."""

    def __init__(self, norm=None):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), norm, nn.Conv2d(4, 1, 3, padding=1)
        with torch.no_grad():
            self.conv.weight[::2] = 1 / 9
            self.conv.weight[1::2] = torch.rand(2, 1, 3, 3)
            self.conv.bias[:] = torch.tensor([-6.0, 0.1, -7.0, 0.2])

    def forward(self, x):
        return self.head(self.normalised(F.relu(self.conv(x))))

    def normalised(self, x):
        return self.norm(x)


def dead(norm=None):
    torch.manual_seed(0)
    return Dead(nn.InstanceNorm2d(4) if norm is None else norm).eval()


def dark(*size, seed=1):
    return torch.rand(1, 1, *(size or (48, 48)), generator=torch.Generator().manual_seed(seed))


def bright(seed=2):
    image = dark(seed=seed)
    image[..., 10:30, 10:30] = 9.0
    return image


def places(done):
    summary = done if isinstance(done, CalibrationSummary) else done.calibration.summary
    return {site.site: site.flat for site in summary.sites if site.flat}


def test_dead_channels_are_refused_by_name():
    """The error names the site, its class, the channels, the eps and two ways out."""
    with pytest.raises(NormfixError, match="NF231") as caught:
        normfix.convert(dead(), dark())
    assert caught.value.where == "norm/0/instance_norm/0 (InstanceNorm2d)"
    for part in ("channels 0, 2 ", "1e-05", "up to 316", "Calibrate on an image", "--allow-flat"):
        assert part in caught.value.message


def test_a_structured_image_is_converted():
    """Control: on an image that reaches every channel the same network is converted, and nothing is named."""
    done = normfix.convert(dead(), bright())
    assert done.proof.passed
    assert done.calibration.summary.findings == ()


def test_allowed_it_is_named():
    """With allow_flat the network is converted, proved on its image, and named in the summary and its JSON."""
    done = normfix.convert(dead(), dark(), allow_flat=True)
    assert done.proof.passed
    (finding,) = done.calibration.summary.findings
    assert (finding.code, finding.where) == ("NF231", "norm/0/instance_norm/0 (InstanceNorm2d)")
    assert "channels 0, 2 " in finding.message
    assert json.loads(done.record.dumps())["calibration"]["sites"][0]["flat"] == [0, 2]


def test_one_image_with_structure_is_enough():
    """Flat on one image and not on another is a population with a spread."""
    done = normfix.convert(dead(), [dark(), bright()])
    assert places(done) == {}


def test_levels_that_differ_between_flat_images_are_no_structure():
    """Two empty fields of different brightness are flat each."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.InstanceNorm2d(2), nn.Conv2d(2, 1, 3, padding=1))
    images = [torch.full((1, 1, 32, 32), level) for level in (0.2, 0.9)]
    done = normfix.convert(net, images, allow_flat=True)
    assert places(done) == {"1/0/instance_norm/0": (0, 1)}


@pytest.mark.slow
def test_an_empty_field_is_refused_where_padding_gives_it_a_spread():
    """Zero padding alone makes a spread at the border, which is no measure of anything either."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3), nn.Conv2d(3, 1, 3, padding=1))
    empty = torch.full((1, 1, 40, 40), 0.9)
    with pytest.raises(NormfixError, match=r"NF231 images: .*padding"):
        normfix.convert(net, empty)
    model = normfix.convert(net, dark()).model
    for keywords in ({}, {"tile": 16}):
        with pytest.raises(NormfixError, match=r"NF231 images: .*padding"):
            normfix.calibrate(model, [empty, 2 * empty], **keywords)
        assert normfix.calibrate(model, [empty, dark()], **keywords).summary.findings == ()


@pytest.mark.parametrize("level", [0.0, 0.2, 1000.0, 1e6])
def test_an_empty_field_is_refused_at_any_level(level):
    """A constant image is flat, also where its level makes the rounding of its variance larger than eps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.InstanceNorm2d(3), nn.Conv2d(3, 1, 3, padding=1))
    empty = torch.full((1, 1, 40, 40), level)
    with pytest.raises(NormfixError, match=r"NF231 images: every calibration image is constant"):
        normfix.convert(net, empty)
    assert places(normfix.convert(net, empty, allow_flat=True)) == {"1/0/instance_norm/0": (0, 1, 2)}


@pytest.mark.parametrize(
    ("norm", "flat"),
    [(nn.GroupNorm(4, 4), (0, 2)), (nn.GroupNorm(2, 4), ()), (nn.GroupNorm(1, 4), ())],
    ids=["each", "pairs", "all"],
)
def test_a_group_is_flat_as_a_whole(norm, flat):
    """What counts is the variance that is divided by: that of a group, in which a dead channel is no harm."""
    assert dict.fromkeys(places(normfix.convert(dead(norm), dark(), allow_flat=True)).values()) == (
        {flat: None} if flat else {}
    )


def test_batchrenorm_of_groups_divides_by_groups():
    """Converted to BatchRenorm, a dead channel of a live group is divided by the group's deviation, as when frozen."""
    net, bright = dead(nn.GroupNorm(2, 4)), 5 * dark()
    renormed, frozen = (normfix.convert(net, dark(), to).model.eval() for to in ("batchrenorm", "frozen"))
    with torch.no_grad():
        torch.testing.assert_close(renormed(bright), frozen(bright), rtol=1e-4, atol=1e-4)


SPACE = {"dim": (2, 3), "keepdim": True}
DIVIDING = {
    "z-score": lambda x: (x - x.mean(**SPACE)) / (x.std(**SPACE) + 1e-5),
    "clamped": lambda x: x / x.std(**SPACE).clamp(min=1e-6),
    "replaced": lambda x: x / torch.where((s := x.std(**SPACE)) == 0, torch.ones_like(s), s),
    "rsqrt": lambda x: x * torch.rsqrt(x.var(**SPACE) + 1e-5),
    "power": lambda x: x * (x.square().mean(**SPACE) + 1e-6) ** -0.5,
    "reciprocal": lambda x: x * (1 / (x.std(**SPACE) + 1e-5)),
    "range": lambda x: (x - x.amin(**SPACE)) / (x.amax(**SPACE) - x.amin(**SPACE) + 1e-8),
    "norm": lambda x: x / x.norm(**SPACE).clamp_min(1e-6),
    "maximum": lambda x: torch.div(x, x.amax(**SPACE) + 1e-6),
    "in place": lambda x: x.clone().div_(x.std(**SPACE).add_(1e-5)),
    "addcdiv": lambda x: torch.addcdiv(torch.zeros_like(x), x, x.std(**SPACE) + 1e-5),
    "quantiles": lambda x: x / (_quantile(x, 0.9) - _quantile(x, 0.1) + 1e-6),
    "functional": lambda x: F.instance_norm(x),
    "exponential": lambda x: x * torch.exp(-0.5 * torch.log(x.var(**SPACE) + 1e-8)),
    "power of a tensor": lambda x: x * torch.pow(x.var(**SPACE) + 1e-8, torch.tensor(-0.5)),
    "expanded": lambda x: torch.addcdiv(torch.zeros_like(x), x, (x.std(**SPACE) + 1e-6).expand_as(x)),
    "negative": lambda x: -x / -(x.std(**SPACE) + 1e-6),
    "hypotenuse": lambda x: x / torch.hypot(x.std(**SPACE), x.new_tensor(1e-5)),
    "joined": lambda x: x / (torch.cat([part.std(**SPACE) for part in x.chunk(2, 1)], 1) + 1e-6),
    "softplus": lambda x: x / F.softplus((x.var(**SPACE) + 1e-8).log()),
    "bounded": lambda x: x / F.hardtanh(x.std(**SPACE), 1e-6, 1e3),
    "bent": lambda x: x / (torch.tanh(x.std(**SPACE)) + 1e-6),
    "weighed": lambda x: x / (x.std(**SPACE) * torch.tensor([2.0, 1, 1, 1]).view(4, 1, 1) + 1e-6),
    "summed by name": lambda x: x / (torch.einsum("nchw,c->nchw", x.std(**SPACE), torch.ones(4)) + 1e-6),
    "interpolated": lambda x: x / (F.interpolate(x.std(**SPACE), size=x.shape[2:]) + 1e-6),
    "written into": lambda x: x / _without_zeros(x.std(**SPACE)),
    "logistic": lambda x: x * torch.exp(-F.logsigmoid((x.var(**SPACE) + 1e-8).log())),
    "stacked and split": lambda x: x / (torch.stack([x.std(**SPACE), x.mean(**SPACE)]).unbind(0)[0] + 1e-6),
}
HARMLESS = {
    "gated by a mean": lambda x: x * torch.sigmoid(x.mean(**SPACE)),
    "gated by a maximum": lambda x: x * torch.sigmoid(x.amax(**SPACE)),
    "a mean added": lambda x: x + x.mean(**SPACE),
    "scaled by a deviation": lambda x: x * x.std(**SPACE),
    "divided by one and more": lambda x: x / (1 + x.std(**SPACE)),
    "gated by two pools": lambda x: (
        x * torch.sigmoid(torch.cat([x.mean(**SPACE), x.amax(**SPACE)], 1).chunk(2, 1)[1])
    ),
    "softplus of a deviation": lambda x: x / F.softplus(x.std(**SPACE)),
    "softmax of pools": lambda x: x * x.mean(**SPACE).softmax(1),
    "exponential of a maximum": lambda x: x * torch.exp(x.amax(**SPACE)),
    "share of all channels": lambda x: x / (0.2 + (m := x.mean(**SPACE)) / (m.mean(1, keepdim=True) + 1e-6)),
    "exponential of a mean": lambda x: x * torch.exp(-x.mean(**SPACE).abs()),
    "response": lambda x: x + x * (g := x.norm(**SPACE)) / (g.mean(1, keepdim=True) + 1e-6),
}


def _without_zeros(deviation):
    deviation[deviation == 0] = 1.0
    return deviation


def _quantile(x, q):
    return x.flatten(2).quantile(q, -1)[:, :, None, None]


class _ByHand(Dead):
    function = None

    def normalised(self, x):
        return type(self).function(x)


def by_hand(function):
    torch.manual_seed(0)
    return type("ByHand", (_ByHand,), {"function": staticmethod(function)})().eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVIDING)
def test_what_is_divided_by_is_refused_where_it_vanishes(name):
    """A hand-written statistic is found where it ends in a division, however spelt; with structure it passes."""
    with pytest.raises(NormfixError, match=r"NF231 \(root\)/0/"):
        normfix.convert(by_hand(DIVIDING[name]), dark())
    assert places(normfix.convert(by_hand(DIVIDING[name]), bright())) == {}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_not_divided_by_may_vanish(name):
    """Control: pools of dead channels that are multiplied or added are converted without a word."""
    done = normfix.convert(by_hand(HARMLESS[name]), dark())
    assert done.proof.passed
    assert done.calibration.summary.findings == ()


def test_a_large_eps_multiplies_nothing_and_is_named():
    """Below an eps of 0.5 a variance is named, not refused: what comes there later grows by 1.4 at most."""
    done = normfix.convert(dead(nn.InstanceNorm2d(4, eps=0.5)), dark())
    assert done.proof.passed
    assert [finding.code for finding in done.calibration.summary.findings] == ["NF231"]


@pytest.mark.slow
def test_calibrating_refuses_in_every_way_and_keeps_what_was():
    """In passes, in stages and on a sample the old statistics are back after the refusal."""
    model = normfix.convert(dead(), bright()).model
    before = model.norm.running_var.clone()
    for keywords in ({}, {"tile": 16}, {"tile": 16, "sample": 0.5}):
        with pytest.raises(NormfixError, match=r"NF231 norm/0/instance_norm/0 \(InstanceNorm2d\)"):
            normfix.calibrate_(model, dark(), allow_flat=False, **keywords)
        assert torch.equal(model.norm.running_var, before)
    assert places(normfix.calibrate_(model, dark(), tile=16, allow_flat=True)) == {
        "norm/0/instance_norm/0": (0, 2)
    }


def test_calibrating_keeps_a_dead_channel_among_others_and_names_it():
    """By default a calibration goes on and names it; where no channel of a site has a spread it is refused."""
    model = normfix.convert(dead(), bright()).model
    (finding,) = normfix.calibrate(model, dark()).summary.findings
    assert "channels 0, 2 " in finding.message
    faint = 1e-4 * dark() - 5.0
    with pytest.raises(NormfixError, match=r"NF231 norm/.*channels 0, 1, 2, 3 "):
        normfix.calibrate(model, faint)


def test_converting_in_stages_refuses_too():
    """With a budget the same sites and channels are named."""
    with pytest.raises(NormfixError, match=r"NF231 norm/.*channels 0, 2 "):
        normfix.convert(dead(), dark(), tile=24, blocks=normfix.Blocks(budget=1 << 24))


def test_a_mask_may_hide_all_structure():
    """What counts is what is measured: with the bright object ignored the channels are flat."""
    model, mask = normfix.convert(dead(), bright()).model, torch.zeros(48, 48)
    mask[8:32, 8:32] = 1
    with pytest.raises(NormfixError, match=r"NF231 norm/.*channels 0, 2 "):
        normfix.calibrate(model, bright(), mask=mask, allow_flat=False)


@torch.no_grad()
def test_per_image_statistics_may_be_flat():
    """Predicting an image by its own statistics is what the original does, flat or not."""
    model = normfix.convert(dead(), bright()).model
    own = normfix.predict(model, dark(), tile=24, statistics="per-image")
    torch.testing.assert_close(own, dead()(dark()), rtol=1e-4, atol=1e-4)


def test_what_training_left_flat_is_no_news():
    """A batch norm channel whose running variance is below eps may be measured flat; one that was alive may not."""
    net = dead(nn.BatchNorm2d(4))
    with pytest.raises(NormfixError, match=r"NF231 norm/.*BatchNorm2d.*channels 0, 2 "):
        normfix.calibrate(net, dark(), allow_flat=False)
    net.norm.running_var[::2] = 1e-9
    assert places(normfix.calibrate(net, dark(), allow_flat=False).summary) == {}


def test_fine_tuning_recalibrates_under_the_same_rule():
    """A run refuses flat statistics, unless it allows them."""
    model = normfix.convert(dead(), bright(), "batchrenorm").model
    run = normfix.prepare_finetune(model, total_steps=10)
    with pytest.raises(NormfixError, match="NF231"):
        run.recalibrate(dark(), allow_flat=False)
    assert run.recalibrate(dark(), allow_flat=True).findings


@pytest.mark.slow
def test_the_card_names_it(tmp_path):
    """The model card of what was allowed has a section with site and channels; without there is none."""
    for allowed, image in ((True, dark()), (False, bright())):
        folder = tmp_path / str(allowed)
        normfix.save(normfix.convert(dead(), image, allow_flat=allowed), folder)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert ("## Flat statistics" in card) is allowed
        assert ("norm/0/instance_norm/0 (InstanceNorm2d): the variance of channels 0, 2 " in card) is allowed


@pytest.mark.slow
def test_the_commands_have_the_switch(tmp_path, monkeypatch, capsys):
    """convert exits 2 with NF231, writes nothing, and with --allow-flat writes and names; calibrate likewise."""
    np.save(tmp_path / "flat.npy", np.full((96, 96), 0.2, dtype=np.float32))
    flags = ["--scale", "none"]
    out = tmp_path / "out"
    convert = [
        "convert",
        "factories:tiny_unet",
        str(tmp_path / "flat.npy"),
        *flags,
        "--to",
        "frozen",
        "-o",
        str(out),
    ]

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["normfix", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    code, _, error = run(*convert)
    assert (code, "NF231" in error, out.exists()) == (2, True, False)
    code, text, _ = run(*convert, "--allow-flat", "--partial")
    assert "NF231 " in text
    assert out.exists()
    again = ["calibrate", str(out), "--arch", "factories:tiny_unet", str(tmp_path / "flat.npy"), *flags]
    again += ["-o", str(tmp_path / "again")]
    code, _, error = run(*again)
    assert (code, "NF231" in error) == (2, True)
    code, text, _ = run(*again, "--allow-flat", "--format", "json")
    assert (code, json.loads(text)["findings"][0]["code"]) == (0, "NF231")


# the proof on another input compares values


def _drift(model, name):
    layer = getattr(model, name)
    kind = type(layer)
    forward = kind.forward
    layer.__class__ = type(
        kind.__name__,
        (kind,),
        {"forward": lambda self, x: forward(self, x) + 1e-2 * (x > x.new_tensor(0)).to(x)},
    )


@pytest.mark.slow
def test_a_layer_that_gives_something_else_on_another_input_fails(monkeypatch):
    """Control: a layer that runs once and is not live, but whose values are off elsewhere, fails the step "used"."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 3, padding=1))
    image = dark()
    done = normfix.convert(net, image)
    assert done.proof.step("used").status == "passed"
    honest = subject.Subject.used

    def drifted(self, given, judge):
        _drift(self.model, "1")
        return honest(self, given, judge)

    monkeypatch.setattr(subject.Subject, "used", drifted)
    step = normfix.convert(net, image).proof.step("used")
    assert step.status == "failed"
    assert "sd from the formulas'" in step.note
    step = normfix.prove(done.model, image).step("used")
    assert step.status == "failed"
    assert "1/0/instance_norm/0 does not give what its statistics say" in step.note


def test_the_reference_shares_nothing_with_the_conversion():
    """A constant that is not the one stored is off by what it says: the original is run with the stored values."""
    net = by_hand(DIVIDING["z-score"])
    done = normfix.convert(net, bright())
    other = dark(48, 48, seed=5)
    arguments = (done.original, done.model, done.plan, done.caller, other)
    with torch.no_grad():
        assert values.differing_from_original(*arguments, done.model(other)) == []
        assert float((done.model(other) - net(other)).abs().max()) > 0.1
        name = done.plan.converted[0].target
        module = done.model.get_submodule(name)
        honest = module.forward
        module.forward = lambda *given: honest(*given) * 1.01
        assert "sd from the formulas'" in values.differing_from_original(*arguments, done.model(other))[0]


def test_findings_travel_through_json():
    """The summary with its findings is read back as it was."""
    summary = normfix.convert(dead(), dark(), allow_flat=True).calibration.summary
    assert isinstance(summary, Record)
    assert CalibrationSummary.from_json(json.loads(summary.dumps())) == summary


class Faint(nn.Module):
    """One channel has a variance of a share of eps, as trained networks have on ordinary images."""

    def __init__(self, share, image):
        super().__init__()
        self.norm, self.head = nn.InstanceNorm2d(2), nn.Conv2d(2, 1, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor([1.0, (share * 1e-5) ** 0.5 / float(image.std(correction=0))]))

    def forward(self, x):
        return self.head(self.norm(x * self.gain[:, None, None]))


@pytest.mark.parametrize(("share", "refused"), [(0.9, False), (0.3, False), (0.05, True), (1e-4, True)])
def test_a_faint_channel_is_named_and_only_a_dead_one_refused(share, refused):
    """Between a tenth of eps and eps the image still decides the constant: it is named; below eps decides alone."""
    image = torch.rand(1, 1, 64, 64)
    network = Faint(share, image).eval()
    if refused:
        with pytest.raises(NormfixError, match=r"NF231 norm.*channel 1 "):
            normfix.convert(network, image)
        return
    done = normfix.convert(network, image)
    assert done.proof.passed
    assert [f.code for f in done.calibration.summary.findings] == ["NF231"]
    assert done.calibration.summary.sites[0].flat == (1,)


def test_a_dead_channel_of_a_live_group_is_no_divisor():
    """A group norm that becomes BatchRenorm divides by its group's deviation in eval, whatever one channel has."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.GroupNorm(1, 2), nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, x):
            return self.head(self.norm(torch.cat([x, torch.zeros_like(x)], 1)))

    torch.manual_seed(0)
    network, image = Grouped().eval(), torch.rand(1, 1, 64, 64)
    done = normfix.convert(network, image, to="batchrenorm")
    assert done.proof.passed
    with torch.no_grad():  # another image with structure in the dead channel's group
        other = 3 * image.flip(-1)
        ratio = done.model.eval()(other).std() / network(other).std()
    assert ratio < 10
    with pytest.raises(NormfixError, match="NF231"):
        normfix.convert(network, torch.zeros(1, 1, 64, 64), to="batchrenorm")
