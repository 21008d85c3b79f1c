"""Experiments on a network as it runs: chosen calls get the value they have on the whole image.

A counterfactual, not a conversion: nothing is built, saved or changed, and it also works where no constant
could replace the call. For one image the fixes are exact (T1): what a fixed call returns on the whole image
is what the live call returns there.

    norm         y = (x - mean) / sqrt(var + eps) * w + b   with mean and var of the whole image
    statistic    the whole image's result
    attention    the tile's queries meet the whole image's keys and values
    position     align_corners=True resizes with the coordinates of the whole image
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normfix.networks.functions import bound
from normfix.records.sites import Family, Site, function_of
from normfix.scanning.census import census

__all__ = ["POSITION", "Offset", "Recording", "Watched", "record", "run_fixed", "watch"]

POSITION = "position"
_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm", "einsum"})
_RESIZES = frozenset({"interpolate", "upsample", "upsample_bilinear"})

Run = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Offset:
    """Where a window lies: its first pixel and the extents of the whole image, per axis."""

    start: tuple[int, ...]
    whole: tuple[int, ...]


@dataclass(slots=True)
class Recording:
    """What each site has on the whole image; `resized` holds (input, output) extents of align_corners calls."""

    sites: Mapping[str, Site]
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    operands: dict[str, dict[int | str, Tensor]] = field(default_factory=dict)
    partners: dict[str, str] = field(default_factory=dict)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def fixable(self, site: str) -> bool:
        """Tell whether the site can be given the whole image's value."""
        return site in self.norms or site in self.values or site in self.operands or site in self.resized


@dataclass(frozen=True, slots=True)
class Watched:
    """The (mean, variance) per channel that norms have on one input, by site."""

    norms: Mapping[str, tuple[Tensor, Tensor]]


def record(model: nn.Module, run: Run, image: Tensor, sites: Sequence[Site]) -> tuple[Tensor, Recording]:
    """Run the whole image and keep what each live site has there."""
    kept = Recording({site.id: site for site in sites if site.live})
    waiting: dict[tuple[int, ...], str] = {}

    def settle(site: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        result = func(*args, **kwargs)
        name = function_of(site)
        known = kept.sites.get(site)
        if known is not None and known.family is Family.ATTENTION:
            _keep_operands(kept, site, name, args, kwargs)
            if name in _PRODUCTS:
                waiting[tuple(result.shape)] = site
        elif known is not None and known.layer is not None:
            kept.norms[site] = _moments(_operand(name, args, kwargs), known)
        elif known is not None and known.layer is None and name not in ("layer_norm", "rms_norm"):
            kept.values[site] = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, result)
        elif name in _PRODUCTS:
            _keep_partner(kept, waiting, site, args)
        elif name in _RESIZES and _aligned(func, args, kwargs) and isinstance(result, Tensor):
            kept.resized[site] = tuple(args[0].shape[2:]), tuple(result.shape[2:])
        return result

    _, _, output = census(model, run, image, settle)
    return output, kept


