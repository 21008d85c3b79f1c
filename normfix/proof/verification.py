"""verify: the geometry of a saved folder derived again from its program, without its network's source or an image.

    statement     normfix.json is what was sealed
    constants     every tensor that the program holds is the one that the certificate names
    program       it holds the folder's weights, and gives the output that is stored for the seeded probe
    sites         what became of each site, and which constants it reads, is what the plan says
    derivation    reach, lattice, scale and offset of every output are what its operators give
    guards        so are the conditions on the image's size, and the scan states all that exclude an image
    geometry      stride, halo and scale that tiles are cut by follow from the derivation
    numbers       in float64, windows cut at that stride and read with that halo give what the whole gives

Nothing is compared with a checksum alone: whoever changed a file and its checksums would pass that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from normfix.networks.calling import Caller, refusals
from normfix.networks.graph.raising import raised, unlifted
from normfix.networks.numerics import exact_arithmetic
from normfix.networks.surroundings import undisturbed
from normfix.records.certificates import Certificate, Verification
from normfix.records.encoding import parsed, read_text
from normfix.records.saved import Saved
from normfix.records.sites import Finding
from normfix.records.spans import Spans, in_strides
from normfix.records.verdicts import ProofStep
from normfix.storage.certificate import ForeignProgramError, certificate_of, read_graph
from normfix.storage.folder import GRAPH, MANIFEST, PROGRAM, WEIGHTS, digest_of, seeded_input, with_aliases
from normfix.storage.opening import read_weights
from normfix.storage.opening.workload import TooMuchError, Workload
from normfix.storage.probe import LARGEST_PROBE, ProbeError, require_probe
from normfix.tiling.dependence import is_isolated
from normfix.tiling.geometry import geometry_of, holds_stride, thinnest
from normfix.tiling.grid import Geometry
from normfix.tiling.stride import exact_multiple, pads_inside

__all__ = ["verify"]

_CLAIMS = {
    "statement": "normfix.json and the files it names are what was saved",
    "constants": "every tensor that the program holds is the one that the certificate names",
    "program": "it holds the folder's weights, and gives the output that is stored for the seeded probe",
    "sites": "what became of each site, and which constants it reads, is what the plan says",
    "derivation": "reach, lattice, scale and offset of every output are what the program's operators give",
    "guards": "the conditions on the image's size are the program's, and the scan states all that exclude an image",
    "geometry": "stride, halo and scale follow from the derivation",
    "numbers": "in float64, windows cut at the stride and read with the halo give what the whole gives",
}
_CODES = {
    "statement": "NF520",
    "constants": "NF521",
    "program": "NF522",
    "sites": "NF523",
    "derivation": "NF523",
    "guards": "NF525",
    "geometry": "NF524",
    "numbers": "NF524",
}
_OPEN = "NF526"
_NOISE = 1


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a step came to; `why` is empty where it passed."""

    status: Literal["passed", "failed", "inconclusive"]
    why: str = ""


_PASSED = _Answer("passed")


