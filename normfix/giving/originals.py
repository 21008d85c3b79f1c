"""The original on disk: whose it is, what builds its networks, and what its files of weights hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfix.giving.formats import LIBRARIES, Library, plain
from normfix.giving.refusals import NotGiven, without_switch
from normfix.records.saved import Source
from normfix.storage.opening.factories import dumped
from normfix.storage.opening.formats import diffusers_folder
from normfix.storage.opening.gate import FACTORIES, is_allowed, library, present
from normfix.storage.opening.pickles import read_torch
from normfix.storage.opening.request import Request
from normfix.storage.opening.state_dicts import entries
from normfix.storage.opening.tensors import read_weights

__all__ = ["Original", "Stock", "is_original", "require_allowed"]


@dataclass(frozen=True, slots=True)
class Stock:
    """One network of an original: its file of weights, what that holds, and what builds it if files say so."""

    path: Path | None = None
    content: Any = None
    source: Source | None = None

    def holds(self, model: nn.Module) -> bool:
        """Tell whether its weights, but for norms, are a converted network's."""
        return any(_same(weights, model) for weights in entries(self.content).values())

    def builder(self, known: Source, source: str | Source | None, args: Mapping[str, Any] | None) -> Source:
        """Return the factory that builds the network.

        Raises:
            NotGiven: NF550 if nobody names one, NF553 if the original has another.
            Unfit: NF551 if its library is known to have no argument for the norm.
        """
        if isinstance(source, str):
            source = Source(kind="factory", spec=source, args=dumped(args or {}))
        stated = next((one for one in (source, known) if one is not None and one.kind == "factory"), None)
        if self.source is not None:
            if stated is not None and (stated.spec, stated.args) != (self.source.spec, self.source.args):
                raise NotGiven(
                    "NF553",
                    f"the network was converted from {stated.spec} with {stated.args[:200]}, and this holds "
                    f"{self.source.spec} with {self.source.args[:200]}. Give the original that was converted.",
                    where=str(self.path),
                )
            return self.source
        if stated is None:
            raise NotGiven(
                "NF550",
                "it does not say what builds it, so no library can be asked to. Name it: --arch pkg.module:factory "
                "with --arch-args (source= and args= in Python), or give the folder it came from: --original.",
                where=known.spec,
            )
        refusal = without_switch(stated.spec)
        if refusal is not None:
            raise refusal
        if stated.spec.startswith("normfix."):
            raise NotGiven(
                "NF553",
                "what builds it is a folder of its own library, so the files to write are that folder's. Give it: "
                "--original (original= in Python).",
                where=stated.spec,
            )
        return stated


@dataclass(frozen=True, slots=True)
class Original:
    """A folder or file of a library's, with its networks; without a path, what has no folder of its own."""

    library: Library
    path: Path | None = None
    stocks: tuple[Stock, ...] = (Stock(),)

    @classmethod
    def of(cls, path: Path | None, request: Request) -> Original:
        """Open an original.

        Raises:
            NotGiven: NF553 for a format that is not given back.
        """
        if path is None:
            return cls(plain)
        format_ = _library_of(path)
        if format_ is None:
            if diffusers_folder.recognises(path) and (refusal := without_switch("diffusers")):
                raise refusal
            names = ", ".join(one.NAME for one in LIBRARIES if not one.recognises(None))
            raise NotGiven(
                "NF553",
                f"it is none of what is given back as a whole ({names}). Leave it out: a state dict and the arguments "
                "of its factory are written.",
                where=str(path),
            )
        files = format_.weights(path)
        stocks = [
            Stock(file, _content(file, request), format_.builder(path if len(files) == 1 else file, request))
            for file in files
        ]
        if not all(
            isinstance(stock.content, Mapping) for stock in stocks
        ):  # a network that was pickled whole
            return cls(plain)
        return cls(format_, path, tuple(stocks))

    def stocks_of(self, models: Sequence[nn.Module]) -> list[Stock]:
        """Return which of its networks each converted one was made of: the only one, or what has its weights.

        Raises:
            NotGiven: NF553 if that is not certain.
        """
        if len(self.stocks) == len(models) == 1:
            return list(self.stocks)
        if self.path is None:
            raise NotGiven(
                "NF553", "several networks go back into one original that holds them all: give --original."
            )
        chosen: list[Stock] = []
        for number, model in enumerate(models):
            having = [stock for stock in self.stocks if stock.holds(model) and stock not in chosen]
            if not having:
                names = ", ".join(str(stock.path) for stock in self.stocks)
                raise NotGiven(
                    "NF553",
                    f"converted network {number + 1} of {len(models)} has the weights of none of {names} that is not "
                    "taken already. Give each network once, with the original that it was converted from; a network "
                    "that was trained further has a file of its own to replace: give that checkpoint as the original.",
                    where=str(self.path),
                )
            chosen.append(having[0])
        return chosen


def is_original(path: str | Path) -> bool:
    """Tell whether something is of a format that is given back as a whole."""
    return _library_of(Path(path)) is not None


def require_allowed(source: Source) -> None:
    """Refuse to call what only a program's file names, of a library: nothing was built to open it.

    Raises:
        NotGiven: NF550.
    """
    if library(source.spec) in FACTORIES and not is_allowed(present(source.spec)):
        raise NotGiven(
            "NF550",
            "the program says that this builds its network, and a file may not name it. If it is right, say so "
            "yourself: source= and args= in Python.",
            where=source.spec,
        )


def _library_of(original: Path) -> Library | None:
    return next((one for one in LIBRARIES if one.recognises(original)), None)


def _content(file: Path, request: Request) -> Any:
    return read_weights(file) if file.suffix == ".safetensors" else read_torch(file, request)


def _same(weights: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Tell whether all weights of more than one axis, which no norm's are, are there under their names."""
    own = {name: tensor for name, tensor in model.state_dict().items() if tensor.dim() > 1}
    return bool(own) and all(
        name in weights
        and weights[name].shape == tensor.shape
        and torch.equal(weights[name].to(tensor), tensor)
        for name, tensor in own.items()
    )
