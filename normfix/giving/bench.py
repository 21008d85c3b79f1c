"""A converted network on the bench: whether BatchNorms can hold it, and whether its library's network is the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normfix.giving.matching import Match
from normfix.giving.refusals import NotGiven, Unequal
from normfix.layers import BatchRenorm
from normfix.networks.calling import Caller, home_of, in_eval_mode
from normfix.networks.copying import copy_of, twin_of
from normfix.networks.numerics import IDENTITY, deviation, exact_arithmetic
from normfix.networks.provenance import is_current, provenance_of
from normfix.proof.subject import Subject
from normfix.records.saved import Provenance, Scaling
from normfix.records.verdicts import Verdict
from normfix.storage.folder import seeded_input
from normfix.storage.probe import SEED
from normfix.tiling.geometry import geometry_of

__all__ = ["Work"]


@dataclass(frozen=True, slots=True)
class Work:
    """A converted network on the bench, on the CPU and in eval mode."""

    model: nn.Module
    known: Provenance
    caller: Caller

    @classmethod
    def of(cls, model: nn.Module, scaling: Scaling | None) -> Work:
        """Put a network on the bench, as a copy.

        Raises:
            NotGiven: NF550 if no BatchNorms can hold it.
        """
        known = _known(model, scaling)
        return cls(twin_of(model).cpu(), known, Caller.of(known))

    @property
    def dtype(self) -> torch.dtype:
        """Its parameters' dtype."""
        return home_of(self.model)[1]

    def image(self, dtype: torch.dtype) -> Tensor:
        """Return the seeded input, which is none that anything was measured on."""
        return seeded_input((1, *self.known.scan.example[1:]), SEED, dtype)

    def output(self, network: nn.Module) -> Tensor:
        """Return a network's output for it."""
        with exact_arithmetic():
            return self.caller.exactly(network, self.image(self.dtype))

    def in_double(self, network: nn.Module) -> Tensor:
        """Return a network's output for it in float64."""
        with exact_arithmetic():
            image = self.image(self.dtype).double()
            return self.caller.exactly(in_eval_mode(copy_of(network).double()), image)

    def proved(self, match: Match) -> tuple[nn.Module, float]:
        """Return the library's network in the converted one's dtype, and how far its output is.

        Raises:
            Unequal: NF552 if it is another.
        """
        network = in_eval_mode(copy_of(match.network).to(self.dtype))
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
