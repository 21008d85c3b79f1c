"""The README beside what was given back: what its own tool must be told, in words and numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader

from normfix.records.returns import GivenBack
from normfix.records.saved import Provenance
from normfix.records.spans import in_strides

if TYPE_CHECKING:
    from normfix.giving.formats import Library

__all__ = ["card_of"]


def card_of(record: GivenBack, known: Provenance, library: Library) -> str:
    """Return the text in Markdown."""
    environment = Environment(
        loader=PackageLoader("normfix.giving"),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        keep_trailing_newline=True,
    )  # Markdown, not HTML
    scan = known.scan
    assert scan.halo is not None
    assert scan.stride is not None
    return environment.get_template("card.md").render(
        record=record,
        scan=scan,
        scaling=known.scaling,
        halo=in_strides(scan.halo, scan.stride),
        advice=library.advice(scan),
        count=len(known.plan.converted),
    )
