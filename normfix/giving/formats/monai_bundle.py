"""MONAI bundles: `norm` (or `norm_name`, ...) in the network's definition, and the weights under the same names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from normfix.errors import NormfixError
from normfix.giving.configs import set_in
from normfix.giving.formats import plain
from normfix.giving.formats.described import builder
from normfix.giving.gift import Gift, changed, config_changes, copied, key_changes, write_tensors
from normfix.records.returns import Change
from normfix.records.saved import Source
from normfix.records.sites import Scan
from normfix.storage.opening.formats.monai_bundle import described, weights_file
from normfix.storage.opening.formats.monai_bundle import recognises as is_bundle

__all__ = ["LOADER", "NAME", "advice", "builder", "candidates", "place", "recognises", "weights", "write"]

NAME = "MONAI bundle"

LOADER = """
import json, os, yaml
from monai.bundle import ConfigParser

def is_plain(value):
    if isinstance(value, dict):
        return "_target_" not in value and all(is_plain(inner) for pair in value.items() for inner in pair)
    if isinstance(value, list):
        return all(map(is_plain, value))
    return not (isinstance(value, str) and value.startswith(("$", "%")))

for name in ("inference.json", "inference.yaml", "train.json", "train.yaml", "evaluate.json"):
    path = os.path.join(folder, "configs", name)
    if not os.path.isfile(path):
        continue
    with open(path, encoding="utf-8") as text:
        config = json.load(text) if name.endswith("json") else yaml.safe_load(text)
    key = next((k for k in ("network_def", "network", "net") if isinstance(config.get(k), dict)), None)
    if key is not None and "_target_" in config[key]:
        break
definition = config.pop(key)
if not is_plain({k: v for k, v in definition.items() if k != "_target_"}):
    raise ValueError("its network is more than a class and plain values")
values = {k: v for k, v in config.items() if is_plain(v) and "#" not in k and "::" not in k}
network = ConfigParser({key: definition, **values}).get_parsed_content(key)
state = torch.load(os.path.join(folder, file), weights_only=True)
network.load_state_dict(state, strict=True)
"""
"""Of the configuration, MONAI gets the network and plain values: its parser runs every import that it meets."""


def recognises(original: Path | None) -> bool:
    """Recognise a bundle."""
    return original is not None and is_bundle(original)


def weights(original: Path) -> tuple[Path, ...]:
    """Return the file of weights."""
    return (weights_file(original),)


def place(weights: Path | None) -> str:
    """Return the name of the file of weights in a bundle."""
    assert weights is not None
    return f"models/{weights.name}"


def candidates(source: Source) -> Iterator[Mapping[str, Any]]:
    """Return the class's arguments with its norms switched, by its signature."""
    return plain.candidates(source)


def write(draft: Path, gifts: Sequence[Gift]) -> tuple[Change, ...]:
    """Copy the bundle, switch the norm in each configuration of this network, and swap the weights."""
    (gift,) = gifts
    assert gift.original is not None
    changes = copied(gift.original, draft, _left_out)
    new = changed(gift.before, gift.args)
    for path in sorted((draft / "configs").iterdir()):
        key = _describes(path, gift)
        if key is not None:
            set_in(path, key, new)
            changes += config_changes(f"configs/{path.name}", f"{key}#", gift.before, new)
    write_tensors(dict(gift.state), draft / gift.file)
    return (*changes, *key_changes(gift.file, gift.names_before, gift.state))


def advice(scan: Scan) -> str:
    """Say what MONAI's inferer does with windows."""
    return (
        "`python -m monai.bundle run --config_file configs/inference.json` runs it unchanged. SlidingWindowInferer "
        "averages overlapping windows and crops nothing, so pixels nearer to a window's border than the halo are "
        "mixed with what lacks context; no `overlap` makes that vanish. Make `roi_size` a multiple of the stride, as "
        "large as memory takes; with a `roi_size` of the whole image the result is exact. Without MONAI's blending, "
        "tiles that are cropped by the halo are exact."
    )


def _left_out(path: Path) -> str:
    if path.suffix != ".ts":
        return ""
    return "it is a program of the original network; python -m monai.bundle ckpt_export writes it anew"


def _describes(path: Path, gift: Gift) -> str | None:
    """Return what a configuration calls the network, if it describes this one."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        return None
    try:
        found = described(path)
    except NormfixError:  # another part of the bundle
        return None
    if found is None or found[1] != gift.source.spec or json.loads(json.dumps(found[2])) != gift.before:
        return None
    return found[0]
