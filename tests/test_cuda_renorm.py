"""BatchRenorm in training on a GPU, by Triton's kernels and without them; needs torch and pytest, nothing else."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from normfix.layers import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, fused

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]

GPU = torch.device("cuda", 0)
HALVES = [torch.bfloat16, torch.float16]
RUNNING = ("running_mean", "running_var")
KINDS = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def exact():
    """Convolutions in float32."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def in_splits(monkeypatch):
    """No map is small."""
    monkeypatch.setattr(fused.Plan, "AT_ONCE", 0)
    fused._plan.cache_clear()
    yield
    fused._plan.cache_clear()


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(fused, "kernels_of", lambda device: None)


RENORM = [
    (BatchRenorm2d, (4, 8, 33, 20), False),
    (BatchRenorm2d, (4, 8, 33, 20), True),
    (BatchRenorm3d, (2, 8, 6, 10, 12), False),
    (BatchRenorm3d, (2, 8, 6, 10, 12), True),
]
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kind", "shape", "last"), RENORM)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_renorm_is_its_formula(dtype, kind, shape, last, momentum):
    """Output, gradients and running statistics are those of float64 on the CPU, step by step."""
    wide = kind(8, momentum=momentum, r_max=1.5, d_max=0.5, dtype=torch.float64)
    nn.init.uniform_(wide.weight, 0.5, 1.5)
    nn.init.normal_(wide.bias)
    layer = copy.deepcopy(wide).to(GPU, torch.float64 if dtype == torch.float64 else torch.float32)
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64) * (1 + step) + step
        x = x.to(dtype)
        ours = x.to(GPU).clone()
        if last:
            ours = ours.to(memory_format=torch.channels_last if ours.dim() == 4 else torch.channels_last_3d)
        ours = ours.requires_grad_()
        theirs = x.double().clone().requires_grad_()
        grad = torch.randn(shape, dtype=torch.float64).to(dtype)
        a, b = layer(ours), wide(theirs)
        a.backward(grad.to(GPU))
        b.backward(grad.double())
        near = TOLERANCE[dtype]
        assert_close(a.double().cpu(), b, rtol=near, atol=near)
        assert_close(ours.grad.double().cpu(), theirs.grad, rtol=near, atol=near)
        for name in ("weight", "bias"):
            mine, exact = getattr(layer, name).grad.double().cpu(), getattr(wide, name).grad
            assert_close(mine, exact, rtol=near, atol=near * float(exact.abs().max()))
        for name in RUNNING:
            near = 1e-3 if dtype in HALVES else 1e-5
            assert_close(getattr(layer, name).double().cpu(), getattr(wide, name), rtol=near, atol=near)
        assert int(layer.num_batches_tracked) == step + 1


# the shapes of benchmarks/gpu.py, at small extents and with odd ones, cut as those are
IN_SPLITS = [(8, 32, 32, 32), (4, 64, 50, 34), (2, 32, 8, 16, 16)]
AT_ONCE = [(16, 128, 8, 8), (2, 256, 5, 7), (6, 40, 9), (64, 12)]


@pytest.mark.parametrize("shape", [*IN_SPLITS, *AT_ONCE])
@pytest.mark.parametrize("kind", ["contiguous", "last", "bfloat16"])
def test_shapes_of_the_benchmark(request, shape, kind):
    """Whatever way a map is cut, two steps are those of float64 on the CPU."""
    if shape in IN_SPLITS:
        request.getfixturevalue("in_splits")
    two_steps(shape, torch.bfloat16 if kind == "bfloat16" else torch.float32, last=kind == "last")


def two_steps(shape, dtype, *, last=False, changed=lambda x: x, **options):
    wide = KINDS[len(shape)](shape[1], momentum=0.1, r_max=1.5, d_max=0.5, dtype=torch.float64, **options)
    if wide.affine:
        nn.init.uniform_(wide.weight, 0.5, 1.5)
        nn.init.normal_(wide.bias)
    layer = copy.deepcopy(wide).to(GPU, torch.float32)
    near = TOLERANCE[dtype]
    for step in range(2):
        exact = (torch.randn(shape, dtype=torch.float64) * (1 + step) + step).to(dtype).double()
        grad = torch.randn(shape).to(dtype)
        x = exact.to(GPU, dtype)
        if last and x.dim() in FORMATS:
            x = x.to(memory_format=FORMATS[x.dim()])
        x = changed(x).requires_grad_()
        exact.requires_grad_()
        layer.zero_grad()
        wide.zero_grad()
        y, expected = layer(x), wide(exact)
        y.backward(grad.to(GPU))
        expected.backward(grad.double())
        assert y.dtype == dtype
        assert_close(y.double().cpu(), expected, rtol=near, atol=near)
        assert_close(x.grad.double().cpu(), exact.grad, rtol=near, atol=near)
        for ours, theirs in zip(layer.parameters(), wide.parameters(), strict=True):
            largest = float(theirs.grad.abs().max())
            assert_close(ours.grad.double().cpu(), theirs.grad, rtol=near, atol=near * largest)
        for ours, theirs in zip(layer.buffers(), wide.buffers(), strict=True):
            assert_close(ours.double().cpu(), theirs.double(), rtol=1e-3, atol=1e-3)


