"""Frozen statistics under all that people do with a model: copies, compilers, threads, training."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nasty import (
    ConvolutionalBlock,
    GlobalContext,
    HandNorm,
    InnerCheckpoint,
    Nasty,
    Nested,
    ResponseNorm,
    SqueezeExcite,
    SumOverExtent,
    SumOverNumel,
    Twice,
    TwoStepsMax,
)
from networks import TOLERANCE
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normfix
from normfix.errors import NormfixError
from normfix.layers import FrozenStatistic
from normfix.records.plans import Action

KINDS = (HandNorm, ResponseNorm, ConvolutionalBlock, GlobalContext, TwoStepsMax, SumOverExtent, Nested, Twice)
EVERY = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
IMAGE = torch.rand(1, 1, 96, 128, generator=torch.Generator().manual_seed(7))
OTHER = torch.randn(2, 1, 64, 96, generator=torch.Generator().manual_seed(8)) * 2


@pytest.fixture(scope="module")
def models():
    """Convert each kind once; tests copy what they change."""
    torch.manual_seed(0)
    return {kind: normfix.convert(kind(), IMAGE).model.eval() for kind in KINDS}


def output(model, x=OTHER):
    with torch.no_grad():
        return model(x)


@pytest.mark.slow
@EVERY
def test_copies_are_equal_to_the_bit(models, kind):
    """Deep copy, pickle and a strict reload give the same bits on another image and batch."""
    model = models[kind]
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        if isinstance(module, FrozenStatistic):
            module.value.zero_()
    fresh.load_state_dict(model.state_dict(), strict=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(output(copied), output(model))


class LinearAttention(Nasty):
    """Breaks tests by size: the product of keys and values over a small map has more elements than the map."""

    def __init__(self):
        super().__init__(deep=nn.Conv2d(4, 32, 1), back=nn.Conv2d(32, 4, 1))

    def body(self, x):
        y = self.deep(F.avg_pool2d(x, 16))
        tokens = y.flatten(2)
        mixed = (tokens @ tokens.mT).sigmoid() @ tokens
        return x + F.interpolate(self.back(mixed.view(y.shape)), scale_factor=16)


@pytest.mark.slow
def test_a_product_over_space_larger_than_the_map_is_frozen():
    """What no longer varies over space is a statistic however large: linear attention is converted and proved."""
    torch.manual_seed(0)
    done = normfix.convert(LinearAttention(), IMAGE)
    assert done.proof.passed
    assert [d.site.id for d in done.plan.converted] == ["(root)/0/matmul/0"]


@pytest.mark.slow
@EVERY
def test_the_batch_is_treated_image_by_image(models, kind):
    """Each image of a batch gives what it gives alone."""
    model = copy.deepcopy(models[kind]).double()
    alone = torch.cat([output(model, x[None]) for x in OTHER.double()])
    assert_close(output(model, OTHER.double()), alone, **TOLERANCE[torch.float64])


@pytest.mark.slow
@EVERY
def test_compiled_without_a_break(models, kind):
    """torch.compile(fullgraph=True) takes every interception, with equal output."""
    torch._dynamo.reset()
    compiled = torch.compile(models[kind], fullgraph=True, backend="eager")
    assert torch.equal(output(compiled), output(models[kind]))


def test_a_method_of_tensors_that_others_replace_is_not_called(models, monkeypatch):
    """functorch.dim, which tensordict imports, puts another Tensor.expand in place that torch 2.6 does not compile."""
    expected = output(models[Nested])

    def replaced(*args):
        raise AssertionError

    monkeypatch.setattr(torch.Tensor, "expand", replaced)
    assert torch.equal(output(models[Nested]), expected)


@pytest.mark.slow
@EVERY
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # the count of calls
@pytest.mark.parametrize("strict", [False, True])
def test_exported(models, kind, strict):
    """torch.export, strict or not, with free batch and sizes, gives a program with equal output elsewhere."""
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    example = (torch.randn(2, 1, 96, 128),)
    program = torch.export.export(models[kind], example, dynamic_shapes=(free,), strict=strict)
    assert torch.equal(output(program.module()), output(models[kind]))


@EVERY
def test_eight_threads_at_once(models, kind):
    """Concurrent calls do not share a counter."""
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: output(models[kind]), range(16)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # tracing warns about itself in several ways
def test_traced(models):
    """torch.jit.trace records the constants."""
    traced = torch.jit.trace(models[HandNorm], torch.randn(2, 1, 64, 80), check_trace=False)
    assert torch.equal(output(traced), output(models[HandNorm]))


@pytest.mark.zoo
def test_compiled_by_inductor(models):
    """The default backend agrees up to rounding."""
    torch._dynamo.reset()
    compiled = torch.compile(models[ResponseNorm], fullgraph=True)
    assert_close(output(compiled), output(models[ResponseNorm]), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_constants_follow_the_dtype(models, dtype):
    """A converted network moves to another dtype with its constants, and answers in it."""
    moved = copy.deepcopy(models[SumOverExtent]).to(dtype)
    assert output(moved, OTHER.to(dtype)).dtype == dtype


def _gradients(model, run):
    model = copy.deepcopy(model).train()
    run(model, OTHER).square().mean().backward()
    return [p.grad for p in model.parameters()]


@EVERY
def test_a_checkpoint_around_the_owner_changes_no_gradient(models, kind):
    """Recomputing the whole owner in backward finds the same calls."""
    plain = _gradients(models[kind], lambda model, x: model(x))
    again = _gradients(models[kind], lambda model, x: checkpoint(model, x, use_reentrant=False))
    assert any(g is not None for g in plain)
    for a, b in zip(plain, again, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


class SingleInside(Nasty):
    """Casts to float32 before its statistic, as norms do to be safe in half."""

    def body(self, x):
        return x * x.square().float().mean((2, 3), keepdim=True).add(1e-5).rsqrt().to(x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("make", [SqueezeExcite, SingleInside])
def test_constants_are_as_exact_as_the_network(monkeypatch, make):
    """In float64 the identity holds to 1e-10, without tensors near the statistic or with casts around it.

    Control: constants that were rounded to float32 do not pass.
    """
    torch.manual_seed(0)
    model, x = make().double(), IMAGE.double()
    assert normfix.convert(model, x).proof.step("identity").status == "passed"
    store = FrozenStatistic.set_values_
    monkeypatch.setattr(FrozenStatistic, "set_values_", lambda self, *v: store(self, *(t.float() for t in v)))
    assert normfix.convert(model, x).proof.step("identity").status == "failed"


class Renormalised(Nasty):
    """Makes divisions and products inside a layer that trains, before those that are intercepted."""

    def __init__(self):
        super().__init__(norm=nn.InstanceNorm2d(4))

    def body(self, x):
        x = self.norm(x)
        return (
            x * (x.sum() * (1 / x.numel()) + 2) / (1 + x.square().sum((2, 3), keepdim=True) / x[0, 0].numel())
        )


def test_a_training_batch_renorm_shifts_no_count():
    """What BatchRenorm calls in training is not counted as the forward's own calls."""
    model = normfix.convert(Renormalised(), IMAGE, "batchrenorm").model.train()
    by_hand = copy.deepcopy(model)
    hidden = by_hand.norm(nn.functional.leaky_relu(by_hand.stem(OTHER) + 0.3))
    scaled = hidden * (by_hand.normfix_mul_0.value + 2) / (1 + by_hand.normfix_div_0.value)
    assert torch.equal(model(OTHER), by_hand.head(scaled))


