"""Normalisation by constants on a GPU: one fused multiply-add per value.

    y = (x - mean) / sqrt(var + eps) * weight + bias = x * scale + shift
    scale = weight / sqrt(var + eps)
    shift = bias - mean * scale

torch's batch norm kernels, cuDNN's among them, give a channel of an image few blocks to work on: at a batch of one they
take 11 to 35 times a copy of the operand (one H100), one fused multiply-add about as long as a copy. With Triton it is
one launch (normfix.layers.kernels), without it torch's addcmul. The constants are float32 whatever the network's dtype,
and so is the sum; the result is rounded once. It differs from batch norm's by rounding: with u
the unit roundoff of float32, by at most a few u * (|x * scale| + |shift|), which is what rounding of x itself does to
the result. Bits matter in float64, where proofs are made, and on the CPU, where batch norm is as fast: there it is
batch norm's call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["as_in_graphs", "is_followed", "kernels_of", "normalise", "normalise_rectified"]

_KINDS = ("cuda",)
"""Devices whose batch norm is slow at a batch of one."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> Tensor:
    """Return batch norm of x (n, c, *space) by constants (c,), in its dtype and memory format.

    Where gradients are wanted, or a graph is captured, it is batch norm's own call.
    """
    y = _fused(x, weight, bias, mean, var, eps)
    if y is not None:
        return y
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)


def normalise_rectified(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> Tensor:
    """Return relu of `normalise`, in one launch where that is one: to the same bits."""
    y = _fused(x, weight, bias, mean, var, eps, rectified=True)
    return normalise(x, weight, bias, mean, var, eps).relu_() if y is None else y


def _fused(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    *,
    rectified: bool = False,
) -> Tensor | None:
    """Return the multiply-add where it is meant for x; None elsewhere."""
    fused = x.device.type in _KINDS and x.dtype in _DTYPES and _is_plain(x, weight, bias)
    if not fused or mean is None or var is None:
        return None
    with torch._C.DisableTorchFunction():
        kernels = kernels_of(x.device)
        if kernels is not None:
            found: Tensor | None = kernels.normalised(x, weight, bias, mean, var, eps, rectified=rectified)
            if found is not None:
                return found
        y = _multiplied(x, weight, bias, mean, var, eps)
        return y.relu_() if rectified else y


@contextmanager
def as_in_graphs() -> Iterator[None]:
    """Let this thread make batch norm's own call, as captured graphs do, so that the two have the same bits."""
    before, _THREAD.plainly = getattr(_THREAD, "plainly", False), True
    try:
        yield
    finally:
        _THREAD.plainly = before


_THREAD = threading.local()


@cache
def kernels_of(device: torch.device) -> ModuleType | None:
    """Return the kernels of this package for a device, once they ran there; None without Triton or a compiler."""
    if device.type != "cuda":
        return None
    try:
        from normfix.layers import kernels
    except ImportError:  # no Triton
        return None
    x = torch.zeros((1, 2, 2, 2), device=device)
    ones = torch.ones(2, device=device)
    try:
        kernels.normalised(x, ones, ones, ones, ones, 1e-5)
    except Exception as error:  # noqa: BLE001 - whatever a compiler runs into, torch's own kernels are there
        reason = " ".join(str(error).split())[:160]
        logging.getLogger("normfix").warning(
            "layers run without Triton's kernels, which is slower: %s", reason
        )
        return None
    return kernels


def is_followed() -> bool:
    """Tell whether a compiler or a transform follows what is computed."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def _is_plain(x: Tensor, *affine: Tensor | None) -> bool:
    """Tell whether nothing follows what is computed: no gradient or tangent, no compiler, no transform, no subclass."""
    if is_followed() or type(x) is not Tensor or torch.autograd.forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *affine)):
        return False
    return not getattr(_THREAD, "plainly", False)


def _multiplied(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    scale = (var.float() + eps).rsqrt_()
    if weight is not None:
        scale = scale.mul_(weight)
    shift = -(mean * scale) if bias is None else torch.addcmul(bias.float(), mean, scale, value=-1)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    y = torch.empty_like(x)
    # an output that is given keeps autocast and type promotion away from the result's dtype
    return torch.addcmul(shift.view(shape), x, scale.view(shape), out=y)
