"""convert: every kind of norm through the same contracts, and planted mistakes that the proof must catch."""

import copy
import pickle
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from optional import needs_newer_torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

import normfix
from normfix.layers.base import ChannelNorm
from normfix.records.plans import Action, Means

SIZE = (96, 128)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def stack(*norms: nn.Module) -> nn.Sequential:
    """Conv and norm in turn on 8 channels, a strided level inside, a head."""
    layers: list[nn.Module] = [conv(1, 8)]
    for norm in norms:
        layers += [norm, nn.ReLU(), conv(8, 8)]
    return nn.Sequential(*layers, nn.MaxPool2d(2), conv(8, 8), nn.Upsample(scale_factor=2), conv(8, 2))


def randomised(model: nn.Module) -> nn.Module:
    """Give every affine map and running statistic values that a mistake cannot hide behind."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.copy_(
                torch.rand_like(tensor) * 1.5 + 0.3
                if "running_mean" not in name
                else torch.randn_like(tensor)
            )
    return model


class Twice(nn.Module):
    """Calls one norm on two different maps: it needs two statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = conv(1, 8), conv(8, 8), nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x) + 3))
        return self.norm(self.second(x))


class Aliased(nn.Module):
    """Holds one norm under three names and calls it once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(1, 8), nn.InstanceNorm2d(8, affine=True)
        self.same, self.others = self.norm, nn.ModuleList([self.norm])

    def forward(self, x: Tensor) -> Tensor:
        return self.others[0](self.conv(x))


class Functional(nn.Module):
    """Normalises by function calls, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(1, 8), conv(8, 8)
        self.gain, self.offset = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.instance_norm(self.first(x), weight=self.gain, bias=self.offset)
        return F.group_norm(self.second(x), 2, self.gain, self.offset) + F.group_norm(x, 4)


class NormAct(nn.GroupNorm):
    """A subclass whose forward does more than its base, as timm's fused layers do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class BatchAct(nn.BatchNorm2d):
    """A batch norm with a fused activation: replacing the module would lose it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Keyword(nn.Module):
    """Hands a norm its operand by keyword, and would swallow exceptions that end a pass early."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(1, 8), nn.InstanceNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.norm(input=self.conv(x))
        except Exception:  # noqa: BLE001 - what real networks do
            return self.conv(x)


class SharedBlock(nn.Module):
    """A block with a norm, run twice: the calls share owner and index, but not statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.block = conv(1, 8), nn.Sequential(conv(8, 8), nn.GroupNorm(2, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.head(x)) * 2 - 1)


def shared_in_sequential() -> nn.Sequential:
    """The simplest shared norm: a container runs whatever it holds, so nothing may be added to it."""
    norm = nn.GroupNorm(2, 8)
    return nn.Sequential(conv(1, 8), norm, nn.ReLU(), conv(8, 8), norm, conv(8, 2))


