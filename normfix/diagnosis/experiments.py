"""Every cause alone, and everything but that cause: what it introduces, and what its fix removes.

An experiment is a set of causes that are present; all others are fixed. Its mismatch is the mean absolute
difference of the stitched tiles from the whole image, both with the same causes present, in sd of the
whole. With all causes C of a pipeline,

    introduced(c) = mismatch({c})        removed(c) = mismatch(C) - mismatch(C without c)

The two differ: with fourteen live norms each introduces most of the mismatch and fixing one removes almost
none of it. Experiments run in float64, so a cause is named however little it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from normfix.diagnosis.intervention import POSITION, Offset, Recording, record, run_fixed
from normfix.diagnosis.windows import Window, faults, paste, take, windows
from normfix.networks.numerics import BOUNDLESS
from normfix.proof.indicators import compare, spread_of
from normfix.records.diagnoses import Culprit, Kind, Mismatch, Tiling
from normfix.records.progress import Progress, silent
from normfix.records.sites import Site
from normfix.records.spans import Spans, in_strides
from normfix.tiling.grid import Geometry
from normfix.tiling.stitching import cropped, padded

__all__ = ["NAMED", "UNKNOWN", "Experiments", "Trial", "culprits"]

NAMED = 1e-9
"""Largest difference in sd, in float64, that names no cause: a hundred times what rounding makes there."""

UNKNOWN = "unknown"

_REMEDIES = {
    "phase": "start tiles and windows on multiples of the stride",
    "last tile": "start the last tile on the grid as well",
    "border padding": "end windows where the image ends; the network pads there as it does for the whole image",
    "tile scaling": "scale the whole image once, before it is cut",
    "train mode": "call model.eval()",
    "size": "extend the image to an exact size first",
    POSITION: "resize by scale_factor with align_corners=False; it needs retraining or tolerance",
    "attention": "hold its keys and values, normfix convert --keys all, where no position embedding ties it to a size",
    "other": "none without retraining: it orders or transforms the whole extent",
    UNKNOWN: "not found; compare the layers' outputs of a tile and of the whole image",
}
_FREEZE = "freeze its statistic at the value of the whole image: normfix convert"

Run = Callable[[nn.Module, Tensor], Tensor]
Scale = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Trial:
    """What one experiment gave: the stitched prediction, the whole one, and how they compare."""

    stitched: Tensor
    whole: Tensor
    mismatch: Mismatch
    sd: float


@dataclass(slots=True)
class Experiments:
    """A network, an image and a tiling, ready for experiments.

    `evaluated` and `trained` are the network in eval mode and with batch statistics in use, `live` the live
    sites of each; `scale` is what the tiling applies to every window, and here also to the whole image.
    """

    evaluated: nn.Module
    trained: nn.Module
    run: Run
    image: Tensor
    geometry: Geometry
    tiling: Tiling
    kind: Kind
    live: Mapping[bool, Sequence[Site]]
    scale: Scale = lambda image: image
    progress: Progress = silent
    _recordings: dict[tuple[bool, bool], tuple[Tensor, Recording]] = field(default_factory=dict)
    _trials: dict[frozenset[str], Trial] = field(default_factory=dict)

    def causes(self) -> dict[str, frozenset[str]]:
        """Return every cause by name with the sites it consists of; faults of the tiling have none."""
        found: dict[str, frozenset[str]] = {}
        kept = self.recorded()
        own = {site.id for site in self.live[False]}
        for site in kept.sites.values():
            if site.id in own:
                found[str(site.family)] = found.get(str(site.family), frozenset()) | {site.id}
        if kept.resized:
            found[POSITION] = frozenset(kept.resized)
        for fault in faults(self.tiling, self.geometry, self.image.shape[2:]):
            if fault != "train mode" or len(self.live[True]) > len(own):
                found[fault] = frozenset()
        return found

    def fixable(self, cause: str, sites: frozenset[str]) -> bool:
        """Tell whether the cause can be taken away in an experiment."""
        return all(self.recorded().fixable(site) for site in sites)

    def unfixable(self) -> frozenset[str]:
        """Return the sites that no experiment can fix."""
        causes = self.causes()
        return frozenset().union(*(s for name, s in causes.items() if not self.fixable(name, s)))

    def planned(self) -> set[frozenset[str]]:
        """Return the experiments that attribution takes."""
        causes, all_, stuck = self.causes(), self.everything(), self.unfixable()
        states = {all_, stuck}
        for name, sites in causes.items():
            own = sites or frozenset({name})
            states |= {own | stuck} | ({all_ - own} if self.fixable(name, sites) else set())
        return states

    def everything(self) -> frozenset[str]:
        """Return all that is present in the pipeline as it is: faults by name, sites by id."""
        return frozenset().union(*(sites or {name} for name, sites in self.causes().items()))

    def recorded(self) -> Recording:
        """Return what the sites have on the whole image, in the mode of the pipeline."""
        return self._recorded(trained=self.tiling.train, extended=True)[1]

    def each_site(self) -> dict[str, tuple[float, float | None]]:
        """Return (introduced, removed) for every live site by itself, whose statistic can be fixed."""
        found: dict[str, tuple[float, float | None]] = {}
        as_is, stuck = self.trial(self.everything()), self.unfixable()
        for site in self.live[False]:
            alone = self._once(frozenset({site.id}) | stuck)
            removed = None
            if site.id not in stuck:
                removed = as_is.mismatch.mean_sd - self._once(self.everything() - {site.id})
            found[site.id] = alone, removed
        return found

    def trial(self, present: frozenset[str]) -> Trial:
        """Run one experiment: `present` holds faults by name and sites by id."""
        if present not in self._trials:
            self._trials[present] = self._measured(present)
        return self._trials[present]

    def tiles(self, present: frozenset[str]) -> list[Window]:
        """Return the windows of an experiment."""
        return list(windows(self.size(present), self.tiling, self.geometry, present))

    def size(self, present: frozenset[str]) -> tuple[int, ...]:
        """Return the extents of the image in an experiment, extended to an exact size where that is fixed."""
        return tuple(self._extended("size" not in present).shape[2:])

    def with_halo(self, halo: Spans) -> Experiments:
        """Return the same bench where tiles are read with another halo."""
        return replace(self, tiling=replace(self.tiling, halo=halo), _trials={})

    def _once(self, present: frozenset[str]) -> float:
        """Return the mean mismatch of an experiment without keeping its predictions."""
        known = self._trials.get(present)
        return (known or self._measured(present)).mismatch.mean_sd

    def _measured(self, present: frozenset[str]) -> Trial:
        trained, extended = "train mode" in present, "size" not in present
        whole, kept = self._recorded(trained=trained, extended=extended)
        image = self._extended(extended)
        model = self.trained if trained else self.evaluated
        own = {site.id for site in self.live[False]}
        fixed = frozenset(site for site in (own | kept.resized.keys()) - present if kept.fixable(site))
        stitched = torch.zeros_like(whole)
        tiles = self.tiles(present)
        for done, window in enumerate(tiles):
            place = Offset(tuple(a for a, _ in window.read), tuple(image.shape[2:]))
            output = run_fixed(model, self.run, self._window(image, window, present), kept, fixed, place)
            paste(stitched, output, window, self.geometry)
            self.progress("experiments", done + 1, len(tiles))
        size = self.image.shape[2:]
        if extended:
            stitched, whole = (cropped(t, size, self.geometry.scale) for t in (stitched, whole))
        sd = spread_of(whole, self.kind)
        mismatch = compare(stitched, whole, self.kind, sd)
        assert mismatch is not None
        return Trial(stitched, whole, mismatch, sd)

    def _window(self, image: Tensor, window: Window, present: frozenset[str]) -> Tensor:
        """Cut one window, scaled as a whole or by itself."""
        context = self.tiling.context if "border padding" in present else "image"
        if "tile scaling" not in present:
            return take(self.scale(image), window, context)
        return self.scale(take(image, window, context))

    def _extended(self, extended: bool) -> Tensor:
        return padded(self.image, self.geometry) if extended else self.image

    def _recorded(self, *, trained: bool, extended: bool) -> tuple[Tensor, Recording]:
        key = trained, extended
        if key not in self._recordings:
            model = self.trained if trained else self.evaluated
            # batch statistics in use are what train mode consists of, not sites of their own
            sites = self.live[False]
            self._recordings[key] = record(model, self.run, self.scale(self._extended(extended)), sites)
        return self._recordings[key]


def culprits(bench: Experiments) -> tuple[Culprit, ...]:
    """Name every cause whose presence changes anything, the largest first."""
    causes, everything, unfixable = bench.causes(), bench.everything(), bench.unfixable()
    as_is, nothing = bench.trial(everything), bench.trial(unfixable)
    found = []
    for name, sites in causes.items():
        alone = bench.trial((sites or frozenset({name})) | unfixable)
        fixable = bench.fixable(name, sites)
        without = bench.trial(everything - (sites or {name})) if fixable else None
        change = 0.0 if without is None else _largest_change(as_is, without)
        if max(alone.mismatch.max_sd, change) > NAMED:
            found.append(
                _culprit(
                    name,
                    sites,
                    as_is.mismatch,
                    alone.mismatch,
                    without.mismatch if without is not None else None,
                    _remedy(name, bench.geometry),
                )
            )
    if not unfixable and nothing.mismatch.max_sd > NAMED:
        found.append(
            _culprit(UNKNOWN, frozenset(), as_is.mismatch, nothing.mismatch, None, _REMEDIES[UNKNOWN])
        )
    return tuple(sorted(found, key=lambda c: -c.introduced))


def _remedy(name: str, geometry: Geometry) -> str:
    """Return what to do about a cause, in the numbers of the network."""
    if name != "halo":
        return _REMEDIES.get(name, _FREEZE)
    need = ", ".join(f"{before}/{after}" for before, after in in_strides(geometry.halo, geometry.stride))
    return f"read tiles with at least {need} pixels of context before and after them, per axis, and crop it"


def _largest_change(a: Trial, b: Trial) -> float:
    """Return how far fixing something moves the difference of tiles from the whole, in sd, anywhere."""
    first, second = ((t.stitched.double() - t.whole.double()) for t in (a, b))
    return float(((first - second).abs() / (a.sd or 1.0)).max().nan_to_num(BOUNDLESS))


def _culprit(
    name: str, sites: frozenset[str], as_is: Mismatch, alone: Mismatch, without: Mismatch | None, remedy: str
) -> Culprit:
    dice = (
        None if as_is.dice is None or without is None or without.dice is None else as_is.dice - without.dice
    )
    return Culprit(
        cause=name,
        sites=tuple(sorted(sites)),
        introduced=alone.mean_sd,
        introduced_max=alone.max_sd,
        removed=None if without is None else as_is.mean_sd - without.mean_sd,
        introduced_dice=alone.dice,
        removed_dice=dice,
        remedy=remedy,
    )
