"""What a diagnosis found: plain data that knows nothing of torch.

Differences are in sd of the output compared with (for labels: 1 where they differ, else 0). A number that
was not measured is None, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from normfix.records.encoding import SCHEMA, Record
from normfix.records.halo_curves import HaloCurve
from normfix.records.saved import Scaling
from normfix.records.sites import Finding
from normfix.records.spans import Spans
from normfix.records.verdicts import Verdict

__all__ = [
    "AccuracyRow",
    "Cost",
    "Culprit",
    "DiagnosisRecord",
    "Kind",
    "Mismatch",
    "Observation",
    "Pair",
    "PipelineRecord",
    "Profile",
    "ReceptiveField",
    "SiteReport",
    "TileMismatch",
    "Tiling",
    "TrainEval",
]

Kind = Literal["probability", "logits", "softmax", "scores", "labels", "regression"]
"""What an output means: sigmoid probabilities or logits (each channel by itself), softmax probabilities or
scores (one class per pixel, by argmax), labels, or anything else, which has no Dice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling(Record):
    """How a user's pipeline cuts an image; the default is what normfix itself does.

    `halo` holds (before, after) pixels of context that each tile of `tile` pixels is read with; empty means what
    the network needs, and an empty `tile` one that divides the image. `last` tells
    where the last window of an axis starts: on the grid, or pushed back so that it is a full one. `context`
    tells what lies beyond: the image up to its border, mirrored pixels beyond the image's border, or the tile's
    own pixels mirrored. `scaling` is applied to every window by itself, `train` leaves the network in train
    mode, `padded` extends the image to an exact size first.
    """

    tile: tuple[int, ...]
    halo: Spans
    last: Literal["grid", "pushed back"] = "grid"
    context: Literal["image", "mirrored border", "mirrored tile"] = "image"
    scaling: Scaling | None = None
    train: bool = False
    padded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch(Record):
    """Two predictions of the same pixels, compared.

    `dice` is 1 - Dice of the thresholded predictions, 0 where both are empty, None for regression; `p99` is
    the 99th percentile of the absolute difference, `pixels` how many output pixels were compared.
    """

    dice: float | None
    mean_sd: float
    p99_sd: float
    max_sd: float
    pixels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Record):
    """Two overlapping windows, by the start of what each reads, and how far they disagree."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    mismatch: Mismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TileMismatch(Record):
    """Tile against tile over all overlaps and beyond the halo, and stitched tiles against the whole image.

    The windows of the tiling are compared with those of the same tiling shifted by half a tile. None where
    there was no such pixel, or the whole image was not predicted.
    """

    overlap: Mismatch | None
    beyond_halo: Mismatch | None
    whole: Mismatch | None
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(Record):
    """Absolute difference of stitched tiles from the whole, in sd, by distance from the nearest cut.

    Entry i is about output pixels i pixels away from a cut, 0 beside it. `shape` names what that looks like.
    """

    mean_sd: tuple[float, ...]
    max_sd: tuple[float, ...]
    shape: Literal["flat zero", "plateau", "decay", "comb"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainEval(Record):
    """Eval mode against batch statistics in use (updates off, dropout off), on patches of the tile size.

    `composition` says which patches share a batch; `accuracy_change` is Dice in train mode minus Dice in eval
    mode, where labels were given.
    """

    batch: int
    composition: str
    mismatch: Mismatch
    accuracy_change: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit(Record):
    """One cause of seams.

    `introduced` is the mean absolute difference (sd) of stitched tiles from the whole with this cause alone
    present, `removed` by how much the mean difference of the pipeline as it is falls when this cause alone is
    fixed; the `_dice` fields say the same of 1 - Dice. `removed` is None where no fix could be tried.
    """

    cause: str
    sites: tuple[str, ...]
    introduced: float
    introduced_max: float
    removed: float | None
    introduced_dice: float | None
    removed_dice: float | None
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport(Record):
    """One site's statistic on the whole image and how far the tiles' own stray from it.

    `mean` and `sd` run (smallest, largest) over channels; `spread` is the largest distance of a tile's mean
    from the whole image's, in sd of the whole image, `ratio` the (smallest, largest) tile variance over the
    whole image's. None for what is no norm. `introduced` and `removed` are as for a culprit, where measured.
    """

    site: str
    family: str
    live: bool
    mean: tuple[float, float] | None
    sd: tuple[float, float] | None
    spread: float | None
    ratio: tuple[float, float] | None
    introduced: float | None
    removed: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceptiveField(Record):
    """How far an output looks, (before, after) input pixels per axis.

    `theoretical` is what it can depend on once nothing is live (dye), None where unbounded; `effective` holds
    95 % of the mean absolute input gradient of a central output of the network as it is; `outside` is the
    share of that gradient beyond the theoretical field, which only a statistic can put there.
    """

    theoretical: Spans | None
    effective: Spans
    outside: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRow(Record):
    """How well one way of predicting agrees with labels: Dice and, where given, the user's own metric."""

    prediction: str
    dice: float | None
    metric: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost(Record):
    """What a diagnosis runs, stated before it starts; seconds are extrapolated from one window."""

    windows: int
    wholes: int
    experiments: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosisRecord(Record):
    """Everything that one diagnosis measured.

    `halo_curve` is that of the network with every other cause fixed, in float64; None where it was not asked for.
    """

    model: str
    image: tuple[int, ...]
    kind: Kind
    status: Literal["passed", "failed", "inconclusive"]
    tiling: Tiling
    stride: tuple[int, ...]
    exact_halo: Spans
    sd: float
    noise: float
    tile_mismatch: TileMismatch
    after: Mismatch | None
    profile: Profile | None
    train_eval: tuple[TrainEval, ...]
    culprits: tuple[Culprit, ...]
    sites: tuple[SiteReport, ...]
    receptive_field: ReceptiveField | None
    accuracy: tuple[AccuracyRow, ...]
    cost: Cost
    findings: tuple[Finding, ...]
    settings: tuple[tuple[str, str], ...]
    halo_curve: HaloCurve | None = None
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation(Record):
    """One cause of seams in a pipeline's own steps, and what was seen of it."""

    cause: str
    evidence: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRecord(Record):
    """A pipeline tested from outside, and, where its network could be replaced by probes, from inside.

    `windows`, `extents` (the largest per axis), `starts` (per axis) and `context` (before, after) are what the probes
    saw; None where no network was given or the pipeline did not run probes, and what they could not see is a
    finding. `held` is the verdict of the same pipeline with the network's live statistics held at the whole image's
    values: what is left is the pipeline's own. Of a network that takes windows of one size alone, what can be held is
    held at windows' values, and what is left is also the network's.
    """

    verdict: Verdict
    windows: int | None
    extents: tuple[int, ...] | None
    starts: tuple[tuple[int, ...], ...] | None
    context: Spans | None
    culprits: tuple[Observation, ...]
    held: Verdict | None
    findings: tuple[Finding, ...]
    schema: int = SCHEMA
