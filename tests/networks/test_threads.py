"""A network that another thread uses is left alone, and what threads share comes back as it was."""

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import sympy
import torch
import torch.nn.functional as F
from optional import needs_newer_torch, needs_programs
from torch import nn

import normfix
from normfix.networks.graph.isolation import silence
from normfix.networks.numerics import exact_arithmetic


def conv(before, after):
    return nn.Conv2d(before, after, 3, padding=1)


class Served(nn.Module):
    """Live norms of three kinds, and a cache of its own that changes in every call."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = conv(1, 6), nn.InstanceNorm2d(6, affine=True)
        self.second, self.batch, self.group = conv(6, 6), nn.BatchNorm2d(6), nn.GroupNorm(2, 6)
        self.seen = {}

    def forward(self, x):
        self.seen[len(self.seen)] = tuple(x.shape)
        if len(self.seen) > 5:
            self.seen.clear()
        if torch.compiler.is_compiling():
            self.traced = True
        y = self.group(self.batch(self.second(F.relu(self.norm(self.first(x))))))
        return y + 1 if self.training else y


def state(model):
    """Return what another thread may see of a network."""
    modules = [
        (path, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
        for path, m in model.named_modules()
    ]
    tensors = [(n, id(t), t._version) for n, t in (*model.named_parameters(), *model.named_buffers())]
    return modules, tensors


@contextmanager
def serving(model, x):
    """Run a network in another thread; yields what went wrong there."""
    with torch.no_grad():
        expected = model(x)
    before, faults, stop, calls = state(model), [], threading.Event(), [0]

    def serve():
        while not stop.is_set():
            try:
                with torch.no_grad():
                    same = torch.equal(model(x), expected)
                faults.extend([] if same else ["another output"])
                faults.extend([] if state(model) == before else ["another state"])
            except Exception as error:  # noqa: BLE001 - whatever it is, a server must not see it
                faults.append(repr(error))
            calls[0] += 1
            stop.wait(0.002)  # leaves the work some of the interpreter

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield faults
    finally:
        while thread.is_alive() and calls[0] < 2:  # what was quick may be over before it was served twice
            stop.wait(0.001)
        stop.set()
        thread.join()
    assert calls[0] > 1


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def converted(image):
    torch.manual_seed(0)
    return normfix.convert(Served().train(), image).model


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use", ["scan", "convert", "check", "diagnose"])
def test_an_original_that_serves_notices_nothing(image, use, training):
    """Whatever is found out about a network, its calls in another thread give the same bits in the same mode."""
    torch.manual_seed(0)
    model = Served().eval()
    model.first.train(training)
    tile = {} if use in ("scan", "convert") else {"tile": 32}
    with serving(model, image[..., :32, :32]) as faults:
        getattr(normfix, use)(model, image, **tile)
    assert not faults, faults[:3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        lambda model, image, folder: normfix.predict(model, image, 32, engine="tiles"),
        lambda model, image, folder: normfix.predict(model, image, 32, engine="stages"),
        lambda model, image, folder: normfix.predict(model, image, 32, statistics="per-image"),
        lambda model, image, folder: normfix.calibrate(model, image * 2),
        lambda model, image, folder: normfix.calibrate(model, image * 2, tile=32),
        lambda model, image, folder: normfix.check(model, image, tile=32),
        lambda model, image, folder: normfix.prove(model, image),
        lambda model, image, folder: normfix.save(model, folder / "saved"),
        lambda model, image, folder: normfix.save(model, folder / "saved.pt2"),
    ],
    ids=["tiles", "stages", "per-image", "calibrate", "blocks", "check", "prove", "save", "program"],
)
def test_a_converted_network_that_serves_notices_nothing(converted, image, use, tmp_path):
    """Predicting with a network in train mode, proving and saving it leave its calls in another thread as they were."""
    with serving(converted.train(), image[..., :32, :32]) as faults:
        use(converted, image, tmp_path)
    assert not faults, faults[:3]


@pytest.mark.parametrize("plant", ["guard", "mode", "kernels"])
def test_what_reaches_a_serving_thread_is_seen(image, plant):
    """Control: a hook on the served network, another mode, and oneDNN switched off are each noticed."""
    torch.manual_seed(0)
    model = Served().eval()
    with serving(model, image) as faults:
        if plant == "guard":
            model.first.register_forward_pre_hook(lambda *_: None)
        elif plant == "mode":
            model.train()
        else:
            torch.backends.mkldnn.set_flags(False)
        deadline = time.monotonic() + 60
        while not faults and time.monotonic() < deadline:
            time.sleep(0.01)
        torch.backends.mkldnn.set_flags(True)
    assert faults


def flags():
    """Return what of torch belongs to the process."""
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "filters": list(warnings.filters),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.slow
def test_conversions_at_once_are_those_one_by_one(image):
    """Two networks, and one network twice, converted in threads: the same bits, and the process as it was."""
    torch.manual_seed(0)
    models = [Served().eval(), Served().eval()]
    alone = [normfix.convert(model, image).model.state_dict() for model in models]
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    try:
        before = flags()
        with ThreadPoolExecutor(3) as pool:
            for _ in range(2):
                together = list(pool.map(lambda m: normfix.convert(m, image), [*models, models[0]]))
                for done, expected in zip(together, [*alone, alone[0]], strict=True):
                    assert done.proof.passed
                    torch.testing.assert_close(done.model.state_dict(), expected, rtol=0, atol=0)
        assert flags() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False


@needs_newer_torch("a scan moves the random numbers of all threads")
def test_another_threads_random_numbers_are_its_own(image):
    """What another thread draws while a network that draws is scanned, is what it would have drawn."""

    class Drawing(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x[:, :1]) * 0 + F.dropout(x, 0.5) * 0

    model = Drawing(conv(1, 2), nn.InstanceNorm2d(2)).eval()
    torch.manual_seed(7)
    expected = torch.rand(2000).tolist()
    torch.manual_seed(7)
    drawn, stop = [], threading.Event()

    def draw():
        while len(drawn) < 2000 and not (stop.is_set() and len(drawn) > 100):
            drawn.append(float(torch.rand(())))
            stop.wait(0.001)

    thread = threading.Thread(target=draw)
    thread.start()
    normfix.scan(model, image, fast=True)
    stop.set()
    thread.join()
    torch.manual_seed(7)
    assert drawn == [float(torch.rand(())) for _ in drawn]
    assert len(expected) >= len(drawn) > 1


def test_random_numbers_of_a_network_are_the_same_in_every_call(image):
    """A network that draws draws the same for original and copy, and the caller's generator does not move."""
    model = nn.Sequential(conv(1, 4), nn.InstanceNorm2d(4), nn.Dropout(0.5))
    model[2].eval = model[2].train  # stays on, as Monte Carlo dropout does
    before = torch.get_rng_state()
    assert not normfix.scan(model, image).tile_invariant
    assert torch.equal(torch.get_rng_state(), before)


