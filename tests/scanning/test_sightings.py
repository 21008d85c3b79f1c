"""The dye look: every operation over the whole extent is found by what it does, and nothing is changed by looking."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from networks import LiveInstance, UNet, bilinear, max_pool, plain_unet
from torch import nn
from torchvision.ops import deform_conv2d

from normfix.networks.calling import Caller
from normfix.scanning.sightings import confirmed, dye_look
from normfix.tiling.dye.twins import Shadows


class Between(nn.Module):
    """Two convolutions around a function of the map (1, 4, 32, 48)."""

    def __init__(self, function):
        super().__init__()
        self.before, self.after = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.after(self.function(self.before(x)))


def _look(function, size=(32, 48)):
    return dye_look(Between(function), Caller(), torch.randn(1, 1, *size))


def _written_by_view(x):
    buffer = torch.zeros(x.shape)
    buffer.view(x.shape).copy_(x)
    return buffer - buffer.mean((2, 3), keepdim=True)


def _in_place(x):
    var, mean = torch.var_mean(x, (2, 3), keepdim=True)
    return x.sub_(mean).div_(var.sqrt())


def _interleaved(x):
    buffer = torch.zeros_like(x)
    buffer[:, :, ::2] = x[:, :, ::2]
    return buffer / buffer.std()


def _attention(x):
    tokens = x.flatten(2).transpose(1, 2)
    return ((tokens @ tokens.mT).softmax(-1) @ tokens).mT.reshape(x.shape)


def _adaptive(x):
    return F.interpolate(F.adaptive_avg_pool2d(x, 6), size=x.shape[2:])


# name: (function, calls found)
GLOBAL = {
    "mean": (lambda x: x - x.mean((2, 3), keepdim=True), ["mean"]),
    "strip": (lambda x: x - x.mean(3, keepdim=True), ["mean"]),
    "maximum": (lambda x: x / x.amax((2, 3), keepdim=True), ["amax"]),
    "median": (lambda x: x - x.flatten(2).median(-1)[0][..., None, None], ["median"]),
    "cumulative sum": (lambda x: x.cumsum(2), ["cumsum"]),
    "cumulative sum in place": (lambda x: x.cumsum_(2), ["cumsum_"]),
    "sort": (lambda x: x.flatten(2).sort(-1)[0].view_as(x), ["sort"]),
    "top values": (lambda x: x + x.flatten(2).topk(3)[0].mean(), ["topk"]),
    "quantile": (lambda x: x - x.flatten(1).quantile(0.5), ["quantile"]),
    "softmax over space": (lambda x: x.flatten(2).softmax(-1).view_as(x), ["softmax"]),
    "Fourier": (lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real, ["fft_fft2", "fft_ifft2"]),
    "layer norm over space": (lambda x: F.layer_norm(x, x.shape[1:]), ["layer_norm"]),
    "group norm": (lambda x: F.group_norm(x, 2), ["group_norm"]),
    "attention": (_attention, ["matmul", "matmul"]),
    "norm by name": (lambda x: F.normalize(x.flatten(2), dim=-1).view_as(x), ["normalize"]),
    "share above a threshold": (lambda x: x * (x > 0).float().mean(), ["mean"]),
    "selection, then mean": (lambda x: x + torch.where(x > 9, x, 0.0).mean(), ["mean"]),
    "mean as a number": (lambda x: x * x.mean().item(), ["mean"]),
    "pool to six": (_adaptive, ["adaptive_avg_pool2d"]),
    "pool of the whole extent": (lambda x: x * F.avg_pool2d(x, x.shape[2:]), ["avg_pool2d"]),
    "two in place": (_in_place, ["var_mean"]),
    "interleaved buffer": (_interleaved, ["std"]),
}
LOCAL = {
    "norm over channels": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
    "mean over channels": lambda x: x - x.mean(1, keepdim=True),
    "softmax over channels": lambda x: x.softmax(1),
    "running statistics": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "pool to a quarter": lambda x: F.interpolate(F.max_pool2d(x, 4), scale_factor=4),
    "unfolding": lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1),
    "rolling": lambda x: x.roll((3, 5), (2, 3)),
    "threshold": lambda x: (x > 0).float(),
    "reshuffled": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_finds(name):
    """An operation over the whole extent is found once, under the name people call it by."""
    function, expected = GLOBAL[name]
    assert [(s.owner, s.function.removeprefix("hidden.")) for s in _look(function).found] == [
        ("", called) for called in expected
    ]


@pytest.mark.parametrize("name", LOCAL)
def test_takes_nothing_local_for_global(name):
    """Negative control: what looks at a neighbourhood, or at one pixel's channels, is not found."""
    seen = _look(LOCAL[name])
    assert (seen.found, seen.unknown) == ((), ())


