"""The README beside what was given back: what its own tool must be told, in words and numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normfix.records.halo_curves import HaloPoint
from normfix.records.returns import GivenBack
from normfix.records.saved import Provenance
from normfix.records.spans import in_strides
from normfix.reporting.page import markdown

if TYPE_CHECKING:
    from normfix.giving.formats import Library

__all__ = ["card_of"]


def card_of(record: GivenBack, known: Provenance, library: Library, shorter: HaloPoint | None = None) -> str:
    """Return the text in Markdown."""
    scan = known.scan
    assert scan.halo is not None
    assert scan.stride is not None
    return markdown(
        "normfix.giving",
        "card.md",
        record=record,
        scan=scan,
        scaling=known.scaling,
        halo=in_strides(scan.halo, scan.stride),
        advice=library.advice(scan),
        count=len(known.plan.converted),
        shorter=shorter,
    )
