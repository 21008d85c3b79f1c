"""The numbers that decide: one tolerance table keyed by dtype, the noise floor, reproducible settings."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from normfix.errors import NormfixError
from normfix.networks.precision import exact_precision

__all__ = [
    "BOUNDLESS",
    "EXACT",
    "HALF",
    "IDENTITY",
    "as_numbers",
    "deviation",
    "exact_arithmetic",
    "require_finite",
    "settings",
]

BOUNDLESS = 1e300
"""Stands for a difference that is infinite or NaN: JSON knows neither, and NaN compares as if it were fine."""

HALF = (torch.bfloat16, torch.float16)
"""Dtypes of 16 bits: their rounding is so large that a proof in them is made in float64 as well."""

_ROUNDINGS = 64
"""As many roundings of 16 bits may lie between two computations of one function, at the worst pixel.

Measured on U-Nets of 18 norms in bfloat16, whose unit roundoff is 2**-8: 0.10 sd on a CPU and 0.11 sd on an H100, 26
and 28 roundings. The order of sums differs between devices, so the bound is twice the largest, as a power of two.
"""

EXACT = 1e-10
"""The largest relative difference in float64 that counts as none."""

IDENTITY: dict[torch.dtype, float] = {
    torch.float64: EXACT,
    torch.float32: 1e-4,
    torch.bfloat16: _ROUNDINGS * 2.0**-8,
    torch.float16: _ROUNDINGS * 2.0**-11,
}
"""The largest difference, in sd of the output, at which two computations count as the same function, on any device."""


def as_numbers(value: Tensor) -> Tensor:
    """Return truth values as the numbers 0 and 1, which can be subtracted; all else as it is."""
    return value.to(torch.uint8) if value.dtype == torch.bool else value


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
    """Switch TF32, algorithm search, autocast and gradients off; restore them.

    Precision and algorithm search are settings of the whole process: the first thread that enters switches them off,
    the last one that leaves brings them back, so regions may overlap. Autocast and gradients are the thread's own.
    """
    _SWITCH.enter()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        _SWITCH.leave()


class _Switch:
    """Counts who computes exactly, and keeps how the process was set before the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                with ExitStack() as undo:
                    _search_off(undo)
                    undo.callback(exact_precision())
                    self._undo = undo.pop_all()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()


_SWITCH = _Switch()


def _search_off(undo: ExitStack) -> None:
    cudnn = torch.backends.cudnn
    if cudnn.benchmark:
        undo.callback(setattr, cudnn, "benchmark", True)
        cudnn.benchmark = False


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
