"""The layers survive what people do to modules: saving, copying, casting, compiling, exporting, averaging."""

import copy
import pickle
import shutil

import pytest
import torch
from optional import needs_newer_torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from normfix.conversion.lowering import lower
from normfix.layers import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    FrozenNorm1d,
    FrozenNorm2d,
    FrozenNorm3d,
    RenormSchedule,
    SyncBatchRenorm2d,
    synchronise,
)

KINDS = [
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    FrozenNorm1d,
    FrozenNorm2d,
    FrozenNorm3d,
    SyncBatchRenorm2d,
]
STRICT = needs_newer_torch("strict torch.export does not take a layer alone")
TWO_D = [BatchRenorm2d, FrozenNorm2d]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()


def _randomise(layer):
    layer.set_statistics_(torch.randn(layer.num_features), torch.rand(layer.num_features) + 0.2)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def _input(kind, **like):
    dims = int(kind.__name__[-2])
    return torch.randn(3, 4, *[5] * dims, **like)


def _network(kind):
    first, second = _randomise(kind(4)), _randomise(kind(4))
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), first, nn.ReLU(), nn.Conv2d(4, 4, 3), second)


def _step(model, run, x):
    """Return output, input gradient, parameter gradients and buffers after one training pass."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = run(x)
    y.pow(3).mean().backward()
    return {
        "y": y,
        "x": x.grad,
        **{n: p.grad for n, p in model.named_parameters()},
        **dict(model.named_buffers()),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_is_batch_norms(kind):
    """State dicts load strictly from BatchNorm and back, the keys in the same order."""
    stock = getattr(nn, f"BatchNorm{kind.__name__[-2:]}")(4)
    ours = _randomise(kind(4))
    stock.load_state_dict(ours.state_dict(), strict=True)
    again = kind(4)
    again.load_state_dict(stock.state_dict(), strict=True)
    assert list(again.state_dict()) == list(stock.state_dict())
    assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_compute_the_same_and_share_nothing(kind, way):
    """A deep copy or pickle, taken while a graph is alive, trains on as the original does."""
    layer = _randomise(kind(4))
    x = _input(kind)
    alive = layer(x)
    other = way(layer)
    a, b = _step(layer, layer, x), _step(other, other, x)
    assert_close(a, b, rtol=0, atol=0)
    assert other.running_mean is not layer.running_mean
    assert alive.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moving_moves_everything(kind, dtype):
    """`.to(dtype)` moves parameters and statistics, `.to("meta")` the bounds too, and the layer still runs."""
    layer = _randomise(kind(4)).to(dtype)
    assert {layer.weight.dtype, layer.running_var.dtype} == {dtype}
    assert layer(_input(kind, dtype=dtype)).dtype == dtype
    assert all(v.is_meta for v in [*layer.to("meta").buffers(), *layer.parameters()])


def test_bounds_survive_the_meta_device():
    """A layer made on meta and materialised has its bounds, which no state dict holds, and loads the rest."""
    layer = BatchRenorm2d(4, r_max=2, d_max=1, device="meta").to_empty(device="cpu")
    layer.load_state_dict(_randomise(BatchRenorm2d(4)).state_dict())
    assert (layer.r_max.item(), layer.d_max.item()) == (2.0, 1.0)


@pytest.mark.parametrize("kind", TWO_D)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_statistics_in_float32(kind, dtype):
    """At sd 300, whose variance overflows float16, outputs and gradients are finite and statistics right."""
    layer = kind(4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), layer, nn.Conv2d(4, 4, 1))
    nn.init.dirac_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    x = torch.randn(4, 4, 32, 32) * 300
    with torch.autocast("cpu", dtype):
        y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert layer.running_var.dtype == torch.float32
    if kind is BatchRenorm2d:
        expected = 0.99 + 0.01 * x.to(dtype).float().var((0, 2, 3))
        assert_close(layer.running_var, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", TWO_D)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_is_kept(kind, training):
    """A channels_last input gives a channels_last output and the numbers of a contiguous one."""
    layer = _randomise(kind(4)).train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(2, 4, 6, 6)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, other(x), rtol=1e-5, atol=1e-5, check_stride=False)


@pytest.mark.parametrize("kind", TWO_D)
def test_functional_call_uses_and_updates_what_it_is_given(kind):
    """functional_call computes with given tensors, updates the given statistics and not the module's."""
    layer, other = kind(4), _randomise(kind(4))
    x = torch.randn(2, 4, 5, 5)
    given = {name: value.detach().clone() for name, value in other.state_dict().items()}
    y = torch.func.functional_call(layer, given, (x,))
    assert_close(y, other(x), rtol=0, atol=0)
    assert_close(given, other.state_dict(), rtol=0, atol=0)
    assert_close(layer.state_dict(), kind(4).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", TWO_D)
def test_averaging_weights_keeps_a_working_model(kind):
    """An EMA with buffers averages parameters and statistics and runs in train and eval."""
    model = _network(kind)
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    before = model[1].running_mean.clone()
    ema.update_parameters(model)
    model(torch.randn(4, 3, 8, 8) + 5)
    ema.update_parameters(model)
    assert_close(ema.module[1].running_mean, (before + model[1].running_mean) / 2)
    assert ema.eval()(torch.randn(1, 3, 8, 8)).isfinite().all()
    assert list(ema.module.state_dict()) == list(model.state_dict())


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")


@pytest.mark.zoo
@needs_compiler
def test_compiles_whole_and_once_over_the_ramp():
    """Inductor, fullgraph: five steps of a ramp are eager's in every number, with a single compilation."""
    eager = [BatchRenorm2d(3, momentum=0.1), nn.Conv2d(3, 4, 1), BatchRenorm2d(4, momentum=None)]
    eager = nn.Sequential(*eager).double()
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True)
    schedules = [RenormSchedule(m, 5, warm=False, r_until=1, d_until=1) for m in (eager, compiled)]
    for step in range(5):
        x = torch.randn(4, 3, 6, 6, dtype=torch.double) * 3 + 1
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            assert_close(_step(compiled, run, x), _step(eager, eager, x), rtol=1e-8, atol=1e-8)
        for schedule in schedules:
            schedule.step()
    assert eager[0].r_max == 3


