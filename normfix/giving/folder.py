"""give_back: find the library's own network, prove it, write it, and let the library alone read it back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfix.conversion.results import Calibration, Conversion
from normfix.giving.alone import alone_sd
from normfix.giving.card import card_of
from normfix.giving.formats import LIBRARIES, Library
from normfix.giving.gift import Gift
from normfix.giving.matching import Match, built, matched
from normfix.giving.refusals import NotGiven, Unequal
from normfix.layers import BatchRenorm
from normfix.networks.calling import Caller, home_of
from normfix.networks.copying import copy_of, twin_of
from normfix.networks.graph.program import ProgramNetwork
from normfix.networks.numerics import IDENTITY, deviation, exact_arithmetic
from normfix.networks.provenance import is_current, provenance_of
from normfix.networks.surroundings import undisturbed
from normfix.proof.subject import Subject
from normfix.records.returns import GivenBack
from normfix.records.saved import Provenance, Scaling, Source
from normfix.records.verdicts import Verdict
from normfix.storage.folder import appearing, require_absent, seeded_input
from normfix.storage.opening import open_path
from normfix.storage.opening.factories import dumped
from normfix.storage.opening.gate import FACTORIES, is_allowed, library, present
from normfix.storage.opening.pickles import read_torch
from normfix.storage.opening.request import Request
from normfix.storage.probe import SEED
from normfix.tiling.geometry import geometry_of

__all__ = ["give_back", "is_original"]


@undisturbed()
def give_back(
    converted: Conversion | Calibration | nn.Module,
    folder: str | Path,
    source: str | Source | None = None,
    args: Mapping[str, Any] | None = None,
    *,
    original: str | Path | None = None,
    switch: Mapping[str, Any] | None = None,
    scaling: Scaling | None = None,
    allow_classes: Iterable[str] = (),
    trust_pickle: bool = False,
) -> GivenBack:
    """Write a converted network in the format that it came from, for its own tool to run without normfix.

    Its own library builds the network again, with BatchNorms, which hold the constants. Before anything appears, that
    network gave the converted one's output in float64 and in its own dtype, its tiles equalled the whole, and the
    library alone read what was written and gave the same.

    Args:
        converted: a conversion, a calibration, or a network that `load` opened; not modified.
        folder: must not exist.
        source: "pkg.mod:factory" or "timm:NAME", or what `load` found, if the network does not know it.
        args: keyword arguments that the factory was called with, JSON-ready.
        original: the MONAI bundle or pytorch-3dunet run that was converted, which is copied but for what must change.
            Without it, a state dict and the arguments of its factory are written.
        switch: arguments with which the factory builds BatchNorms, such as {"norm": "batch"}; default: they are found.
        scaling: how the images were scaled, for the README; default: as the network knows.
        allow_classes: classes that the original's checkpoint may hold, by name or as "package.*".
        trust_pickle: run the original's pickle.

    Raises:
        NotGiven: NF550 if it was not converted, or keeps what no BatchNorm holds; NF553 for an original that it was
            not converted from.
        Unfit: NF551 if its library has no such switch.
        Unequal: NF552 if what the library builds gives another output.
        NotAlone: NF554 if the library does not read back what was written.
        NormfixError: NF114 if the folder exists.

    Example:
        >>> import normfix, torch
        >>> from monai.networks.nets import BasicUNet  # doctest: +SKIP
        >>> args = {"spatial_dims": 2, "features": [4, 4, 4, 4, 4, 4]}  # doctest: +SKIP
        >>> done = normfix.convert(BasicUNet(**args), torch.rand(1, 1, 128, 128))  # doctest: +SKIP
        >>> record = normfix.give_back(done, "for-monai", "monai.networks.nets:BasicUNet", args)  # doctest: +SKIP
    """
    target = Path(folder)
    require_absent(target)
    model = converted if isinstance(converted, nn.Module) else converted.model
    known = _known(model, scaling)
    request = Request(trust_pickle=trust_pickle, allow_classes=tuple(allow_classes))
    work = _Work(twin_of(model).cpu(), known, Caller.of(known))
    origin = _Origin.of(None if original is None else Path(original), request)
    named = _source(known.source, source, args, origin)
    if isinstance(model, ProgramNetwork) and not isinstance(source, str):
        _require_allowed(named)
    library = origin.library
    candidates = library.candidates(named) if switch is None else [{**json.loads(named.args), **switch}]
    match = matched(work.model, work.caller, work.image(torch.float64), named, candidates)
    network, single = work.proved(match)
    verdict = work.tiles(network)
    gift = Gift(
        source=named,
        args=match.args,
        state=_state(network),
        names_before=tuple(built(named, json.loads(named.args)).state_dict()),
        original=origin.path,
        checkpoint=origin.content,
    )
    with appearing(target) as draft:
        changes = library.write(draft, gift)
        image = work.image(work.dtype)
        alone = alone_sd(draft, library.LOADER, work.caller, image, work.output(work.model))
        record = GivenBack(
            folder=str(target),
            format=library.NAME,
            changes=changes,
            double_sd=match.double_sd,
            single_sd=single,
            alone_sd=alone,
            verdict=verdict,
        )
        readme = "README.md" if not (draft / "README.md").exists() else "README-normfix.md"
        (draft / readme).write_text(card_of(record, known, library), encoding="utf-8")
    return record


def is_original(path: str | Path) -> bool:
    """Tell whether something is of a format that is given back as a whole."""
    return _library_of(Path(path)) is not None


def _library_of(original: Path | None) -> Library | None:
    return next((library for library in LIBRARIES if library.recognises(original)), None)


def _known(model: nn.Module, scaling: Scaling | None) -> Provenance:
    """Return what travels with the network, if it is one that BatchNorms can hold.

    Raises:
        NotGiven: NF550.
    """
    known = provenance_of(model)
    name = type(model).__name__
    if known is None:
        raise NotGiven("NF550", "normfix did not convert it. Give what convert returned.", where=name)
    if not is_current(model):
        raise NotGiven(
            "NF550",
            "its modules are not those it was converted with, so its halo no longer counts. Convert it as it is now.",
            where=name,
        )
    if live := known.plan.left_live:
        sites = ", ".join(f"{d.site.id} ({d.reason})" for d in live[:3])
        raise NotGiven(
            "NF550",
            f"{len(live)} sites stay live in it, and its own tool would compute them per tile: {sites}.",
            where=name,
        )
    statistics = [d.site.id for d in known.plan.converted if d.site.statistic is not None]
    if statistics:
        raise NotGiven(
            "NF550",
            f"it has frozen statistics that are no norm ({', '.join(statistics[:3])}), for which a library has no "
            "switch. Use the folder through normfix.load, or convert -o FILE.pt2, which runs without normfix.",
            where=name,
        )
    if any(isinstance(module, BatchRenorm) and module.training for module in model.modules()):
        raise NotGiven(
            "NF550",
            "its BatchRenorm layers are in train mode, where they follow the batch. Call eval() first.",
            where=name,
        )
    if geometry_of(known.scan) is None:
        raise NotGiven(
            "NF550", "it has no halo and stride, so tiles of it cannot be shown to be exact.", where=name
        )
    return known if scaling is None else replace(known, scaling=scaling)


@dataclass(frozen=True, slots=True)
class _Origin:
    """The original on disk: whose it is, its folder or file, what builds it, and what its file of weights holds."""

    library: Library
    path: Path | None = None
    source: Source | None = None
    content: Any = None

    @classmethod
    def of(cls, path: Path | None, request: Request) -> _Origin:
        """Open an original.

        Raises:
            NotGiven: NF553 for a format that is not given back.
        """
        library = _library_of(path)
        if library is not None:
            if path is None:
                return cls(library)
            content = read_torch(library.weights(path), request)
            return cls(library, path, open_path(path, request).source, content)
        names = ", ".join(library.NAME for library in LIBRARIES if not library.recognises(None))
        raise NotGiven(
            "NF553",
            f"it is none of what is given back as a whole ({names}). Leave it out: a state dict and the arguments of "
            "its factory are written.",
            where=str(path),
        )


def _source(
    known: Source, source: str | Source | None, args: Mapping[str, Any] | None, origin: _Origin
) -> Source:
    """Return the factory that builds the network.

    Raises:
        NotGiven: NF550 if nobody names one, NF553 if the original has another.
    """
    if isinstance(source, str):
        source = Source(kind="factory", spec=source, args=dumped(args or {}))
    stated = next((one for one in (source, known) if one is not None and one.kind == "factory"), None)
    if origin.source is not None:
        if stated is not None and (stated.spec, stated.args) != (origin.source.spec, origin.source.args):
            raise NotGiven(
                "NF553",
                f"the network was converted from {stated.spec} with {stated.args[:200]}, and this holds "
                f"{origin.source.spec} with {origin.source.args[:200]}. Give the original that was converted.",
                where=str(origin.path),
            )
        return origin.source
    if stated is None:
        raise NotGiven(
            "NF550",
            "it does not say what builds it, so no library can be asked to. Name it: --arch pkg.module:factory with "
            "--arch-args (source= and args= in Python), or give the folder it came from: --original.",
            where=known.spec,
        )
    if stated.spec.startswith("normfix."):
        raise NotGiven(
            "NF553",
            "what builds it is a folder of its own library, so the files to write are that folder's. Give it: "
            "--original (original= in Python).",
            where=stated.spec,
        )
    return stated


def _require_allowed(source: Source) -> None:
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


@dataclass(frozen=True, slots=True)
class _Work:
    """A converted network on the bench, on the CPU and in eval mode."""

    model: nn.Module
    known: Provenance
    caller: Caller

    @property
    def dtype(self) -> torch.dtype:
        return home_of(self.model)[1]

    def image(self, dtype: torch.dtype) -> Tensor:
        """Return the seeded input, which is none that anything was measured on."""
        return seeded_input((1, *self.known.scan.example[1:]), SEED, dtype)

    def output(self, network: nn.Module) -> Tensor:
        """Return a network's output for it."""
        with exact_arithmetic():
            return self.caller.exactly(network, self.image(self.dtype))

    def proved(self, match: Match) -> tuple[nn.Module, float]:
        """Return the library's network in the converted one's dtype, and how far its output is.

        Raises:
            Unequal: NF552 if it is another.
        """
        network = copy_of(match.network).to(self.dtype).eval()
        wanted = self.output(self.model)
        apart = deviation(self.output(network), wanted, float(wanted.double().std()))[0]
        if apart > IDENTITY[self.dtype]:
            raise Unequal(
                "NF552",
                f"in {str(self.dtype).removeprefix('torch.')} the library's network differs by {apart:.1g} sd. Nothing "
                "was written.",
                where=type(network).__name__,
            )
        return network, apart

    def tiles(self, network: nn.Module) -> Verdict:
        """Compare the library's network's tiles with its whole, with the converted one's halo and stride.

        Raises:
            Unequal: NF552 if they differ, or if nothing was compared.
        """
        scan = self.known.scan
        subject = Subject(
            network,
            self.caller,
            self.known.plan,
            geometry_of(scan),
            tuple(scan.example[2:]),
            sizes=scan.sizes,
        )
        with exact_arithmetic():
            verdict = subject.verdict(self.image(self.dtype))
        if verdict is None or not verdict.passed:
            status = "nothing was compared" if verdict is None else verdict.status
            reasons = "; ".join(finding.line for finding in verdict.findings) if verdict else ""
            raise Unequal(
                "NF552",
                f"tiles of the library's network do not equal its whole image ({status} {reasons}). Nothing was "
                "written.",
                where=type(network).__name__,
            )
        return verdict


def _state(network: nn.Module) -> dict[str, Tensor]:
    """Return its state as a library saves it."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
