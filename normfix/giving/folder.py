"""give_back: find the library's own network, prove it, write it, and let the library alone read it back."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from normfix.conversion.results import Calibration, Conversion
from normfix.giving.alone import alone_sd
from normfix.giving.bench import Work
from normfix.giving.card import card_of
from normfix.giving.formats import Library
from normfix.giving.gift import Gift, replaced
from normfix.giving.matching import built, matched
from normfix.giving.originals import Original, Stock, require_allowed
from normfix.images.drafts import UnwritableError
from normfix.networks.graph.program import ProgramNetwork
from normfix.networks.surroundings import undisturbed
from normfix.records.halo_curves import HaloPoint
from normfix.records.returns import GivenBack
from normfix.records.saved import Provenance, Scaling, Source
from normfix.storage.folder import appearing, require_absent
from normfix.storage.opening.packages import described_in, unpacked
from normfix.storage.opening.request import Request

__all__ = ["give_back"]

Converted = Conversion | Calibration | nn.Module


@undisturbed()
def give_back(
    converted: Converted | Sequence[Converted],
    folder: str | Path,
    source: str | Source | None = None,
    args: Mapping[str, Any] | None = None,
    *,
    original: str | Path | None = None,
    switch: Mapping[str, Any] | None = None,
    scaling: Scaling | None = None,
    allow_classes: Iterable[str] = (),
    trust_pickle: bool = False,
    allow_code: Iterable[str] = (),
    shorter: HaloPoint | None = None,
) -> GivenBack:
    """Write a converted network in the format that it came from, for its own tool to run without normfix.

    Its own library builds the network again, with BatchNorms, which hold the constants. Before anything appears, that
    network gave the converted one's output in float64 and in its own dtype, its tiles equalled the whole, and the
    library alone read what was written and gave the same.

    Args:
        converted: a conversion, a calibration, or a network that `load` opened; not modified. Several where the
            original holds several, as the folds of an nnU-Net folder: which is which, its weights say.
        folder: must not exist.
        source: "pkg.mod:factory" or "timm:NAME", or what `load` found, if the network does not know it.
        args: keyword arguments that the factory was called with, JSON-ready.
        original: what was converted (bioimage.io package, MONAI bundle, nnU-Net folder or checkpoint, pytorch-3dunet
            run, file of weights), which is copied but for what must change. Without it, a state dict and the arguments
            of its factory are written.
        switch: arguments with which the factory builds BatchNorms, such as {"norm": "batch"}; default: they are found.
        scaling: how the images were scaled, for the README; default: as the network knows.
        allow_classes: classes that the original's checkpoint may hold, by name or as "package.*".
        trust_pickle: run the original's pickle.
        allow_code: sha256 of files of code that may run to build a bioimage.io package's network.
        shorter: a point of `halo_curve`, whose halo is declared in place of the exact one, with its error beside it.

    Raises:
        NotGiven: NF550 if it was not converted, or keeps what no BatchNorm holds; NF553 for an original that it was
            not converted from.
        Unfit: NF551 if its library has no such switch.
        Unequal: NF552 if what the library builds gives another output.
        NotAlone: NF554 if the library does not read back what was written.
        NormfixError: NF114 if the folder exists, cannot be written, or lies in the original.

    Example:
        >>> import normfix, torch
        >>> from monai.networks.nets import BasicUNet  # doctest: +SKIP
        >>> args = {"spatial_dims": 2, "features": [4, 4, 4, 4, 4, 4]}  # doctest: +SKIP
        >>> done = normfix.convert(BasicUNet(**args), torch.rand(1, 1, 128, 128))  # doctest: +SKIP
        >>> record = normfix.give_back(done, "for-monai", "monai.networks.nets:BasicUNet", args)  # doctest: +SKIP
    """
    target = Path(folder)
    require_absent(target)
    several = list(converted) if isinstance(converted, Sequence) else [converted]
    works = [Work.of(one if isinstance(one, nn.Module) else one.model, scaling) for one in several]
    request = Request(
        trust_pickle=trust_pickle, allow_classes=tuple(allow_classes), allow_code=tuple(allow_code)
    )
    with _folder_of(original) as place:
        whole = Original.of(place, request)
        stocks = whole.stocks_of([work.model for work in works])
        builders = [
            stock.builder(work.known.source, source, args) for work, stock in zip(works, stocks, strict=True)
        ]
        for work, builder in zip(works, builders, strict=True):
            if isinstance(work.model, ProgramNetwork) and not isinstance(source, str):
                require_allowed(builder)
        offers = [
            _offer(*one, whole, switch=switch, shorter=shorter)
            for one in zip(works, stocks, builders, strict=True)
        ]
        with appearing(target) as draft:
            try:
                return _written(draft, target, whole.library, offers, works[0].known)
            except (OSError, SafetensorError) as error:
                raise UnwritableError("NF114", f"cannot write there: {error}.", where=str(target)) from error


@contextmanager
def _folder_of(original: str | Path | None) -> Iterator[Path | None]:
    """Give the place of an original: a package's archive as a folder, as long as it is needed."""
    path = None if original is None else Path(original)
    if path is None or path.is_dir() or not described_in(path):
        yield path
        return
    with unpacked(path) as folder:
        yield folder


