"""What a network gives for noise tells settings apart that nothing in it shows."""

from contextvars import ContextVar

import pytest
import torch
from torch import nn

import normfix
from normfix.networks.calling import Caller
from normfix.networks.provenance import is_current
from normfix.networks.responses import Response, is_as_known, response_of

RADIUS = ContextVar("RADIUS", default=1)
POOLS = {"blur": nn.AvgPool2d(3, 1, 1)}


class Options(dict):
    """Keys as attributes, as configurations of many projects are."""

    __getattr__ = dict.__getitem__


OPTIONS = Options(radius=1)


class Blurring(nn.Module):
    """Convolves, normalises and blurs, by what it is told elsewhere."""

    def __init__(self, blur):
        super().__init__()
        self.stem, self.norm, self.blur = nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), blur
        self.register_buffer("rows", torch.ones(1))

    def forward(self, x):
        return self.blur(self, self.norm(self.stem(x)))


def pooled(x, radius):
    return nn.functional.avg_pool2d(x, 2 * radius + 1, 1, radius)


def by_context(_, x):
    return pooled(x, RADIUS.get())


def by_module(_, x):
    return POOLS["blur"](x)


def by_buffer(self, x):
    return pooled(x, int(self.rows))


def by_options(_, x):
    return pooled(x, OPTIONS.radius)


def widen_pool(_, patch):
    patch.setitem(POOLS, "blur", nn.AvgPool2d(15, 1, 7))


def assert_tiles_equal_the_whole(net, image, tile=16):
    """Tiles are what the network gives now for the whole."""
    with torch.no_grad():
        expected = net(image)
    torch.testing.assert_close(normfix.predict(net, image, tile, engine="tiles"), expected)


@pytest.mark.parametrize(
    ("blur", "widen"),
    [
        (by_context, lambda net, patch: RADIUS.set(7)),
        (by_module, widen_pool),
        (by_buffer, lambda net, patch: net.rows.fill_(7)),
    ],
    ids=["context", "module elsewhere", "buffer"],
)
def test_tiles_are_of_the_network_as_it_is_set_now(blur, widen, monkeypatch):
    """A wider blur after the conversion gives wider halos, although no picture of the network shows it."""
    torch.manual_seed(0)
    image = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    model = normfix.convert(Blurring(blur).double().eval(), image).model
    before = RADIUS.set(1)
    try:
        widen(model, monkeypatch)
        assert is_current(model)
        assert_tiles_equal_the_whole(model, image)
    finally:
        RADIUS.reset(before)


def test_calibration_does_not_make_a_network_known():
    """One that is set otherwise when it is calibrated, by copy or in place, is scanned again afterwards."""
    torch.manual_seed(0)
    image = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    model = normfix.convert(Blurring(by_context).double().eval(), image).model
    assert is_current(normfix.calibrate(model, image + 1).model)
    before = RADIUS.set(7)
    try:
        copied = normfix.calibrate(model, image * 2).model
        normfix.calibrate_(model, image * 2)
        assert_tiles_equal_the_whole(copied, image)
        assert_tiles_equal_the_whole(model, image)
    finally:
        RADIUS.reset(before)


def test_keys_that_are_attributes_are_read():
    """An object whose attributes are its keys answers unknown ones by KeyError, and is looked at none the less."""
    image = torch.rand(1, 1, 48, 48)
    assert normfix.convert(Blurring(by_options).eval(), image).proof.passed


def test_weights_are_no_settings():
    """A network that was trained on, moved or rounded is as known; the same weights set otherwise are not."""
    net, shape = Blurring(by_context).eval(), (1, 1, 32, 32)
    assert is_as_known(net, Caller(), shape)
    with torch.no_grad():
        net.stem.weight.mul_(2)
    assert is_as_known(net, Caller(), shape)
    assert is_as_known(net.double(), Caller(), shape)
    before = RADIUS.set(2)
    assert not is_as_known(net, Caller(), shape)
    RADIUS.reset(before)
    assert is_as_known(net, Caller(), shape)


def test_responses_differ_by_more_than_rounding():
    """What is not finite must be so in both; a network that takes no noise of this size gave nothing."""
    values = torch.tensor([1.0, 2.0, torch.nan])
    assert Response(values) == Response(values * (1 + 1e-7))
    assert Response(values) != Response(values * 1.01)
    assert Response(values) != Response(values.nan_to_num())
    assert Response(values) != Response(values.double())
    assert Response(values) != Response(None)
    assert Response(values) != values
    assert response_of(nn.Linear(3, 3), Caller(), (1, 1, 8, 8)) == Response(None)


class Hidden:
    """Says a radius, and nothing of itself: it is pickled as something else."""

    __slots__ = ("radius",)

    def __init__(self):
        self.radius = 1

    def __reduce__(self):
        return Hidden, ()


HIDDEN = Hidden()


def by_hidden_where_wide(_, x):
    return pooled(x, HIDDEN.radius if x.shape[-1] > 80 else 1)


def by_context_where_large(_, x):
    return pooled(x, RADIUS.get() if x.shape[-2] * x.shape[-1] >= 5000 else 1)


@pytest.fixture
def set_wide():
    """Set both radii to 7; both are 1 again afterwards."""
    tokens = []

    def widen():
        HIDDEN.radius = 7
        tokens.append(RADIUS.set(7))

    yield widen
    HIDDEN.radius = 1
    for token in tokens:
        RADIUS.reset(token)


@pytest.mark.parametrize("blur", [by_hidden_where_wide, by_context_where_large])
@pytest.mark.parametrize("convert", [True, False])
def test_a_setting_that_images_of_a_size_alone_reach_is_seen(blur, convert, set_wide):
    """The noise is as large as what was scanned where the graph says that a smaller one is another network's."""
    torch.manual_seed(0)
    image = torch.rand(1, 1, 160, 176, dtype=torch.float64)
    net = Blurring(blur).double().eval()
    if convert:
        model = normfix.convert(net, image).model
    else:
        net.norm, model = nn.Identity(), net
    assert_tiles_equal_the_whole(model, image, 96)
    set_wide()
    assert_tiles_equal_the_whole(model, image, 96)


def test_noise_is_small_where_no_size_parts_it_from_what_was_scanned():
    """Control: a small image shows what a large one does."""
    scan = normfix.scan(Blurring(by_context).eval(), torch.rand(1, 1, 160, 176))
    given = response_of(Blurring(by_context).eval(), Caller(), scan.example, scan.sizes)
    assert given.values.shape[2:] == (64, 64)


class Drawing(nn.Module):
    """Adds noise that it draws from torch's generator, as StyleGAN does, or drops out in eval mode."""

    def __init__(self, drops):
        super().__init__()
        self.conv, self.norm, self.drops = nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), drops

    def forward(self, x):
        y = self.norm(self.conv(x))
        return nn.functional.dropout(y, 0.5, training=True) if self.drops else y + torch.rand_like(y)


@pytest.mark.parametrize("drops", [False, True])
def test_a_network_that_draws_is_known_and_leaves_the_generator(drops):
    """It draws the same numbers in each response, and none that the caller's own program would have drawn."""
    net, shape = Drawing(drops).eval(), (1, 1, 32, 32)
    before = torch.get_rng_state()
    response = response_of(net, Caller(), shape)
    assert response == response_of(net, Caller(), shape)
    assert response.values is not None
    for verb in (normfix.check, normfix.scan):
        verb(net, torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), before)
    net.conv.bias.data += 1e-2
    net.norm.eps = 0.1
    assert response != response_of(net, Caller(), shape)
