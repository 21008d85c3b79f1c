"""The columns of a page that come from a run of the geometry alone."""

from __future__ import annotations

__all__ = ["local_names", "with_geometry"]


def local_names(page: str) -> set[str]:
    """Return the networks that a page calls converted or local."""
    return {name for name, cells in _rows(page) if {"converted", "local"} & set(cells)}


def _rows(page: str):
    for line in page.partition("\n## Table\n")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] not in ("network", "---"):
            yield cells[0], cells[1:]


def with_geometry(page, rows):
    raise NotImplementedError
