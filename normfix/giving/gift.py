"""What a library's module gets to write, and what the modules share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normfix.networks.calling import Caller
from normfix.records.returns import Change
from normfix.records.saved import Provenance, Source
from normfix.records.verdicts import Verdict

__all__ = ["Gift", "changed", "config_changes", "copied", "key_changes", "other_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gift:
    """A network to write: its architecture with the new arguments, its weights, and the original that it came from.

    `names_before` are those of the original's weights. `file` is the name of its file of weights in what is written.
    `checkpoint` is what the original's file holds, where there is one: a library's module puts `state` in the weights'
    place and leaves the rest. `network` is the library's, filled, and `converted` what it was compared with, of which
    `known` says halo and scaling; `verdict` compares its tiles with the whole.
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


def copied(original: Path, draft: Path, leave: Callable[[Path], str]) -> list[Change]:
    """Copy an original folder into the draft, but the files for which `leave` has a reason; return those."""
    left = []
    for path in sorted(original.rglob("*")):
        name = path.relative_to(original)
        if path.is_dir():
            (draft / name).mkdir(parents=True, exist_ok=True)
        elif not path.is_file():
            left.append(Change(file=str(name), kind="left out", name=name.name, after="it is no plain file"))
        elif reason := leave(path):
            left.append(Change(file=str(name), kind="left out", name=name.name, after=reason))
        else:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, draft / name)
    return left


def other_weights(files: Collection[Path], reason: str) -> Callable[[Path], str]:
    """Return what leaves out, for a reason, the files of weights but these; see `copied`."""
    endings = {file.suffix for file in files}
    return lambda path: reason if path.suffix in endings and path not in files else ""
