"""Reports of verdicts, proofs and diagnoses, by the ending of the file: HTML, JSON, Markdown and JUnit XML.

All say the same: the verdict first, then the numbers behind it. A page is one file that fetches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from normfix.records.candidates import ChoiceRecord
from normfix.records.diagnoses import DiagnosisRecord, PipelineRecord
from normfix.records.encoding import Record
from normfix.records.verdicts import Proof, Verdict
from normfix.reporting.about import About, about, about_choice
from normfix.reporting.causes import name_of
from normfix.reporting.junit import junit
from normfix.reporting.maps import Maps
from normfix.reporting.page import render
from normfix.reporting.places import Places, places
from normfix.reporting.sentences import headline

__all__ = ["choice_text", "fragment", "text_of"]


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


def choice_text(ending: str, record: ChoiceRecord, shown: Places | None = None) -> str:
    """Return a report of a choice as text: of .html, .json or .md; `shown` adds the pictures to a page."""
    makers: Mapping[str, Callable[[], str]] = {
        ".json": record.dumps,
        ".md": lambda: _markdown_of("choice.md", record, record.headline, about_choice(record)),
        ".html": lambda: render(
            "choice.html",
            pictures={},
            record=record,
            headline=record.headline,
            about=about_choice(record),
            table=record.table(),
            places=None if shown is None else places(shown),
        ),
    }
    return makers[ending]()


def fragment(record: DiagnosisRecord, maps: Maps) -> str:
    """Return the verdict and the pictures for a notebook cell."""
    return render("fragment.html", pictures={}, record=record, headline=headline(record), views=_views(maps))


def _page(record: Record, maps: Maps | None) -> str:
    shared: dict[str, Any] = {"headline": headline(record), "about": about(record), "views": _views(maps)}
    if isinstance(record, DiagnosisRecord):
        return render("diagnosis.html", pictures={}, record=record, **shared, **_charts(record, maps))
    if isinstance(record, Proof):
        return render("proof.html", pictures={}, proof=record, **shared)
    verdict = record.verdict if isinstance(record, PipelineRecord) else record
    pipeline = record if isinstance(record, PipelineRecord) else None
    return render("verdict.html", pictures={}, verdict=verdict, pipeline=pipeline, **shared)


def _markdown(record: Record) -> str:
    names = {"DiagnosisRecord": "diagnosis.md", "PipelineRecord": "pipeline.md", "Proof": "proof.md"}
    name = names.get(type(record).__name__, "verdict.md")
    return _markdown_of(name, record, headline(record), about(record))


def _markdown_of(name: str, record: Record, headline: str, about: About) -> str:
    environment = Environment(
        loader=PackageLoader("normfix.reporting"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sd"] = lambda value: "" if value is None else f"{value:.2g}"
    environment.filters |= {"cause": name_of, "cell": _cell}
    return environment.get_template(name).render(record=record, headline=headline, about=about)


def _cell(value: object) -> str:
    """Escape what would break out of a table cell or start markup."""
    text = " ".join(str(value).split())
    for sign in ("\\", "|", "`", "*", "_", "<", ">", "[", "]"):
        text = text.replace(sign, "\\" + sign)
    return text


def _views(maps: Maps | None) -> dict[str, Any] | None:
    if maps is None:
        return None
    from normfix.reporting.scenes import scenes

    close, everything = scenes(maps)
    return {"close": close, "everything": everything}


def _charts(record: DiagnosisRecord, maps: Maps | None) -> dict[str, Any]:
    """Return the charts of a diagnosis, and how wide the bars of its causes are in percent."""
    from normfix.reporting.drawing import course, field_picture, halo_picture

    drawn: dict[str, Any] = {"course": None, "field": None, "halos": None}
    if maps is not None and record.profile is not None:
        halo = max(max(pair) for pair in record.exact_halo)
        drawn["course"] = course(record.profile, record.noise, halo)
    if record.halo_curve is not None:
        drawn["halos"] = halo_picture(record.halo_curve)
    if maps is not None and maps.gradient is not None and record.receptive_field is not None:
        drawn["field"] = field_picture(maps.gradient, record.receptive_field)
    most = max([c.introduced for c in record.culprits], default=0) or 1
    return {**drawn, "width": lambda value: f"{40 * min(max(value or 0, 0) / most, 1):.1f}"}
