"""Statistics of one image measured three ways, each held against the original's own output of that image, in float64.

The network is converted on one image and measured anew on another, of another size: in passes, in stages over blocks,
and by `predict` as the image's own statistics. All three must give what the original gives of the whole image; that
they agree with each other would prove nothing. Trained batch norms that were converted beside the live ones keep their
statistics in `predict`, which gives what the original gave, but `calibrate` means to measure them anew: there the
original is the one whose batch norms take the statistics of what comes in.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

import normfix

from .entry import Entry
from .preparing import material, prepared
from .tiling import distance, in_float64

__all__ = ["AGREED", "agreement"]

AGREED = 1e-9
"""Largest distance in sd in float64; a network that casts to float32 on the way is held to 1e-4."""


def agreement(entry: Entry, *, tile: int | None = None) -> dict[str, Any]:
    """Return the largest distance from the original per way, `limit`, and `skipped` where nothing is measured."""
    model = prepared(entry).double()
    example = material(entry.shape, entry.name).double()
    scan = normfix.scan(model, example, forward_fn=entry.call, output=entry.output)
    if scan.halo is None or scan.exact_sizes is None:
        return {"skipped": "no geometry"}
    if not any(site.live for site in scan.sites):
        return {"skipped": "nothing live"}
    done = normfix.convert(model, example, forward_fn=entry.call, output=entry.output)
    if done.plan.left_live or not done.proof.passed:
        return {"skipped": "not converted"}
    grow = [n // 2 + (-(n // 2)) % m for n, m in zip(entry.shape[2:], scan.exact_sizes, strict=True)]
    size = (*entry.shape[:2], *(n + g for n, g in zip(entry.shape[2:], grow, strict=True)))
    image = (material(size, entry.name + " anew").double() * 0.5 + 1).contiguous()
    trained = {d.site.owner for d in done.plan.converted if not d.measured}
    original, casts = _output(entry, model, image)
    anew, _ = _output(entry, model, image, anew=trained)
    tile = tile or min(entry.shape[2:])
    keywords: dict[str, Any] = {"forward_fn": entry.call, "output": entry.output}
    passes = normfix.calibrate(done.model, image, allow_flat=True, **keywords)
    stages = normfix.calibrate(done.model, image, tile=tile, allow_flat=True, **keywords)
    unit = max(scan.stride or (1,))
    own = normfix.predict(
        done.model, image, -(-tile // unit) * unit, statistics="per-image", engine="tiles", **keywords
    )
    return {
        "passes": distance(_output(entry, passes.model, image)[0], anew),
        "stages": distance(_output(entry, stages.model, image)[0], anew),
        "per-image": distance(own, original),
        "engine": stages.summary.engine,
        "reason": stages.summary.reason,
        "limit": 1e-4 if casts else AGREED,
        "trained": len(trained),
    }


def _output(
    entry: Entry, model: nn.Module, image: Tensor, *, anew: Collection[str] = ()
) -> tuple[Tensor, int]:
    """Return the output that counts, and how many casts to float32 were on the way (and were not made).

    The batch norms named in `anew` take the image's statistics.
    """
    network = copy.deepcopy(model).eval()
    for name in anew:
        network.get_submodule(name).register_forward_pre_hook(_measured_anew)
    with in_float64() as mode:
        result = network(image.clone()) if entry.call is None else entry.call(network, image.clone())
    if entry.output is not None:
        key: Any = entry.output
        result = result[
            int(key) if isinstance(key, str) and key.isdigit() and not isinstance(result, dict) else key
        ]
    assert isinstance(result, Tensor)
    return result, mode.casts


def _measured_anew(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    values = inputs[0].transpose(0, 1).flatten(1)
    norm.running_mean.copy_(values.mean(1))
    norm.running_var.copy_(values.var(1, correction=0))
