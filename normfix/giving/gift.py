"""What a library's module gets to write, and what the modules share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfix.errors import NormfixError, printable
from normfix.networks.calling import Caller
from normfix.records.halo_curves import HaloPoint
from normfix.records.returns import Change
from normfix.records.saved import Provenance, Source
from normfix.records.verdicts import Verdict
from normfix.storage.opening.packages import leads_out
from normfix.storage.opening.state_dicts import places, prefixes

__all__ = [
    "Gift",
    "agrees",
    "changed",
    "config_changes",
    "copied",
    "fitting",
    "key_changes",
    "other_weights",
    "replaced",
    "write_tensors",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gift:
    """A network to write: its architecture with the new arguments, its weights, and the original that it came from.

    `names_before` are those of the original's weights. `file` is the name of its file of weights in what is written.
    `checkpoint` is what the original's file holds, where there is one: a library's module puts `state` in the weights'
    place and leaves the rest. `network` is the library's, filled, and `converted` what it was compared with, of which
    `known` says halo and scaling; `verdict` compares its tiles with the whole, `shorter` is a halo to
    declare in place of the exact one, and what it costs in accuracy.
    """

    source: Source
    args: Mapping[str, Any]
    state: Mapping[str, Tensor]
    names_before: tuple[str, ...]
    file: str
    original: Path | None = None
    checkpoint: Any = None
    network: nn.Module
    converted: nn.Module
    caller: Caller
    known: Provenance
    verdict: Verdict
    shorter: HaloPoint | None = None

    @property
    def before(self) -> dict[str, Any]:
        """Return the arguments that the original was built with."""
        return dict(json.loads(self.source.args))


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are new or have another value.

    >>> changed({"channels": 8, "norm": "instance"}, {"channels": 8, "norm": "batch"})
    {'norm': 'batch'}
    """
    return {name: value for name, value in after.items() if name not in before or before[name] != value}


def config_changes(
    file: str, place: str, before: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[Change]:
    """Return the changes of a configuration's values."""
    for name, value in new.items():
        was = json.dumps(before[name]) if name in before else ""
        yield Change(file=file, kind="config", name=f"{place}{name}", before=was, after=json.dumps(value))


def key_changes(file: str, before: Iterable[str], after: Iterable[str]) -> tuple[Change, ...]:
    """Return the names that the weights of a file have more and less."""
    old, new = list(before), list(after)
    added = [Change(file=file, kind="added", name=name) for name in new if name not in set(old)]
    removed = [Change(file=file, kind="removed", name=name) for name in old if name not in set(new)]
    return (*removed, *added)


def replaced(gift: Gift) -> tuple[Change, ...]:
    """Return that the original holds other weights than those that were converted, where it does.

    Its file then gets weights that never stood in it: of a network that was trained further, or of another one.
    """
    if not isinstance(gift.checkpoint, Mapping):
        return ()
    same = [agrees(held, prefix, gift.state) for _, prefix, held in fitting(gift)]
    if not same or any(same):
        return ()
    reason = "weights of the original had other values: trained further since, or converted from another file"
    return (Change(file=gift.file, kind="replaced", name="weights", after=reason),)


def fitting(gift: Gift) -> Iterator[tuple[tuple[str, ...], str, Mapping[str, Tensor]]]:
    """Yield the weights of the original that fit the network: the keys to them, the prefix of their names, they."""
    for place, held in places(gift.checkpoint):
        for prefix in prefixes(held, gift.names_before):
            yield place, prefix, held


def agrees(held: Mapping[str, Tensor], prefix: str, state: Mapping[str, Tensor]) -> bool:
    """Tell whether all weights of more than one axis that have the same name are the same."""
    shared = [
        (held[prefix + name], tensor)
        for name, tensor in state.items()
        if tensor.dim() > 1 and prefix + name in held
    ]
    return bool(shared) and all(
        one.shape == other.shape and torch.equal(one.to(other), other) for one, other in shared
    )


def copied(original: Path, draft: Path, leave: Callable[[Path], str]) -> list[Change]:
    """Copy an original folder into the draft, but the files for which `leave` has a reason; return those.

    Links to files of the folder become files. Those that lead out of it are left out, as others will get the copy.

    Raises:
        NormfixError: NF114 if the draft lies in the original.
    """
    if draft.resolve().is_relative_to(original.resolve()):
        raise NormfixError(
            "NF114",
            "the folder to write lies in the original, which would be copied into itself. Name another output.",
            where=str(original),
        )
    left = []
    for path in sorted(original.rglob("*")):
        name = path.relative_to(original)
        reason = _hindrance(path, original) or ("" if path.is_dir() else leave(path))
        if reason:
            change = Change(
                file=printable(str(name)), kind="left out", name=printable(name.name), after=reason
            )
            left.append(change)
        elif path.is_dir():
            (draft / name).mkdir(parents=True, exist_ok=True)
        else:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, draft / name)
    return left


def _hindrance(path: Path, folder: Path) -> str:
    """Return why what lies in a folder is not copied, whatever it is; "" if nothing hinders it."""
    try:
        if leads_out(path, folder):
            return "it is a link that leads out of the folder"
        if path.is_dir():
            return "it is a link to a folder" if path.is_symlink() else ""
        return "" if path.is_file() else "it is no plain file"
    except (OSError, RuntimeError):  # a link to itself
        return "it is a link that leads nowhere"


def write_tensors(content: Any, path: Path) -> None:
    """Write what torch.save writes, into a file of any name; its folder is made.

    Raises:
        OSError: if there is no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch goes on after a part that was not written, and then complains of its place
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def other_weights(files: Collection[Path], reason: str) -> Callable[[Path], str]:
    """Return what leaves out, for a reason, the files of weights but these; see `copied`."""
    endings = {file.suffix for file in files}
    return lambda path: reason if path.suffix in endings and path not in files else ""
