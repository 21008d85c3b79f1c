"""What normfix found, planned, measured and proved: plain data that knows nothing of torch.

Every record is frozen and turns into JSON and back without loss: `Plan.from_json(plan.to_json()) == plan`.
The records an API call returns and those `--format json` prints are the same objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Literal

from normfix.errors import NormfixError
from normfix.json_record import SCHEMA, Record

__all__ = [
    "Action",
    "CalibrationSummary",
    "ConversionRecord",
    "Decision",
    "Family",
    "Finding",
    "ImageShift",
    "LayerSpec",
    "Looked",
    "Means",
    "Plan",
    "Probe",
    "Proof",
    "ProofStep",
    "Provenance",
    "Sampled",
    "Saved",
    "Scaling",
    "Scan",
    "Site",
    "SiteStatistics",
    "Source",
    "StatisticSpec",
    "Verdict",
    "matches",
    "site_id",
    "statement_of",
]

Spans = tuple[tuple[int, int], ...]


class Family(StrEnum):
    """Kinds of statistic, by what they are computed over."""

    BATCH = "batch"
    INSTANCE = "instance"
    GROUP = "group"
    LAYER = "layer"
    RESPONSE = "response"
    POOL = "pool"
    REDUCTION = "reduction"
    ATTENTION = "attention"
    OTHER = "other"


class Action(StrEnum):
    """What a plan does with a site."""

    FREEZE = "freeze"
    BATCHRENORM = "batchrenorm"
    KEEP = "keep"
    REFUSE = "refuse"


class Means(StrEnum):
    """How a decision is carried out in the user's model."""

    SWAP = "swap"
    INTERCEPT = "intercept"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site(Record):
    """One normalising or reducing call over space (or batch), as seen in one forward pass.

    `owner` is the path of the innermost module, `invocation` which call of that module in the root forward,
    `index` the position among its calls of `function`. `within` holds the modules around the call, root
    first; `anchor` is the nearest of them that runs once per root forward, `holder` the module at or below it
    that can keep a new layer without noticing. `swappable` tells that the owner
    is a module of a known exact class, run once, whose whole forward is this call. `others` counts the
    calls of the same function inside the anchor that are no sites: (before this one, in all). `looks` names
    what saw it: "census", "graph", "dye".
    """

    owner: str
    invocation: int
    function: str
    index: int
    owner_class: str
    anchor: str
    holder: str
    within: tuple[str, ...]
    family: Family
    live: bool
    reduces: str
    line: str
    swappable: bool
    refusal: str = ""
    layer: LayerSpec | None = None
    statistic: StatisticSpec | None = None
    others: tuple[int, int] = (0, 0)
    looks: tuple[str, ...] = ("census",)

    @property
    def id(self) -> str:
        """Name the site in one string: owner, invocation, function and index."""
        return site_id(self.owner, self.invocation, self.function, self.index)

    @property
    def convertible(self) -> bool:
        """Tell whether normfix has a rule that converts it."""
        return (self.layer is not None or self.statistic is not None) and not self.refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec(Record):
    """The shape of the replacement: enough to build it without weights, images or a forward pass.

    `groups` is the number of sets of channels that share a statistic in the original: `features` for one
    statistic per channel (batch, instance), 1 for one over all channels (layer).
    `carries` tells that the original has running statistics that eval mode uses.
    """

    ndim: int
    features: int
    groups: int
    eps: float
    affine: bool
    carries: bool


