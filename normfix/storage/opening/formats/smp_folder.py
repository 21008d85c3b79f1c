"""segmentation-models-pytorch: a folder that `model.save_pretrained` wrote."""

from __future__ import annotations

from pathlib import Path

from normfix.storage.opening.candidates import require_named
from normfix.storage.opening.gate import is_allowed
from normfix.storage.opening.pretrained import config_of, folder_weights
from normfix.storage.opening.request import Loaded, Request, factory
from normfix.storage.opening.state_dicts import filled

__all__ = ["open_network", "recognises"]

_CLASS = "_model_class"


def recognises(path: Path) -> bool:
    """Recognise a folder whose config.json names a model class."""
    return isinstance(config_of(path).get(_CLASS), str)


def open_network(path: Path, request: Request) -> Loaded:
    """Build the class that the config names, if it is one of the library's, and fill it."""
    config = config_of(path)
    spec = f"segmentation_models_pytorch:{config.pop(_CLASS)}"
    weights = folder_weights(path, request)
    if request.named is None and is_allowed(spec):
        config["encoder_weights"] = None
        return filled(weights, path, factory(spec, config), request)
    return filled(weights, path, require_named(weights, path, request), request)
