"""Constants are compared on what they were not measured on, and the recommendation follows what was planted."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import normfix
from normfix.choosing import samples
from normfix.choosing.bench import Bench, Sample
from normfix.choosing.recommendation import recommend
from normfix.choosing.references import blended_windows, side_by_side
from normfix.choosing.samples import folds_of, samples_of
from normfix.errors import NormfixError
from normfix.images.given import images_of
from normfix.images.sources import TensorImage
from normfix.networks.calling import Caller
from normfix.records.candidates import Candidate, ChoiceRecord
from normfix.reporting.places import places
from normfix.reporting.report import choice_text
from normfix.tiling.grid import Geometry

SIZE = 32


def network(norm=None):
    """A threshold after a norm: where its constants are wrong, the mask is."""
    first = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[[[1.0]]], [[[-1.0]]]]))
        first.bias.zero_()
    last = nn.Conv2d(2, 1, 1)
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[[[4.0]], [[-4.0]]]]))
        last.bias.fill_(-4.0)
    return nn.Sequential(first, norm or nn.InstanceNorm2d(2), last, nn.Sigmoid()).eval()


def image(seed, empty=0.0):
    """Squares in windows of 32, one much brighter than the next; a share of the windows is empty and dark."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1, 64, 96, generator=generator) * 0.1
    truth = torch.zeros(64, 96)
    places = [(r, c) for r in (0, 32) for c in (0, 32, 64)]
    for number, (r, c) in enumerate(places[: round(len(places) * (1 - empty))]):
        x[..., r + 8 : r + 24, c + 8 : c + 24] += 0.2 * 1.6**number
        truth[r + 8 : r + 24, c + 8 : c + 24] = 1
    return x, truth.numpy()


