"""calibrate: measure a network's statistics anew on whole images, in a copy or in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normfix.calibration import Calibration, measure_sites_
from normfix.calling import Caller, home_of
from normfix.errors import NormfixError
from normfix.graph import Program
from normfix.images import Items
from normfix.interception import InterceptedNorm
from normfix.layers import ChannelNorm, FrozenStatistic
from normfix.moments import Moments
from normfix.pipeline.looking import fitting_example, geometry_of, site_target
from normfix.provenance import provenance_of
from normfix.records import CalibrationSummary, Family, Plan
from normfix.rewriting import copy_of
from normfix.scanning import survey
from normfix.stitching import padded
from normfix.targets import NormTarget, Target

__all__ = ["calibrate", "calibrate_"]

Progress = Callable[[int, int], None]
ForwardFn = Callable[[nn.Module, Tensor], Any]


def calibrate(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    tile: int | None = None,
    *,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """Return a copy of a network whose statistics are measured anew on whole images.

    Args:
        model: converted by normfix, or any network with batch norms on running statistics; not modified.
        images: re-iterable of (N, C, *space) tensors, or one tensor.
        tile: has no influence on the statistics, which are those of whole images; this version holds each
            image in memory whole.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        progress: called with (passes done, passes in all).

    Raises:
        NormfixError: NF302 if the network has live statistics, or none at all; NF301 and codes of the images.
    """
    copied = copy_of(model)
    return Calibration(
        copied, calibrate_(copied, images, tile, forward_fn=forward_fn, output=output, progress=progress)
    )


def calibrate_(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    tile: int | None = None,
    *,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    progress: Progress = lambda done, total: None,
) -> CalibrationSummary:
    """Measure a network's statistics anew in place, on the same module objects; see `calibrate`.

    Optimizers, compiled and distributed wrappers keep their model. On any error the old statistics are back.
    """
    known = provenance_of(model)
    items = Items.of(images, *home_of(model), like=known.scan.example if known else None)
    caller = Caller(forward_fn, output if output is not None else known.output if known else None)
    targets: Sequence[Target]
    if known is not None:
        geometry = geometry_of(known.scan)
        if geometry is not None:
            items = replace(items, prepare=partial(padded, geometry=geometry))
        targets = _planned(model, known.plan)
    else:
        targets = _batch_norms(model, fitting_example(model, next(iter(items)), caller), caller)
    return measure_sites_(model, targets, items, caller, progress)


def _planned(model: nn.Module, plan: Plan) -> list[Target]:
    """Describe the converted sites, all of which must still be there."""
    modules = dict(model.named_modules())
    for decision in plan.converted:
        layer = modules.get(decision.target)
        if isinstance(model, Program):
            if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
                raise NormfixError(
                    "NF228",
                    "the program holds the constant and no longer what computed it, so it cannot be measured anew. "
                    "Calibrate the folder or network that the program was written from and write it again, or "
                    "convert the program it was made of on these images.",
                    where=decision.site.id,
                )
        elif not isinstance(layer, ChannelNorm | InterceptedNorm | FrozenStatistic):
            raise NormfixError(
                "NF302",
                "the converted layer is gone. Convert the network as it is now.",
                where=decision.target,
            )
    return [site_target(model, decision, express=False) for decision in plan.converted]


def _batch_norms(model: nn.Module, example: Tensor, caller: Caller) -> list[NormTarget]:
    """Describe the batch norms of a network that normfix did not convert."""
    copied = copy_of(model).eval()
    sites = survey(copied, caller, example).sites
    live = [site for site in sites if site.live]
    batch = [s for s in sites if s.family is Family.BATCH and s.layer is not None and s.layer.carries]
    if live or not batch:
        reason = f"{live[0].id} is live" if live else "it has no normalisation with running statistics"
        raise NormfixError(
            "NF302",
            f"there is nothing to calibrate before it is converted: {reason}.",
            where=type(model).__name__,
        )
    return [_batch_target(site.id, model.get_submodule(site.owner)) for site in batch]


def _batch_target(name: str, norm: nn.Module) -> NormTarget:
    def store(moments: Moments) -> None:
        with torch.no_grad():
            norm.running_mean.copy_(moments.mean)  # type: ignore[operator]
            norm.running_var.copy_(moments.var)  # type: ignore[operator]

    return NormTarget(name, norm, norm, store, lambda moments: moments)