def test_finds_all_in_one_pass():
    """The dye is put back after each statistic, so that no later one is hidden by an earlier."""
    seen = _look(lambda x: F.instance_norm(F.instance_norm(x) * x.std()))
    assert [s.id for s in seen.found] == [
        "(root)/0/instance_norm/0",
        "(root)/0/std/0",
        "(root)/0/instance_norm/1",
    ]


def test_a_statistic_after_a_live_pool_is_found():
    """Dye goes on along the branch that was not reduced."""
    seen = _look(lambda x: (lambda y: y - y.mean((2, 3), keepdim=True))(x * x.mean((2, 3), keepdim=True)))
    assert [s.id for s in seen.found] == ["(root)/0/mean/0", "(root)/0/mean/1"]


def test_the_site_is_the_census_own():
    """A norm module's call is found under its id, with its extents and source line."""
    (seen,) = dye_look(LiveInstance(), Caller(), torch.randn(1, 1, 16, 24)).found
    assert (seen.id, seen.over, seen.recorded) == ("1/0/instance_norm/0", (24, 16), True)
    assert "instancenorm.py" in seen.line or "test_spreading" in seen.line


def test_a_dependence_the_census_lost_is_seen():
    """A statistic of a buffer that was written through a view is found, whatever the census knows."""
    assert len(_look(_written_by_view).found) == 1


@pytest.mark.parametrize("make", [plain_unet, lambda: UNet(max_pool, bilinear, depth=4)])
def test_deep_maps_do_not_fill_up(make):
    """The dye shrinks after each convolution, so a deep map of 2x2 pixels does not look global."""
    assert not dye_look(make(), Caller(), torch.randn(1, 1, 32, 32)).found


@pytest.mark.parametrize("name", GLOBAL)
def test_the_output_is_bit_identical(name):
    """Watching changes no bit of what the network computes: no NaN gets into a real tensor."""
    net, x = Between(GLOBAL[name][0]).eval(), torch.randn(1, 1, 32, 48)
    outputs = []

    def run(model, image):
        outputs.append(model(image).clone())
        return outputs[-1]

    with torch.no_grad():
        expected = net(x.clone())
    dye_look(net, run, x)
    assert torch.equal(outputs[0], expected)


def test_buffers_and_random_numbers_are_left_alone():
    """A batch norm in train mode updates its buffers as ever, and dropout draws the same numbers."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    other, x = copy.deepcopy(net), torch.randn(1, 1, 16, 16)
    torch.manual_seed(3)
    dye_look(net, Caller(), x)
    after = torch.rand(1)
    torch.manual_seed(3)
    with torch.no_grad():
        other(x)
    assert torch.equal(after, torch.rand(1))
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


def test_deformable_convolution_never_sees_nan():
    """NaN offsets crash its kernel; it is named as unknown instead, and the pass goes on behind it."""

    def deformed(x):
        offset = x.repeat(1, 5, 1, 1)[:, :18]
        y = deform_conv2d(x, offset, torch.ones(4, 4, 3, 3), padding=1)
        return y - y.mean((2, 3), keepdim=True)

    seen = _look(deformed)
    assert [s.op for s in seen.unknown] == ["torchvision::deform_conv2d"]
    assert [s.function for s in seen.found] == ["mean"]


def test_sampling_at_computed_coordinates_is_unknown():
    """Where grid_sample reads depends on the data."""
    seen = _look(lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False))
    assert [s.op for s in seen.unknown] == ["aten::grid_sampler_2d"]


@pytest.fixture
def library():
    """Operators that nobody knows: one local, one not."""
    with torch.library._scoped_library("strangers", "DEF") as lib:
        lib.define("double(Tensor x) -> Tensor")
        lib.define("centre(Tensor x) -> Tensor")
        lib.impl("double", lambda x: 2 * x, "CPU")
        lib.impl("centre", lambda x: x - x.mean(), "CPU")
        yield torch.ops.strangers


def test_a_foreign_operator_is_unknown(library):
    """What a foreign operator does is not taken for local, though it changes one pixel only."""
    seen = _look(lambda x: library.double(x))
    assert [s.op for s in seen.unknown] == ["strangers::double"]
    assert not seen.found


def test_a_foreign_operator_that_moves_every_pixel_is_global(library):
    """A small change of one pixel that changes all outputs is found without NaN."""
    seen = _look(lambda x: library.centre(x))
    assert [s.op for s in seen.found] == ["strangers::centre"]


def test_an_operator_that_is_gone_is_no_other_object(library):
    """Its number stays in TorchScript's table, so nothing else may get it."""
    packet = library.double._op
    assert torch.jit._builtins._find_builtin(packet) == "strangers::double"
    packet = weakref.ref(packet)
    with torch.library._scoped_library("strangers", "FRAGMENT") as lib:
        lib.define("double.again(Tensor x, int n) -> Tensor")  # replaces the packet's operator
    gc.collect()
    assert packet() is not None


