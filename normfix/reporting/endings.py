"""The kinds of report, told by the ending of the file; nothing here is slow to import."""

from __future__ import annotations

from pathlib import Path

from normfix.errors import NormfixError

__all__ = ["ENDINGS", "require_ending"]

ENDINGS = (".html", ".json", ".md", ".xml")


def require_ending(path: str | Path) -> str:
    """Return the ending of a report's name.

    Raises:
        NormfixError: NF610 for one that names no kind of report.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise NormfixError("NF610", f"a report ends in {', '.join(ENDINGS)}.", where=str(path))
    return ending
