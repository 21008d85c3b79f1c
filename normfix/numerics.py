"""The numbers that decide: one tolerance table keyed by dtype, the noise floor, reproducible settings."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from normfix.errors import NormfixError

__all__ = ["BOUNDLESS", "IDENTITY", "deviation", "exact_arithmetic", "require_finite", "settings"]

BOUNDLESS = 1e300
"""Stands for a difference that is infinite or NaN: JSON knows neither, and NaN compares as if it were fine."""

IDENTITY: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 1e-1,
    torch.float16: 2e-2,
}
"""The largest difference, in sd of the output, at which two computations count as the same function."""


def deviation(actual: Tensor, expected: Tensor, sd: float) -> tuple[float, float]:
    """Return (largest, mean) absolute difference in units of `sd`, in float64; NaN counts as BOUNDLESS."""
    difference = (actual.double() - expected.double()).abs() / sd
    difference = difference.nan_to_num(nan=BOUNDLESS).clamp_max(BOUNDLESS)
    return float(difference.max()), float(difference.mean())


def require_finite(prediction: Tensor, where: str) -> None:
    """Refuse a prediction with NaN or infinite values.

    Raises:
        NormfixError: NF149.
    """
    if prediction.is_floating_point() and not torch.isfinite(prediction).all():
        bad = int((~torch.isfinite(prediction)).sum())
        raise NormfixError(
            "NF149",
            f"{bad:,} of {prediction.numel():,} values are NaN or infinite on a finite image, in "
            f"{str(prediction.dtype).removeprefix('torch.')}: the network overflows on it. Scale the image as it was "
            "trained with (--scale) or compute in a wider dtype (--dtype); if the network means such values, give "
            "--allow-nonfinite (allow_nonfinite=True in Python).",
            where=where,
        )


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Switch TF32, algorithm search, autocast and gradients off; restore them and the random state."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    try:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = False, False, False
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before


def settings(device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """Return what is needed to reproduce a number, as (name, value) pairs."""
    return (
        ("torch", torch.__version__.split("+")[0]),
        ("python", platform.python_version()),
        ("device", device.type),
        ("dtype", str(dtype).removeprefix("torch.")),
        ("threads", str(torch.get_num_threads())),
        ("tf32", "off"),
        ("cudnn.benchmark", "off"),
    )
