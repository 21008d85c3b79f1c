"""BatchRenorm against an independent float64 reference written from Ioffe 2017, and against nn.BatchNorm."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from normfix.layers import (
    BatchRenorm,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    ChannelNorm,
    SyncBatchRenorm2d,
)
from normfix.layers.batchrenorm import Renormalise, batch_moments

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SINGLE = {"rtol": 2e-4, "atol": 2e-4}
LAYERS = {1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d}
STOCK = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Reference:
    """Ioffe 2017, algorithms 1 and 2, in plain float64; a running variance in place of sigma."""

    def __init__(self, layer: BatchRenorm) -> None:
        as64 = {name: value.detach().double() for name, value in layer.state_dict().items()}
        self.mu, self.var = as64["running_mean"].clone(), as64["running_var"].clone()
        self.gamma = as64["weight"].requires_grad_() if layer.affine else None
        self.beta = as64["bias"].requires_grad_() if layer.affine else None
        self.eps, self.alpha, self.seen = layer.eps, layer.momentum, int(layer.num_batches_tracked)
        self.r_max, self.d_max = float(layer.r_max), float(layer.d_max)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        columns = x.transpose(0, 1).flatten(1)  # (c, n * space)
        m = columns.shape[1]
        mu_b = columns.sum(1) / m
        var_b = ((columns - mu_b[:, None]) ** 2).sum(1) / m
        sigma_b, sigma = (var_b + self.eps).sqrt(), (self.var + self.eps).sqrt()
        r = torch.ones_like(sigma)
        d = torch.zeros_like(sigma)
        if self.seen:
            r = (sigma_b / sigma).detach().clamp(1 / self.r_max, self.r_max)
            d = ((mu_b - self.mu) / sigma).detach().clamp(-self.d_max, self.d_max)
        xhat = (columns - mu_b[:, None]) / sigma_b[:, None] * r[:, None] + d[:, None]
        y = xhat if self.gamma is None else self.gamma[:, None] * xhat + self.beta[:, None]
        self.seen += 1
        alpha = 1 / self.seen if self.alpha is None else self.alpha
        self.mu = (1 - alpha) * self.mu + alpha * mu_b.detach()
        self.var = (1 - alpha) * self.var + alpha * var_b.detach() * m / (m - 1)
        n, c, *space = x.shape
        return y.reshape(c, n, *space).transpose(0, 1)


def _randomise(layer: ChannelNorm) -> ChannelNorm:
    c = layer.num_features
    layer.set_statistics_(torch.randn(c, dtype=torch.double), torch.rand(c, dtype=torch.double) + 0.2)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


def _a_layer(**arguments) -> BatchRenorm2d:
    return _randomise(BatchRenorm2d(3, dtype=torch.double, **arguments))


shapes = st.tuples(
    st.integers(1, 4), st.integers(1, 5), st.lists(st.integers(1, 5), min_size=0, max_size=3)
).filter(lambda s: s[0] * math.prod(s[2]) > 1)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    mean=st.sampled_from([0.0, 3.0, -100.0]),
    sd=st.sampled_from([0.01, 1.0, 50.0]),
    r_max=st.sampled_from([1.0, 1.5, 3.0, 1e6]),
    d_max=st.sampled_from([0.0, 0.5, 5.0, 1e6]),
    momentum=st.sampled_from([0.01, 0.5, 1.0, None]),
    affine=st.booleans(),
    warm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_papers_formulas(shape, mean, sd, r_max, d_max, momentum, affine, warm, seed):
    """Outputs, all gradients and both running statistics are the reference's, over three steps."""
    torch.manual_seed(seed)
    n, c, space = shape
    kind = LAYERS[max(1, len(space))]
    layer = kind(c, momentum=momentum, affine=affine, r_max=r_max, d_max=d_max, dtype=torch.double)
    layer = _randomise(layer) if warm else layer
    reference = Reference(layer)
    for _ in range(3):
        x = (torch.randn(n, c, *space, dtype=torch.double) * sd + mean).requires_grad_()
        x2 = x.detach().clone().requires_grad_()
        y, expected = layer(x), reference(x2)
        assert_close(y, expected, **EXACT)
        grad = torch.randn_like(y)
        ours = torch.autograd.grad(y, [x, *layer.parameters()], grad)
        wanted = [x2] if reference.gamma is None else [x2, reference.gamma, reference.beta]
        theirs = torch.autograd.grad(expected, wanted, grad)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, rtol=1e-7, atol=1e-7 * max(1.0, b.abs().max().item()))
        assert_close(layer.running_mean, reference.mu, **EXACT)
        assert_close(layer.running_var, reference.var, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_near_the_reference(dtype):
    """Inputs in float32, bfloat16 and float16 with float32 statistics stay within their rounding."""
    layer = _randomise(BatchRenorm2d(3))
    reference = Reference(layer)
    x = (torch.randn(4, 3, 9, 7) * 2 + 1).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    assert_close(y.double(), reference(x.double()), rtol=tolerance, atol=tolerance)
    assert_close(layer.running_var.double(), reference.var, rtol=1e-5, atol=1e-5)


def test_double_backward_equals_the_reference():
    """A gradient penalty has the reference's gradients: r and d are constants there too."""
    layer = _a_layer(r_max=1.3, d_max=0.4)
    reference = Reference(layer)
    x = torch.randn(4, 3, 5, 5, dtype=torch.double, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    results = []
    for run, inputs in (
        (layer, [x, layer.weight, layer.bias]),
        (reference, [x2, reference.gamma, reference.beta]),
    ):
        first = torch.autograd.grad(run(inputs[0]).pow(3).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck_with_constant_corrections(affine):
    """With r and d held constant, first and second derivatives equal finite differences."""
    r, d = torch.tensor([0.5, 2.0]).double(), torch.tensor([0.3, -1.0]).double()

    def run(x, weight=None, bias=None):
        mean, var = batch_moments(x.detach())
        return Renormalise.apply(x, weight, bias, mean, var, (var + 1e-5).rsqrt(), r, d, 1e-5, None)

    inputs = [torch.randn(3, 2, 4, dtype=torch.double, requires_grad=True)]
    inputs += [torch.randn(2, dtype=torch.double, requires_grad=True) for _ in range(2 if affine else 0)]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_gradcheck_notices_a_wrong_gradient():
    """The check above can fail: with corrections that follow x, finite differences disagree."""

    def run(x):
        mean, var = batch_moments(x.detach())
        return Renormalise.apply(x, None, None, mean, var, (var + 1e-5).rsqrt(), var, mean, 1e-5, None)

    x = torch.randn(3, 2, 4, dtype=torch.double, requires_grad=True)
    assert not torch.autograd.gradcheck(run, [x], raise_exception=False)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_closed_bounds_are_batch_norm(dims):
    """With r_max=1 and d_max=0 outputs, gradients and buffers are nn.BatchNorm's."""
    ours = LAYERS[dims](4, momentum=0.1, r_max=1, d_max=0, dtype=torch.double)
    theirs = STOCK[dims](4, dtype=torch.double)
    theirs.load_state_dict(_randomise(ours).state_dict())
    for _ in range(3):
        x = torch.randn(3, 4, *[5] * dims, dtype=torch.double, requires_grad=True)
        y, expected = ours(x), theirs(x)
        assert_close(y, expected, **EXACT)
        gradients = [
            torch.autograd.grad(out.pow(3).sum(), [x, m.weight, m.bias])
            for out, m in ((y, ours), (expected, theirs))
        ]
        assert_close(*gradients, **EXACT)
    assert_close(ours.state_dict(), theirs.state_dict(), **EXACT)


def test_unclipped_training_is_inference_with_the_statistics_before():
    """Where nothing is clipped, the training output equals eval with the pre-update statistics."""
    layer = _a_layer(r_max=1e9, d_max=1e9)
    before = copy.deepcopy(layer).eval()
    x = torch.randn(4, 3, 6, 6, dtype=torch.double) * 4 + 2
    assert_close(layer(x), before(x), **EXACT)


def test_clipped_training_is_not_inference():
    """The claim above is not vacuous: with bounds in force the two differ."""
    layer = _a_layer(r_max=1.1, d_max=0.1)
    before = copy.deepcopy(layer).eval()
    x = torch.randn(4, 3, 6, 6, dtype=torch.double) * 4 + 2
    assert (layer(x) - before(x)).abs().max() > 0.1


@pytest.mark.parametrize("momentum", [0.01, None])
def test_a_fresh_layers_first_batch_is_batch_norm(momentum):
    """A layer that has seen nothing normalises and tracks its first batch as nn.BatchNorm does."""
    ours = BatchRenorm2d(3, momentum=momentum, dtype=torch.double)
    theirs = nn.BatchNorm2d(3, momentum=momentum, dtype=torch.double)
    x = torch.randn(4, 3, 6, 6, dtype=torch.double) * 4 + 2
    assert_close(ours(x), theirs(x), **EXACT)
    assert_close(ours.state_dict(), theirs.state_dict(), **EXACT)
    assert (ours(x * 2) - theirs(x * 2)).abs().max() > 0.1


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_eval_is_batch_norm_to_the_bit(dims, affine):
    """In eval the output has the same bits as nn.BatchNorm's."""
    ours = _randomise(LAYERS[dims](4, affine=affine)).eval()
    theirs = STOCK[dims](4, affine=affine).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, *[5] * dims)
    assert torch.equal(ours(x), theirs(x))


def test_without_running_statistics_it_is_batch_norm():
    """With track_running_stats=False training and eval are nn.BatchNorm's, and nothing is in the way."""
    ours, theirs = (k(3, track_running_stats=False) for k in (BatchRenorm2d, nn.BatchNorm2d))
    x = torch.randn(2, 3, 4, 4)
    for training in (True, False):
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_an_empty_batch_is_batch_norms(shape):
    """An empty batch gives an empty output, zero gradients and BatchNorm's buffers."""
    ours, theirs = BatchRenorm2d(3), nn.BatchNorm2d(3)
    x = torch.zeros(shape, requires_grad=True)
    for layer in (ours, theirs):
        layer(x).sum().backward()
    assert_close(ours.state_dict(), theirs.state_dict())
    assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("tracked", [True, False])
def test_one_value_per_channel_is_refused_as_by_batch_norm(tracked):
    """One value per channel raises BatchNorm's error in training and changes no statistic."""
    ours, theirs = (k(3, track_running_stats=tracked) for k in (BatchRenorm2d, nn.BatchNorm2d))
    x = torch.ones(1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel") as error:
        theirs(x)
    with pytest.raises(ValueError, match="more than 1 value per channel") as our_error:
        ours(x)
    assert str(our_error.value) == str(error.value)
    assert not tracked or ours.num_batches_tracked == 0
    assert not tracked or ours.eval()(x).shape == x.shape


@pytest.mark.parametrize(("dims", "rank"), [(1, 4), (2, 3), (2, 5), (3, 4)])
def test_other_ranks_are_refused_as_by_batch_norm(dims, rank):
    """An input of another rank raises BatchNorm's error."""
    x = torch.ones(*[2] * rank)
    with pytest.raises(ValueError, match="expected") as error:
        STOCK[dims](2)(x)
    with pytest.raises(ValueError, match="expected") as our_error:
        LAYERS[dims](2)(x)
    assert str(our_error.value) == str(error.value)


def test_a_wrong_channel_count_is_named():
    """An input with another number of channels raises a ValueError with both numbers."""
    with pytest.raises(ValueError, match=r"3 channels.*5 channels"):
        BatchRenorm2d(3)(torch.ones(2, 5, 4, 4))


@pytest.mark.parametrize("bounds", [{"r_max": 0.5}, {"d_max": -1.0}, {"r_max": math.nan}])
def test_impossible_bounds_are_refused(bounds):
    """Bounds that cross are refused when the layer is made."""
    with pytest.raises(ValueError, match="r_max"):
        BatchRenorm2d(3, **bounds)


@pytest.mark.parametrize("given", ["both", "weight", "bias", "neither"])
def test_normalize_uses_the_given_affine(given):
    """`normalize` normalises with the affine it is given, in training and in eval, with gradients."""
    x = torch.randn(4, 3, 5, 5, dtype=torch.double)
    weight = torch.randn(3, dtype=torch.double, requires_grad=True) if given in ("both", "weight") else None
    bias = torch.randn(3, dtype=torch.double, requires_grad=True) if given in ("both", "bias") else None
    affine = [v for v in (weight, bias) if v is not None]
    for training in (True, False):
        plain = _a_layer(affine=False).train(training)
        same = copy.deepcopy(plain)
        w = 1 if weight is None else weight[:, None, None]
        b = 0 if bias is None else bias[:, None, None]
        expected = plain(x) * w + b
        y = same.normalize(x, weight, bias)
        assert_close(y, expected, **EXACT)
        if affine:
            ours, theirs = (torch.autograd.grad(out.pow(2).sum(), affine) for out in (y, expected))
            assert_close(ours, theirs, **EXACT)


def test_no_functional_batch_norm_is_called():
    """The layers call torch.batch_norm below nn.functional, so a census counts no call of theirs."""

    class Census(torch.overrides.TorchFunctionMode):
        seen: list = []  # noqa: RUF012

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    layer = _randomise(BatchRenorm2d(3))
    with Census() as census:
        layer(torch.randn(2, 3, 4, 4))
        layer.eval()(torch.randn(2, 3, 4, 4))
        nn.functional.relu(torch.ones(1))
    assert nn.functional.batch_norm not in census.seen
    assert nn.functional.relu in census.seen


def test_large_mean_keeps_the_variance():
    """At mean / sd = 1000 the float32 statistics are right to 1e-4; E[x²] - E[x]² is off by percents."""
    layer = BatchRenorm2d(1, momentum=1.0)
    x = torch.randn(4, 1, 64, 64) + 1000
    layer(x)
    exact = x.double().var()
    assert abs(layer.running_var.item() / exact - 1) < 1e-4
    naive = (x.square().mean() - x.mean().square()).item()
    assert abs(naive / exact - 1) > 1e-3


# known bugs of other implementations, each by name


@pytest.mark.parametrize("n", [1, 2, 8])
def test_bessel_counts_batch_and_space_unlike_torchrl(n):
    """Bessel's factor is m/(m-1), m = batch x space; torchrl's, of the batch alone, is 2 at batch 2."""
    layer = BatchRenorm2d(1, momentum=1.0, dtype=torch.double)
    x = torch.randn(n, 1, 16, 16, dtype=torch.double)
    layer(x)
    assert_close(layer.running_var, x.var().reshape(1), **EXACT)


def test_bessel_does_not_count_channels_unlike_corenet():
    """One channel gives a finite running variance; corenet's factor c/(c-1) is infinite there."""
    layer = BatchRenorm1d(1)
    layer(torch.randn(8, 1, 5))
    assert layer.running_var.isfinite().all()


def test_corrections_stay_within_bounds_for_ever_unlike_torchrl():
    """Long after any ramp r and d are still within r_max and d_max; torchrl's factor grows past 1."""
    layer = BatchRenorm2d(2, momentum=0.0, affine=False, r_max=2.0, d_max=1.0, dtype=torch.double)
    layer.set_statistics_(torch.zeros(2), torch.full((2,), 0.01))
    layer.num_batches_tracked.fill_(10**7)
    x = torch.randn(4, 2, 8, 8, dtype=torch.double) * 5 + 100
    y = layer(x)
    assert_close(y.mean((0, 2, 3)), torch.ones(2, dtype=torch.double), rtol=1e-5, atol=1e-5)
    assert_close(y.std((0, 2, 3), correction=0), torch.full((2,), 2.0, dtype=torch.double), **SINGLE)


def test_statistics_are_saved_unlike_avalanche():
    """Running statistics are buffers: saved, and moved with the module."""
    layer = _randomise(BatchRenorm2d(3))
    assert {"running_mean", "running_var"} <= layer.state_dict().keys()
    assert layer.double().running_mean.dtype == torch.double


def test_eval_does_not_update_unlike_mf1024():
    """Eval leaves the statistics alone."""
    layer = _a_layer().eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(4, 3, 5, 5, dtype=torch.double))
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_eps_is_inside_the_root_unlike_ludvb():
    """A constant channel under unit statistics: r = sqrt(eps)/sqrt(1+eps), clipped to 1/r_max."""
    layer = BatchRenorm2d(1, eps=0.25, r_max=1e6, d_max=1e6, affine=False, dtype=torch.double)
    layer.set_statistics_(torch.zeros(1), torch.ones(1))
    x = torch.randn(2, 1, 5, 5, dtype=torch.double)
    assert_close(layer(x), x / math.sqrt(1.25), **EXACT)


def test_affine_comes_after_the_corrections_unlike_tensorpack():
    """Corrections act before weight and bias: with weight 2 and bias 1 the output is 2 (xhat r + d) + 1."""
    layer = _a_layer(r_max=1.5, d_max=0.5)
    bare = copy.deepcopy(layer)
    x = torch.randn(4, 3, 5, 5, dtype=torch.double)
    plain = bare.normalize(x, None, None)
    assert_close(layer(x), plain * layer.weight[:, None, None] + layer.bias[:, None, None], **EXACT)


def test_channels_last_is_kept_unlike_ludvb():
    """Output and input gradient keep the channels_last layout."""
    layer = _randomise(BatchRenorm2d(3))
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_equals_torchrl_where_that_is_right():
    """After torchrl's warm-up, on (n, c) with momentum 0, both give the same output and gradient."""
    modules = pytest.importorskip("torchrl.modules")
    ours = _randomise(BatchRenorm1d(4, dtype=torch.double, r_max=1.5, d_max=0.5))
    theirs = modules.BatchRenorm1d(4, warmup_steps=0, max_r=1.5, max_d=0.5).double()
    theirs.running_mean.copy_(ours.running_mean)
    theirs.running_var.copy_(ours.running_var)
    x = torch.randn(64, 4, dtype=torch.double, requires_grad=True)
    expected = theirs(x) * ours.weight + ours.bias
    y = ours(x)
    assert_close(y, expected, rtol=1e-4, atol=1e-4)  # torchrl adds eps to the standard deviation
    gradients = [torch.autograd.grad(out.pow(2).sum(), x) for out in (y, expected)]
    assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_it_is_not_torchs_batch_norm():
    """update_bn and convert_sync_batchnorm look for _BatchNorm, and must not find these layers."""
    for kind in (*LAYERS.values(), SyncBatchRenorm2d):
        assert not issubclass(kind, nn.modules.batchnorm._BatchNorm)
    layer = _randomise(BatchRenorm2d(3))
    before = copy.deepcopy(layer.state_dict())
    assert nn.SyncBatchNorm.convert_sync_batchnorm(layer) is layer
    torch.optim.swa_utils.update_bn([torch.randn(2, 3, 4, 4)], layer)
    assert_close(layer.state_dict(), before)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (2, 3, 40), (2, 3, 3, 5, 7), (1, 2, 33, 31)])
