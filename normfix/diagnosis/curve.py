"""What a shorter halo would cost once every other cause is fixed: the statistics held, the tiles on the grid.

With a live statistic no halo helps, so the curve of a network as it is says nothing of the one that is converted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from normfix.diagnosis.experiments import Experiments
from normfix.proof.halo_curve import halos_between, measured
from normfix.records.halo_curves import HaloCurve, HaloPoint
from normfix.records.progress import Progress
from normfix.records.spans import Spans

__all__ = ["curve_of", "halo_count"]


def halo_count(bench: Experiments) -> int:
    """Return how many halos are measured, each by one experiment."""
    return sum(1 for _ in halos_between(bench.geometry))


def curve_of(bench: Experiments, progress: Progress) -> HaloCurve | None:
    """Measure the error against the halo in float64; None where every window is the whole image."""
    points = measured(list(halos_between(bench.geometry)), _Trials(bench).point, progress)
    if not any(point.compared for point in points):
        return None
    return HaloCurve(
        tile=bench.tiling.tile,
        exact=bench.geometry.halo,
        points=points,
        tolerance=None,
        smallest=None,
        live=tuple(sorted(bench.unfixable())),
    )


@dataclass(frozen=True, slots=True)
class _Trials:
    """Experiments in which nothing but the halo, and what no experiment can fix, is present."""

    bench: Experiments

    def point(self, axis: int | None, halo: Spans) -> HaloPoint:
        """Return what tiles with this halo are off by, and cost."""
        present = self.bench.unfixable() | {"halo"}
        bench = self.bench.with_halo(halo)
        trial, size = bench.trial(present), bench.size(present)
        windows = bench.tiles(present)
        whole = [all(w.read[d] == (0, n) for w in windows) for d, n in enumerate(size)]
        return HaloPoint(
            axis=axis,
            halo=halo,
            max_sd=trial.mismatch.max_sd,
            mean_sd=trial.mismatch.mean_sd,
            cost=sum(prod(stop - start for start, stop in w.read) for w in windows) / prod(size),
            compared=tuple(d for d, covered in enumerate(whole) if not covered),
        )
