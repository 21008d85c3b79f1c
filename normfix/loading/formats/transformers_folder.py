"""transformers: a folder that `save_pretrained` of a model wrote."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from normfix.errors import NormfixError
from normfix.loading.pretrained import config_of, require_complete, require_inert, require_safe
from normfix.loading.request import Loaded, Request, factory

__all__ = ["network", "open_network", "recognises"]


def recognises(path: Path) -> bool:
    """Recognise a folder whose config.json names architectures or a type of model."""
    config = config_of(path)
    return "transformers_version" in config or ("model_type" in config and "architectures" in config)


def open_network(path: Path, request: Request) -> Loaded:
    """Let transformers read it, from this folder alone and without code of its own.

    Raises:
        NormfixError: NF113 for a class that is not its own or a config that reaches beyond the folder, NF105 for
            weights that do not fit.
    """
    config = config_of(path)
    names = config.get("architectures") or []
    if len(names) != 1:
        raise NormfixError(
            "NF119",
            f"its config names {len(names)} architectures: {', '.join(map(str, names))}.",
            where=str(path),
        )
    name = str(names[0])
    require_inert(config, str(path))
    kind = _class(name)
    safe = require_safe(path)
    model, info = kind.from_pretrained(
        str(path), local_files_only=True, use_safetensors=safe, output_loading_info=True
    )
    require_complete(info, path)
    args = {"name": name, "config": model.config.to_dict()}
    return Loaded(model, request.named or factory(f"{__name__}:network", args))


def network(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a network of transformers from its config, with weights to come."""
    require_inert(config, name)
    kind = _class(name)
    model = kind(kind.config_class.from_dict(dict(config)))
    assert isinstance(model, nn.Module)
    return model


def _class(name: str) -> Any:
    import transformers

    kind = getattr(transformers, name, None)
    if not (
        inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel) and kind.__name__ == name
    ):
        raise NormfixError("NF113", f"transformers has no network {name[:80]!r}.", where=name[:80])
    return kind
