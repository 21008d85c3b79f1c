"""Whether a network and its conversion differ by rounding alone: the comparison repeated in float64.

A norm whose input lies far from zero loses digits: with mean/sd = r, float32 keeps the normalised values to about
r * 6e-8, and their variance to r^2 * 6e-8, whichever way they are computed. Then the original is as far from its own
float64 output as the converted network is from the original, and no float32 computation could tell a wrong
conversion from a right one. In float64 the same two networks must agree to the bound of float64; and the converted
network's output may lie no further from the exact one than ROUNDING times the original's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from normfix.networks.calling import Caller, in_eval_mode, refusals
from normfix.networks.copying import copy_of
from normfix.networks.numerics import deviation
from normfix.proof.steps import identity
from normfix.records.verdicts import ProofStep

__all__ = ["ROUNDING", "repeated_in_double"]

ROUNDING = 4.0
"""As many times the original's own rounding may be the converted network's: two computations of like length differ
by a factor of up to two (measured: ratios of 1.2 to 1.8 at mean/sd from 3e3 to 1e6), and check excuses four."""

_MEANINGLESS = 1.0
"""Rounding of this many sd leaves nothing of the output, so that nothing is proved by being no worse."""


def repeated_in_double(
    failed: ProofStep,
    original: nn.Module,
    image: Tensor,
    caller: Caller,
    outputs: tuple[Tensor, Tensor],
    convert: Callable[[nn.Module, Tensor], nn.Module],
) -> ProofStep:
    """Return the identity step in float64 if the difference in the network's own dtype is rounding, else the failed.

    A step that passed in 16 bits stands if it passes in float64 too.

    Args:
        failed: the step in the network's own dtype; what passed in 16 bits is a failure unless float64 confirms it.
        original: the network as it was, in eval mode.
        image: (1, C, *space), on which it is compared.
        caller: calls it.
        outputs: of the converted network and the original for the image, in their own dtype.
        convert: converts a float64 network, calibrated on a float64 image alone.
    """
    try:
        double, wide = in_eval_mode(copy_of(original).double()), image.double()
        exact = caller.in_double(double, wide)
        step = identity(caller.in_double(in_eval_mode(convert(double, wide)), wide), exact)
    except refusals() as error:
        return replace(failed, note=f"it cannot be repeated in float64: {' '.join(str(error).split())[:160]}")
    spread = float(exact.std())
    ours, own = (deviation(output, exact, spread)[0] for output in outputs)
    kind = str(outputs[1].dtype).removeprefix("torch.")
    if failed.status == "passed" and step.status == "passed":
        return replace(
            failed, note=f"{step.value or 0.0:.1e} sd in float64; the bound is that of {kind} rounding"
        )
    failed = replace(failed, status="failed")
    if step.status == "passed" and own < _MEANINGLESS and ours <= ROUNDING * own:
        note = (
            f"in float64; in {kind} the original is {own:.1e} sd from its own float64 output and the converted network "
            f"{ours:.1e}, so what lies between the two there ({failed.value:.1e} sd) is rounding"
        )
        return replace(step, note=note)
    note = (
        f"in float64 it is {step.status} at {step.value or 0.0:.1e} sd; in {kind} the original is {own:.1e} sd from "
        f"its own float64 output, the converted network {ours:.1e} (rounding is at most {ROUNDING:g} times as far)"
    )
    if step.status == "passed":
        note += ". Next: convert in float64 (--dtype float64, dtype=torch.float64 in Python)"
    return replace(failed, note=note)
