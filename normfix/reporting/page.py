"""Pages: Jinja2 with autoescaping, pictures embedded, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from normfix.records.spans import in_strides

__all__ = ["render"]


def render(template: str, *, pictures: Mapping[str, bytes], **values: Any) -> str:
    """Render a template of this package; `pictures` are PNG bytes by name, available as data URIs."""
    environment = Environment(
        loader=PackageLoader("normfix.reporting"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["in_strides"] = in_strides
    environment.filters["sd"] = lambda value: "–" if value is None else f"{value:.2g}"
    embedded = {
        name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in pictures.items()
    }
    return environment.get_template(template).render(pictures=embedded, **values)
