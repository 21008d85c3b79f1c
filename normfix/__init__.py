"""Make pretrained PyTorch networks tile-invariant: find live statistics, freeze them exactly, prove it.

Public names are resolved on first use, so `import normfix` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "normfix.errors": ("NormfixError",),
    "normfix.records.sites": ("Family", "Finding", "Scan", "Site"),
    "normfix.records.plans": ("Action", "Decision", "Plan"),
    "normfix.records.measurements": ("CalibrationSummary",),
    "normfix.records.verdicts": ("Proof", "ProofStep", "Verdict"),
    "normfix.records.saved": ("Scaling", "Source"),
    "normfix.records.certificates": ("Certificate", "Verification"),
    "normfix.records.exports": ("Export",),
    "normfix.records.halo_curves": ("HaloCurve", "HaloPoint"),
    "normfix.records.returns": ("GivenBack",),
    "normfix.records.diagnoses": ("Tiling",),
    "normfix.layers": (
        "BatchRenorm1d",
        "BatchRenorm2d",
        "BatchRenorm3d",
        "FrozenNorm1d",
        "FrozenNorm2d",
        "FrozenNorm3d",
        "RenormSchedule",
    ),
    "normfix.images.given": ("read_images",),
    "normfix.images.opening": ("open_image",),
    "normfix.images.parts": ("Measured", "Windows"),
    "normfix.tiling.stages.options": ("Blocks",),
    "normfix.tiling.stages.outlook": ("Outlook", "Step"),
    "normfix.conversion.results": ("Calibration", "Conversion"),
    "normfix.conversion.lowering": ("fold", "lower"),
    "normfix.scanning.scan": ("plan", "scan"),
    "normfix.storage.saving": ("save",),
    "normfix.storage.loading": ("load",),
    "normfix.storage.hub": ("push",),
    "normfix.giving.folder": ("give_back",),
    "normfix.proof.check": ("assert_tile_invariant", "check"),
    "normfix.proof.halo_curve": ("halo_curve",),
    "normfix.proof.prove": ("prove",),
    "normfix.proof.verification": ("verify",),
    "normfix.api.conversion": ("convert",),
    "normfix.api.recalibration": ("calibrate", "calibrate_"),
    "normfix.api.prediction": ("predict", "write_prediction"),
    "normfix.api.finetuning": ("FineTuning", "prepare_finetune"),
    "normfix.diagnosis.network": ("Diagnosis", "diagnose"),
    "normfix.choosing.choose": ("Choice", "choose"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from normfix.api.conversion import convert as convert
    from normfix.api.finetuning import FineTuning as FineTuning
    from normfix.api.finetuning import prepare_finetune as prepare_finetune
    from normfix.api.prediction import predict as predict
    from normfix.api.prediction import write_prediction as write_prediction
    from normfix.api.recalibration import calibrate as calibrate
    from normfix.api.recalibration import calibrate_ as calibrate_
    from normfix.choosing.choose import Choice as Choice
    from normfix.choosing.choose import choose as choose
    from normfix.conversion.lowering import fold as fold
    from normfix.conversion.lowering import lower as lower
    from normfix.conversion.results import Calibration as Calibration
    from normfix.conversion.results import Conversion as Conversion
    from normfix.diagnosis.network import Diagnosis as Diagnosis
    from normfix.diagnosis.network import diagnose as diagnose
    from normfix.errors import NormfixError as NormfixError
    from normfix.giving.folder import give_back as give_back
    from normfix.images.given import read_images as read_images
    from normfix.images.opening import open_image as open_image
    from normfix.images.parts import Measured as Measured
    from normfix.images.parts import Windows as Windows
    from normfix.layers import BatchRenorm1d as BatchRenorm1d
    from normfix.layers import BatchRenorm2d as BatchRenorm2d
    from normfix.layers import BatchRenorm3d as BatchRenorm3d
    from normfix.layers import FrozenNorm1d as FrozenNorm1d
    from normfix.layers import FrozenNorm2d as FrozenNorm2d
    from normfix.layers import FrozenNorm3d as FrozenNorm3d
    from normfix.layers import RenormSchedule as RenormSchedule
    from normfix.proof.check import assert_tile_invariant as assert_tile_invariant
    from normfix.proof.check import check as check
    from normfix.proof.halo_curve import halo_curve as halo_curve
    from normfix.proof.prove import prove as prove
    from normfix.proof.verification import verify as verify
    from normfix.records.certificates import Certificate as Certificate
    from normfix.records.certificates import Verification as Verification
    from normfix.records.diagnoses import Tiling as Tiling
    from normfix.records.exports import Export as Export
    from normfix.records.halo_curves import HaloCurve as HaloCurve
    from normfix.records.halo_curves import HaloPoint as HaloPoint
    from normfix.records.measurements import CalibrationSummary as CalibrationSummary
    from normfix.records.plans import Action as Action
    from normfix.records.plans import Decision as Decision
    from normfix.records.plans import Plan as Plan
    from normfix.records.returns import GivenBack as GivenBack
    from normfix.records.saved import Scaling as Scaling
    from normfix.records.saved import Source as Source
    from normfix.records.sites import Family as Family
    from normfix.records.sites import Finding as Finding
    from normfix.records.sites import Scan as Scan
    from normfix.records.sites import Site as Site
    from normfix.records.verdicts import Proof as Proof
    from normfix.records.verdicts import ProofStep as ProofStep
    from normfix.records.verdicts import Verdict as Verdict
    from normfix.scanning.scan import plan as plan
    from normfix.scanning.scan import scan as scan
    from normfix.storage.hub import push as push
    from normfix.storage.loading import load as load
    from normfix.storage.saving import save as save
    from normfix.tiling.stages.options import Blocks as Blocks
    from normfix.tiling.stages.outlook import Outlook as Outlook
    from normfix.tiling.stages.outlook import Step as Step


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'normfix' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