def _written(
    draft: Path, target: Path, library: Library, offers: Sequence[_Offer], known: Provenance
) -> GivenBack:
    """Write the library's files and the card beside them, and let the library alone read them back."""
    gifts = [offer.gift for offer in offers]
    changes = (*library.write(draft, gifts), *(change for gift in gifts for change in replaced(gift)))
    alone = [offer.alone(draft, library.LOADER) for offer in offers]
    record = GivenBack(
        folder=str(target),
        format=library.NAME,
        changes=changes,
        double_sd=max(offer.double_sd for offer in offers),
        single_sd=max(offer.single_sd for offer in offers),
        alone_sd=max(alone),
        verdict=max((offer.gift.verdict for offer in offers), key=lambda verdict: verdict.max_sd),
    )
    card = next(name for name in _cards() if not os.path.lexists(draft / name))
    (draft / card).write_text(card_of(record, known, library, offers[0].gift.shorter), encoding="utf-8")
    return record


def _cards() -> Iterator[str]:
    """Yield names for the card, since what the original calls so stays."""
    yield from ("README.md", "README-normfix.md")
    yield from (f"README-normfix-{number}.md" for number in itertools.count(2))


@dataclass(frozen=True, slots=True)
class _Offer:
    """One network that the library builds, what was shown of it before it is written, and the converted one."""

    work: Work
    gift: Gift
    double: Tensor
    double_sd: float
    single_sd: float

    def alone(self, draft: Path, loader: str) -> float:
        """Return how far the library alone is, reading what was written, in sd.

        Raises:
            NotAlone: NF554.
        """
        work = self.work
        image = work.image(work.dtype)
        return alone_sd(
            draft,
            self.gift.file,
            loader,
            work.caller,
            image,
            wanted=work.output(work.model),
            double=self.double,
        )


def _offer(
    work: Work,
    stock: Stock,
    source: Source,
    whole: Original,
    *,
    switch: Mapping[str, Any] | None,
    shorter: HaloPoint | None,
) -> _Offer:
    """Find the arguments that build the library's network, and prove it."""
    args = json.loads(source.args)
    candidates = whole.library.candidates(source) if switch is None else [{**args, **switch}]
    match = matched(work.model, work.caller, work.image(torch.float64), source, candidates)
    network, single = work.proved(match)
    verdict = work.tiles(network)
    gift = Gift(
        source=source,
        args=match.args,
        state=_state(network),
        names_before=tuple(built(source, args).state_dict()),
        original=whole.path,
        file=whole.library.place(stock.path),
        checkpoint=stock.content,
        network=network,
        converted=work.model,
        caller=work.caller,
        known=work.known,
        verdict=verdict,
        shorter=shorter,
    )
    return _Offer(work, gift, work.in_double(network), match.double_sd, single)


def _state(network: nn.Module) -> dict[str, Tensor]:
    """Return its state as a library saves it."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