@undisturbed()
def verify(folder: str | Path) -> Verification:
    """Derive the geometry of a saved folder again, from the program in it alone.

    Neither the network's source nor an image is needed. It takes seconds, mostly to read the program.

    Args:
        folder: that normfix saved.

    Returns:
        The steps; `.passed` tells whether all passed. A folder without a certificate or without a program is
        inconclusive, and so is a halo that was measured because the program does not bound it.

    Raises:
        NormfixError: NF101 and NF108 if it is no folder of normfix's, or a file of it is damaged; NF121 if its program
            is built to harm; NF420 on a torch before 2.8.

    Example:
        >>> import normfix, tempfile, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> with tempfile.TemporaryDirectory() as home:
        ...     normfix.save(normfix.convert(net, torch.rand(1, 1, 128, 128)), f"{home}/fixed")
        ...     found = normfix.verify(f"{home}/fixed")
        >>> found.status, [step.name for step in found.steps][4]
        ('passed', 'derivation')
    """
    opened = _Opened.of(Path(folder))
    answers = dict(opened.answers())
    steps = tuple(
        ProofStep(name=name, claim=_CLAIMS[name], status=a.status, value=None, bound=None, note=a.why)
        for name, a in answers.items()
    )
    findings = tuple(
        Finding(code=_CODES[name] if a.status == "failed" else _OPEN, where=name, message=a.why)
        for name, a in answers.items()
        if a.why
    )
    certificate = opened.saved.certificate
    return Verification(
        steps=steps, findings=findings, assumed=() if certificate is None else certificate.assumed
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """A folder whose manifest was read; whether it was edited is a step like any other."""

    folder: Path
    saved: Saved
    edited: bool

    @classmethod
    def of(cls, folder: Path) -> _Opened:
        path = folder / MANIFEST
        data = parsed(read_text(path), str(path))
        saved = Saved.read(data, str(path))
        return cls(folder, saved, saved.edited(data))

    def answers(self) -> Iterator[tuple[str, _Answer]]:
        """Yield the steps by name, as far as they can be taken."""
        yield "statement", self._statement()
        certificate = self.saved.certificate
        if certificate is None or (why := self._without_program(certificate)):
            old = "a version of before saved it, without a certificate. Convert the network again to have one"
            yield "derivation", _open(old if certificate is None else why)
        else:
            yield from self._derived(certificate)

    def _without_program(self, certificate: Certificate) -> str:
        """Return why there is nothing to derive from, "" where there is."""
        if not certificate.program:
            return f"it holds no program: {certificate.reason}"
        there = certificate.program in (GRAPH, PROGRAM) and (self.folder / certificate.program).is_file()
        return "" if there else f"{certificate.program[:80]} is missing: fetch or save the folder again"

    def _statement(self) -> _Answer:
        """Hold every file against the checksums in normfix.json, and that against its own."""
        certificate = self.saved.certificate
        files = {WEIGHTS: self.saved.sha256}
        if certificate is not None and certificate.program:
            files[certificate.program] = certificate.sha256
        changed = [MANIFEST] if self.edited else []
        paths = {name: self.folder / name for name in files}
        changed += [n for n, path in paths.items() if path.is_file() and digest_of(path) != files[n]]
        if changed:
            return _failed(f"{', '.join(changed)} changed since it was saved: fetch or convert it again")
        return _PASSED if self.saved.statement else _open("a version of before saved it, without a checksum")

    def _derived(self, certificate: Certificate) -> Iterator[tuple[str, _Answer]]:
        """Yield the steps that need the program."""
        path = self.folder / certificate.program
        weights = with_aliases(read_weights(self.folder / WEIGHTS), self.saved)
        try:
            program = read_graph(path, weights)
        except ForeignProgramError as error:
            yield "program", _failed(str(error))
            return
        again = certificate_of(program, certificate.program, digest_of(path), self.saved.provenance)
        yield "constants", _same_constants(certificate, again)
        yield "program", self._probed(program)
        yield "sites", _same_sites(certificate, again)
        yield "derivation", _same_derivations(certificate, again)
        yield "guards", _same_guards(certificate, again)
        yield "geometry", self._followed(again)
        yield "numbers", self._computed(program, again)

    def _probed(self, program: ExportedProgram) -> _Answer:
        """Run the program on the seeded probe."""
        probe, where = self.saved.probe, str(self.folder)
        if probe is None:
            return _open("no output is stored for a probe, so the program was compared with nothing")
        try:
            with self._bounded(math.prod(probe.shape)):
                require_probe(unlifted(program), Caller.of(self.saved.provenance), probe, where)
        except ProbeError as error:
            return _failed(str(error))
        except TooMuchError as error:
            return _open(str(error))
        except refusals() as error:
            return _failed(f"it does not run: {' '.join(str(error).split())[:200]}")
        return _PASSED

    def _followed(self, again: Certificate) -> _Answer:
        """Hold what tiles are cut by against the derivation."""
        scan, found = self.saved.provenance.scan, again.counting
        geometry = geometry_of(scan)
        if geometry is None:
            return _open("the folder states no geometry: sites stay live in it")
        if found is None:
            return _failed("the output that its tiles are made of is none of the program's")
        if found.scale and found.scale != scan.scale:
            return _failed(f"the scale is said to be {scan.scale}, and the program's is {found.scale}")
        if scan.halo_rounded is not None and scan.halo_rounded != in_strides(geometry.halo, geometry.stride):
            return _failed(f"{scan.halo_rounded} is not the halo {scan.halo} in whole strides")
        reach = scan.reach
        if reach is None or found.bound is None or found.wraps:
            return _open("the program does not bound the halo, which was measured")
        if reach.used == "graph" and geometry.halo != found.bound:
            return _failed(f"the halo is said to be {geometry.halo}, and the program's is {found.bound}")
        if not _within(found.bound, geometry.halo):
            return _open(f"the halo {geometry.halo} was measured, and the program bounds it by {found.bound}")
        return _PASSED

    def _computed(self, program: ExportedProgram, again: Certificate) -> _Answer:
        """Cut windows out of noise in float64; at sizes too that the program takes with any remainder."""
        provenance = self.saved.provenance
        geometry, caller = geometry_of(provenance.scan), Caller.of(provenance)
        if geometry is None:
            return _open("the folder states no geometry, so there are no windows to cut")
        shape = (1, *provenance.scan.example[1:])
        if math.prod(shape) > LARGEST_PROBE:
            return _open(
                f"its example has {math.prod(shape):,} values, and no more than {LARGEST_PROBE:,} are run"
            )
        try:
            network = raised(program).double()
            example = seeded_input(shape, _NOISE, torch.float64)
            with self._bounded(example.numel()), exact_arithmetic():
                wrong = _disagreement(
                    lambda x: caller.in_double(network, x),
                    example,
                    geometry,
                    any_size=not any(guard.role == "repeats" for guard in again.guards),
                )
        except TooMuchError as error:
            return _open(str(error))
        except refusals() as error:
            return _failed(f"it does not run on windows: {' '.join(str(error).split())[:200]}")
        return _failed(wrong) if wrong else _PASSED

    def _bounded(self, values: int) -> Workload:
        """Return what keeps a program from taking more than is in proportion to the folder."""
        stored = (self.folder / WEIGHTS).stat().st_size
        return Workload(stored, str(self.folder), values, generous=True)


def _disagreement(
    f: Callable[[Tensor], Tensor], example: Tensor, geometry: Geometry, *, any_size: bool
) -> str:
    """Return what is wrong with a geometry, as the numbers show it; "" if nothing is."""
    cross = thinnest(f, example, geometry)
    if not holds_stride(f, example, geometry, cross):
        return f"windows cut at the stride {geometry.stride} do not give what the whole gives"
    if not is_isolated(f, example, geometry, cross):
        return f"pixels beyond the halo {geometry.halo} change a tile"
    whole = in_strides(geometry.halo, geometry.stride)
    pairs = zip(geometry.stride, geometry.multiple, strict=True) if any_size else ()
    for axis, (stride, multiple) in enumerate(pairs):
        scale = geometry.scale[axis]
        if multiple % stride and exact_multiple(f, example, axis, stride, scale, whole[axis], cross) != 1:
            return (
                f"sizes that are multiples of {multiple} are said to be exact along axis {axis}, and are not"
            )
        if (
            any_size
            and geometry.rests((1,) * len(whole))[axis]
            and not pads_inside(f, example, axis, stride, scale, whole[axis], cross)
        ):
            return f"the network is said to pad its input itself along axis {axis}, and does not"
    return ""


def _within(inner: Spans, outer: Spans) -> bool:
    """Tell whether a halo holds another."""
    pairs = [pair for axis in zip(inner, outer, strict=True) for pair in zip(*axis, strict=True)]
    return all(mine <= other for mine, other in pairs)


def _same_constants(stated: Certificate, again: Certificate) -> _Answer:
    mine, theirs = ({c.name: c for c in made.constants} for made in (stated, again))
    changed = sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name))
    if changed:
        return _failed(
            f"{len(changed)} of its tensors are other ones than the certificate names, such as {changed[0]}"
        )
    return _PASSED


