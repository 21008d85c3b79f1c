"""Pages: Jinja2 with autoescaping, pictures embedded, nothing fetched from anywhere; and Markdown, which is not."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from normfix.records.spans import in_strides
from normfix.reporting.causes import name_of, reason_of

__all__ = ["markdown", "render"]


def render(template: str, *, pictures: Mapping[str, bytes], **values: Any) -> str:
    """Render a template of this package; `pictures` are PNG bytes by name, available as data URIs."""
    environment = Environment(
        loader=PackageLoader("normfix.reporting"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cause": name_of, "in_strides": in_strides, "reason": reason_of, "uri": _uri}
    environment.filters["sd"] = lambda value: "–" if value is None else f"{value:.2g}"
    embedded = {name: _uri(png) for name, png in pictures.items()}
    return environment.get_template(template).render(pictures=embedded, **values)


def _uri(png: bytes) -> str:
    """Return a picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def markdown(package: str, template: str, **values: Any) -> str:
    """Render a template of Markdown that lies in a package; nothing in it is escaped."""
    environment = Environment(
        loader=PackageLoader(package),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)
