"""torch-em checkpoints: a trainer's folder with best.pt, or such a file; `norm` in the arguments it remembers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normfix.giving.formats import checkpoint, plain
from normfix.giving.formats.checkpoint import place
from normfix.giving.formats.plain import builder, candidates
from normfix.giving.gift import (
    Gift,
    changed,
    config_changes,
    copied,
    key_changes,
    other_weights,
    write_tensors,
)
from normfix.records.returns import Change
from normfix.records.sites import Scan
from normfix.storage.opening import archives

__all__ = ["LOADER", "NAME", "advice", "builder", "candidates", "place", "recognises", "weights", "write"]

NAME = "torch-em checkpoint"
_NAMES = ("best.pt", "latest.pt")
_SPOT = checkpoint.Spot(("model_state",), "")

LOADER = f"""{plain.BUILDER}
from torch_em.util import load_model
network = load_model(os.path.join(folder, file), model=network, device="cpu")
"""


def recognises(original: Path | None) -> bool:
    """Recognise what torch-em's trainer saved."""
    if original is None or not original.exists():
        return False
    file = original if original.is_file() else _best(original)
    if file is None or file.suffix != ".pt":
        return False
    begins = archives.inventory(file).pickle
    return all(word in begins for word in (b"best_metric", b"current_metric", b"model_state"))


def weights(original: Path) -> tuple[Path, ...]:
    """Return the checkpoint, the best in a folder."""
    file = original if original.is_file() else _best(original)
    assert file is not None
    return (file,)


def write(draft: Path, gifts: Sequence[Gift]) -> tuple[Change, ...]:
    """Copy the folder, swap the weights, and switch the norm in what the trainer remembers of the network."""
    (gift,) = gifts
    assert gift.original is not None
    (file,) = weights(gift.original)
    changes: list[Change] = []
    if gift.original.is_dir():
        changes += copied(
            gift.original, draft, other_weights([file], "it holds other weights, of the original network")
        )
    content = checkpoint.swapped(gift, _SPOT)
    new, before = changed(gift.before, gift.args), content["init"].get("model_kwargs", {})
    content["init"] = {**content["init"], "model_kwargs": {**before, **new}}
    changes += config_changes(gift.file, "init.model_kwargs.", before, new)
    write_tensors(content, draft / gift.file)
    changes += plain.told(draft, gift)
    return (*changes, *key_changes(gift.file, gift.names_before, gift.state))


def advice(scan: Scan) -> str:
    """Say what predict_with_halo does with blocks."""
    assert scan.halo_rounded is not None
    assert scan.stride is not None
    halo = tuple(max(pair) for pair in scan.halo_rounded)
    return (
        "`torch_em.util.load_model` and `predict_with_halo` run it unchanged. Give `predict_with_halo` "
        f"`halo={halo}`, a `block_shape` of multiples of {tuple(scan.stride)}, and **`preprocess=None`** with an image "
        "that is scaled as a whole: by default it standardizes each block by itself, which is one more statistic of "
        "the block. It crops the halo, so its result is that of the whole image; only within the halo of the image's "
        "own border it is another, because it mirrors the image there, where the network pads zeros."
    )


def _best(folder: Path) -> Path | None:
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)