def test_two_images_have_the_statistics_of_their_union():
    """Frozen mean and unbiased variance are those of all pixels of two images of different sizes."""
    images = [IMAGE.double(), (OTHER[:1].double() * 2 + 1)[..., :96]]
    model = HandNorm().double()
    done = normfix.convert(model, images)
    assert done.proof.passed
    with torch.no_grad():
        maps = [nn.functional.leaky_relu(model.stem(x) + 0.3).flatten(2)[0] for x in images]
    joint = torch.cat(maps, 1)
    exact = TOLERANCE[torch.float64]
    assert_close(done.model.normfix_mean_0.value.flatten(), joint.mean(1), **exact)
    assert_close(done.model.normfix_var_0.value.flatten(), joint.var(1), **exact)


@pytest.mark.parametrize("kind", [SumOverExtent, SumOverNumel])
def test_quotients_of_two_images_are_weighted_by_pixels(kind):
    """A sum over its extent is the mean of all pixels of both images."""
    images = [IMAGE.double(), OTHER[:1].double()]
    model = kind().double()
    done = normfix.convert(model, images)
    with torch.no_grad():
        maps = [nn.functional.leaky_relu(model.stem(x) + 0.3).flatten(2)[0] for x in images]
    joint = torch.cat(maps, 1)
    expected = joint.mean(1) if kind is SumOverExtent else joint.mean()
    found = done.model.normfix_div_0.value
    assert_close(found.reshape(expected.shape), expected, **TOLERANCE[torch.float64])


def test_a_batch_of_two_is_two_images():
    """One item with two images gives what two items give."""
    both = torch.rand(2, 1, 96, 128)
    torch.manual_seed(3)
    model = SqueezeExcite()
    together, apart = normfix.convert(model, both), normfix.convert(model, list(both.split(1)))
    assert_close(
        together.model.pool.normfix_adaptive_avg_pool2d_0.value,
        apart.model.pool.normfix_adaptive_avg_pool2d_0.value,
        **TOLERANCE[torch.float32],
    )


def test_no_law_several_images():
    """What has no population law is NF230 for two images, with the site's name, and fine for one."""
    with pytest.raises(NormfixError, match=r"NF230 \(root\)/0/matmul/0"):
        normfix.convert(GlobalContext(), [IMAGE, IMAGE * 2])


