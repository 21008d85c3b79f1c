"""Set a network, an image and a tiling up for experiments: its scan, its geometry, its two modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normfix.diagnosis.experiments import Experiments
from normfix.diagnosis.intervention import record, run_fixed
from normfix.errors import NormfixError
from normfix.images.scaling import scaled
from normfix.networks.calling import Caller, evaluating, home_of, in_eval_mode, refusals
from normfix.networks.copying import as_trained_copy, copy_of, twin_of
from normfix.proof.indicators import recognise
from normfix.records.diagnoses import Kind, Tiling
from normfix.records.progress import Progress
from normfix.records.saved import Scaling
from normfix.records.sites import Finding, Scan, Site
from normfix.records.spans import per_axis, round_up
from normfix.scanning.base import base_of
from normfix.scanning.scan import look
from normfix.scanning.sites import survey
from normfix.tiling.geometry import Locality, measure_locality
from normfix.tiling.grid import Geometry
from normfix.tiling.stitching import dividing

__all__ = ["Setting", "bench_of", "prepare"]

_INSTEAD = "Diagnose it as a pipeline: give a function predict(image), which needs no geometry."


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known before the first measurement; `kind` and `channels` are the output's."""

    model: nn.Module
    trained: nn.Module
    caller: Caller
    image: Tensor
    scan: Scan
    geometry: Geometry
    tiling: Tiling
    kind: Kind
    channels: int
    live: dict[bool, tuple[Site, ...]]
    findings: tuple[Finding, ...]

    def scale(self, image: Tensor) -> Tensor:
        """Apply what the tiling scales windows with to a whole tensor (1, C, *space)."""
        return image if self.tiling.scaling is None else _scaled(image, self.tiling.scaling)


def prepare(
    model: nn.Module,
    image: Tensor,
    tiling: Tiling | None,
    *,
    tile: int | Sequence[int] | None,
    halo: int | Sequence[int] | Literal["auto"],
    kind: Kind | None,
    caller: Caller,
) -> Setting:
    """Scan the network and complete the tiling: what the user did not state is as normfix does it.

    Raises:
        NormfixError: NF601 if no geometry can be measured even with everything global held constant, NF602 for
            a tiling that does not fit the image.
    """
    ready = base_of(model, image, caller)
    base, caller, example = ready.network, ready.caller, ready.example
    training = [name for name, m in base.named_modules() if isinstance(m, _NormBase) and m.training]
    seen = look(ready.copy, example, caller)
    local = {
        s.id for s in seen.scan.sites if not s.live and s.layer is None
    }  # measured, whatever their names say
    evaluated, trained = in_eval_mode(ready.copy()), in_eval_mode(_as_used(base, training))
    live = {
        mode: tuple(s for s in _sites(net, example, caller) if s.live and s.id not in local)
        for mode, net in ((False, evaluated), (True, trained))
    }
    geometry = seen.geometry or _geometry(evaluated, example, caller, live[False])
    # pipelines' windows leave over what their grid does, not what the image does
    geometry = replace(geometry, padded_inside=())
    tiling = _completed(tiling, tile, halo, geometry, image, bool(training))
    tiling, findings = _runs(evaluated, image, tiling, geometry, caller)
    with evaluating(evaluated), torch.no_grad():
        middle = caller(evaluated, example.to(*home_of(evaluated)))
    return Setting(
        evaluated,
        trained,
        caller,
        image,
        seen.scan,
        geometry,
        tiling,
        kind or recognise(middle),
        middle.shape[1],
        live,
        findings,
    )


def bench_of(setting: Setting, progress: Progress) -> Experiments:
    """Return the experiments' bench, in float64 on the network's device."""
    return Experiments(
        evaluated=in_eval_mode(copy_of(setting.model).double()),
        trained=in_eval_mode(copy_of(setting.trained).double()),
        run=setting.caller.in_double,
        image=setting.image.double(),
        geometry=setting.geometry,
        tiling=setting.tiling,
        kind=setting.kind,
        live=setting.live,
        scale=setting.scale,
        progress=progress,
    )


def _as_used(base: nn.Module, training: Sequence[str]) -> nn.Module:
    """Return a copy with batch statistics in use where the network uses them: in some norms, or in all."""
    used = as_trained_copy(base)
    for name, module in base.named_modules():
        if training and isinstance(module, _NormBase) and name not in training:
            used.get_submodule(name).__dict__.update(copy_of(module).__dict__)
    return used