@pytest.mark.slow
@needs_compiler
def test_compiled_inference_is_eager_inference():
    """Inductor, fullgraph, in eval: both families give eager's output."""
    model = nn.Sequential(_network(BatchRenorm2d), _randomise(FrozenNorm2d(4))).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    assert_close(torch.compile(model, fullgraph=True)(x), model(x), **EXACT)


@pytest.mark.slow
@needs_compiler
def test_compiled_training_of_a_frozen_network_is_eagers():
    """Inductor, fullgraph, in train mode: outputs and gradients are eager's, the statistics stay."""
    eager = _network(FrozenNorm2d).double().train()
    compiled = copy.deepcopy(eager)
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    before = {name: buffer.clone() for name, buffer in compiled.named_buffers()}
    after = _step(compiled, torch.compile(compiled, fullgraph=True), x)
    assert_close(after, _step(eager, eager, x), rtol=1e-8, atol=1e-8)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@needs_newer_torch("a float that changes once becomes a symbol")
def test_a_changing_float_would_compile_again():
    """The claim of one compilation can fail: a Python float written per step compiles anew."""

    class Ramp(nn.Module):
        bound = 1.0

        def forward(self, x):
            return x.clamp(max=self.bound)

    model = Ramp()
    run = torch.compile(model, backend="eager")
    run(torch.ones(2))
    model.bound = 2.0
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="fail_on_recompile"),
    ):
        run(torch.ones(2))


@pytest.mark.slow
@needs_newer_torch("such gradients are right without the guard")
def test_a_checkpoint_inside_compiled_code_is_refused():
    """It would recompute from statistics that have moved: an error, not a wrong gradient."""
    layer = _randomise(BatchRenorm2d(4))

    @torch.compile(backend="aot_eager")
    def run(x):
        return checkpoint(layer, x, use_reentrant=False)

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="inside an activation checkpoint"):
        run(torch.randn(2, 4, 5, 5, requires_grad=True))


@needs_newer_torch("such gradients are right without the guard")
def test_a_checkpoint_around_compiled_code_is_refused():
    """It would run the compiled layer twice and count the batch twice: an error in backward."""
    layer = torch.compile(_randomise(BatchRenorm2d(4)), backend="aot_eager")
    y = checkpoint(layer, torch.randn(2, 4, 5, 5, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match="inside an activation checkpoint"):
        y.sum().backward()


@pytest.mark.slow
@needs_newer_torch("such gradients are right without the guard")
@pytest.mark.parametrize("cut", ["around", "inside"])
def test_without_the_guard_a_compiled_checkpoint_would_be_wrong(cut, monkeypatch):
    """The refusals above are needed: with a mere copy in the guard's place nothing is said and it is wrong."""
    monkeypatch.setattr("normfix.layers.batchrenorm.keep", torch.clone)
    plain, checked = (_randomise(BatchRenorm2d(4, momentum=0.5)).double() for _ in range(2))
    checked.load_state_dict(plain.state_dict())
    compiled = torch.compile(checked, backend="aot_eager")
    runs = {
        "around": lambda x: checkpoint(compiled, x, use_reentrant=False),
        "inside": torch.compile(lambda x: checkpoint(checked, x, use_reentrant=False), backend="aot_eager"),
    }
    x = torch.randn(4, 4, 5, 5, dtype=torch.double) * 3 + 2
    a, b = _step(checked, runs[cut], x), _step(plain, plain, x)
    assert (a["x"] - b["x"]).abs().max() > 1e-3 * b["x"].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO_D)
