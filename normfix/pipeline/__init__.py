"""The order of the stages: load -> scan -> plan -> rewrite -> calibrate -> prove -> save.

Only this package knows the order; stages receive from it what they need of each other. No function modifies
the model it is given, except those whose name ends in an underscore.
"""

from __future__ import annotations

from normfix.pipeline.conversion import Conversion, convert
from normfix.pipeline.diagnosing import Diagnosis, diagnose
from normfix.pipeline.finetuning import FineTuning, prepare_finetune
from normfix.pipeline.invariance import assert_tile_invariant, check
from normfix.pipeline.looking import plan, scan
from normfix.pipeline.opening import open_windowed as open_image
from normfix.pipeline.predicting import predict, write_prediction
from normfix.pipeline.recalibration import calibrate, calibrate_
from normfix.pipeline.reproving import prove
from normfix.pipeline.restoring import load, open_any
from normfix.pipeline.sharing import push
from normfix.pipeline.storage import save

__all__ = [
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
    "open_any",
    "open_image",
    "plan",
    "predict",
    "prepare_finetune",
    "prove",
    "push",
    "save",
    "scan",
    "write_prediction",
]
