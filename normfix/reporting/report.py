"""Reports of verdicts, proofs and diagnoses, by the ending of the file: HTML, JSON, Markdown and JUnit XML.

All say the same: the verdict first, then the numbers behind it. A page is one file that fetches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from normfix.records.diagnoses import DiagnosisRecord, PipelineRecord
from normfix.records.encoding import Record
from normfix.records.verdicts import Proof, Verdict
from normfix.reporting.junit import junit
from normfix.reporting.maps import Maps
from normfix.reporting.page import render
from normfix.reporting.sentences import headline

__all__ = ["fragment", "text_of"]


def text_of(
    ending: str, record: Verdict | Proof | DiagnosisRecord | PipelineRecord, maps: Maps | None = None
) -> str:
    """Return a report as text; `maps` add the pictures to a page."""
    makers: Mapping[str, Callable[[], str]] = {
        ".json": record.dumps,
        ".md": lambda: _markdown(record),
        ".xml": lambda: junit(record),
        ".html": lambda: _page(record, maps),
    }
    return makers[ending]()


def fragment(record: DiagnosisRecord, maps: Maps) -> str:
    """Return the verdict and the pictures for a notebook cell."""
    return render("fragment.html", pictures=_pictures(record, maps), record=record, headline=headline(record))


def _page(record: Record, maps: Maps | None) -> str:
    if isinstance(record, DiagnosisRecord):
        pictures = _pictures(record, maps) if maps is not None else {}
        return render("diagnosis.html", pictures=pictures, record=record, headline=headline(record))
    if isinstance(record, Proof):
        return render("proof.html", pictures={}, proof=record, headline=headline(record))
    verdict = record.verdict if isinstance(record, PipelineRecord) else record
    pipeline = record if isinstance(record, PipelineRecord) else None
    return render("verdict.html", pictures={}, verdict=verdict, pipeline=pipeline, headline=headline(record))


def _markdown(record: Record) -> str:
    environment = Environment(
        loader=PackageLoader("normfix.reporting"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sd"] = lambda value: "" if value is None else f"{value:.2g}"
    environment.filters["cell"] = _cell
    names = {"DiagnosisRecord": "diagnosis.md", "PipelineRecord": "pipeline.md", "Proof": "proof.md"}
    name = names.get(type(record).__name__, "verdict.md")
    return environment.get_template(name).render(record=record, headline=headline(record))


def _cell(value: object) -> str:
    """Escape what would break out of a table cell or start markup."""
    text = " ".join(str(value).split())
    for sign in ("\\", "|", "`", "*", "_", "<", ">", "[", "]"):
        text = text.replace(sign, "\\" + sign)
    return text


def _pictures(record: DiagnosisRecord, maps: Maps) -> dict[str, bytes]:
    from normfix.reporting.drawing import bars, course, field_picture, seams, sides

    drawn = {
        "seams": seams(maps.image, maps.difference, maps.cuts),
        "sides": sides(maps.whole, maps.stitched, maps.fixed, maps.cuts),
    }
    if record.profile is not None:
        halo = max(max(pair) for pair in record.exact_halo)
        drawn["course"] = course(record.profile, record.noise, halo)
    if record.culprits:
        drawn["bars"] = bars(record.culprits)
    if record.receptive_field is not None:
        drawn["field"] = field_picture(maps.gradient, record.receptive_field)
    return drawn
