"""transformers: a folder that `save_pretrained` of a model wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.storage.opening.allocation import Stored
from normfix.storage.opening.arguments import require_small
from normfix.storage.opening.factories import confined
from normfix.storage.opening.gate import is_network
from normfix.storage.opening.pretrained import config_of, folder_weights, require_complete, settled
from normfix.storage.opening.request import Loaded, Request, factory
from normfix.storage.opening.state_dicts import filled

__all__ = ["network", "open_network", "prepare", "recognises"]


def recognises(path: Path) -> bool:
    """Recognise a folder whose config.json names architectures or a type of model."""
    config = config_of(path)
    return "transformers_version" in config or ("model_type" in config and "architectures" in config)


def open_network(path: Path, request: Request) -> Loaded:
    """Let transformers build it from the plain values of its config, and fill it with the weights of this folder.

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
    weights = folder_weights(path, request)
    if request.named is not None:
        return filled(weights, path, request.named, request)
    name, stored = str(names[0]), Stored.of(weights.values(), path)
    require_small(config, str(path), tensors=stored.tensors, elements=stored.elements)
    plain = settled(config, str(path))
    prepare(name)
    model, info = _filled(name, plain, weights, str(path))
    require_complete(info, path)
    args = {"name": name, "config": settled(model.config.to_dict(), str(path))}
    return Loaded(model, factory(f"{__name__}:network", args))


def _filled(
    name: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> tuple[Any, dict[str, Any]]:
    """Let transformers fill its network, renaming what is old, with no folder that it could read from."""
    info: dict[str, Any] = {}
    kind = _class(name)

    def make() -> nn.Module:
        model, told = kind.from_pretrained(
            None,
            config=kind.config_class.from_dict(config),
            state_dict=dict(weights),
            output_loading_info=True,
        )
        info.update(told)
        assert isinstance(model, nn.Module)
        return model

    stored = Stored.of(weights.values())
    return confined(make, stored, where, sketch=lambda: network(name, config)), info


def network(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a network of transformers from its config, with weights to come."""
    kind = _class(name)
    model = kind(kind.config_class.from_dict(settled(config, name)))
    assert isinstance(model, nn.Module)
    return model


def prepare(name: str, **config: Any) -> None:
    """Import what building the network needs."""
    _class(name)


def _class(name: str) -> Any:
    import transformers

    kind: Any = getattr(transformers, name, None)
    known = is_network(kind, "transformers") and issubclass(kind, transformers.PreTrainedModel)
    if not known or kind.__name__ != name:
        raise NormfixError("NF113", f"transformers has no network {name[:80]!r}.", where=name[:80])
    return kind
