"""A probe: what a network gives for a seeded input, stored with it, so that another base network is noticed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.networks.calling import Caller, home_of
from normfix.networks.copying import twin_of
from normfix.networks.numerics import IDENTITY, exact_arithmetic
from normfix.records.encoding import SCHEMA
from normfix.records.measurements import CalibrationSummary
from normfix.records.saved import Probe, Provenance, Saved
from normfix.records.verdicts import Proof
from normfix.storage.folder import seeded_input

__all__ = ["LARGEST_PROBE", "SEED", "ProbeError", "probe_of", "probed", "require_probe", "saved_inside"]

SEED = 0
_SAMPLES = 64
LARGEST_PROBE = 1 << 21
"""Values of a probe: 128 pixels cubed; a file must not ask for more."""


class ProbeError(NormfixError):
    """A network that does not give the output stored for its probe (NF115)."""


def probe_of(model: nn.Module, caller: Caller, provenance: Provenance) -> Probe | None:
    """Return what the model gives for a seeded input; None if it needs a calling convention that is not saved."""
    if caller.forward_fn is not None:
        return None
    dtype = home_of(model)[1]
    shape = (1, *provenance.scan.example[1:])
    if math.prod(shape) > LARGEST_PROBE:
        return None
    output = probed(model, caller, shape, SEED, dtype)
    return Probe(
        shape=shape,
        seed=SEED,
        dtype=str(dtype).removeprefix("torch."),
        output=tuple(output.shape),
        sd=float(output.double().std()),
        values=_samples(output),
    )


def saved_inside(
    model: nn.Module,
    caller: Caller,
    provenance: Provenance,
    proof: Proof | None,
    calibration: CalibrationSummary | None,
) -> Saved:
    """Return what travels inside a file that holds its network itself, without weights of its own beside it."""
    return Saved(
        schema=SCHEMA,
        provenance=provenance,
        aliases=(),
        sha256="",
        calibration=calibration,
        proof=proof,
        probe=probe_of(model, caller, provenance),
    )


def require_probe(model: nn.Module, caller: Caller, probe: Probe, where: str) -> None:
    """Refuse a network that does not repeat what is stored for it.

    Raises:
        ProbeError: NF115 if it gives another output.
        NormfixError: NF121 if the probe would not fit.
    """
    if math.prod(probe.shape) > LARGEST_PROBE:
        raise NormfixError("NF121", f"its probe has the shape {probe.shape}. It is not made.", where=where)
    dtype: torch.dtype = getattr(torch, probe.dtype)
    output = probed(model, caller, probe.shape, probe.seed, dtype)
    scale = probe.sd or 1.0
    same = tuple(output.shape) == probe.output and all(
        abs(a - b) <= IDENTITY[dtype] * scale for a, b in zip(_samples(output), probe.values, strict=True)
    )
    if not same:
        raise ProbeError(
            "NF115",
            "the network does not give the output stored with it for the probe input, so it is another base "
            "network or another version of its code. Rebuild it with the version it was converted with.",
            where=where,
        )


def probed(model: nn.Module, caller: Caller, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Return the output that counts for the seeded input, on the CPU."""
    device = home_of(model)[0]
    with exact_arithmetic():
        return caller(twin_of(model), seeded_input(shape, seed, dtype).to(device)).cpu()


def _samples(output: Tensor) -> tuple[float, ...]:
    flat = output.double().flatten()
    # in float32 whatever the default is, as folders were written, which rounds up beyond 2**24
    places = torch.linspace(0, len(flat) - 1, _SAMPLES, dtype=torch.float32).long().clamp(max=len(flat) - 1)
    return tuple(float(v) for v in flat[places])
