"""Saved folders with something changed in them, and whatever checksums somebody thought of made right again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from archive_attacks import members, zipped
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from normfix.records.saved import Provenance, Saved, statement_of
from normfix.storage.certificate import certificate_of, read_graph
from normfix.storage.folder import GRAPH, MANIFEST, WEIGHTS, digest_of, with_aliases

__all__ = [
    "Forked",
    "argument_of",
    "call_of",
    "changed_graph",
    "changed_weights",
    "derived_anew",
    "edited",
    "forked",
]

Data = dict[str, Any]


class Forked(nn.Module):
    """Stride 2, a dilated convolution, an instance norm, and another network on images of more than 160x160 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True)
        self.wide, self.head = nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] > 160 * 160:
            x = F.max_pool2d(x, 5, 1, 2)
        fine = torch.relu(self.norm(self.stem(x)))
        coarse = F.interpolate(torch.relu(self.wide(F.max_pool2d(fine, 2))), scale_factor=2)
        return self.head(torch.cat([fine, coarse], 1))


def forked() -> Forked:
    """Return the network in eval mode."""
    return Forked().eval()


def edited(folder: Path, change: Callable[[Data], None]) -> None:
    """Change normfix.json, and seal it again with the checksums of the files that are there."""
    path = folder / MANIFEST
    data = json.loads(path.read_text("utf-8"))
    change(data)
    data["sha256"] = digest_of(folder / WEIGHTS)
    if data["certificate"] and data["certificate"]["program"]:
        data["certificate"]["sha256"] = digest_of(folder / GRAPH)
    data["statement"] = statement_of(data)
    path.write_text(json.dumps(data), "utf-8")


def derived_anew(folder: Path) -> Callable[[Data], None]:
    """Return the change that derives the certificate from what the folder says and holds by then."""

    def change(data: Data) -> None:
        saved = Saved.read(data, MANIFEST)
        weights = with_aliases(load_file(folder / WEIGHTS), saved)
        known = Provenance.from_json(data["provenance"])
        program = read_graph(folder / GRAPH, weights)
        data["certificate"] = certificate_of(program, GRAPH, digest_of(folder / GRAPH), known).to_json()

    return change


def changed_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the stored tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def changed_graph(folder: Path, change: Callable[[Data], None]) -> None:
    """Change the program that is stored in a folder."""
    content = members((folder / GRAPH).read_bytes())
    (name,) = (name for name in content if name.endswith("models/model.json"))
    program = json.loads(content[name])
    change(program)
    content[name] = json.dumps(program).encode()
    (folder / GRAPH).write_bytes(zipped(content))


def call_of(program: Data, target: str, number: int = -1) -> Data:
    """Return one of the calls of an operator in a program's JSON."""
    nodes: Sequence[Data] = program["graph_module"]["graph"]["nodes"]
    return [node for node in nodes if node["target"] == f"torch.ops.aten.{target}"][number]


def argument_of(call: Mapping[str, Any], name: str) -> Data:
    """Return an argument of a call."""
    found: Data = next(given["arg"] for given in call["inputs"] if given["name"] == name)
    return found
