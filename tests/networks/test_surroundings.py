"""What a caller switched on around a call, and what stops a network, neither changes a result nor passes for one."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from optional import needs_newer_torch
from torch import nn

import normfix
from normfix.networks.numerics import exact_arithmetic


class Placing(nn.Module):
    """Makes a tensor on the default device in its forward."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 1))

    def forward(self, x):
        return self.body(x) + torch.zeros(1, dtype=x.dtype)


@contextmanager
def default(name, value, before):
    set_it = getattr(torch, name)
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


SURROUNDINGS = {
    "device": partial(torch.device, "meta"),
    "default device": partial(default, "set_default_device", "meta", None),
    "float64": partial(default, "set_default_dtype", torch.float64, torch.float32),
    "bfloat16": partial(default, "set_default_dtype", torch.bfloat16, torch.float32),
    "inference": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "deterministic": partial(default, "use_deterministic_algorithms", True, False),
}


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def converted(image):
    torch.manual_seed(0)
    return normfix.convert(Placing().eval(), image)


_EARLIER = needs_newer_torch("a default device around a call reaches into what torch itself computes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_EARLIER if name == "device" else ()) for name in SURROUNDINGS]
)
def test_surroundings_change_no_conversion(image, name):
    """Under another default device or dtype, in inference mode and under autocast the same network comes out."""
    expected = converted(image).model
    torch.manual_seed(0)
    model = Placing().eval()
    with SURROUNDINGS[name]():
        done = normfix.convert(model, image)
        tiled = normfix.predict(done.model, image, 32)
        seen = normfix.scan(model, fast=True)
        verdict = normfix.check(done.model, image, tile=32)
    assert done.proof.passed
    assert verdict.status == "passed"
    assert seen.halo == ((1, 1), (1, 1))
    torch.testing.assert_close(done.model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(tiled, normfix.predict(expected, image, 32), rtol=0, atol=0)


class Setting(Placing):
    """Makes something the default of the process in its forward."""

    def __init__(self, name, value):
        super().__init__()
        self.name, self.value = name, value

    def forward(self, x):
        getattr(torch, self.name)(self.value)
        return self.body(x)


@pytest.mark.parametrize(
    ("name", "value", "outer"),
    [
        ("set_default_device", "meta", "none"),
        ("set_default_device", "meta", "bfloat16"),
        ("set_default_dtype", torch.float64, "none"),
        ("set_default_dtype", torch.float64, "default device"),
        ("set_default_dtype", torch.float64, "bfloat16"),
    ],
)
def test_a_default_that_a_network_sets_ends_with_its_call(image, name, value, outer):
    """It would be that of the package's tensors too, and without values there (NotImplementedError)."""
    torch.manual_seed(0)
    net = Setting(name, value).eval()
    with exact_arithmetic(), torch.no_grad():
        expected = net.body(image)
    with SURROUNDINGS.get(outer, nullcontext)():
        before = torch.empty(0).device, torch.get_default_dtype()
        result = normfix.convert(net, image)
        whole = normfix.predict(net, image, 32, statistics="per-image", engine="stages")
        assert (torch.empty(0).device, torch.get_default_dtype()) == before
    assert result.proof.passed
    torch.testing.assert_close(whole, expected)
    assert normfix.check(result.model, image, tile=32).passed


def test_what_is_converted_in_inference_mode_can_train(image):
    """No tensor of the result is one that autograd refuses."""
    with torch.inference_mode():
        model = normfix.convert(Placing(), image).model
    model.train()(image).sum().backward()
    assert model.body[0].weight.grad is not None


READ = """
import torch
from normfix.networks.numerics import exact_arithmetic
b = torch.backends
def settings():
    def read(f):
        try: return f()
        except RuntimeError: return "contradictory"
    legacy = [torch.get_float32_matmul_precision, lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32]
    new = [b, b.cuda.matmul, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv]
    return [read(f) for f in legacy], [m.fp32_precision for m in new]
def later():
    b.fp32_precision = "tf32"
    b.mkldnn.fp32_precision = "ieee"
    return [m.fp32_precision for m in (b, b.cuda.matmul, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv)]
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="before torch 2.9")
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param("torch.set_float32_matmul_precision('medium')", marks=pytest.mark.zoo),
        pytest.param("b.cuda.matmul.allow_tf32 = True", marks=pytest.mark.zoo),
        pytest.param("b.cuda.matmul.fp32_precision = 'tf32'", marks=pytest.mark.zoo),
        pytest.param("b.mkldnn.fp32_precision = 'bf16'", marks=pytest.mark.zoo),
        pytest.param("b.fp32_precision = 'tf32'", marks=pytest.mark.zoo),
        "torch.set_float32_matmul_precision('high'); b.mkldnn.matmul.fp32_precision = 'ieee'",
        "pass",
    ],
)
def test_precision_reads_back_through_every_interface(setting):
    """In a region all is exact; afterwards every setting reads as before, and what inherits still inherits.

    But for cuDNN's, whose own default torch lets nobody set again.
    """
    script = f"""{READ}
{setting}
before = settings()
with exact_arithmetic():
    with exact_arithmetic():
        inside = settings()
assert set(inside[1]) <= {{"none", "ieee"}}, inside
assert settings() == before, (settings(), before)
touched = later()
"""
    untouched = f"{READ}\n{setting}\ntouched = later()\n"
    runs = [
        subprocess.run(
            [sys.executable, "-c", s + "print(touched)"], capture_output=True, text=True, check=True
        )
        for s in (script, untouched)
    ]
    assert runs[0].stdout == runs[1].stdout


def test_what_is_set_meanwhile_stays():
    """A precision that somebody sets while another computes exactly is not taken back."""
    try:
        torch.set_float32_matmul_precision("high")
        with exact_arithmetic():
            torch.set_float32_matmul_precision("medium")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.slow
def test_first_use_leaves_environment_and_filters():
    """In a fresh process the first scan adds no variable and no warning filter."""
    script = (
        "import os, warnings, torch, normfix\n"
        "before = dict(os.environ), list(warnings.filters)\n"
        "normfix.scan(torch.nn.Conv2d(1, 1, 3), torch.rand(1, 1, 32, 32))\n"
        "assert (dict(os.environ), list(warnings.filters)) == before\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


class Failing(nn.Module):
    """Raises in a part of its own whenever `when` says so."""

    def __init__(self, error, when):
        super().__init__()
        self.error, self.when = error, when

    def forward(self, x):
        if self.error is not None and self.when(x):
            raise self.error
        return x


def failing(error=None, when=lambda x: True):
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), Failing(error, when)).eval()


class OddError(Exception):
    pass


@pytest.mark.parametrize("error", [TypeError("t"), RecursionError("r"), OddError("o"), KeyError("k")])
@pytest.mark.parametrize("use", ["scan", "prove", "predict", "check", "calibrate", "diagnose"])
def test_errors_of_a_network_are_named(image, use, error):
    """Whatever a network raises is NF109 with the layer, over the error itself."""
    model = failing() if use in ("scan", "diagnose") else normfix.convert(failing(), image).model
    model[2].error = error
    with pytest.raises(normfix.NormfixError, match=r"NF109.*, in 2: ") as caught:
        getattr(normfix, use)(model, image)
    assert type(caught.value.__cause__) is type(error)


def _full():
    """Return what torch raises where the machine's memory does not suffice."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    return caught.value


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [TimeoutError("late"), MemoryError("full"), torch.OutOfMemoryError("full"), _full()], ids=type
)
def test_a_stop_at_one_size_is_no_refusal_of_it(image, error):
    """Time-outs go on as they are and memory is NF250, where the scan would go on without a size it refuses."""
    named = (normfix.NormfixError, "NF250") if not isinstance(error, TimeoutError) else (TimeoutError, "late")
    model = failing(error, lambda x: x.shape[2:] != (64, 64))
    with pytest.raises(named[0], match=named[1]):
        normfix.scan(model, image)
    refused = failing(RuntimeError("too small"), lambda x: x.shape[2:] != (64, 64))
    assert normfix.scan(refused, image).halo is None


class Late(RuntimeError):  # noqa: N818 - of the class that a refused size has
    pass


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no such signal")
@pytest.mark.parametrize("handler", ["function", "partial", "method"])
def test_what_a_signal_handler_raises_goes_on(image, handler):
    """A handler's error stops the scan although a network that raises the same class only refuses a size."""

    class Handler:
        def late(self, *_):
            raise Late("late")

    def late(*_):
        raise Late("late")

    handlers = {"function": late, "partial": partial(late, 1), "method": Handler().late}

    def hang(x):
        if x.shape[2:] != (64, 64):
            os.kill(os.getpid(), signal.SIGALRM)
        return False

    before = signal.signal(signal.SIGALRM, handlers[handler])
    try:
        with pytest.raises(Late):
            normfix.scan(failing(OddError(), hang), image)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert normfix.scan(failing(Late(), lambda x: x.shape[2:] != (64, 64)), image).halo is None
