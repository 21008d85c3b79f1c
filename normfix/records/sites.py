"""What normfix found, planned, measured and proved: plain data that knows nothing of torch.

Every record is frozen and turns into JSON and back without loss: `Plan.from_json(plan.to_json()) == plan`.
The records an API call returns and those `--format json` prints are the same objects.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from normfix.records.choices import StrEnum
from normfix.records.derivations import Reach
from normfix.records.encoding import Record
from normfix.records.sizes import ProvedSizes
from normfix.records.spans import Spans, in_strides
from normfix.records.tables import Shown, Table, by_axis, counted

__all__ = [
    "Family",
    "Finding",
    "LayerSpec",
    "Looked",
    "Scan",
    "Site",
    "StatisticSpec",
    "function_of",
    "site_id",
]


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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Site(Shown, Record):
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

    @property
    def headline(self) -> str:
        """Return what it is, where, and whether it is live."""
        return f"{self.id} ({self.owner_class}), {self.family}, {'live' if self.live else 'not live'}"


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
    "keys",
    "none",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticSpec(Record):
    """The shape of a frozen statistic that is no norm: a pool, a hand-written mean, a response.

    `law` is how several images' values become one (normfix.layers.laws): "none" where nothing but the value of a
    single image can be frozen. `shape` is a result's for one image, `outputs` how many results the function
    returns, of which only the first is used if `selects` ((values, indices)). The operand is tensor number
    `operand` among the call's arguments; it has `rank` dimensions, of which the call reduces `dims`, and the
    extents in `sizes` ((dimension, extent)). `batch` is (dimension of the operand, its extent for one image,
    dimension of the result) along which images are stacked, None where the statistic runs over the batch as
    well. `correction` and `power` are the function's own (variance, norm). `quotient` tells that the call
    divides a sum by the number of its terms. `number` is the kind of a result.

    Of an attention (law "keys") the keys and values are held: `shape` is the keys' for one image of the example,
    `operand` the first of the two tensors that constants take the place of, `dims` the dimension of the tokens, `batch`
    as above with the keys' dimension last, and `kept` how many keys are kept of all images together, 0 for all.
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
    kept: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked(Record):
    """How one of the three looks at a network went; `note` says why it was skipped or failed."""

    name: Literal["census", "graph", "dye"]
    status: Literal["done", "failed", "skipped"]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Scan(Shown, Record):
    """Sites of a network and the geometry its output has once they are frozen.

    `stride`, `halo`, `scale` and `exact_sizes` run over the spatial axes. `halo` holds (before, after) in
    input pixels: the bound that the network's graph gives, or as measured where it gives none; `reach` says which, and
    holds both. None means unbounded or not measurable. `halo_rounded` is it rounded up to the stride:
    what a tile must read, by whatever tool. `scale` is output pixels per input pixel, as a
    fraction in text ("1", "1/2", "2"). `exact_sizes` holds the number of pixels that sizes must be a
    multiple of (1 = any); where `padded_inside`, the network pads others by itself, and windows that leave the image's
    remainder give what the whole gives. `smallest_tile` holds the least extents the network runs on, `sizes` the sizes
    that all of this is said of. Geometry is None where the network is not dense or not local. `draws` tells that the
    network draws random numbers, which normfix gives it from a source of its own, the same in every call.
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
    padded_inside: tuple[bool, ...] | None = None
    smallest_tile: tuple[int, ...] | None = None
    halo_rounded: Spans | None = None
    reach: Reach | None = None
    sizes: ProvedSizes | None = None
    looks: tuple[Looked, ...] = ()
    findings: tuple[Finding, ...] = ()
    draws: bool = False

    @property
    def live(self) -> tuple[Site, ...]:
        """Return the sites whose statistic is computed from the current input."""
        return tuple(site for site in self.sites if site.live)

    @property
    def headline(self) -> str:
        """Return whether tiles matter, how many statistics are live, and the geometry."""
        kinds = Counter(str(site.family) for site in self.live)
        live = ", ".join(f"{n} {family}" for family, n in kinds.items())
        parts = [
            f"{self.model} at {by_axis(self.example)}",
            f"{'' if self.tile_invariant else 'not '}tile-invariant",
            counted(len(self.live), "live site") + (f" ({live})" if live else ""),
        ]
        if self.stride is not None and self.halo is not None:
            halo = ", ".join(f"{before}/{after}" for before, after in in_strides(self.halo, self.stride))
            parts.append(f"stride {by_axis(self.stride)}, halo {halo}")
        return "; ".join([*parts, *([counted(len(self.findings), "finding")] * bool(self.findings))])

    def table(self) -> Table:
        """Return the sites."""
        rows = [
            (site.id, str(site.family), "live" if site.live else "", site.reduces, site.refusal)
            for site in self.sites
        ]
        return Table(("site", "family", "live", "reduces", "refused because"), rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding(Record):
    """One named reason, with the place it concerns."""

    code: str
    where: str
    message: str

    @property
    def line(self) -> str:
        """Return it as it is printed."""
        return f"{self.code} {self.where}: {self.message}"


def site_id(owner: str, invocation: int, function: str, index: int) -> str:
    """Name a call in one string, the same for every look at a network.

    >>> site_id("", 0, "mean", 1)
    '(root)/0/mean/1'
    """
    return f"{owner or '(root)'}/{invocation}/{function}/{index}"


def function_of(site: str) -> str:
    """Return the function of a call that is known by its name alone.

    >>> function_of("encoder.norm/0/batch_norm/1")
    'batch_norm'
    """
    return site.rsplit("/", 2)[1]