@pytest.mark.parametrize("strict", [pytest.param(True, marks=STRICT), False])
def test_export_keeps_one_batch_norm_per_layer(kind, strict):
    """An exported network runs at another size with eager's output; its program is aten operations."""
    model = _network(kind).eval()
    dims = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=(dims,), strict=strict)
    x = torch.randn(3, 3, 11, 9)
    assert_close(program.module()(x), model(x))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert sum("batch_norm" in str(node.target) for node in calls) == 2
    assert all(str(node.target).startswith("aten.") for node in calls)


@STRICT
def test_training_exports_without_operations_of_normfix():
    """A network exported in train mode computes and tracks as eager does, by aten operations alone."""
    model = _network(BatchRenorm2d)
    program = torch.export.export(copy.deepcopy(model), (torch.randn(2, 3, 8, 8),))
    exported = program.module()
    x = torch.randn(2, 3, 8, 8)
    assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)
    assert_close(exported.state_dict()["1.running_var"], model[1].running_var)
    assert "normfix" not in str(program.graph)


@pytest.mark.slow
@needs_newer_torch("torch.onnx does not take what onnxscript makes today")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", TWO_D)
def test_lowered_onnx_is_batch_normalization(kind, tmp_path):
    """The lowered network exports to ONNX as BatchNormalization and runs there with the same output."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential(_randomise(kind(3)), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(lower(model).model, (x,), path, dynamo=True, verbose=False)
    assert "BatchNormalization" in [node.op_type for node in onnx.load(path).graph.node]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), model(x), rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """One layer called twice, with checkpoints of several kinds around it."""

    def __init__(self, cut, reentrant):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = _randomise(BatchRenorm2d(4, momentum=0.3))
        self.cut, self.reentrant = cut, reentrant

    def part(self, x):
        return torch.relu(self.norm(self.conv(x)))

    def both(self, x):
        return self.part(self.part(x))

    def same(self, x):
        return self.norm(x) * self.norm(x)

    def kept(self, run, *inputs):
        return checkpoint(run, *inputs, use_reentrant=self.reentrant)

    def forward(self, x):
        match self.cut:
            case "none":
                return self.both(x)
            case "one":
                return self.kept(self.both, x)
            case "two":
                return self.kept(self.part, self.kept(self.part, x))
            case "half":
                return self.kept(self.part, self.part(x))
            case "nested":
                return self.kept(lambda x: self.kept(self.part, self.part(x)), x)


def _twice(cut, reentrant):
    torch.manual_seed(3)
    return Twice(cut, reentrant).double()


@pytest.mark.parametrize(
    ("cut", "reentrant"),
    [(cut, False) for cut in ("one", "two", "half", "nested")]
    + [(cut, True) for cut in ("one", "two", "half")],
)
def test_checkpointing_changes_nothing(cut, reentrant):
    """Outputs, gradients and statistics over three steps are the unchecked run's, the layer called twice."""
    plain, checked = _twice("none", False), _twice(cut, reentrant)
    for step in range(3):
        x = torch.randn(3, 4, 5, 5, dtype=torch.double) * (step + 1) + step
        assert_close(_step(checked, checked, x), _step(plain, plain, x), **EXACT)
    assert checked.norm.num_batches_tracked == 7  # one by calibration, two per step


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_frozen_network_changes_nothing(reentrant):
    """Outputs and gradients are the unchecked run's, and the statistics stay."""
    plain = _network(FrozenNorm2d).double().train()
    checked = copy.deepcopy(plain)
    x = torch.randn(3, 3, 6, 6, dtype=torch.double)
    run = lambda x: checkpoint(checked, x, use_reentrant=reentrant)  # noqa: E731
    assert_close(_step(checked, run, x), _step(plain, plain, x), **EXACT)


@pytest.mark.parametrize("segments", [1, 2])
def test_checkpointed_calls_with_equal_inputs_are_told_apart(segments):
    """Two calls on one input differ only in the statistics before them; each gets its own corrections."""

    def run(model, x, keep):
        if segments == 1:
            return keep(model.same, x)
        return keep(lambda x: 3 * model.norm(x).square(), x) + keep(lambda x: model.norm(x).pow(3), x)

    plain, checked = _twice("none", False), _twice("none", False)
    x = torch.randn(3, 4, 5, 5, dtype=torch.double) * 2 + 1
    expected = _step(plain, lambda x: run(plain, x, lambda f, x: f(x)), x)
    assert_close(_step(checked, lambda x: run(checked, x, checked.kept), x), expected, **EXACT)


