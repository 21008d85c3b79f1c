"""Make pretrained PyTorch networks tile-invariant: find live statistics, freeze them exactly, prove it.

Public names are resolved on first use, so `import normfix` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "normfix.errors": ("NormfixError",),
    "normfix.records": (
        "Action",
        "CalibrationSummary",
        "Decision",
        "Family",
        "Finding",
        "Plan",
        "Proof",
        "ProofStep",
        "Scaling",
        "Scan",
        "Site",
        "Source",
        "Verdict",
    ),
    "normfix.layers": (
        "BatchRenorm1d",
        "BatchRenorm2d",
        "BatchRenorm3d",
        "FrozenNorm1d",
        "FrozenNorm2d",
        "FrozenNorm3d",
        "RenormSchedule",
    ),
    "normfix.diagnosis_record": ("Tiling",),
    "normfix.calibration": ("Calibration",),
    "normfix.pipeline": (
        "Conversion",
        "Diagnosis",
        "FineTuning",
        "assert_tile_invariant",
        "calibrate",
        "calibrate_",
        "check",
        "convert",
        "diagnose",
        "load",
        "open_image",
        "plan",
        "predict",
        "prepare_finetune",
        "prove",
        "push",
        "save",
        "scan",
        "write_prediction",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from normfix.calibration import Calibration as Calibration
    from normfix.diagnosis_record import Tiling as Tiling
    from normfix.errors import NormfixError as NormfixError
    from normfix.layers import BatchRenorm1d as BatchRenorm1d
    from normfix.layers import BatchRenorm2d as BatchRenorm2d
    from normfix.layers import BatchRenorm3d as BatchRenorm3d
    from normfix.layers import FrozenNorm1d as FrozenNorm1d
    from normfix.layers import FrozenNorm2d as FrozenNorm2d
    from normfix.layers import FrozenNorm3d as FrozenNorm3d
    from normfix.layers import RenormSchedule as RenormSchedule
    from normfix.pipeline import Conversion as Conversion
    from normfix.pipeline import Diagnosis as Diagnosis
    from normfix.pipeline import FineTuning as FineTuning
    from normfix.pipeline import assert_tile_invariant as assert_tile_invariant
    from normfix.pipeline import calibrate as calibrate
    from normfix.pipeline import calibrate_ as calibrate_
    from normfix.pipeline import check as check
    from normfix.pipeline import convert as convert
    from normfix.pipeline import diagnose as diagnose
    from normfix.pipeline import load as load
    from normfix.pipeline import open_image as open_image
    from normfix.pipeline import plan as plan
    from normfix.pipeline import predict as predict
    from normfix.pipeline import prepare_finetune as prepare_finetune
    from normfix.pipeline import prove as prove
    from normfix.pipeline import push as push
    from normfix.pipeline import save as save
    from normfix.pipeline import scan as scan
    from normfix.pipeline import write_prediction as write_prediction
    from normfix.records import Action as Action
    from normfix.records import CalibrationSummary as CalibrationSummary
    from normfix.records import Decision as Decision
    from normfix.records import Family as Family
    from normfix.records import Finding as Finding
    from normfix.records import Plan as Plan
    from normfix.records import Proof as Proof
    from normfix.records import ProofStep as ProofStep
    from normfix.records import Scaling as Scaling
    from normfix.records import Scan as Scan
    from normfix.records import Site as Site
    from normfix.records import Source as Source
    from normfix.records import Verdict as Verdict


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'normfix' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
