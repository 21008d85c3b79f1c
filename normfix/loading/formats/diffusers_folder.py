"""diffusers: a folder that `save_pretrained` of a model wrote, such as the unet/ or vae/ of a pipeline."""

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

_STEM = "diffusion_pytorch_model"


def recognises(path: Path) -> bool:
    """Recognise a folder whose config.json says which diffusers wrote it, or a pipeline of such folders."""
    return "_diffusers_version" in config_of(path) or (path / "model_index.json").is_file()


def open_network(path: Path, request: Request) -> Loaded:
    """Let diffusers read it, from this folder alone and without code of its own.

    Raises:
        NormfixError: NF119 for a pipeline, NF113 for a config that reaches beyond the folder.
    """
    config = config_of(path)
    if not config:
        parts = sorted(p.name for p in path.iterdir() if "_diffusers_version" in config_of(p))
        raise NormfixError(
            "NF119",
            f"this is a pipeline; give one of its networks: {', '.join(parts) or 'none'}.",
            where=str(path),
        )
    require_inert(config, str(path))
    name = str(config.get("_class_name"))
    safe = require_safe(path, _STEM)
    model, info = _class(name).from_pretrained(
        str(path),
        local_files_only=True,
        use_safetensors=safe,
        low_cpu_mem_usage=False,
        output_loading_info=True,
    )
    require_complete(info, path)
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return Loaded(model, request.named or factory(f"{__name__}:network", {"name": name, "config": plain}))


def network(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a network of diffusers from its config, with weights to come."""
    require_inert(config, name)
    model = _class(name).from_config(dict(config))
    assert isinstance(model, nn.Module)
    return model


def _class(name: str) -> Any:
    import diffusers

    kind = getattr(diffusers, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin) and kind.__name__ == name):
        raise NormfixError("NF113", f"diffusers has no network {name[:80]!r}.", where=name[:80])
    return kind