@pytest.fixture(scope="module")
def images():
    """Four images, with labels."""
    return [image(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def by_labels(images):
    """One choice by labels, with windows and agreement beside."""
    return normfix.choose(network(), [x for x, _ in images], labels=[t for _, t in images], window=SIZE)


@pytest.fixture(scope="module")
def by_agreement(images):
    """One choice on a single image without labels."""
    return normfix.choose(network(), images[0][0], window=SIZE)


def test_all_candidates_are_there_and_seamless(by_labels):
    """Each kind of constants has a row with a score per held-out image, and seams that are rounding."""
    rows = {c.name: c for c in by_labels.record.candidates}
    laws = {f"windows:{SIZE}:{law}" for law in ("geometric", "arithmetic", "median", "total")}
    assert rows.keys() == {"whole", "images:geometric", "per-image", "batchrenorm", *laws}
    assert all(len(c.scores) == len(c.agreements) == 4 and c.seams < 1e-4 for c in rows.values())


def test_seams_of_the_original_are_seen(by_labels):
    """Control: the same measure of tiles side by side of the original is no rounding."""
    live = next(c for c in by_labels.record.references if "tiles" in c.name)
    assert live.seams > 0.05


def test_own_windows_agree_with_themselves(by_agreement):
    """Control: what candidates are held against scores 1, and they do not all."""
    own = next(c for c in by_agreement.record.references if "own windows" in c.name)
    assert own.scores == (1.0, 1.0)
    assert any(c.mean < 1 for c in by_agreement.record.candidates)


@torch.no_grad()
def test_a_score_is_of_images_that_were_not_measured(images, by_labels):
    """Whole images' score of the first image is that of a network converted on the other three, by hand."""
    inputs = [x for x, _ in images]
    done = normfix.convert(network(), inputs[1:])
    mask, truth = done.model(inputs[0])[0, 0] > 0.5, torch.from_numpy(images[0][1]) > 0
    dice = 2 * float((mask & truth).sum()) / float(mask.sum() + truth.sum())
    row = next(c for c in by_labels.record.candidates if c.name == "whole")
    assert row.scores[by_labels.record.parts.index("image 0")] == pytest.approx(dice)


def test_windows_are_chosen_where_they_are_right(by_labels, images):
    """Dim squares are missed with the variance of whole images: the law that finds them is recommended, and sure."""
    record = by_labels.record
    assert record.recommended == f"windows:{SIZE}:median" == record.candidates[0].name
    assert (record.sure, record.best.better) == ("sure", 4)
    done = normfix.convert(network(), by_labels.given)
    assert done.proof.passed
    whole = normfix.convert(network(), [x for x, _ in images])
    found = [(net(images[0][0])[0, 0] > 0.5).sum() for net in (whole.model, done.model)]
    assert found[0] < found[1]


def test_a_metric_of_ones_own_decides(images):
    """What is more by it is better: one that punishes what is found takes the constants that find least."""

    def scarcity(prediction, truth):
        return -float((prediction > 0.5).mean())

    inputs, truths = [x for x, _ in images], [t for _, t in images]
    record = normfix.choose(network(), inputs, labels=truths, window=SIZE, metric=scarcity).record
    assert record.measure == "scarcity"
    assert record.recommended != f"windows:{SIZE}:median" == record.candidates[-1].name


def test_halves_of_one_image_share_no_pixel(by_agreement):
    """One image is held out by halves along its longest axis, cut on the stride grid."""
    geometry = Geometry(stride=(4, 4), halo=((4, 4),) * 2, scale=(Fraction(1),) * 2, multiple=(4, 4))
    x = torch.arange(8 * 22.0).reshape(1, 1, 8, 22)
    (first, second) = folds_of([Sample("image", x, x[0, 0].numpy())], geometry)
    assert torch.equal(torch.cat([second.judged[0].pixels, first.judged[0].pixels], 3), x)
    assert first.measured[0] is second.judged[0]
    assert np.array_equal(first.judged[0].labels, first.judged[0].pixels[0, 0].numpy())
    assert by_agreement.record.parts == ("image 0, half 1", "image 0, half 0")


class Large:
    """An image that remembers how many pixels were read of it at once."""

    def __init__(self, pixels):
        self._pixels, self.shape, self.most = pixels, tuple(pixels.shape), 0

    def read(self, window):
        """Return a window."""
        found = TensorImage(self._pixels).read(window)
        self.most = max(self.most, found.numel())
        return found

    def padded(self, padding):
        """Return itself: its extents are multiples of everything here."""
        return self

    def fingerprint(self):
        """Return what differs for another image."""
        return TensorImage(self._pixels).fingerprint()


@pytest.fixture
def large(monkeypatch):
    """The four images side by side, twice, too large to be read; parts are of 64 x 96."""
    monkeypatch.setattr(samples, "_LARGE", 1 << 12)
    monkeypatch.setattr(samples, "_EXTENT", {2: 64})
    pairs = [image(seed) for seed in range(8)]
    pixels = torch.cat([x for x, _ in pairs], 2)
    return pixels, np.concatenate([truth for _, truth in pairs])


def test_an_image_read_by_window_is_compared_in_parts(large, by_labels):
    """No more than a part is read at once, parts share no pixel, and the recommendation is that of images in memory."""
    pixels, truth = large
    opened = Large(pixels)
    found = normfix.choose(network(), opened, labels=truth, window=SIZE)
    assert opened.most == 64 * 96
    assert len(set(found.record.parts)) == len(found.record.parts) == 8
    assert (found.record.recommended, found.record.sure) == (by_labels.record.recommended, "sure")
    assert "better on 8 of 8 held-out parts" in found.headline
    assert (found.record.folds, found.table().heads[4]) == ((2, 2, 2, 1, 1), "of folds")
    assert not {"per-image", "images:geometric"} & {c.name for c in found.record.candidates}
    assert found.given.images is opened


def test_labels_of_a_part_are_those_of_its_pixels(large):
    """Cut like the image; labels that do not cover it are refused."""
    pixels, _ = large
    given = images_of(Large(pixels), network())
    assert all(
        np.array_equal(s.labels, s.pixels[0, 0]) for s in samples_of(given, pixels[0, 0].numpy(), (SIZE,))
    )
    with pytest.raises(NormfixError, match="NF604"):
        samples_of(given, pixels[0, 0, :-32].numpy(), (SIZE,))


def row(name, *scores):
    return Candidate(name=name, statistics=None, seams=0.0, scores=scores, agreements=(), better=0, note="")


@pytest.mark.parametrize(
    ("scores", "name", "sure"),
    [
        ((0.91, 0.92, 0.93, 0.92), "windows", "sure"),
        ((0.95, 0.91, 0.93, 0.87), "windows", "likely"),
        ((0.99, 0.80, 0.85, 0.99), "whole", "open"),
        ((0.9001, 0.9001, 0.9001, 0.8801), "whole", "open"),
    ],
)
def test_a_recommendation_says_how_sure_it_is(scores, name, sure):
    """Paired differences decide: beyond doubt, mostly, or not at all, and then whole images are taken."""
    found = recommend([row("whole", 0.9, 0.9, 0.9, 0.88), row("windows", *scores)])
    assert (found.name, found.sure) == (name, sure)


def test_images_of_one_fold_count_once():
    """Those held out together share their constants: what differs within a fold is no doubt, and no proof."""
    rows = [row("whole", *[0.9] * 6), row("windows", 0.91, 0.93, 0.92, 0.92, 0.91, 0.93)]
    apart, together = recommend(rows), recommend(rows, (2, 2, 2))
    assert apart.error > 0.003
    assert together.error == pytest.approx(0, abs=1e-9)
    assert recommend(rows, (1, 1, 1, 1, 1, 1)) == apart


def test_a_worse_rival_leaves_whole_sure():
    """Where whole images are best on all, that is said to be sure."""
    found = recommend([row("whole", 0.9, 0.9, 0.9, 0.9), row("windows", 0.8, 0.81, 0.8, 0.8)])
    assert (found.name, found.sure) == ("whole", "sure")
    assert found.margin == pytest.approx(0.0975)


@pytest.mark.slow
@torch.no_grad()
def test_stored_statistics_are_blended():
    """A batch norm in train mode whose stored statistics are right is best at weight 0, and convert gives that."""
    norm = nn.BatchNorm2d(2)
    net = network(norm)
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([0.3, -0.3]))
        norm.running_var.fill_(0.2)
    given = [image(seed, empty=0.5) for seed in range(2)]
    truth = [(net(x)[0, 0] > 0.5).numpy() for x, _ in given]  # what stored statistics give is true
    found = normfix.choose(net, [x for x, _ in given], labels=truth, as_trained=True)
    blend = next(c for c in found.record.candidates if c.name.startswith("blend"))
    assert (blend.name, blend.scores) == ("blend:0", (1.0, 1.0))
    assert blend.seams < 1e-4
    assert found.record.recommended == "blend:0"
    done = normfix.convert(net, normfix.Measured(given[0][0], "blend:0.25"), as_trained=True)
    live = net[0](given[0][0])
    expected = 0.75 * norm.running_var + 0.25 * live.var((0, 2, 3), correction=0)
    torch.testing.assert_close(done.model[1].running_var, expected, rtol=1e-5, atol=1e-7)
    assert done.proof.passed


def test_groups_as_batchrenorm_are_a_candidate_of_their_own():
    """Per channel and recalibrated, groups have other constants than frozen, and the row is measured."""
    given = [image(seed)[0] * (1 + seed) for seed in range(2)]
    found = normfix.choose(network(nn.GroupNorm(1, 2)), given, window=SIZE, kind="regression")
    rows = {c.name: c for c in found.record.candidates}
    assert rows["batchrenorm"].seams < 1e-4
    assert "recalibrat" in rows["batchrenorm"].note or "calibrate" in rows["batchrenorm"].note


@pytest.mark.slow
def test_distilled_constants_are_a_candidate_where_they_are_asked_for(images):
    """Fitted on one half and judged on the other, they agree with the original's own windows better than whole's."""
    record = normfix.choose(network(), images[0][0], window=16, distilled=True).record
    rows = {c.name: c for c in record.candidates}
    assert rows["distilled:16"].mean > rows["whole"].mean
    assert rows["distilled:16"].seams < 1e-4


def test_logits_are_told_by_labels(images):
    """Numbers without bounds are read as logits where masks judge them, and said to be; they score as probabilities."""
    net, (x, truth) = network(), images[0]
    found = normfix.choose(net[:-1], x, labels=truth).record
    assert found.measure == "Dice, output read as logits"
    expected = normfix.choose(net, x, labels=truth).record
    assert [c.scores for c in found.candidates] == [c.scores for c in expected.candidates]


def test_the_network_is_not_changed(images):
    """Neither weights, mode nor random numbers of the caller move."""
    net = network().train()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    normfix.choose(net, images[0][0], window=SIZE)
    assert net.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_windows_are_blended_as_sliding_windows_are():
    """Windows of a function of the pixel give that function; of the window's mean a smooth mix, and tiles a step."""
    geometry = Geometry(stride=(4, 4), halo=((0, 0),) * 2, scale=(Fraction(1),) * 2, multiple=(4, 4))
    x = torch.rand(1, 1, 16, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blended_windows(lambda w: 2 * w, x, (8,), geometry), 2 * x)
    ramp = torch.linspace(0, 1, 28).expand(1, 1, 16, 28)
    mean = lambda w: w.mean() + torch.zeros_like(w)  # noqa: E731
    smooth, steps = (f(mean, ramp, (8,), geometry)[0, 0, 0].diff() for f in (blended_windows, side_by_side))
    assert smooth.abs().max() < 0.5 * steps.abs().max()


@pytest.mark.parametrize(("up", "extent"), [(False, 29), (True, 28)], ids=["takes any size", "rounds down"])
def test_blended_windows_cover_what_the_stride_does_not_divide(up, extent):
    """The last window ends where the image does, whatever a network makes of the pixels beyond its stride."""
    geometry = Geometry(stride=(4,), halo=((0, 0),), scale=(Fraction(1),), multiple=(1,))
    x = torch.rand(1, 1, 29, generator=torch.Generator().manual_seed(0))
    run = lambda w: w[..., : w.shape[2] // 4 * 4] if up else w  # noqa: E731
    torch.testing.assert_close(blended_windows(run, x, (8,), geometry), x[..., :extent])


@pytest.mark.parametrize(
    ("model", "options", "code"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)).eval(), {"window": 32}, "NF555"),
        (network(), {}, "NF556"),
        (network(), {"labels": [np.zeros((64, 96))] * 2}, "NF557"),
        (network(), {"labels": np.zeros((64, 96)), "kind": "regression"}, "NF557"),
        (network(), {"labels": np.zeros((64, 90))}, "NF604"),
        (network(), {"window": 96}, "NF556"),
        (network(), {"window": 999, "labels": np.zeros((64, 96))}, "NF556"),
        (network(), {"labels": np.zeros((64, 96)), "metric": lambda found, true: float("nan")}, "NF557"),
        (network(), {"window": 32, "metric": lambda found, true: 1.0}, "NF557"),
    ],
    ids=[
        "nothing live",
        "nothing to judge by",
        "too many",
        "no Dice",
        "another size",
        "a window as large",
        "a window as large, with labels",
        "no number",
        "a metric without labels",
    ],
)
def test_what_cannot_be_compared_is_refused(model, options, code):
    """Each has a code that says what to give."""
    with pytest.raises(NormfixError) as raised:
        normfix.choose(model, image(0)[0], **options)
    assert raised.value.code == code


