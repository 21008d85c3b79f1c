"""diffusers: a folder that `save_pretrained` of a model wrote, such as the unet/ or vae/ of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.networks.calling import in_eval_mode
from normfix.storage.opening.allocation import Stored
from normfix.storage.opening.factories import rebuild
from normfix.storage.opening.gate import is_network
from normfix.storage.opening.pretrained import config_of, folder_weights, require_complete, settled
from normfix.storage.opening.request import Loaded, Request, factory
from normfix.storage.opening.state_dicts import filled

__all__ = ["network", "open_network", "prepare", "recognises"]

_STEM = "diffusion_pytorch_model"


def recognises(path: Path) -> bool:
    """Recognise a folder whose config.json says which diffusers wrote it, or a pipeline of such folders."""
    return "_diffusers_version" in config_of(path) or (path / "model_index.json").is_file()


def open_network(path: Path, request: Request) -> Loaded:
    """Let diffusers build it from the plain values of its config, and fill it with the weights of this folder.

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
    weights = folder_weights(path, request, _STEM)
    if request.named is not None:
        return filled(weights, path, request.named, request)
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    args = {"name": str(config.get("_class_name")), "config": settled(plain, str(path))}
    source = factory(f"{__name__}:network", args)
    model = rebuild(source, stored=Stored.of(weights.values(), path))
    _fill_(model, weights, path)
    return Loaded(in_eval_mode(model), source)


def _fill_(model: Any, weights: dict[str, Tensor], path: Path) -> None:
    """Load weights strictly, in place, under the names of today, as diffusers' from_pretrained does."""
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(weights)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    kept = {key: value for key, value in weights.items() if not any(re.search(p, key) for p in ignored)}
    try:
        result = model.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        require_complete({"mismatched": str(error).splitlines()[1:4]}, path)
    else:
        require_complete(
            {"missing_keys": result.missing_keys, "unexpected_keys": result.unexpected_keys}, path
        )


def network(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a network of diffusers from its config, with weights to come."""
    model = _class(name).from_config(settled(config, name))
    assert isinstance(model, nn.Module)
    return model


def prepare(name: str, **config: Any) -> None:
    """Import what building the network needs."""
    _class(name)


def _class(name: str) -> Any:
    import diffusers

    kind: Any = getattr(diffusers, name, None)
    if not (
        is_network(kind, "diffusers") and issubclass(kind, diffusers.ModelMixin) and kind.__name__ == name
    ):
        raise NormfixError("NF113", f"diffusers has no network {name[:80]!r}.", where=name[:80])
    return kind