class Drawing(nn.Sequential):
    """Draws in every call, to no effect."""

    def forward(self, x):
        return super().forward(x) + torch.rand_like(x[:, :1]) * 0


USES = {
    "calibrate": normfix.calibrate,
    "calibrate in stages": lambda model, x: normfix.calibrate(model, x, tile=32),
    "predict": lambda model, x: normfix.predict(model, x, 32),
    "own statistics": lambda model, x: normfix.predict(model, x, 32, statistics="per-image"),
    "check": lambda model, x: normfix.check(model, x, tile=32),
    "prove": normfix.prove,
    "diagnose": lambda model, x: normfix.diagnose(model, x, tile=32),
    "fold": normfix.fold,
}


@pytest.fixture(scope="module")
def drawing():
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    return normfix.convert(Drawing(conv(1, 2), nn.InstanceNorm2d(2)).eval(), x), x


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_a_converted_network_that_draws_leaves_the_generator_alone(drawing, use):
    """What was found when it was scanned is known whenever it is used: it draws from no generator of torch's."""
    done, x = drawing
    assert done.scan.draws
    before = torch.get_rng_state()
    USES[use](done.model, x)
    assert torch.equal(torch.get_rng_state(), before)


@needs_programs
def test_a_saved_network_that_draws_leaves_the_generator_alone(drawing, tmp_path):
    """Saving and loading, as a folder with its program or as a program, draw from no generator of torch's."""
    done, x = drawing
    before = torch.get_rng_state()
    normfix.save(done, tmp_path / "folder")
    model = normfix.load(tmp_path / "folder", model=done.original)
    normfix.predict(model, x, 32)
    normfix.predict(normfix.load(tmp_path / "folder"), x, 32)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_norms_of_a_network_that_draws_are_measured_without_the_generator():
    """A network that normfix did not convert is watched before it is measured."""
    model = Drawing(conv(1, 2), nn.BatchNorm2d(2)).eval()
    before = torch.get_rng_state()
    normfix.calibrate(model, torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_draws_is_not_cut_into_blocks(drawing):
    """A block draws other numbers than the whole image, so stages give way to passes, and say why."""
    done, x = drawing
    summary = normfix.calibrate(done.model, x, tile=32).summary
    assert summary.engine == "passes"
    assert "draws random numbers" in summary.reason


def test_exactness_ends_with_the_last_that_asks_for_it():
    """Regions of several threads may overlap: precision is exact until all have left, and then as it was."""
    torch.set_float32_matmul_precision("high")
    try:
        inside, leave = threading.Event(), threading.Event()

        def hold():
            with exact_arithmetic():
                inside.set()
                leave.wait()

        thread = threading.Thread(target=hold)
        with exact_arithmetic():
            thread.start()
            inside.wait()
        assert torch.get_float32_matmul_precision() == "highest"
        leave.set()
        thread.join()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_filters_that_others_set_meanwhile_stay():
    """Two threads that silence torch.export one after the other take nobody's warning filter with them."""
    with warnings.catch_warnings():
        before = list(warnings.filters)
        with silence():
            warnings.filterwarnings("ignore", message="set meanwhile")
            with silence():
                warnings.warn("unheard", stacklevel=1)
        assert next(item for item in warnings.filters if item not in before)[1].pattern == "set meanwhile"
        assert [item for item in warnings.filters if item in before] == before


def test_nothing_is_silenced_once_another_thread_has_put_its_filters_back():
    """It copied the list while a capture's filter was in it, and puts the list itself back when that has ended."""
    before, elsewhere = list(warnings.filters), warnings.catch_warnings()
    with silence():
        elsewhere.__enter__()
        assert list(warnings.filters) != before
    assert list(warnings.filters) == before
    elsewhere.__exit__(None, None, None)
    assert list(warnings.filters) == before


def test_a_formula_is_simplified_once_while_nothing_else_is_known_of_its_symbols(monkeypatch):
    """In the thread that traces: torch forgets with each thing that it learns, of whatever symbol."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, ValueRanges

    asked = []
    simplify = ShapeEnv.simplify
    monkeypatch.setattr(
        ShapeEnv, "simplify", lambda self, *a, **k: asked.append(a) or simplify(self, *a, **k)
    )
    counted = ShapeEnv.simplify
    env, symbol, other = ShapeEnv(), sympy.Symbol("s", integer=True), sympy.Symbol("t", integer=True)
    env.var_to_range[symbol] = env.var_to_range[other] = ValueRanges(2, 100)
    with silence():
        found = [env.simplify(symbol * 2 + 1) for _ in range(3)]
        assert (len(asked), len({*found})) == (1, 1)
        env.var_to_range[other] = ValueRanges(2, 50)
        env.simplify(symbol * 2 + 1)
        assert len(asked) == 1
        env.var_to_range[symbol] = ValueRanges(2, 50)
        env.simplify(symbol * 2 + 1)
        ShapeEnv().simplify(symbol * 2 + 1)
        assert len(asked) == 3
        thread = threading.Thread(target=lambda: [env.simplify(symbol * 2 + 1) for _ in range(2)])
        thread.start()
        thread.join()
        assert len(asked) == 5
        env.replacements[symbol] = sympy.Integer(4)
        env._update_version_counter()
        assert env.simplify(symbol * 2 + 1) == 9
    assert ShapeEnv.simplify is counted