def test_an_error_gives_the_old_constants_back():
    """A calibration that fails midway leaves every constant as it was."""
    model = normfix.convert(GlobalContext(), IMAGE).model
    before = model.normfix_matmul_0.value.clone()
    with pytest.raises(NormfixError, match="NF230"):
        normfix.calibrate_(model, [IMAGE, IMAGE * 2])
    assert torch.equal(model.normfix_matmul_0.value, before)
    assert model.normfix_matmul_0.observer is None


@pytest.mark.slow
def test_recalibrated_on_another_image():
    """Calibrating on another image gives the constants that converting on it gives."""
    torch.manual_seed(0)
    model = HandNorm()
    moved = normfix.calibrate(normfix.convert(model, IMAGE).model, IMAGE * 3 - 1).model
    again = normfix.convert(model, IMAGE * 3 - 1).model
    assert torch.equal(moved.normfix_var_0.value, again.normfix_var_0.value)


class Moody(Nasty):
    """Makes other calls when told to."""

    def __init__(self):
        super().__init__(width=4)
        self.mood = "as planned"

    def body(self, x):
        if self.mood == "more":
            x = x - x.mean()
        if self.mood == "channels":
            x = x.repeat(1, 2, 1, 1)
        dims = (0, 2, 3) if self.mood == "dims" else (2, 3)
        mean = x.flatten(2).mean(2)[..., None, None] if self.mood == "rank" else x.mean(dims, keepdim=True)
        return (x - mean)[:, :4] if self.mood != "fewer" else x


@pytest.mark.parametrize("mood", ["more", "channels", "dims", "rank"])
def test_other_calls_than_planned_stop_by_name(mood):
    """Another number of calls, rank, number of channels or reduced dimensions is NF207; sizes are free."""
    model = normfix.convert(Moody(), IMAGE).model.eval()
    assert output(model).shape == OTHER.shape
    model.mood = mood
    with pytest.raises(NormfixError, match=r"NF207 \(root\)/0/mean/0"):
        output(model)


def test_a_checkpoint_inside_the_owner_is_refused():
    """Its interception would be lost under a compiler, so it is refused with what to do."""
    (site,) = [site for site in normfix.scan(InnerCheckpoint(), IMAGE).live if site.function == "mean"]
    assert not site.convertible
    assert "around the module" in site.refusal


def test_a_checkpoint_around_the_owner_is_none_of_its_business():
    """Control: the same block, recomputed from outside, is converted."""

    class Outer(Nasty):
        def body(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    done = normfix.convert(Outer(block=SqueezeExcite(), width=1), IMAGE)
    assert done.proof.passed
    assert [d.site.owner for d in done.plan.converted] == ["block.pool"]


@pytest.mark.slow
def test_saved_and_loaded(tmp_path):
    """A folder holds the constants, and a reload gives the same bits."""
    torch.manual_seed(0)
    model = ConvolutionalBlock()
    done = normfix.convert(model, IMAGE)
    normfix.save(done, tmp_path / "fixed")
    loaded = normfix.load(tmp_path / "fixed", model=model)
    assert torch.equal(output(loaded), output(done.model.eval()))


@pytest.mark.slow
def test_a_reviewed_plan_is_replayed():
    """A plan that went through JSON freezes the same statistics; one edited to keep leaves that one live."""
    torch.manual_seed(0)
    model = HandNorm()
    plan = normfix.Plan.from_json(normfix.plan(normfix.scan(model, IMAGE)).to_json())
    assert normfix.convert(model, IMAGE, to=plan).proof.passed
    first, second = plan.decisions
    edited = replace(plan, decisions=(replace(first, action=Action.KEEP), second))
    done = normfix.convert(model, IMAGE, to=edited)
    assert [d.site.id for d in done.plan.left_live] == [first.site.id]
    assert done.proof.step("identity").status == "passed"
    assert done.proof.step("tiles").status == "failed"


@pytest.mark.slow
def test_uncalled_norms_are_reported():
    """A norm that the network owns and never calls is named as uncalibrated."""
    scan = normfix.scan(HandNorm(spare=nn.InstanceNorm2d(4)), IMAGE)
    assert scan.uncalled == ("spare",)
    assert [f.code for f in scan.findings] == ["NF202"]


@pytest.mark.parametrize("value", [1.9999999, 2.0000001])
def test_whole_numbers_are_the_nearest(value):
    """A count that was computed in floating point is off by rounding, and must not lose one by being cut off."""
    statistic = FrozenStatistic((1,), rank=1, dtype=torch.int64)
    statistic.set_values_(torch.tensor([value], dtype=torch.float64))
    assert statistic.value.tolist() == [2]
    fraction = FrozenStatistic((1,), rank=1, dtype=torch.float64)
    fraction.set_values_(torch.tensor([value], dtype=torch.float64))
    assert fraction.value.tolist() == [value]