def _same_sites(stated: Certificate, again: Certificate) -> _Answer:
    for mine, theirs in zip(stated.sites, again.sites, strict=False):
        if mine != theirs:
            return _failed(f"the program and the plan give another {theirs.site} than is certified")
    if len(stated.sites) != len(again.sites):
        return _failed("the plan has another number of sites than is certified")
    return _PASSED


def _same_derivations(stated: Certificate, again: Certificate) -> _Answer:
    """Compare output by output; what the program does not bound is open."""
    if stated.derivations != again.derivations:
        pairs = zip(stated.derivations, again.derivations, strict=False)
        mine, theirs = next((p for p in pairs if p[0] != p[1]), (None, None))
        if mine is None or theirs is None:
            return _failed("the program has another number of outputs than is certified")
        return _failed(f"output {theirs.output}: {_differing(mine.to_json(), theirs.to_json())}")
    if stated.assumed != again.assumed:
        return _failed("what the certificate assumes is not what the scan says")
    counting = again.counting
    if counting is None or not counting.whole:
        why = counting and (
            counting.note or ", ".join(o.operator for o in (*counting.obstacles, *counting.wraps))
        )
        return _open(
            f"nothing bounds the output that tiles are made of: {why or 'it is none of the program'}"
        )
    return _PASSED


def _differing(mine: dict[str, object], theirs: dict[str, object]) -> str:
    name = next(name for name in mine if mine[name] != theirs[name])
    return f"{name} is certified as {str(mine[name])[:120]}, and the program gives {str(theirs[name])[:120]}"


def _same_guards(stated: Certificate, again: Certificate) -> _Answer:
    """Compare the conditions; one that excludes images without being stated was known of, or taken out."""
    if stated.guards != again.guards:
        one = set(stated.guards) ^ set(again.guards)
        first = next((guard for guard in (*again.guards, *stated.guards) if guard in one), None)
        what = "their order" if first is None else f"{first.text} ({first.role})"
        return _failed(f"the program and the scan differ from the certificate in {what}")
    if unstated := [guard.text for guard in again.guards if guard.role == "open"]:
        return _open(f"the program holds where {', '.join(unstated)}, and the scan does not state that")
    return _PASSED


def _failed(why: str) -> _Answer:
    return _Answer("failed", why)


def _open(why: str) -> _Answer:
    return _Answer("inconclusive", why)
