"""timm: a folder as `push_to_hf_hub` and `save_for_hf` write it."""

from __future__ import annotations

from pathlib import Path

from normfix.errors import NormfixError
from normfix.storage.opening.pretrained import config_of, folder_weights
from normfix.storage.opening.request import Loaded, Request, factory
from normfix.storage.opening.state_dicts import filled

__all__ = ["open_network", "recognises"]


def recognises(path: Path) -> bool:
    """Recognise a folder whose config.json names an architecture of timm's, with what timm says about its training."""
    config = config_of(path)
    return isinstance(config.get("architecture"), str) and (
        "pretrained_cfg" in config or "num_features" in config
    )


def open_network(path: Path, request: Request) -> Loaded:
    """Build the architecture that the config names and fill it."""
    config = config_of(path)
    name = str(config["architecture"])
    if not name.replace("_", "").isalnum():  # "hf-hub:..." and "local-dir:..." would open another place
        raise NormfixError(
            "NF113", f"{name[:80]!r} is no name of a timm network.", where=str(path / "config.json")
        )
    shared = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    args = dict(config.get("model_args") or shared)
    if "scriptable" in args:
        raise NormfixError(
            "NF113",
            "its model_args set scriptable, which has torch compile the network. Name it: --arch timm:NAME.",
            where=str(path / "config.json"),
        )
    source = request.named or factory(f"timm:{name}", args)
    return filled(folder_weights(path, request), path, source, request)
