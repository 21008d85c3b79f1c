"""What was measured of the sites on images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from normfix.records.encoding import Record
from normfix.records.sites import Finding
from normfix.records.tables import Shown, Table, counted, number

__all__ = ["CalibrationSummary", "Distilled", "Sampled", "SiteStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatistics(Record):
    """One site after calibration.

    `elements` counts values per channel. `spread` is the largest difference between an image's own channel
    mean and the population's, in population sd (0 for one image). The residual is re-measured under the
    stored statistics: `mean_shift` is the largest |measured mean - stored mean| in sd (exactly consistent:
    0), `variance_ratio` the (smallest, largest) measured over stored variance (exactly consistent: 1, 1).

    A statistic that is no norm has no sd of its own: there, `spread` and `mean_shift` are the largest
    difference in units of the root mean square of the stored values, and `variance_ratio` is 1, 1.

    Of a sample, `mean_error` and `sd_error` are the largest standard errors of a channel's mean and deviation, in sd.
    `flat` are the channels whose variance is at or below the norm's eps on every image; of a statistic that is no norm
    the values that the network divides by and that vanish beside the eps of that division.
    """

    site: str
    elements: int
    spread: float
    mean_shift: float
    variance_ratio: tuple[float, float]
    mean_error: float | None = None
    sd_error: float | None = None
    flat: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Record):
    """That statistics are those of a random sample of blocks: how many, of how many, drawn in the order of `seed`.

    The sample grew until `error`, the largest standard error of any mean or deviation in sd, was at most
    `tolerance`, or until no block was left. Unless `exact`, statistics are estimates.
    """

    blocks: int
    of: int
    tolerance: float
    error: float
    seed: int

    @property
    def exact(self) -> bool:
        """Tell whether every block was measured."""
        return self.blocks == self.of


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled(Record):
    """That constants were fitted to the original in windows: of how many, in how many steps, and how well.

    `start` and `end` are the mean losses (normfix.conversion.distillation) on the windows that were held out, with the
    constants it began with and with those it ended with; `end` is never above `start`.
    """

    windows: int
    held_out: int
    steps: int
    start: float
    end: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CalibrationSummary(Shown, Record):
    """What was measured on which images.

    `engine` tells how: stage by stage over blocks, or in passes over whole images; `reason` why not in stages,
    where they were asked for. `ignored` counts the pixels of each image that its mask left out, empty without
    masks. `sample` is there where not all of the images was measured; spread is between blocks then. `findings` name
    the sites whose statistic is flat on every image, where that was allowed. `distilled` is there for constants that
    were fitted; sites then say how far they are from those of windows.
    """

    images: tuple[tuple[int, ...], ...]
    sites: tuple[SiteStatistics, ...]
    engine: Literal["stages", "passes"] = "passes"
    reason: str = ""
    ignored: tuple[int, ...] = ()
    sample: Sampled | None = None
    findings: tuple[Finding, ...] = ()
    distilled: Distilled | None = None

    @property
    def headline(self) -> str:
        """Return how many sites and images, and the largest residual and spread."""
        parts = [
            f"{counted(len(self.sites), 'site')} on {counted(len(self.images), 'image')}, by {self.engine}"
        ]
        if self.sites:
            residual, spread = (
                max(getattr(s, name) for s in self.sites) for name in ("mean_shift", "spread")
            )
            parts.append(f"largest residual {number(residual)} sd, spread between images {number(spread)} sd")
        if self.sample is not None and not self.sample.exact:
            parts.append(f"estimates from {self.sample.blocks} of {self.sample.of} blocks")
        if self.distilled is not None:
            d = self.distilled
            parts.append(f"distilled in {d.steps} steps: held-out loss {number(d.start)} to {number(d.end)}")
        return "; ".join([*parts, *([counted(len(self.findings), "finding")] * bool(self.findings))])

    def table(self) -> Table:
        """Return the sites."""
        rows = [
            (s.site, str(s.elements), number(s.spread), number(s.mean_shift), str(len(s.flat) or ""))
            for s in self.sites
        ]
        return Table(("site", "elements", "spread", "residual", "flat channels"), rows)
