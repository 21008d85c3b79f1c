"""What folders of transformers, diffusers, timm and segmentation-models-pytorch share: config.json and weights.

Their libraries read more than weights if a config says so: code of the author's, kernels and backbones from the
hub, another configuration beside this one. So the libraries are given the values and the weights that were read here,
never the folder, and settings that reach further are refused before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from normfix.errors import NormfixError, printable
from normfix.storage.opening.arguments import require_inert
from normfix.storage.opening.configs import read_json, read_mapping
from normfix.storage.opening.pickles import read_torch
from normfix.storage.opening.request import Request, unreadable
from normfix.storage.opening.tensors import read_weights
from normfix.storage.spec import ENDINGS

__all__ = ["CONFIG", "config_of", "folder_weights", "require_complete", "settled", "weight_files"]

CONFIG = "config.json"

_REACHING = (
    *("auto_map", "custom_pipelines", "custom_code", "custom_generate", "trust_remote_code"),
    *("backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone", "quantization_config"),
    *("kernel_config", "use_kernels", "fusion_config", "distributed_config", "transformers_weights"),
)
"""Settings that make the libraries fetch or run something else, or change themselves."""
_LONGEST = 1000
"""Characters of a tensor's name; libraries match patterns with it."""
_ORIGINS = ("_name_or_path", "name_or_path", "_commit_hash")
"""Where the network came from, which the libraries only keep."""
_IMPLEMENTATIONS = ("eager", "sdpa")


def config_of(path: Path) -> dict[str, Any]:
    """Return a folder's config.json; empty if it has none that is readable and plain."""
    try:
        return read_mapping(path / CONFIG) if (path / CONFIG).is_file() else {}
    except NormfixError:
        return {}


def settled(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return settings without what says where they came from, if they let a library fetch or run nothing.

    Raises:
        NormfixError: NF113.
    """
    plain = {name: _without_origins(value) for name, value in settings.items() if name not in _ORIGINS}
    for name, value in _flat(plain):
        reaches = name in _REACHING and value not in (None, {}, [], False)
        runs = "implementation" in name and isinstance(value, str) and value not in _IMPLEMENTATIONS
        if reaches or runs:
            raise NormfixError(
                "NF113",
                f"its setting {name} = {str(value)[:60]!r} makes the library fetch or run something beyond this "
                "folder. Build the network yourself and name it: --arch pkg.module:factory.",
                where=where,
            )
    require_inert(plain, where, sections=True)
    return plain


def _without_origins(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_origins(inner) for name, inner in value.items() if name not in _ORIGINS}
    if isinstance(value, list):
        return [_without_origins(inner) for inner in value]
    return value


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """Return the weights files of a folder, .safetensors before .bin, each that an index names once.

    Raises:
        NormfixError: NF101 if there are none, or an index names a file outside of the folder.
    """
    for name in (f"{stem}.safetensors", "pytorch_model.bin", f"{stem}.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(map(str, dict(read_json(index)).get("weight_map", {}).values())))
            if not shards or any(Path(s).name != s or not (folder / s).is_file() for s in shards):
                raise unreadable(index, "it names weights files that are not in this folder")
            return [folder / shard for shard in shards]
    raise unreadable(folder, f"it holds no {stem}.safetensors and no pytorch_model.bin{_others_in(folder)}")


def _others_in(folder: Path) -> str:
    """Say which other files of weights a folder holds, which may be meant."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in ENDINGS)
    return f", but {', '.join(names[:6])}, of which one may be given" if names else ""


def folder_weights(folder: Path, request: Request, stem: str = "model") -> dict[str, Tensor]:
    """Return all weights of a folder, running nothing.

    Raises:
        NormfixError: NF101 if two of its files hold one name, NF121 for a name that is no name of a tensor; see
            `read_weights` and `read_torch`.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder, stem):
        weights = read_weights(path) if path.suffix == ".safetensors" else read_torch(path, request)
        twice = next((name for name in weights if name in found), None)
        if twice is not None:
            raise unreadable(
                path, f"another of the folder's files holds {printable(str(twice)[:80])} as well"
            )
        found.update(weights)
    if any(len(name) > _LONGEST for name in found):
        raise NormfixError(
            "NF121",
            f"it names a tensor with more than {_LONGEST} characters. It is not opened.",
            where=str(folder),
        )
    return found


def require_complete(info: Mapping[str, Any], where: Path) -> None:
    """Refuse weights that a library read in part, which it only logs.

    Raises:
        NormfixError: NF105.
    """
    wrong = {kind: list(names) for kind, names in info.items() if names and kind != "error_msgs"}
    if wrong or info.get("error_msgs"):
        listed = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(map(str, n[:4]))}" for kind, n in wrong.items()
        )
        raise NormfixError(
            "NF105", f"the weights do not fit the network of its config: {listed}.", where=str(where)
        )


def _flat(value: object, name: str = "") -> Iterator[tuple[str, Any]]:
    if name:
        yield name, value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _flat(inner)
