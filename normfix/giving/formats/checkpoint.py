"""A file of weights of any library: a state dict, or a checkpoint that holds one (Lightning, CycleGAN, any trainer).

The file keeps its name and whatever else it holds. The weights are swapped where they stand, under the prefix that they
have there, and arguments that the file remembers are switched: Lightning's `hyper_parameters`. Beside it,
`arguments.json` says what builds the network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from normfix.giving.formats import plain
from normfix.giving.formats.plain import builder, candidates, weights
from normfix.giving.gift import Gift, agrees, changed, config_changes, fitting, key_changes, write_tensors
from normfix.giving.refusals import NotGiven
from normfix.records.returns import Change
from normfix.records.sites import Scan
from normfix.storage.opening.formats import lightning, safetensors_file, torch_file

__all__ = [
    "LOADER",
    "NAME",
    "advice",
    "builder",
    "candidates",
    "place",
    "recognises",
    "swapped",
    "weights",
    "write",
]

NAME = "checkpoint"
_REMEMBERED = "hyper_parameters"

LOADER = f"""{plain.BUILDER}
path = os.path.join(folder, file)
if path.endswith(".safetensors"):
    from safetensors.torch import load_file
    state = load_file(path)
else:
    state = torch.load(path, map_location="cpu", weights_only=False)
for key in told["place"]:
    state = state[key]
state = {{k.removeprefix(told["prefix"]): v for k, v in state.items() if k.startswith(told["prefix"])}}
network.load_state_dict(state, strict=True)
"""


def recognises(original: Path | None) -> bool:
    """Recognise a file that torch.save, Lightning or safetensors wrote."""
    kinds = (lightning, safetensors_file, torch_file)
    return original is not None and any(kind.recognises(original) for kind in kinds)


def place(weights: Path | None) -> str:
    """Return its name."""
    assert weights is not None
    return weights.name


def write(draft: Path, gifts: Sequence[Gift]) -> tuple[Change, ...]:
    """Write the file with the weights swapped, and arguments.json."""
    (gift,) = gifts
    spot = _spot(gift)
    content = swapped(gift, spot)
    new, changes = changed(gift.before, gift.args), list[Change]()
    remembered = content.get(_REMEMBERED)
    if isinstance(remembered, Mapping):
        known = {name: value for name, value in new.items() if name in remembered}
        content[_REMEMBERED] = {**remembered, **known}
        changes += config_changes(gift.file, f"{_REMEMBERED}.", remembered, known)
    if gift.file.endswith(".safetensors"):
        save_file(content, draft / gift.file)
    else:
        write_tensors(content, draft / gift.file)
    changes += plain.told(draft, gift, place=spot.place, prefix=spot.prefix)
    return (
        *changes,
        *key_changes(gift.file, *(map(spot.prefix.__add__, n) for n in (gift.names_before, gift.state))),
    )


def advice(scan: Scan) -> str:
    """Say how the file is used."""
    return (
        "Build the network with the arguments of `arguments.json` (for pytorch-CycleGAN-and-pix2pix that is "
        "`--norm batch`), fill it with the weights of the file as you did with the original's, strictly, and call "
        "`eval()`. Read each tile with the halo, start on multiples of the stride, and crop the halo away."
    )


@dataclass(frozen=True, slots=True)
class Spot:
    """Where the weights stand in a file: keys into nested mappings, and what stands before their names there."""

    place: tuple[str, ...]
    prefix: str


def swapped(gift: Gift, spot: Spot) -> dict[str, Any]:
    """Return what the file holds with the network's weights in the place of the original's."""
    content: dict[str, Any] = copy.copy(dict(gift.checkpoint))
    holder = content
    for key in spot.place[:-1]:
        holder[key] = dict(holder[key])
        holder = holder[key]
    old = holder[spot.place[-1]] if spot.place else content
    gone = {spot.prefix + name for name in gift.names_before}
    new = {name: tensor for name, tensor in old.items() if name not in gone}
    new |= {spot.prefix + name: tensor for name, tensor in gift.state.items()}
    if not spot.place:
        return new
    holder[spot.place[-1]] = new
    return content


def _spot(gift: Gift) -> Spot:
    """Return where the weights stand that were converted; else where the only ones that fit stand.

    Raises:
        NotGiven: NF553 if none fit, or several and none are those.
    """
    found = {Spot(place, prefix): held for place, prefix, held in fitting(gift)}
    same = [spot for spot, held in found.items() if agrees(held, spot.prefix, gift.state)]
    if same or len(found) == 1:
        return [*same, *found][0]
    raise NotGiven(
        "NF553",
        f"of what it holds, {len(found)} sets of weights fit the network and none are those that were converted, so "
        "which to swap is not certain. Give the file that was converted.",
        where=gift.file,
    )
