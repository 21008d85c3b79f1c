"""Networks that once got through: each is now converted right, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfix


def conv(inputs, outputs, kernel=3, **arguments):
    return nn.Conv2d(inputs, outputs, kernel, padding=arguments.pop("padding", kernel // 2), **arguments)


@pytest.fixture
def image():
    return torch.rand(1, 1, 192, 192)


def circular():
    """Wraps around at the border of whatever it is given."""
    layers = [conv(1, 8, padding_mode="circular"), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, conv(8, 1, padding_mode="circular")).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_circular_padding_never_passes(image, dtype):
    """A tile's own border is not the image's, and no noise floor excuses it."""
    done = normfix.convert(circular().to(dtype), image.to(dtype))
    assert done.proof.step("tiles").status == "failed"


def test_noise_far_from_zero_excuses_nothing():
    """On values near 1000 the noise floor is large; a structural difference fails all the same."""
    x = torch.rand(1, 1, 192, 192) * 1e-3 + 1000
    assert normfix.check(circular(), x, tile=64).status == "failed"


class ScaleInvariant(nn.Module):
    """Normalises each pixel over channels first, so that amplifying the outside changes nothing."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, bias=False)
        self.body = nn.Sequential(*(conv(8, 8) for _ in range(8)))

    def forward(self, x):
        return self.body(F.normalize(self.stem(x), dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_halo_where_interference_is_blind(dtype):
    """A halo shorter than measured fails, also where nothing that is amplified can be seen."""
    verdict = normfix.check(
        ScaleInvariant().to(dtype), torch.rand(1, 3, 160, 160, dtype=dtype), tile=32, halo=4
    )
    assert verdict.status == "failed"
    assert any(f.code == "NF403" and "reaches (8, 8)" in f.message for f in verdict.findings)


class PadsToEight(nn.Module):
    """Pads on both sides to a multiple of 8 around a network of stride 4."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 4, stride=4),
            nn.InstanceNorm2d(8),
            conv(8, 8),
            nn.ConvTranspose2d(8, 1, 4, stride=4),
        )

    def forward(self, x):
        h, w = x.shape[2:]
        below, right = -h % 8, -w % 8
        top, left = below // 2, right // 2
        x = self.net(F.pad(x, (left, right - left, top, below - top), mode="reflect"))
        return x[..., top : top + h, left : left + w]


def test_extents_have_a_unit_of_their_own(image):
    """Windows are cut on multiples of 8, not of the stride 4, and odd sizes are exact by that rule."""
    done = normfix.convert(PadsToEight(), image)
    assert done.proof.passed
    assert done.scan.stride == (8, 8)
    with pytest.raises(normfix.NormfixError, match="NF402"):
        normfix.predict(done.model, image, tile=100)
    odd = image[..., :180, :188]
    with torch.no_grad():
        whole = done.model.eval()(F.pad(odd, (0, 4, 0, 4), mode="replicate"))[..., :180, :188]
    assert float((normfix.predict(done.model, odd, tile=64) - whole).abs().max()) < 1e-5


class Branching(nn.Module):
    """Lets one number computed from the whole image decide what is done."""

    def __init__(self, decide):
        super().__init__()
        self.net, self.decide = nn.Sequential(conv(1, 8), nn.InstanceNorm2d(8), nn.ReLU(), conv(8, 1)), decide

    def forward(self, x):
        return self.net(x / 255 if self.decide(x) else x)


def brighter(x):
    return x.max() > 1.5


def negative(x):
    return bool(torch.any(x < 0))


def dim(x):
    return x.mean().item() < 0.2


def dark(x):
    return int(x.mean() < 0.2)


@pytest.mark.parametrize("decide", [brighter, negative, dim, dark])
def test_a_statistic_that_decides_a_branch_is_frozen(image, decide):
    """A reduction whose value leaves tensors is live, and frozen: every tile takes the image's branch."""
    scan = normfix.scan(Branching(decide), image)
    assert scan.live[0].reduces == "space"
    done = normfix.convert(Branching(decide), image)
    assert done.proof.passed
    assert [d.site.function for d in done.plan.converted][1:] == ["instance_norm"]


@pytest.mark.parametrize("decide", [brighter, negative, dim, dark])
def test_a_branch_that_is_kept_live_fails(image, decide):
    """Control: with the statistic kept, the tiles fail."""
    done = normfix.convert(Branching(decide), image, keep=("",))
    assert done.proof.step("tiles").status == "failed"


def test_axes_that_windows_cover_are_proved_on_strips():
    """An image that is narrow on one axis does not hide what happens along that axis."""

    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = conv(1, 4), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 15)

        def forward(self, x):
            x = F.pad(self.norm(self.first(x)), (0, 0, 7, 7))
            return self.last(F.pad(x, (7, 7, 0, 0), mode="circular"))

    done = normfix.convert(Wraps(), torch.rand(1, 1, 256, 20))
    assert done.proof.step("tiles").status == "failed"


def test_the_callers_image_is_not_modified(image):
    """A network that works in place on its input gets a copy of it."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv(1, 8), nn.InstanceNorm2d(8), conv(8, 1))

        def forward(self, x):
            x.sub_(0.4).clamp_(-0.2, 0.2)
            return self.body(x)

    before = image.clone()
    done = normfix.convert(InPlace(), image)
    assert done.proof.passed
    normfix.predict(done.model, image, tile=64)
    normfix.check(done.model, image, tile=64)
    assert torch.equal(image, before)


def test_a_closure_over_the_original_is_refused(image):
    """A lambda that still runs the original's modules would change them; it is refused before it does."""

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(1, 8), nn.BatchNorm2d(8)
            self.step = lambda x: self.norm(self.conv(x))

        def forward(self, x):
            return self.step(x)

    model = Closure()
    before = model.norm.running_mean.clone()
    for use in (normfix.scan, normfix.convert, normfix.check):
        with pytest.raises(normfix.NormfixError, match=r"NF208.*closure"):
            use(model, image)
    assert torch.equal(model.norm.running_mean, before)
    assert not model.conv._forward_pre_hooks


def test_the_random_state_is_the_callers(image):
    """Scanning and converting leave the global random state as it was, also for lazy networks."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    normfix.convert(nn.Sequential(nn.LazyConv2d(8, 3), nn.InstanceNorm2d(8)), image)
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_that_count_are_given_back(image):
    """A counter that every forward raises is, after the conversion, what it was in the caller's network."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv(1, 8), nn.InstanceNorm2d(8), conv(8, 1))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.count += 1
            return self.body(x)

    done = normfix.convert(Counting(), image)
    assert done.proof.passed
    assert int(done.model.count) == 0


class SafeInHalf(nn.GroupNorm):
    """Casts to float32 and back, as diffusion U-Nets do."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def test_norms_that_cast_to_float32_are_proved_in_float64(image):
    """A cast to float32 inside the network does not spoil the geometry, which is measured in float64."""
    model = nn.Sequential(conv(1, 8), SafeInHalf(2, 8), nn.ReLU(), conv(8, 1))
    done = normfix.convert(model, image)
    assert done.proof.passed
    assert done.scan.halo == ((2, 2), (2, 2))


def test_tied_group_norms(image):
    """Norms that share their affine map get their own where each is re-expressed."""
    first, second = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)
    second.weight, second.bias = first.weight, first.bias
    model = nn.Sequential(conv(1, 8), first, nn.ReLU(), conv(8, 8), second)
    for to in ("frozen", "batchrenorm"):
        assert normfix.convert(model, image, to).proof.passed


def test_strides_that_are_no_power_of_two():
    """A network of stride 5 is measured and proved."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=5), nn.InstanceNorm2d(8), nn.ConvTranspose2d(8, 1, 5, stride=5)
    )
    done = normfix.convert(model, torch.rand(1, 1, 200, 300))
    assert done.proof.passed
    assert done.scan.stride == (5, 5)