class Listed(nn.ModuleList):
    """A container with a forward of its own that normalises by function and runs all it holds."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = F.instance_norm(layer(x))
        return x


def constant_layer_norm(shape: tuple[int, ...]) -> nn.LayerNorm:
    norm = nn.LayerNorm(shape)
    with torch.no_grad():
        norm.weight.copy_((torch.rand(shape[0], 1, 1) + 0.5).expand(shape))
        norm.bias.copy_(torch.randn(shape[0], 1, 1).expand(shape))
    return norm


class Network(nn.Module):
    """A U-Net with 14 norms of one kind."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()

        def level(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                conv(inputs, outputs),
                norm(outputs),
                nn.ReLU(),
                conv(outputs, outputs),
                norm(outputs),
                nn.ReLU(),
            )

        widths = (4, 8, 8, 8)
        self.down = nn.ModuleList(level(i, o) for i, o in zip((1, *widths), widths, strict=False))
        self.up = nn.ModuleList(level(widths[i] + widths[i - 1], widths[i - 1]) for i in (3, 2, 1))
        self.head = conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for number, level in enumerate(self.down):
            x = level(x if number == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for level, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return self.head(x)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "instance": lambda: stack(nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True)),
    "instance tracked": lambda: stack(nn.InstanceNorm2d(8, track_running_stats=True), nn.InstanceNorm2d(8)),
    "group": lambda: stack(nn.GroupNorm(2, 8), nn.GroupNorm(1, 8), nn.GroupNorm(8, 8)),
    "group without affine": lambda: stack(nn.GroupNorm(2, 8, affine=False)),
    "batch": lambda: stack(nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)),
    "batch without statistics": lambda: stack(nn.BatchNorm2d(8, track_running_stats=False)),
    "sync batch": lambda: stack(nn.SyncBatchNorm(8)),
    "layer over channels and space": lambda: stack(nn.LayerNorm((8, *SIZE), elementwise_affine=False)),
    "layer with constant affine": lambda: stack(constant_layer_norm((8, *SIZE))),
    "lazy": lambda: stack(nn.LazyInstanceNorm2d(affine=True), nn.LazyBatchNorm2d()),
    "root": lambda: nn.InstanceNorm2d(1, affine=True),
    "called twice": Twice,
    "called by keyword": Keyword,
    "aliased": Aliased,
    "shared in a sequential": shared_in_sequential,
    "container with a forward": lambda: Listed([conv(1, 8), conv(8, 8), conv(8, 2)]),
    "functional": Functional,
    "fused subclass": lambda: stack(NormAct(2, 8)),
    "fused batch subclass": lambda: stack(BatchAct(8)),
    "block run twice": SharedBlock,
    "unet of 14 instance norms": lambda: Network(lambda c: nn.InstanceNorm2d(c, affine=True)),
    "unet of 14 group norms": lambda: Network(lambda c: nn.GroupNorm(2, c)),
}
EVERY_NETWORK = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.zoo if "of 14" in n else ()) for n in BUILDERS]
)
BOTH = pytest.mark.parametrize("to", ["frozen", "batchrenorm"])


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = BUILDERS[name]()
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        return model
    return randomised(model).train(False)


def image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an image whose halves differ in brightness and contrast, so that tiles differ from the whole."""
    size = size or SIZE
    x = torch.rand(1, 1, *size, dtype=dtype)
    x[..., size[-1] // 2 :] = x[..., size[-1] // 2 :] * 3 + 1
    return x


@cache
def converted(name: str, to: str = "frozen") -> tuple[normfix.Conversion, Tensor]:
    """Convert once for all tests that only look, or that copy first; returned with the image."""
    torch.manual_seed(2)
    x = image()
    return normfix.convert(build(name), x, to), x


@pytest.mark.slow
@BOTH
@EVERY_NETWORK
def test_proof_passes(name: str, to: str) -> None:
    """Every kind of norm is converted both ways, and all steps of the proof pass."""
    done, _ = converted(name, to)
    assert done.proof.passed, done.proof.steps
    assert done.plan.converted
    assert not done.plan.left_live


@pytest.mark.slow
@BOTH
@EVERY_NETWORK
def test_equals_original_in_float64(name: str, to: str) -> None:
    """In float64 the converted network equals the original on the calibration image to 1e-10 sd."""
    model, x = build(name), image(dtype=torch.float64)
    done = normfix.convert(model.double(), x, to)
    with torch.no_grad():
        expected, actual = done.original.eval()(x), done.model.eval()(x)
    assert float((actual - expected).abs().max() / expected.std()) <= 1e-10


@pytest.mark.slow
@EVERY_NETWORK
def test_statistics_stay_frozen_elsewhere(name: str) -> None:
    """On a crop, the converted network gives the crop of what it gives on the whole, where halo allows."""
    model, wide = converted(name)[0].model, image(64, 192)
    with torch.no_grad():
        whole, part = model(wide), model(wide[..., 64:])
    # 64 is a multiple of every stride here, and 60 exceeds every halo but that of the U-Nets
    if "unet" not in name:
        assert_close(whole[..., 124:], part[..., 60:], rtol=0, atol=1e-4)


@pytest.mark.slow
@EVERY_NETWORK
def test_caller_keeps_model(name: str) -> None:
    """The caller's model is deep-equal to what it was: weights, modes, hooks, classes."""
    model = build(name).train()
    before = fingerprint(model)
    normfix.convert(model, image(), "batchrenorm")
    assert fingerprint(model) == before


