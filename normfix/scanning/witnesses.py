"""The two witnesses of a reach, held against each other: the graph's bound and the dye's measurement.

The bound counts what no set of values shows: the side of a comparison that was not taken, a tap further away than any
strip is long, one off the axes, a weight of zero. The dye counts nothing but what was run. So the bound is the halo
where there is one, and the dye must lie within it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from normfix.errors import reason_of
from normfix.networks.calling import Caller, failures
from normfix.networks.graph.capture import Captured, NotCaptured, capture
from normfix.records.derivations import Reach
from normfix.records.sites import Finding
from normfix.records.spans import in_strides
from normfix.tiling.geometry import Locality
from normfix.tiling.reach.bounds import Bound, bound_of
from normfix.tiling.reach.extents import Unsized

__all__ = ["HaloSource", "Witness", "witness_of"]

HaloSource = Literal["graph", "measured"]

_FAR = 2
"""A bound is far above what was measured where it is more than this many strides, and half as much again, above it."""


@dataclass(frozen=True, slots=True)
class Witness:
    """What the graph says of a network: a bound, or a note that says why there is none.

    `chosen` tells that its bound is not to be used, `program` is the graph, where it equals the network.
    """

    found: Bound | None
    note: str = ""
    chosen: bool = False
    program: ExportedProgram | None = None

    @property
    def bound(self) -> Bound | None:
        """Return the bound that is the halo, None where it is to be measured."""
        found = self.found
        return found if found is not None and found.is_whole_if_masked and not self.chosen else None

    @property
    def stretches(self) -> tuple[Finding, ...]:
        """Return what the graph resizes by a factor that follows the size, which strips may be too short to show."""
        found = () if self.found is None else self.found.stretches
        return tuple(
            Finding(
                code="NF244",
                where=stretch.where,
                message=f"{stretch.operator} resizes by a factor that is another at every size of the image, so what "
                "it weighs depends on the place in the whole extent. Resize by a constant factor, or to the extent of "
                "a map that has the image's ratio.",
            )
            for stretch in found
        )

    def of_other_sizes(self) -> Witness:
        """Return it without its bound, which strips of other sizes were seen to exceed."""
        return replace(
            self,
            found=None,
            note="the network branches on the image's size, and reaches further at other sizes than its graph does",
        )

    def reach(self, locality: Locality) -> Reach:
        """Say what both witnesses say."""
        geometry, found = locality.geometry, self.found
        measured = Reach(
            used="graph" if self.bound else "measured",
            chosen=self.chosen,
            measured=locality.dye,
            extent=() if self.bound else locality.extent,
            note=self.note,
        )
        if found is None:
            return measured
        return replace(measured, **found.stated(found.lattice if geometry is None else geometry.stride))

    def findings(self, locality: Locality) -> tuple[Finding, ...]:
        """Name the axes along which the bound is far above what was measured."""
        geometry, dye = locality.geometry, locality.dye
        if self.bound is None or geometry is None or dye is None:
            return ()
        bounds, shown = in_strides(geometry.halo, geometry.stride), in_strides(dye, geometry.stride)
        pairs = enumerate(zip(bounds, shown, geometry.stride, strict=True))
        return tuple(
            Finding(code="NF253", where=f"axis {axis}", message=_far_above(bound, dyed))
            for axis, (bound, dyed, stride) in pairs
            if any(b > a + _FAR * stride and 2 * b > 3 * a for a, b in zip(dyed, bound, strict=True))
        )


def witness_of(
    network: nn.Module,
    caller: Caller,
    example: Tensor,
    source: HaloSource,
    known: Sequence[tuple[Tensor, Tensor]] = (),
    captured: Captured | None = None,
) -> Witness:
    """Capture a network in which no statistic is live and derive its reach.

    Args:
        network: not modified.
        caller: calls it.
        example: (1, C, *space); sizes are left free.
        source: "measured" keeps the bound from being used.
        known: images that it ran on before, each with what it gave.
        captured: its graph, where that was captured before.
    """
    if caller.draws:
        return Witness(None, "it draws random numbers, which are others on a tile whatever the graph says")
    found = captured or capture(network, caller, example, once=True, known=known)
    if isinstance(found, NotCaptured):
        return Witness(None, found.reason)
    unbounded = Witness(None, chosen=source == "measured", program=found.program)
    try:
        return replace(unbounded, found=bound_of(found.program))
    except Unsized as reason:
        return replace(unbounded, note=str(reason))
    except failures() as error:
        # one witness never takes the other with it
        failed = f"deriving failed: {reason_of(error)}"
        return replace(unbounded, note=failed)


def _far_above(bound: Sequence[int], dyed: Sequence[int]) -> str:
    return (
        f"the graph bounds the halo by {bound[0]} before and {bound[1]} after, where the dye shows {dyed[0]} and "
        f"{dyed[1]} on the strips that were run: a tap further away than these are long or off the axis, a side of a "
        "comparison that was not taken, or weights that are zero. Tiles read the bound; --halo measured takes the "
        "other."
    )