CHANGES = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "not aligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cut", ["at once", "in splits"])
def test_memory_of_any_kind(request, change, cut):
    """What is transposed, strided or begins between two vectors is computed as what is not, after that was."""
    if cut == "in splits":
        request.getfixturevalue("in_splits")
    two_steps((4, 8, 16, 32), torch.float32)
    two_steps((4, 8, 16, 32), torch.float32, changed=CHANGES[change])


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_with_triton_and_without(request, triton, affine):
    """Both ways there are give the formula; the first is taken where Triton is."""
    if not triton:
        request.getfixturevalue("without_triton")
    layer, x = BatchRenorm2d(8, affine=affine).to(GPU), torch.randn(4, 8, 16, 16, device=GPU)
    assert fused.is_for(layer, x, layer.weight, layer.bias) is triton
    two_steps((4, 8, 16, 16), torch.float32, affine=affine)


def test_the_mean_may_be_far_from_zero(in_splits):
    """At a mean of a thousand standard deviations the variance is right to 1e-4."""
    layer, x = BatchRenorm2d(4, momentum=1.0).to(GPU), torch.randn(2, 4, 128, 160, device=GPU) + 1000
    layer(x)
    exact = x.double().var((0, 2, 3))
    assert_close(layer.running_var.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_in_a_checkpoint_it_counts_once(request, triton, reentrant):
    """A call that is repeated in backward takes the corrections of the first, and counts no batch."""
    if not triton:
        request.getfixturevalue("without_triton")
    parts = (nn.Conv2d(3, 8, 3), BatchRenorm2d(8, momentum=0.1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    plain = nn.Sequential(*parts).to(GPU)
    twin = copy.deepcopy(plain)
    for _ in range(3):
        x = torch.randn(4, 3, 12, 12, device=GPU) * 2 + 1
        plain(x).square().sum().backward()
        checkpoint(twin, x.requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    assert int(twin[1].num_batches_tracked) == 3
    assert_close(twin[1].running_var, plain[1].running_var)
    assert_close(twin[0].weight.grad, plain[0].weight.grad, rtol=1e-4, atol=1e-3)


def test_second_derivatives():
    """A gradient that is differentiated again is the CPU's in float64."""
    found = []
    wide = BatchRenorm2d(3, r_max=1.5, d_max=0.5, dtype=torch.float64)
    x, direction = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    for layer, device in ((wide, "cpu"), (copy.deepcopy(wide).float(), GPU)):
        layer = layer.to(device)
        layer(x.to(device, layer.running_mean.dtype))
        operand = (x * 2).to(device, layer.running_mean.dtype).requires_grad_()
        (slope,) = torch.autograd.grad(layer(operand).pow(3).sum(), operand, create_graph=True)
        (slope * direction.to(slope)).sum().backward()
        found.append((operand.grad.double().cpu(), layer.weight.grad.double().cpu()))
    for exact, ours in zip(*found, strict=True):
        assert_close(ours, exact, rtol=1e-4, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("cut", ["at once", "in splits"])
def test_the_same_twice(request, cut):
    """Two runs have the same bits, gradients included; what is not wanted is not given."""
    if cut == "in splits":
        request.getfixturevalue("in_splits")
    x, runs = torch.randn(4, 8, 33, 20, device=GPU), []
    for _ in range(2):
        layer = BatchRenorm2d(8).to(GPU)
        y = layer(x)  # x wants no gradient
        y.backward(y.detach())
        runs.append((y.detach(), layer.weight.grad, layer.bias.grad, layer.running_var))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    frozen = BatchRenorm2d(8).to(GPU).requires_grad_(False)
    operand = x.clone().requires_grad_()
    frozen(operand).sum().backward()
    assert operand.grad is not None
    assert frozen.weight.grad is None


def test_launches():
    """A small map is one launch forward and one backward beside the count of the batch; others three and three."""
    from torch.profiler import ProfilerActivity, profile

    for shape, most in (((2, 256, 8, 8), 3), ((4, 8, 256, 256), 6)):
        layer, x = BatchRenorm2d(shape[1]).to(GPU), torch.randn(shape, device=GPU, requires_grad=True)
        grad = torch.randn_like(x)
        torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
            torch.cuda.synchronize()
        kernels = [event.name for event in seen.events() if event.device_type.name == "CUDA"]
        kernels = [name for name in kernels if "Mem" not in name and "Synchronize" not in name]
        assert 1 < len(kernels) <= most, kernels


def test_compiled_batch_renorm_trains():
    """Under torch.compile a training step of BatchRenorm gives the gradients of an eager one."""
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), BatchRenorm2d(8, momentum=0.1)).to(GPU)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin)
    for _ in range(2):
        x = torch.randn(4, 3, 12, 12, device=GPU)
        plain(x).square().sum().backward()
        compiled(x).square().sum().backward()
    assert_close(twin[1].running_var, plain[1].running_var, rtol=1e-4, atol=1e-5)
    assert_close(twin[1].weight.grad, plain[1].weight.grad, rtol=1e-3, atol=1e-2)