def fingerprint(model: nn.Module) -> list[object]:
    """Describe everything that a conversion could change in a model."""
    return [
        (path, type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules(remove_duplicate=False)
    ] + [
        (key, None if isinstance(t, nn.UninitializedParameter | nn.UninitializedBuffer) else t.tolist())
        for key, t in model.state_dict().items()
    ]


@pytest.mark.slow
@EVERY_NETWORK
def test_class_and_keys_stay(name: str) -> None:
    """The result is of the caller's class and has all keys of the original's state dict."""
    done, _ = converted(name)
    if name != "root":  # there the root itself is the norm
        assert isinstance(done.model, type(done.original))
        assert type(done.model).__name__ == type(done.original).__name__
    assert done.original.state_dict().keys() <= done.model.state_dict().keys()


@pytest.mark.slow
@BOTH
@EVERY_NETWORK
def test_survives_copies(name: str, to: str) -> None:
    """A deep copy and a pickle of the converted network give the same output."""
    done, x = converted(name, to)
    model = done.model
    with torch.no_grad():
        expected = model(x)
        assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)
        assert_close(pickle.loads(pickle.dumps(model))(x), expected, rtol=0, atol=0)


@pytest.mark.slow
@BOTH
@EVERY_NETWORK
def test_trains_afterwards(name: str, to: str) -> None:
    """The converted network has finite gradients in train mode, and frozen statistics do not move."""
    model = copy.deepcopy(converted(name, to)[0].model).train()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    model(image()).square().mean().backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad
    )
    if to == "frozen":  # an owner's own counter may count, the statistics may not move
        assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers() if v.is_floating_point())


@pytest.mark.slow
@needs_newer_torch("strict torch.export does not follow intercepted norms, and NF207 stops it")
@pytest.mark.parametrize("name", ["called twice", "functional", "block run twice", "fused subclass"])
def test_intercepted_exports(name: str) -> None:
    """Networks with interceptions compile as one graph and export, with unchanged output on another input."""
    x, other = image(), image() * 2
    model = normfix.convert(build(name), x).model.eval()
    with torch.no_grad():
        expected = model(other)
        exported = torch.export.export(model, (x,)).module()(other)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(other)
    assert_close(exported, expected)
    assert_close(compiled, expected)


@pytest.mark.slow
def test_batchnorm_is_bit_identical() -> None:
    """A BatchNorm with running statistics keeps its eval output to the bit, without any image."""
    model, x = build("batch"), image()
    for to in ("frozen", "batchrenorm"):
        done = normfix.convert(model, to=to)
        assert done.proof.passed
        with torch.no_grad():
            assert torch.equal(done.model.eval()(x), model(x))


def test_group_affine_is_reexpressed() -> None:
    """BatchRenorm from group statistics has w' = w s_c / s_g and b' = b + w (m_c - m_g) / s_g."""
    torch.manual_seed(1)
    model = nn.Sequential(conv(1, 8), randomised(nn.GroupNorm(2, 8))).double()
    x = image(dtype=torch.float64)
    norm = normfix.convert(model, x, "batchrenorm").model[1]
    y = model[0](x).detach()
    m_c, v_c = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    groups = y.reshape(2, -1)
    m_g, v_g = (s.repeat_interleave(4) for s in (groups.mean(1), groups.var(1, correction=0)))
    s_c, s_g = (v_c + 1e-5).sqrt(), (v_g + 1e-5).sqrt()
    assert_close(norm.running_mean, m_c)
    assert_close(norm.running_var, v_c)
    assert_close(norm.weight.detach(), model[1].weight.detach() * s_c / s_g)
    assert_close(norm.bias.detach(), model[1].bias.detach() + model[1].weight.detach() * (m_c - m_g) / s_g)