def _sites(model: nn.Module, example: Tensor, caller: Caller) -> tuple[Site, ...]:
    return survey(
        in_eval_mode(copy_of(model).cpu().float()), caller, example[:1].detach().cpu().float()
    ).sites


def _geometry(model: nn.Module, example: Tensor, caller: Caller, live: Sequence[Site]) -> Geometry:
    """Measure the geometry with every global call held at its value on the example, attention's too.

    A network that resizes with align_corners=True drifts by up to a pixel of its coarsest map, so its halo
    gets one more of those.
    """
    material = example[:1].detach().cpu().float()
    probe = copy_of(model).cpu().float()
    dilution = survey(probe, caller, material).dilution
    _, kept = record(probe, caller, material, live)
    stuck = [s.id for s in live if not kept.fixable(s.id)]
    if stuck:
        raise NormfixError("NF601", f"it cannot be held constant. {_INSTEAD}", where=stuck[0])
    fixed = frozenset(s.id for s in live) | kept.resized.keys()
    double = copy_of(probe).double()
    _, exact = record(double, caller.in_double, material.double(), live)
    found = measure_locality(
        partial(_held, probe, caller, kept, fixed),
        partial(_held, double, caller.in_double, exact, fixed),
        material,
        dilution,
    )
    return _wider(_required(found, type(model).__name__), dilution if kept.resized else (0,) * len(dilution))


def _held(model: nn.Module, run: Any, kept: Any, fixed: frozenset[str], window: Tensor) -> Tensor:
    return run_fixed(model, run, window, kept, fixed, None)


def _required(found: Locality, name: str) -> Geometry:
    if found.geometry is None:
        reasons = "; ".join(f.message for f in found.findings)
        raise NormfixError(
            "NF601",
            f"its geometry cannot be measured even with everything global held constant: {reasons} {_INSTEAD}",
            where=name,
        )
    return found.geometry


def _wider(geometry: Geometry, extra: Sequence[int]) -> Geometry:
    halos = zip(geometry.halo, extra, strict=True)
    return replace(geometry, halo=tuple((before + n, after + n) for (before, after), n in halos))


def _completed(
    tiling: Tiling | None,
    tile: int | Sequence[int] | None,
    halo: int | Sequence[int] | Literal["auto"],
    geometry: Geometry,
    image: Tensor,
    training: bool,
) -> Tiling:
    """Return the user's tiling, or normfix's own with the tile and halo given."""
    ndim, own_tile = image.ndim - 2, dividing(image, geometry)
    pairs = zip(geometry.halo, geometry.stride, strict=True)
    exact = tuple((round_up(b, s), round_up(a, s)) for (b, a), s in pairs)
    if tiling is None:
        extents = own_tile if tile is None else per_axis(tile, ndim)
        sides = None if halo == "auto" else per_axis(halo, ndim)
        if extents is None or (sides is None and halo != "auto"):
            raise NormfixError(
                "NF602",
                f"give 1 or {ndim} whole numbers of pixels for tile and halo.",
                where=f"tile={tile!r}, halo={halo!r}",
            )
        own = exact if sides is None else tuple((n, n) for n in sides)
        tiling = Tiling(tile=extents, halo=own, train=training)
    tiling = replace(tiling, tile=tiling.tile or own_tile, halo=tiling.halo or exact)
    if not len(tiling.tile) == len(tiling.halo) == ndim or min(tiling.tile) < 1:
        raise NormfixError(
            "NF602",
            f"give tile and halo for each of the {ndim} spatial axes, tiles of a pixel or more.",
            where=f"tile={tiling.tile}",
        )
    return tiling


def _runs(
    model: nn.Module, image: Tensor, tiling: Tiling, geometry: Geometry, caller: Caller
) -> tuple[Tiling, tuple[Finding, ...]]:
    """Extend the image to an exact size where the network does not run on the size it has."""
    if tiling.padded or not any(geometry.padding(image.shape[2:])):
        return tiling, ()
    try:
        with torch.no_grad():
            caller(twin_of(model), image[:1])
    except refusals():
        size = "x".join(map(str, image.shape[2:]))
        message = f"the network does not run at {size}, so the image was extended by its edge pixels."
        return replace(tiling, padded=True), (Finding(code="NF603", where="size", message=message),)
    return tiling, ()


def _scaled(image: Tensor, scaling: Scaling) -> Tensor:
    arrays = [scaled(np.asarray(item.cpu()), scaling, "window") for item in image]
    return torch.stack([torch.from_numpy(a) for a in arrays]).to(image)