@pytest.mark.parametrize("mean", [0.0, -1000.0])
def test_moments_in_float32_are_those_of_float64(shape, mean):
    """Long rows and short, contiguous and not, give float64's moments to float32's rounding."""
    x = torch.randn(shape) * 2 + mean
    dims = [d for d in range(x.ndim) if d != 1]
    var, expected = torch.var_mean(x.double(), dims, correction=0)
    for laid_out in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        moments = batch_moments(laid_out)
        assert_close(moments[0].double(), expected, rtol=1e-6, atol=1e-6)
        assert_close(moments[1].double(), var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bounds", [(math.inf, math.inf), (1e30, 1e30)])
def test_infinite_bounds_leave_a_fresh_layer_batch_norm(bounds):
    """Without bounds a fresh layer's first batch is batch norm's, and its second inference's."""
    layer = BatchRenorm2d(3, r_max=bounds[0], d_max=bounds[1], dtype=torch.double)
    x = torch.randn(4, 3, 8, 8, dtype=torch.double) * 3 + 1
    assert_close(layer(x), nn.BatchNorm2d(3, dtype=torch.double)(x), **EXACT)
    before = copy.deepcopy(layer).eval()
    assert_close(layer(x), before(x), **EXACT)


def test_nothing_of_the_inputs_size_is_kept_beyond_batch_norm():
    """Backward keeps x and vectors of one value per channel, as few bytes as nn.BatchNorm within six vectors."""
    kept = []
    for layer in (nn.BatchNorm2d(3), _randomise(BatchRenorm2d(3))):
        storages = {}

        def pack(saved, storages=storages):
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        x = torch.randn(4, 3, 16, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            y = layer(x)
        assert y.requires_grad
        kept.append(sum(storages.values()))
    assert kept[1] - kept[0] <= 6 * 3 * 4


def test_a_held_layer_is_as_in_eval_whatever_its_mode():
    """Holding changes no mode, so neither does whoever puts modes back while it is held; released, it trains."""
    layer, x = BatchRenorm2d(2), torch.randn(2, 2, 8, 8)
    layer(x)
    expected, mean = copy.deepcopy(layer).eval()(x), layer.running_mean.clone()
    layer.hold_()
    assert layer.train().training
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.running_mean, mean)
    layer.hold_(False)
    layer(x)
    assert not torch.equal(layer.running_mean, mean)