Law = Literal[
    "mean",
    "total",
    "variance",
    "deviation",
    "variance_mean",
    "deviation_mean",
    "norm",
    "maximum",
    "minimum",
    "extremes",
    "none",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticSpec(Record):
    """The shape of a frozen statistic that is no norm: a pool, a hand-written mean, a response.

    `law` is how several images' values become one (normfix.laws): "none" where nothing but the value of a
    single image can be frozen. `shape` is a result's for one image, `outputs` how many results the function
    returns, of which only the first is used if `selects` ((values, indices)). The operand is tensor number
    `operand` among the call's arguments; it has `rank` dimensions, of which the call reduces `dims`, and the
    extents in `sizes` ((dimension, extent)). `batch` is (dimension of the operand, its extent for one image,
    dimension of the result) along which images are stacked, None where the statistic runs over the batch as
    well. `correction` and `power` are the function's own (variance, norm). `quotient` tells that the call
    divides a sum by the number of its terms. `number` is the kind of a result.
    """

    law: Law
    shape: tuple[int, ...]
    outputs: int = 1
    selects: bool = False
    operand: int = 0
    rank: int
    dims: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    batch: tuple[int, int, int] | None = None
    correction: float = 0.0
    power: float = 2.0
    quotient: bool = False
    number: Literal["float", "int", "bool"] = "float"


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked(Record):
    """How one of the three looks at a network went; `note` says why it was skipped or failed."""

    name: Literal["census", "graph", "dye"]
    status: Literal["done", "failed", "skipped"]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan(Record):
    """Sites of a network and the geometry its output has once they are frozen.

    `stride`, `halo`, `scale` and `exact_sizes` run over the spatial axes. `halo` holds (before, after) in
    input pixels as measured; None means unbounded or not measurable. `halo_rounded` is it rounded up to the stride:
    what a tile must read, by whatever tool. `scale` is output pixels per input pixel, as a
    fraction in text ("1", "1/2", "2"). `exact_sizes` holds the number of pixels that sizes must be a
    multiple of (1 = any), `smallest_tile` the least extents the network runs on. Geometry is None where the
    network is not dense or not local.
    """

    model: str
    example: tuple[int, ...]
    sites: tuple[Site, ...]
    uncalled: tuple[str, ...]
    dense: bool
    tile_invariant: bool
    stride: tuple[int, ...] | None
    halo: Spans | None
    scale: tuple[str, ...] | None
    exact_sizes: tuple[int, ...] | None
    smallest_tile: tuple[int, ...] | None = None
    halo_rounded: Spans | None = None
    looks: tuple[Looked, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def live(self) -> tuple[Site, ...]:
        """Return the sites whose statistic is computed from the current input."""
        return tuple(site for site in self.sites if site.live)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(Record):
    """What happens to one site, why, and how.

    An intercepted site is call number `position` of its function among the `visible` ones that are still
    made inside the anchor's forward once everything deeper is converted; `target` is the path of its new
    layer.
    """

    site: Site
    action: Action
    means: Means
    reason: str
    target: str
    position: int
    visible: int = 1

    @property
    def converts(self) -> bool:
        """Tell whether the site gets a new layer."""
        return self.action in (Action.FREEZE, Action.BATCHRENORM)

    @property
    def measured(self) -> bool:
        """Tell whether the new layer's constants come from images, not from the original."""
        carries = self.site.layer is not None and self.site.layer.carries
        return self.converts and not carries


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Record):
    """The reviewable decisions for one network."""

    to: Literal["frozen", "batchrenorm"]
    model: str
    decisions: tuple[Decision, ...]
    schema: int = SCHEMA

    @property
    def converted(self) -> tuple[Decision, ...]:
        """Return the decisions that put a new layer in place, in the order of the calls."""
        return tuple(d for d in self.decisions if d.converts)

    @property
    def left_live(self) -> tuple[Decision, ...]:
        """Return the decisions that leave a live statistic in the network."""
        return tuple(d for d in self.decisions if d.site.live and not d.converts)


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
class ImageShift(Record):
    """How far the prediction of one image moved from the original network's, in sd of the original."""

    image: int
    mean_sd: float
    max_sd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding(Record):
    """One named reason, with the place it concerns."""

    code: str
    where: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSummary(Record):
    """What was measured on which images.

    `engine` tells how: stage by stage over blocks, or in passes over whole images; `reason` why not in stages,
    where they were asked for. `ignored` counts the pixels of each image that its mask left out, empty without
    masks. `sample` is there where not all of the images was measured; spread is between blocks then. `findings` name
    the sites whose statistic is flat on every image, where that was allowed.
    """

    images: tuple[tuple[int, ...], ...]
    sites: tuple[SiteStatistics, ...]
    engine: Literal["stages", "passes"] = "passes"
    reason: str = ""
    ignored: tuple[int, ...] = ()
    sample: Sampled | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Record):
    """The outcome of comparing stitched tiles with the whole image.

    Differences are in sd of the whole-image output over the axes in `axes` (those that at least one window
    does not cover). `noise` is the noise floor n of the tested dtype on the same scale; up to `tolerance` (4 n,
    at most 1e-3) passes, up to `threshold` (100 n, at most 1e-3, unless given) warns and passes, above it fails
    if a repeat in float64 confirms it.
    `interference` is the largest relative change of a tile's output when everything outside its window is
    multiplied by 1e12 in float64, one entry per axis. Tiles read `halo_rounded`, the halo rounded up to the stride.
    """

    status: Literal["passed", "failed", "inconclusive"]
    max_sd: float
    mean_sd: float
    tile_mismatch: float | None
    noise: float
    tolerance: float
    threshold: float
    sd: float
    tile: tuple[int, ...]
    halo: Spans
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    axes: tuple[int, ...]
    windows: int
    interference: tuple[float, ...]
    findings: tuple[Finding, ...]
    settings: tuple[tuple[str, str], ...]
    halo_rounded: Spans = ()

    @property
    def passed(self) -> bool:
        """Tell whether the network is tile-invariant on this image."""
        return self.status == "passed"

    @property
    def inconclusive(self) -> bool:
        """Tell whether nothing could be decided; this is not a pass."""
        return self.status == "inconclusive"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofStep(Record):
    """One claim about a conversion, the number that supports it and the bound it was held against.

    "refused" is the status of a claim that is not made, because sites that no constant can replace stay live;
    `value` is then what tiles differ by all the same. "inapplicable" is that of a claim about a form that this network
    cannot be given; `note` says why. It is not a pass.
    """

    name: str
    claim: str
    status: Literal["passed", "failed", "inconclusive", "refused", "inapplicable"]
    value: float | None
    bound: float | None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof(Record):
    """All steps that a conversion, or a network that was trained or measured since, had to pass."""

    steps: tuple[ProofStep, ...]
    shifts: tuple[ImageShift, ...]
    verdict: Verdict | None

    @property
    def passed(self) -> bool:
        """Tell whether every step that applies passed, and any did."""
        return self._all("passed", "inapplicable")

    @property
    def partial(self) -> bool:
        """Tell whether all that could be converted is proved, while refused sites stay live."""
        return not self.passed and self._all("passed", "refused", "inapplicable")

    @property
    def status(self) -> Literal["passed", "failed", "inconclusive"]:
        """Sum the steps up: a refused one is a failure here, an open one leaves all open unless another failed."""
        if self.passed:
            return "passed"
        wrong = any(step.status in ("failed", "refused") for step in self.steps)
        return "failed" if wrong else "inconclusive"

    def step(self, name: str) -> ProofStep:
        """Return the step of that name.

        Raises:
            KeyError: if the proof has no such step.
        """
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)

    def _all(self, *statuses: str) -> bool:
        """Tell whether the steps have no other status than these, and one passed."""
        found = {step.status for step in self.steps}
        return "passed" in found and found <= set(statuses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling(Record):
    """How an image's values become the network's input; statistics run over the whole image.

    kind: "none", "unit" (integer range to 0..1), "zscore", "percentile" (low, high to 0..1, not clipped),
    "fixed" (mean, standard deviation) or "preprocess" (a function "pkg.mod:fn" of the whole array).
    """

    kind: Literal["none", "unit", "zscore", "percentile", "fixed", "preprocess"] = "none"
    values: tuple[float, ...] = ()
    function: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Record):
    """Where the architecture comes from.

    kind "factory": call `spec` ("pkg.mod:name" or "timm:NAME") with `args`; "object": an object whose class
    is `spec`, so loading needs it again from the caller. `origin` names the repository it was fetched from.
    """

    kind: Literal["factory", "object"]
    spec: str
    args: str = "{}"
    origin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance(Record):
    """What travels with a converted model: enough to save, reload, predict with and recalibrate it.

    `output` is the key or index of the output that counts, for networks that return several.
    """

    plan: Plan
    scan: Scan
    scaling: Scaling
    source: Source
    output: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionRecord(Record):
    """A conversion without its model: what `--format json` prints."""

    plan: Plan
    scan: Scan
    calibration: CalibrationSummary | None
    proof: Proof


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Record):
    """What the saved model gives for a seeded normal input: a reload must give the same.

    `values` are the flattened output at even distances; `sd` is the standard deviation of the output.
    """

    shape: tuple[int, ...]
    seed: int
    dtype: str
    output: tuple[int, ...]
    sd: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Record):
    """The content of normfix.json.

    `aliases` are pairs (name, stored name) of tensors that share storage; `sha256` is of model.safetensors, or of the
    tensors of a .pt2; `program` is of program.pt2 where the folder has one. `statement` is of all of that and of all
    below, so plan, geometry, scaling and proof belong to these weights; files of before have none.
    """

    schema: int
    provenance: Provenance
    aliases: tuple[tuple[str, str], ...]
    sha256: str
    program: str = ""
    calibration: CalibrationSummary | None
    proof: Proof | None
    probe: Probe | None
    statement: str = ""

    def sealed(self) -> Saved:
        """Return it with its statement's checksum."""
        return replace(self, statement=statement_of(self.to_json()))

    @classmethod
    def opened(cls, data: object, where: str) -> Saved:
        """Build it from parsed JSON, if that is what was written.

        Raises:
            NormfixError: NF108 as from_json, NF115 if the statement was edited.
        """
        if isinstance(data, Mapping):
            data = {"statement": "", **data}
        saved = cls.from_json(data, where)
        if saved.statement and saved.statement != statement_of(data):
            raise NormfixError(
                "NF115",
                "it is not what was saved with these weights: its plan, stride, halo, scaling or proof was edited, and "
                "what normfix computes with it may be wrong without a sign. Fetch it again, or convert the network "
                "again with the options that you want.",
                where=where,
            )
        return saved

    def doubt(self, where: str) -> tuple[str, ...]:
        """Return what to say of a file that has no checksum of its statement."""
        if self.statement:
            return ()
        return (
            f"{where}: it has no checksum of its plan, stride, halo and scaling (a version of before wrote it, or it "
            "was taken out), so an edit of these is not noticed. Convert the network again to have one.",
        )


def statement_of(saved: Any) -> str:
    """Return the checksum of a statement: of its JSON but for this checksum, however that is laid out.

    >>> statement_of({"a": 1, "b": 2}) == statement_of({"b": 2, "statement": "", "a": 1})
    True
    """
    content = {key: value for key, value in saved.items() if key != "statement"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def site_id(owner: str, invocation: int, function: str, index: int) -> str:
    """Name a call in one string, the same for every look at a network.

    >>> site_id("", 0, "mean", 1)
    '(root)/0/mean/1'
    """
    return f"{owner or '(root)'}/{invocation}/{function}/{index}"


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether a module path matches one of the shell-style patterns.

    >>> matches("head.0.norm", ("head.*",))
    True
    """
    return any(fnmatchcase(path, pattern) for pattern in patterns)