def test_as_trained() -> None:
    """A network used in train mode is converted to what it gives there, not to its running statistics."""
    model, x = build("batch"), image()
    done = normfix.convert(model, x, as_trained=True)
    assert done.proof.passed
    with torch.no_grad():
        assert_close(done.model.eval()(x), copy.deepcopy(model).train()(x), rtol=0, atol=1e-4)
        assert not torch.allclose(done.model.eval()(x), model(x), atol=1e-2)


@pytest.mark.slow
def test_several_images_are_not_one() -> None:
    """With several images statistics are consistent, and the report says that predictions moved."""
    images = [image(), image(64, 64) * 4, image(160, 96) - 2]
    done = normfix.convert(build("unet of 14 instance norms"), images)
    assert done.proof.passed
    assert done.calibration is not None
    assert max(s.mean_shift for s in done.calibration.summary.sites) <= 1e-6
    assert all(abs(r - 1) <= 1e-6 for s in done.calibration.summary.sites for r in s.variance_ratio)
    assert len(done.proof.shifts) == 3
    assert max(s.max_sd for s in done.proof.shifts) > 0.1


def test_images_needed() -> None:
    """A live norm without an image is refused with its path and what to do."""
    with pytest.raises(normfix.NormfixError, match=r"NF203 1 \(.*InstanceNorm2d\).*--keep '1'"):
        normfix.convert(build("instance"))


def test_keep_leaves_live_and_fails() -> None:
    """A kept live norm is named, and tile exactness is not claimed."""
    done = normfix.convert(build("instance"), image(), keep=("4",))
    step = done.proof.step("tiles")
    assert step.status == "failed"
    assert "4/0/instance_norm/0" in step.note
    assert isinstance(done.model[4], nn.InstanceNorm2d)


def test_refuses_pixelwise_layer_norm() -> None:
    """A LayerNorm whose affine map differs between pixels is refused with the reason."""
    model = stack(nn.LayerNorm((8, *SIZE)))
    with torch.no_grad():
        model[1].weight.copy_(torch.rand(8, *SIZE))
    decided = normfix.plan(normfix.scan(model, image()))
    (refused,) = [d for d in decided.decisions if d.action is Action.REFUSE]
    assert "pixel to pixel" in refused.reason