def test_swallowed_dye_is_recorded():
    """An argmax over space holds no NaN; that it swallows the dye is said."""
    seen = _look(lambda x: x + x.flatten(1).argmax(1))
    assert [s.function for s in seen.lost] == ["argmax"]


def _windows(x, window=8):
    """Attention inside windows of fixed extent."""
    n, c, h, w = x.shape
    tokens = x.view(n, c, h // window, window, w // window, window).permute(0, 2, 4, 3, 5, 1)
    tokens = tokens.reshape(-1, window * window, c)
    tokens = (tokens @ tokens.mT).softmax(-1) @ tokens
    tokens = tokens.view(n, h // window, w // window, window, window, c)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def test_a_window_of_fixed_extent_is_not_confirmed():
    """Attention in windows loses a dimension too, but one that does not grow with the image."""
    small, large = _look(_windows, (24, 24)), _look(_windows, (40, 40))
    assert small.found  # else nothing is tested
    assert not confirmed(small, large, frozenset()).found


def test_a_window_of_channels_is_not_confirmed():
    """A response over channels loses the padded channels, which do not grow with the image."""
    small, large = (_look(lambda x: F.local_response_norm(x, 3), size) for size in ((16, 16), (24, 24)))
    assert not confirmed(small, large, frozenset()).found


def test_attention_over_the_image_is_confirmed():
    """Negative control: what grows with the image stays."""
    small, large = _look(_attention, (16, 16)), _look(_attention, (24, 24))
    assert confirmed(small, large, frozenset()).found == small.found


def test_what_only_the_larger_image_shows_of_a_known_site_is_added():
    """On a map of one pixel no statistic shows; the census' site is confirmed at the other size."""

    def deep(x):
        return F.max_pool2d(x, 16).amax((2, 3), keepdim=True) + x

    small, large = _look(deep, (16, 16)), _look(deep, (64, 64))
    known = frozenset({"(root)/0/amax/0"})
    assert known & {s.id for s in large.found}
    assert not known & {s.id for s in small.found}
    assert known <= {s.id for s in confirmed(small, large, known).found}


def test_views_share_their_twin():
    """Dye written through one view of a buffer shows in every other, and not in the buffer."""
    shadows, buffer = Shadows(), torch.zeros(4, 4)
    shadows.put(buffer[1], torch.full((4,), torch.nan))
    assert shadows.dye(buffer).count == 4
    assert shadows.dye(buffer[:, 2]).inside == (0,)
    assert not buffer.isnan().any()


def test_a_new_tensor_in_old_memory_is_clean():
    """A twin dies with its storage: memory that is used again starts clean."""
    shadows = Shadows()
    for _ in range(200):
        tensor = torch.zeros(1024)
        assert shadows.of(tensor) is None
        shadows.put(tensor, tensor + torch.nan)
        del tensor
        gc.collect(0)


def test_complex_numbers_hold_dye():
    """NaN in a complex tensor counts, also behind a conjugate view."""
    shadows, z = Shadows(), torch.zeros(8, dtype=torch.complex64)
    shadows.put(z, z + complex(torch.nan, 0))
    assert shadows.dye(z.conj()).full
