"""A state dict beside the arguments of its factory, for networks of any library that has no folder of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from normfix.giving.gift import Gift, changed, config_changes, key_changes, write_tensors
from normfix.giving.switches import switched
from normfix.networks.naming import named
from normfix.records.returns import Change
from normfix.records.saved import Source
from normfix.records.sites import Scan
from normfix.storage.opening.arguments import blanked
from normfix.storage.opening.gate import imported, is_allowed
from normfix.storage.opening.request import Request

__all__ = [
    "BUILDER",
    "LOADER",
    "NAME",
    "advice",
    "builder",
    "candidates",
    "place",
    "recognises",
    "told",
    "weights",
    "write",
]

NAME = "state dict"
WEIGHTS, ARGUMENTS = "model.pth", "arguments.json"

BUILDER = """
import importlib, json, os
with open(os.path.join(folder, "arguments.json"), encoding="utf-8") as arguments:
    told = json.load(arguments)
module, _, name = told["factory"].rpartition(":")
if module == "timm":
    import timm
    network = timm.create_model(name, **told["arguments"])
else:
    if module.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(module)))
        module = os.path.basename(module)[:-3]
    factory = importlib.import_module(module)
    for part in name.split("."):
        factory = getattr(factory, part)
    network = factory(**told["arguments"])
network.to(getattr(torch, told["dtype"]))
"""
"""Python that makes `network` of what `told` writes."""
LOADER = f"""{BUILDER}
network.load_state_dict(torch.load(os.path.join(folder, file), weights_only=True), strict=True)
"""


def recognises(original: Path | None) -> bool:
    """Recognise what has no folder of its own."""
    return original is None


def weights(original: Path) -> tuple[Path, ...]:
    """Return the file itself."""
    return (original,)


def builder(original: Path, request: Request) -> Source | None:
    """Return nothing: the caller says what builds it."""
    return None


def place(weights: Path | None) -> str:
    """Return the name that weights have which have none."""
    return WEIGHTS


def candidates(source: Source) -> Iterator[Mapping[str, Any]]:
    """Return the arguments of the factory with its norms switched, by its signature."""
    args = json.loads(source.args)
    if source.spec.startswith("timm:"):
        return switched(dict, args)
    return switched(_factory(source.spec), args)


def write(draft: Path, gifts: Sequence[Gift]) -> tuple[Change, ...]:
    """Write model.pth and arguments.json."""
    (gift,) = gifts
    write_tensors(dict(gift.state), draft / WEIGHTS)
    return (*told(draft, gift), *key_changes(WEIGHTS, gift.names_before, gift.state))


def told(draft: Path, gift: Gift, **more: Any) -> Iterator[Change]:
    """Write arguments.json, which says what builds the network; return what in it is new."""
    dtypes = {str(tensor.dtype) for tensor in gift.state.values() if tensor.is_floating_point()}
    content = {
        "factory": gift.source.spec,
        "arguments": _without_fetching(gift),
        "dtype": dtypes.pop().removeprefix("torch.") if len(dtypes) == 1 else "float32",
        **more,
    }
    (draft / ARGUMENTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return config_changes(ARGUMENTS, "", gift.before, changed(gift.before, gift.args))


def advice(scan: Scan) -> str:
    """Say how the two files are used."""
    return (
        "Build the network with the arguments of `arguments.json`, fill it with `model.pth`, strictly, and call "
        "`eval()`. Read each tile with the halo, start on multiples of the stride, and crop the halo away."
    )


def _factory(spec: str) -> Callable[..., Any]:
    found: Callable[..., Any] = (imported if is_allowed(spec) else named)(spec)
    return found


def _without_fetching(gift: Gift) -> dict[str, Any]:
    """Return the arguments with which the factory fetches no weights, since these are there."""
    spec = gift.source.spec
    return blanked(dict if spec.startswith("timm:") else _factory(spec), gift.args, defaults=True)