@pytest.mark.slow
def test_a_pool_that_gates_is_frozen_and_one_that_ends_is_not() -> None:
    """A pool that gates a map is live and frozen, while a classifier's final pool is not live."""

    class Excite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = conv(1, 4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()

    (site,) = normfix.scan(Excite(), image()).live
    assert (site.owner, site.function, site.convertible) == ("", "mean", True)
    assert normfix.convert(Excite(), image()).proof.passed
    classifier = nn.Sequential(conv(1, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert normfix.scan(classifier, image()).live == ()


def test_weight_standardisation_is_no_site() -> None:
    """A batch norm of weights is not live and not converted."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
            return F.conv2d(x, flat.reshape_as(self.weight), self.bias, padding=1)

    model = nn.Sequential(Standardised(1, 8, 3), nn.GroupNorm(2, 8))
    done = normfix.convert(model, image())
    assert done.proof.passed
    assert [d.means for d in done.plan.decisions] == [Means.NONE, Means.SWAP]


@pytest.mark.slow
def test_plan_of_another_network_is_refused() -> None:
    """A plan whose sites are not the network's is refused with the first difference."""
    decided = normfix.plan(normfix.scan(build("instance"), image()))
    with pytest.raises(normfix.NormfixError, match="NF205"):
        normfix.convert(build("called twice"), image(), to=decided)


def test_lost_interception_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interception that is silently not made fails the proof, though the calibration image cannot show it."""
    monkeypatch.setattr("normfix.conversion.rewriting.intercept_", lambda owner, intercepts: None)
    with pytest.raises(normfix.NormfixError, match="NF301"):
        normfix.convert(build("functional"), image())


@pytest.mark.slow
def test_swapped_statistic_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics stored at the wrong channels fail identity and residual."""
    from normfix.conversion import rewriting
    from normfix.layers.moments import Moments

    store = rewriting._store

    def rolled(layer: ChannelNorm, m: Moments) -> None:
        store(layer, Moments(m.count, m.mean.roll(1), m.m2.roll(1)))

    monkeypatch.setattr(rewriting, "_store", rolled)
    done = normfix.convert(build("instance"), image())
    assert done.proof.step("identity").status == "failed"
    assert done.proof.step("residual").status == "failed"


@pytest.mark.slow
def test_dropped_affine_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap that forgets gamma and beta fails the identity."""
    monkeypatch.setattr("normfix.conversion.rewriting._take_affine", lambda new, old, decision: None)
    done = normfix.convert(build("group"), image())
    assert done.proof.step("identity").status == "failed"


def test_changed_neighbour_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that touches a weight elsewhere fails, however little."""
    from normfix.api import conversion
    from normfix.conversion import rewriting

    def careless(model: nn.Module, plan: normfix.Plan) -> nn.Module:
        result = rewriting.rewrite_(model, plan)
        with torch.no_grad():
            result[0].weight.mul_(1 + 1e-6)
        return result

    monkeypatch.setattr(conversion, "rewrite_", careless)
    done = normfix.convert(build("instance"), image())
    assert done.proof.step("untouched").status == "failed"


def test_instance_forward_is_refused() -> None:
    """A forward set on the instance would bypass interception without a word, so it is refused by name."""
    model = build("functional")
    model.forward = model.forward
    done = normfix.convert(model, image())
    assert not done.proof.passed
    assert all("set on the instance" in decision.reason for decision in done.plan.left_live)
    assert done.plan.left_live


def test_other_calls_at_run_time_raise() -> None:
    """If the calls at run time differ from the plan, the converted network stops and names the site."""

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mood = conv(1, 4), True

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return F.instance_norm(x) if self.mood else x

    model = normfix.convert(Moody(), image()).model
    model.mood = False
    with pytest.raises(normfix.NormfixError, match=r"NF207 \(root\)/0/instance_norm/0"):
        model(image())


@pytest.mark.slow
def test_frozen_batchnorm_stays_as_it_was() -> None:
    """A BatchNorm that the user froze keeps eval mode and frozen weights through a conversion."""
    model = stack(nn.BatchNorm2d(8), nn.InstanceNorm2d(8)).train()
    model[1].eval().requires_grad_(False)
    kept = normfix.convert(model, image(), keep=("1",)).model
    assert not kept[1].training
    assert not kept[1].weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_the_result_is_in_eval_mode_and_train_mode_is_said(caplog, training) -> None:
    """In train mode one prediction would change what was proved; the caller's network stays as it is."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.Dropout(0.5)).train(
        training
    )
    whole = image()
    done = normfix.convert(model, whole, to="batchrenorm")
    assert not any(module.training for module in done.model.modules())
    assert torch.equal(done.model(whole), done.model(whole))
    assert ("train mode" in caplog.text) == model.training == training


@pytest.mark.slow
def test_hooks_are_carried_over() -> None:
    """A forward hook on a norm still runs on its replacement, once per call."""
    model, seen = build("instance"), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    done = normfix.convert(model, image())
    seen.clear()
    done.model(image())
    assert seen == ["FrozenNorm2d"]


@pytest.mark.slow
@BOTH
def test_a_norm_keeps_the_modules_that_its_hooks_run(to: str) -> None:
    """What hooks add to a norm, modules and its own attributes included, stays in place, with its weights."""
    model, x = build("instance"), image()
    channels = model[1].num_features
    model[1].add_module("film", nn.Conv2d(channels, channels, 1))
    model[1].register_forward_hook(lambda norm, _, output: norm.film(output) / norm.num_features)
    done = normfix.convert(model, x, to)
    assert done.proof.passed
    assert model.state_dict().keys() <= done.model.state_dict().keys()
    assert done.plan.decisions[0].means is Means.INTERCEPT
    with torch.no_grad():
        assert_close(done.model.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


class Reading(nn.Module):
    """A network that reads what its norm was built with, and a factor that was written on it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = conv(1, 8), nn.GroupNorm(4, 8), conv(8, 2)
        self.norm.factor = 1.5

    def forward(self, x: Tensor) -> Tensor:
        """Give one output for each pixel."""
        y = self.norm(self.inner(x)) * self.norm.factor
        return self.outer(y.unflatten(1, (self.norm.num_groups, -1)).flip(2).flatten(1, 2))


@pytest.mark.slow
@BOTH
def test_attributes_of_a_norm_can_still_be_read(to: str) -> None:
    """What the network reads of a norm beside calling it is read of its replacement, in copies too."""
    model, x = randomised(Reading()), image()
    done = normfix.convert(model, x, to)
    assert done.proof.passed
    assert done.plan.decisions[0].means is Means.SWAP
    with torch.no_grad():
        assert_close(copy.deepcopy(done.model).eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


class Listing(nn.Module):
    """A network that calls its norms as it listed them beside registering them, and one under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = conv(1, 8), conv(8, 2)
        self.listed, self.named = [], {}
        for number in range(2):
            norm = nn.GroupNorm(4, 8)
            setattr(self, f"norm{number}", norm)
            self.listed.append((number, norm))
        self.last = nn.InstanceNorm2d(8, affine=True)
        self.named["last"] = [self.last]

    def forward(self, x: Tensor) -> Tensor:
        """Give two channels for each pixel."""
        y = self.inner(x)
        for _, norm in self.listed:
            y = norm(y).relu() + y
        return self.outer(self.named["last"][0](y))


@pytest.mark.slow
@BOTH
def test_norms_that_a_network_lists_beside_registering_them_are_replaced_there_too(to: str) -> None:
    """Lists, tuples and dictionaries hold the replacements, those of the caller's network its own norms."""
    model, x = randomised(Listing()), image()
    before = [norm for _, norm in model.listed]
    done = normfix.convert(model, x, to)
    assert done.proof.passed
    assert [d.means for d in done.plan.decisions] == [Means.SWAP] * 3
    assert done.model.named["last"][0] is done.model.last
    assert all(a is b for (_, a), b in zip(model.listed, before, strict=True))
    with torch.no_grad():
        assert_close(done.model.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)
        lowered = normfix.lower(done.model).model
        assert_close(lowered(x), model(x), rtol=1e-4, atol=1e-4)


class Asking(nn.Module):
    """A network that asks what class its norm is of: others it leaves out, does not know, or scales."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = conv(1, 8), nn.GroupNorm(4, 8), conv(8, 2)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        """Give two channels for each pixel."""
        y = self.inner(x)
        if isinstance(self.norm, nn.GroupNorm):
            return self.outer(self.norm(y))
        if self.other == "unknown":
            raise TypeError(type(self.norm))
        return self.outer(y if self.other == "left out" else 3 * self.norm(y))


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("other", ["left out", "unknown"])
def test_a_norm_whose_class_counts_stays_what_it_is(to: str, other: str) -> None:
    """Its call is intercepted; that of a norm beside it whose class nobody asks for is as well."""
    model, x = randomised(nn.Sequential(Asking(other), nn.GroupNorm(1, 2))), image()
    done = normfix.convert(model, x, to)
    assert done.proof.passed
    assert [d.means for d in done.plan.decisions] == [Means.INTERCEPT] * 2
    assert isinstance(done.model[0].norm, nn.GroupNorm)
    with torch.no_grad():
        assert_close(done.model.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_network_that_computes_otherwise_for_another_class_does_not_pass() -> None:
    """It runs, and calls its norm once: what it gives tells."""
    assert normfix.convert(randomised(Asking("scaled")), image()).proof.step("identity").status == "failed"


@pytest.mark.slow
def test_a_pruned_norm_is_converted() -> None:
    """A norm whose weight pruning computes before each call keeps computing it, and equals the original."""
    model, x = build("instance"), image()
    model[1] = nn.InstanceNorm2d(model[1].num_features, affine=True)
    prune.random_unstructured(model[1], "weight", 0.5)
    done = normfix.convert(model, x)
    assert done.proof.passed
    assert any("weight_orig" in name for name, _ in done.model.named_parameters())
    with torch.no_grad():
        assert_close(done.model.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_calibrate_returns_a_copy_and_restores() -> None:
    """Recalibration on another image changes a copy, and back again equals the conversion."""
    x = image()
    done = normfix.convert(build("instance"), x)
    there = normfix.calibrate(done.model, x * 5 + 2)
    assert not torch.equal(there.model[1].running_mean, done.model[1].running_mean)
    back = normfix.calibrate(there.model, x)
    assert_close(back.model.state_dict(), done.model.state_dict())


def test_calibrates_plain_batchnorm() -> None:
    """A network that normfix did not convert gets its batch norms measured, consistently."""
    model, x = build("batch"), image()
    result = normfix.calibrate(model, x)
    y = model[0](x)
    assert_close(result.model[1].running_mean, y.mean((0, 2, 3)))
    assert_close(result.model[1].running_var, y.var((0, 2, 3), correction=0))


@pytest.mark.zoo
def test_predict_equals_original() -> None:
    """The product: stitched tiles of the converted network equal the original on the whole image."""
    model, x = build("unet of 14 instance norms"), image(256, 192, dtype=torch.float64)
    done = normfix.convert(model.double(), x)
    with torch.no_grad():
        expected = done.original.eval()(x)
        tiled_original = normfix.check(done.original, x, tile=64)
    stitched = normfix.predict(done.model, x, tile=64)
    assert float((stitched - expected).abs().max() / expected.std()) < 1e-10
    assert tiled_original.max_sd > 0.1


def test_predict_refuses_live() -> None:
    """Prediction with a live network is refused: its tiles would not be the whole image's."""
    with pytest.raises(normfix.NormfixError, match=r"NF409.*instance_norm"):
        normfix.predict(build("instance"), image())


def test_a_network_whose_copies_forget_eval_mode_is_proved_in_it():
    """A copy of torchvision's feature extractor is in train mode; the proof must not train its BatchRenorm."""
    from torchvision.models.feature_extraction import create_feature_extractor

    whole = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 1)
    )
    net = create_feature_extractor(whole.eval(), {"3": "map"}).eval()
    assert any(module.training for module in copy.deepcopy(net).modules())  # else nothing is tested
    image = torch.rand(1, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    assert normfix.convert(net, image, "batchrenorm", tile=32, output="map").proof.passed


class _CastsToHalf(nn.Module):
    """Computes in a half precision that it was built with, the norm in float32 if it is told so."""

    def __init__(self, dtype, *, careful):
        super().__init__()
        self.dtype, self.careful = dtype, careful
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1).to(dtype), nn.InstanceNorm2d(2, affine=True)
        self.head = nn.Conv2d(2, 1, 1).to(dtype)
        self.norm.to(torch.float32 if careful else dtype)

    def forward(self, x):
        y = self.conv(x.to(self.dtype))
        y = self.norm(y.float()) if self.careful else self.norm(y)
        return self.head(y.to(dtype=self.dtype))


@pytest.mark.parametrize(("dtype", "careful"), [(torch.bfloat16, False), (torch.float16, True)])
def test_a_network_that_casts_to_half_itself_is_converted(dtype, careful):
    """It is scanned in float32, in which its own casts to half are left out; it ran on nothing there."""
    torch.manual_seed(0)
    net = _CastsToHalf(dtype, careful=careful).eval()
    image = torch.rand(1, 1, 40, 48, generator=torch.Generator().manual_seed(0))
    done = normfix.convert(net, image)
    assert done.proof.passed
    assert [d.site.owner for d in done.plan.converted] == ["norm"]
    with torch.no_grad():
        whole = done.model(image.to(dtype))
    assert torch.equal(normfix.predict(done.model, image, 16), whole)
