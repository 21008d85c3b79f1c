"""BatchRenorm's kernels in Triton's interpreter: every cut and layout against float64 on the CPU."""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normfix.layers import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, fused

pytest.importorskip("triton", reason="there is no Triton")
pytestmark = pytest.mark.skipif(not fused._keeps_kernels(), reason="this Triton's interpreter is another")

KINDS = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels as Triton's interpreter runs them, in tiles of 128 values."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec("normfix.layers.passes")
    passes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(passes)
    # Triton's own functions were made before the interpreter was asked for
    monkeypatch.setattr(
        JITFunction, "__call__", lambda self, *args, **kwargs: InterpretedFunction(self.fn)(*args, **kwargs)
    )
    monkeypatch.setattr(fused, "_passes", lambda: passes)
    monkeypatch.setattr(fused.Plan, "TILE", 128)
    fused._plan.cache_clear()
    yield
    fused._plan.cache_clear()


def pair(shape, **options):
    """A layer with an affine that is not the identity, and its twin in float64."""
    wide = KINDS[len(shape)](shape[1], r_max=1.5, d_max=0.5, dtype=torch.float64, **options)
    if wide.affine:
        nn.init.uniform_(wide.weight, 0.5, 1.5)
        nn.init.normal_(wide.bias)
    return copy.deepcopy(wide).float(), wide


CASES = {
    "rows, in splits": ((2, 2, 5, 27), False, {}),
    "rows, at once": ((2, 3, 4, 5), False, {"momentum": None}),
    "last, in splits": ((2, 5, 7, 5), True, {}),
    "last, at once": ((2, 3, 2, 3, 4), True, {"affine": False}),
    "vectors": ((9, 3), False, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_formula(interpreted, monkeypatch, case):
    """Output, gradients and running statistics are those of the layer in float64, over two steps."""
    shape, last, options = CASES[case]
    monkeypatch.setattr(fused.Plan, "AT_ONCE", 8 if "splits" not in case else 0)
    layer, wide = pair(shape, momentum=0.1) if not options else pair(shape, **options)
    for step in range(2):
        exact = torch.randn(shape, dtype=torch.float64) * (1 + step) + step
        x = exact.float()
        if last:
            x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        x, exact = x.requires_grad_(), exact.float().double().requires_grad_()
        grad = torch.randn(shape)
        y, expected = fused.renormalise(layer, x, layer.weight, layer.bias), wide(exact)
        y.backward(grad)
        expected.backward(grad.double())
        assert y.stride() == x.stride()
        assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(layer.state_dict().items(), wide.state_dict().values(), strict=True):
        assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5, msg=name)
    for ours, theirs in zip(layer.parameters(), wide.parameters(), strict=True):
        assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)
