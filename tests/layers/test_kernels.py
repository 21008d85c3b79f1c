"""Kernels of the GPU compile, which needs Triton and no GPU; what they compute is in tests/test_cuda.py."""

import pytest

pytest.importorskip("triton")

import triton

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    pytest.skip("before Triton 3.3 its compiler is called otherwise", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normfix.layers import kernels

CASES = {
    "_moments_of_tiles": ({"parts": "*fp64", "x": "*fp32"}, {"rows": 8, "columns": 128, "steps": 16}),
    "_moments_of_parts": ({"out": "*fp64", "parts": "*fp64"}, {"block": 256}),
    "_normalise_window": (
        {**dict.fromkeys(("y", "x", "mean", "var", "weight", "bias"), "*fp32"), "eps": "fp32"},
        {"has_weight": True, "has_bias": True, "rectified": True, "rows": 32, "columns": 128},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_compiles(name):
    """What Triton refuses is seen here: on a GPU torch's own kernels would take over, with a warning."""
    kernel = getattr(kernels, name)
    types, constants = CASES[name]
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(argument),): value for argument, value in constants.items()},
    )
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