def test_checkpointing_with_accumulation_and_two_backwards():
    """Graphs alive side by side, walked out of order and twice, keep their own corrections."""
    plain, checked = _twice("none", False), _twice("one", False)
    inputs = [torch.randn(3, 4, 5, 5, dtype=torch.double) + i for i in range(3)]
    gradients = []
    for model in (plain, checked):
        losses = [model(x).pow(3).mean() for x in inputs]
        for index in (1, 0, 2, 1):
            losses[index].backward(retain_graph=True)
        gradients.append([p.grad for p in model.parameters()])
    assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cut", ["one", "two"])
def test_checkpointing_a_batch_that_overflowed_changes_nothing(cut, reentrant):
    """Infinities of mixed precision give the unchecked run's NaN, for a GradScaler to skip, not an error of ours."""
    plain, checked = _twice("none", False), _twice(cut, reentrant)
    x = torch.randn(3, 4, 5, 5, dtype=torch.double)
    x[0, 0, 0, 0] = torch.inf
    assert_close(_step(checked, checked, x), _step(plain, plain, x), equal_nan=True, **EXACT)
    assert checked.norm.num_batches_tracked == 3


def test_a_batch_that_overflowed_is_told_from_the_one_before():
    """Of two checkpointed calls the second is spoilt: the first one's gradients are the unchecked run's, and finite."""
    batches = [torch.randn(3, 4, 5, 5, dtype=torch.double, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        batches[1][0, 0, 0, 0] = torch.nan
    gradients = []
    for keep in (lambda part, x: part(x), lambda part, x: checkpoint(part, x, use_reentrant=False)):
        model = _twice("none", False)
        losses = [keep(model.part, x).pow(3).mean() for x in batches]
        gradients.append([torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, batches, strict=True)])
    assert gradients[0][0].isfinite().all()
    assert_close(gradients[1], gradients[0], equal_nan=True, **EXACT)


def test_checkpointing_a_layer_without_gradients_of_its_own():
    """A layer whose graph holds nothing is still not run twice: its batch is counted once."""
    layer = _randomise(BatchRenorm2d(4)).requires_grad_(False)
    conv = nn.Conv2d(4, 4, 1)
    y = checkpoint(lambda x: conv(layer(x)).square(), torch.randn(2, 4, 5, 5), use_reentrant=False)
    y.sum().backward()
    assert layer.num_batches_tracked == 2


def test_without_memory_checkpointing_would_be_wrong(monkeypatch):
    """The claims above can fail: forgetting the calls makes gradients wrong and counts batches twice."""
    monkeypatch.setattr("normfix.layers.batchrenorm.recall", lambda *_: None)
    plain, checked = _twice("none", False), _twice("one", False)
    x = torch.randn(3, 4, 5, 5, dtype=torch.double) * 3 + 2
    a, b = _step(checked, checked, x), _step(plain, plain, x)
    assert (a["x"] - b["x"]).abs().max() > 1e-3 * b["x"].abs().max()
    assert a["norm.num_batches_tracked"] == 5
    assert b["norm.num_batches_tracked"] == 3


def test_records_of_calls_die_with_their_graphs():
    """Nothing accumulates: after backward the memory of calls is empty."""
    from normfix.layers.recomputation import _memories

    layer = _randomise(BatchRenorm2d(4))
    for _ in range(5):
        y = layer(torch.randn(2, 4, 5, 5))
    alive = [ref() for ref in _memories[layer].calls if ref() is not None]
    assert len(alive) == 1
    del y, alive
    assert all(ref() is None for ref in _memories[layer].calls)


def test_synchronise_makes_a_copy_under_every_alias():
    """Layers become their synchronised kind, tensors equal, aliases kept, the given model unchanged."""
    layer = _randomise(BatchRenorm2d(4))
    model = nn.ModuleList([layer, nn.Sequential(layer), FrozenNorm2d(4)])
    done = synchronise(model)
    assert [type(m) for m in done] == [SyncBatchRenorm2d, nn.Sequential, FrozenNorm2d]
    assert done[0] is done[1][0]
    assert type(layer) is BatchRenorm2d
    x = torch.randn(2, 4, 5, 5)
    assert_close(_step(done[0], done[0], x), _step(layer, layer, x), rtol=0, atol=0)