def run_fixed(
    model: nn.Module, run: Run, window: Tensor, kept: Recording, fixed: frozenset[str], place: Offset | None
) -> Tensor:
    """Run one window with the sites in `fixed` at their whole-image values, all others live.

    Without a place, align_corners=True resizes as align_corners=False would, which depends on no place.
    """
    if not fixed:
        return run(model, window)
    partners = {kept.partners[site] for site in fixed if site in kept.partners}

    def settle(site: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if site not in fixed and site not in partners:
            return func(*args, **kwargs)
        if site in kept.norms:
            return _normalised(function_of(site), args, kwargs, kept.norms[site])
        if site in kept.operands:
            held = kept.operands[site]
            named = {key: held.get(key, value) for key, value in kwargs.items()}
            return func(*_with_operands(args, held), **named)
        result = func(*args, **kwargs)
        if site in kept.values:
            return _constant(kept.values[site], result)
        return _resized(args[0], result, kept.resized[site], place)

    _, _, output = census(model, run, window, settle)
    return output  # type: ignore[no-any-return]


def watch(model: nn.Module, run: Run, window: Tensor, sites: Sequence[Site]) -> Watched:
    """Run one window and return what its norms compute from it."""
    return Watched(record(model, run, window, sites)[1].norms)


def _operand(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return bound(name, args, kwargs)["input"]  # type: ignore[no-any-return]


def _moments(x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """Return mean and variance per channel, (C,) in float64, of what the site reduces in one image."""
    assert site.layer is not None
    groups = site.layer.groups
    rows = x.double().movedim(1, 0).reshape(groups, -1)  # (n, c, *space) -> (groups, c/groups*n*space)
    repeat = x.shape[1] // groups
    mean, var = rows.mean(1), rows.var(1, unbiased=False)
    return mean.repeat_interleave(repeat), var.repeat_interleave(repeat)


def _normalised(
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    moments: tuple[Tensor, Tensor],
) -> Tensor:
    given = bound(name, args, kwargs)
    x: Tensor = given["input"]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    mean, var = (m.to(x).view(shape) for m in moments)
    y = (x - mean) / (var + float(given["eps"])).sqrt()
    for key, combine in (("weight", torch.mul), ("bias", torch.add)):
        parameter = given.get(key)
        if parameter is not None:
            y = combine(y, parameter.view(shape) if parameter.dim() == 1 else parameter)
    return y


def _constant(value: Any, live: Any) -> Any:
    """Return the whole image's value where it has the shape of the live one; a value per row stays live."""
    mine, theirs = tree_leaves(value), tree_leaves(live)
    same = len(mine) == len(theirs) and all(
        not isinstance(a, Tensor) or a.shape == b.shape for a, b in zip(mine, theirs, strict=True)
    )
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, value) if same else live


def _keep_operands(
    kept: Recording, site: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Keep keys and values: the operands after the query, which pixels of the whole image look at."""
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs.items())
    tensors = [key for key, value in given.items() if isinstance(value, Tensor)]
    named = [key for key in ("key", "value") if key in kwargs]
    chosen = (
        tensors[1:2] if name in _PRODUCTS else [k for k in tensors[1:3] if not isinstance(k, str)] + named
    )
    kept.operands[site] = {key: given[key].clone() for key in chosen}


def _keep_partner(
    kept: Recording, waiting: dict[tuple[int, ...], str], site: str, args: tuple[Any, ...]
) -> None:
    """Keep the values that attention weights are multiplied with: the second half of a hand-written one."""
    tensors = [(i, a) for i, a in enumerate(args) if isinstance(a, Tensor)]
    for i, tensor in tensors:
        score = waiting.get(tuple(tensor.shape))
        if score is not None:
            kept.operands[site] = {j: t.clone() for j, t in tensors if j != i}
            kept.partners[score] = site
            del waiting[tuple(tensor.shape)]
            return


def _with_operands(args: tuple[Any, ...], kept: Mapping[int | str, Tensor]) -> list[Any]:
    return [kept.get(i, a) for i, a in enumerate(args)]


def _aligned(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs.get("align_corners", args[4] if len(args) > 4 else False))


def _resized(
    x: Tensor, live: Tensor, extents: tuple[tuple[int, ...], tuple[int, ...]], place: Offset | None
) -> Tensor:
    """Resize linearly as the whole image would be there, one axis after the other."""
    if place is None:
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.dim() - 2]
        return F.interpolate(x, live.shape[2:], mode=mode, align_corners=False)
    for axis, (before, after) in enumerate(zip(*extents, strict=True)):
        whole, start = place.whole[axis], place.start[axis]
        first_in, first_out = start * before / whole, start * after / whole
        out = torch.arange(live.shape[axis + 2], dtype=torch.float64, device=x.device)
        source = (out + first_out) * ((before - 1) / max(1, after - 1)) - first_in
        source = source.clamp(0, x.shape[axis + 2] - 1)
        low = source.floor().long()
        high = (low + 1).clamp_max(x.shape[axis + 2] - 1)
        weight = (source - low).to(x).view(-1, *(1,) * (x.dim() - axis - 3))
        x = x.index_select(axis + 2, low) * (1 - weight) + x.index_select(axis + 2, high) * weight
    return x