def test_the_record_travels_and_reports_say_the_same(by_labels):
    """JSON comes back as it was; page and Markdown name the recommendation, and the page draws every candidate."""
    record = by_labels.record
    assert ChoiceRecord.loads(record.dumps()) == record
    page = choice_text(".html", record, by_labels.places)
    assert record.recommended in page
    names = [d.name for d in places(by_labels.places)[0].drawings]
    assert names[:2] == ["image", "labels"]
    assert {c.name for c in record.candidates} <= set(names)
    assert record.recommended in choice_text(".md", record)


def test_places_are_where_candidates_differ(by_labels):
    """The first close-up holds the pixel at which predictions are furthest apart."""
    shown = by_labels.places
    stack = np.stack([v[0] for _, v in shown.predictions[: shown.compared]])
    worst = np.unravel_index(stack.std(0).argmax(), stack.shape[1:])
    caption = places(shown)[0].caption
    rows, columns = (tuple(map(int, part.split(" ")[1::2])) for part in caption.split(", ")[1:3])
    assert rows[0] <= worst[0] < rows[1]
    assert columns[0] <= worst[1] < columns[1]


def test_a_bench_is_scanned_once(images, monkeypatch):
    """However many candidates and folds there are, the network is captured in one scan."""
    import normfix.choosing.bench as bench

    calls = []
    look = bench.look
    monkeypatch.setattr(bench, "look", lambda *a, **k: calls.append(1) or look(*a, **k))
    normfix.choose(network(), images[0][0], window=SIZE)
    assert len(calls) == 1
    assert Bench.of(network(), images[0][0], Caller()).geometry.stride == (1, 1)


def _named(folds):
    return [tuple("".join(s.name for s in part) for part in (fold.measured, fold.judged)) for fold in folds]


def test_an_image_is_not_judged_on_a_copy_of_it():
    """A file that is given twice, under two names, is held out with its copy."""
    one, other = torch.rand(2, 1, 1, 8, 8)
    geometry = Geometry(stride=(1, 1), halo=((0, 0),) * 2, scale=(Fraction(1),) * 2, multiple=(1, 1))
    images = [Sample(name, x.clone()) for name, x in (("a", one), ("b", other), ("A", one))]
    assert _named(folds_of(images, geometry)) == [("b", "aA"), ("aA", "b")]


def test_copies_of_one_image_are_one_image():
    """It is measured on one half and judged on the other, with the labels of each."""
    x = torch.rand(1, 1, 8, 8)
    geometry = Geometry(stride=(1, 1), halo=((0, 0),) * 2, scale=(Fraction(1),) * 2, multiple=(1, 1))
    folds = folds_of([Sample("a", x), Sample("b", x.clone())], geometry)
    assert [s.name for s in folds[0].judged] == ["a, half 1", "b, half 1"]
    assert all(torch.equal(s.pixels, x[:, :, :4]) for s in folds[0].measured)
