"""What a result is about: network, image, tiles, when and with which version it was told, and what to run next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from normfix import __version__
from normfix.records.candidates import ChoiceRecord
from normfix.records.diagnoses import DiagnosisRecord, PipelineRecord
from normfix.records.encoding import Record
from normfix.records.spans import Spans, in_strides
from normfix.records.verdicts import Proof, Verdict
from normfix.reporting.causes import FROZEN

__all__ = ["About", "about", "about_choice", "halo_words"]

_TOLD = {"model", "network", "file", "image", "command", "fix"}
"""Settings that have a place of their own."""

_PYTHON = "done = normfix.convert(model, image)  # the image whole\nnormfix.save(done, 'fixed')"


@dataclass(frozen=True, slots=True)
class About:
    """The facts by name, the other settings, and what takes the causes away, ready to be copied."""

    model: str
    facts: tuple[tuple[str, str], ...]
    rest: tuple[tuple[str, str], ...]
    ready: str


def about(record: Record) -> About:
    """Return what a result is about."""
    settings = _settings(record)
    named = dict(settings)
    model = named.get("model") or named.get("network") or getattr(record, "model", "") or "a pipeline"
    facts = [("network", model), ("image", _image(record, named))]
    facts += _tiles(record)
    facts += [("command", named["command"])] if "command" in named else []
    facts += [("written", f"{datetime.now(timezone.utc):%Y-%m-%d} by normfix {__version__}")]
    rest = tuple((name, value) for name, value in settings if name not in _TOLD)
    ready = named.get("fix", _PYTHON) if _is_curable(record) else ""
    return About(model, tuple(facts), rest, ready)


def about_choice(record: ChoiceRecord) -> About:
    """Return what a choice is about."""
    images = ", ".join("x".join(map(str, shape[2:])) for shape in record.images[:4])
    more = f" and {len(record.images) - 4} more" if record.images[4:] else ""
    facts = (
        ("network", record.model),
        ("images", f"{images}{more}"),
        ("judged by", record.measure),
        (
            "held out in turn",
            f"{len(record.parts)}: {', '.join(record.parts[:4])}{', ...' * bool(record.parts[4:])}",
        ),
        ("written", f"{datetime.now(timezone.utc):%Y-%m-%d} by normfix {__version__}"),
    )
    return About(record.model, facts, (), record.fix)


def halo_words(halo: Spans) -> str:
    """Return a halo in pixels, as shortly as it can be said.

    >>> halo_words(((4, 4), (4, 4))), halo_words(((4, 8), (4, 4)))
    ('4 pixels', '4/8, 4/4 pixels')
    """
    if len({n for pair in halo for n in pair}) == 1:
        return f"{halo[0][0]} pixels"
    return f"{', '.join(f'{before}/{after}' for before, after in halo)} pixels"


def _settings(record: Record) -> tuple[tuple[str, str], ...]:
    inner: Any = record
    if isinstance(record, PipelineRecord | Proof):
        inner = record.verdict
    return getattr(inner, "settings", ())


def _image(record: Record, named: dict[str, str]) -> str:
    size = "x".join(map(str, record.image)) if isinstance(record, DiagnosisRecord) else named.get("image", "")
    return ", ".join(filter(None, [named.get("file", ""), size])) or "not named"


def _tiles(record: Record) -> list[tuple[str, str]]:
    if isinstance(record, DiagnosisRecord):
        need = in_strides(record.exact_halo, record.stride)
        given = record.tiling.halo
        halo = f"{halo_words(given)}{'' if given == need else f', and the network needs {halo_words(need)}'}"
        return [("tiles", _by(record.tiling.tile)), ("halo", halo), ("output read as", record.kind)]
    verdict = record.verdict if isinstance(record, PipelineRecord | Proof) else record
    if not isinstance(verdict, Verdict) or not verdict.tile:
        return []
    return [("tiles", _by(verdict.tile)), ("halo", halo_words(verdict.halo_rounded or verdict.halo))]


def _by(extents: Sequence[int]) -> str:
    return " × ".join(map(str, extents))


def _is_curable(record: Record) -> bool:
    """Tell whether anything was found that normfix convert takes away."""
    if isinstance(record, DiagnosisRecord | PipelineRecord):
        return any(c.cause in FROZEN for c in record.culprits)
    return isinstance(record, Verdict) and any(f.code == "NF401" for f in record.findings)
